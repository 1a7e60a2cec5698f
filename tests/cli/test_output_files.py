from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reconciler.cli.output_files import Tail, last_lines, names_with_output, outputs_of
from reconciler.clock import Instant
from reconciler.journal.archive import archive
from reconciler.journal.incarnations import Intent, log_path, write_intent
from reconciler.journal.layout import StateDir


@pytest.fixture
def state(tmp_path) -> StateDir:
    made = StateDir(tmp_path / "state")
    made.ensure()
    return made


def started(state: StateDir, name: str, identity: str, at: float, kind: str = "endpoint") -> Path:
    path = log_path(state, kind, name, identity)
    write_intent(
        state,
        Intent(identity, kind, name, "h", (), (), False, None, 0, ("x",), str(path), Instant(at, at), "boot"),
    )
    return path


@given(text=st.text(alphabet="ab\n", max_size=60), count=st.integers(0, 8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_last_lines_are_the_last_lines(tmp_path, text, count):
    path = tmp_path / "x.log"
    path.write_text(text)
    expected = "".join(text.splitlines(keepends=True)[-count:]) if count else ""
    assert last_lines(path, count).decode() == expected


def test_the_last_lines_of_a_long_file_cross_blocks(tmp_path):
    path = tmp_path / "x.log"
    lines = [f"{n:08d} " + "y" * 300 + "\n" for n in range(2000)]
    path.write_text("".join(lines))
    assert last_lines(path, 700).decode() == "".join(lines[-700:])


def test_a_long_line_costs_a_small_multiple_of_reading_it(tmp_path):
    path = tmp_path / "x.log"
    path.write_bytes(b"x" * (16 << 20))

    def cost_s(read) -> float:
        began = time.process_time()
        assert len(read()) == 16 << 20
        return time.process_time() - began

    floor = min(cost_s(lambda: b"".join(path.read_bytes().splitlines(keepends=True))) for _ in range(3))
    assert min(cost_s(lambda: last_lines(path, 200)) for _ in range(3)) < 20 * floor + 0.1


def test_the_hole_that_rotation_leaves_is_not_shown(tmp_path):
    path = tmp_path / "x.log"
    path.write_bytes(b"\0" * 200_000 + b"one\ntwo\n")
    assert last_lines(path, 10) == b"one\ntwo\n"


def test_a_missing_file_has_no_lines(tmp_path):
    assert last_lines(tmp_path / "none", 5) == b""


def test_starts_are_found_oldest_first_whether_or_not_they_were_put_away(state):
    for number, at in ((2, 20.0), (1, 10.0), (3, 30.0)):
        started(state, "a", f"id{number}", at).write_text("x")
    started(state, "b", "other", 5.0)
    archive(state, "id1", keep=20)
    assert [o.incarnation for o in outputs_of(state, "a")] == ["id1", "id2", "id3"]
    assert names_with_output(state) == {"a", "b"}


def test_a_tail_shows_each_byte_once_from_one_start_to_the_next(state):
    first = started(state, "a", "id1", 10.0)
    first.write_text("old\n")
    tail = Tail(state, "a")
    tail.skip()
    with first.open("a") as file:
        file.write("new\n")
    assert b"".join(tail.new()) == b"new\n"
    second = started(state, "a", "id2", 20.0)
    assert b"".join(tail.new()) == b""
    second.write_text("again\n")
    archive(state, "id1", keep=20)
    assert b"".join(tail.new()) == b"again\n"
    assert b"".join(tail.new()) == b""


def test_a_workload_and_an_endpoint_of_one_name_are_told_apart(state):
    started(state, "twin", "e", 10.0)
    started(state, "twin", "w", 20.0, kind="workload")
    assert [o.incarnation for o in outputs_of(state, "twin", "workload")] == ["w"]
