from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reconciler.cli.arguments import hoist, wants_json

WORDS = st.sampled_from(
    ["status", "--watch", "--format", "json", "--format=json", "--no-color", "--state-dir", "/s", "--", "-n", "5"]
)


def test_shared_options_mean_the_same_before_and_after_the_command():
    assert (
        hoist(["status", "--format", "json"]) == hoist(["--format", "json", "status"]) == ["--format", "json", "status"]
    )


def test_nothing_behind_two_dashes_is_taken_away_from_the_command_that_is_run():
    argv = ["overlay", "submit", "--state-dir=/s", "--", "tool", "--format", "json", "--no-color"]
    assert hoist(argv) == ["--state-dir=/s", "overlay", "submit", "--", "tool", "--format", "json", "--no-color"]


def test_a_shared_option_without_its_value_stays_for_the_parser_to_complain_about():
    assert sorted(hoist(["status", "--format"])) == ["--format", "status"]


def test_a_value_that_looks_like_an_option_stays_with_its_option():
    assert hoist(["plan", "--setpoints", "--format"])[:2] == ["--setpoints", "--format"]


@given(st.lists(WORDS, max_size=8))
def test_hoisting_loses_no_word_and_doing_it_twice_changes_nothing(argv):
    once = hoist(argv)
    assert sorted(once) == sorted(argv)
    if argv.count("--format") <= 1 and "--state-dir" not in argv:
        assert hoist(once) == once


def test_json_is_wanted_only_when_the_last_format_says_so():
    assert wants_json(["--format=text", "--format", "json", "status"])
    assert not wants_json(["--format", "json", "--format=text", "status"])
    assert not wants_json(["sim", "exec", "--", "x", "--format", "json"])
