"""How an end is told."""

from __future__ import annotations

import pytest

from reconciler.plan.exits import exit_words

WANT = "perhaps out of memory: see `journalctl -k`"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "an unknown exit code"),
        (0, "exit code 0"),
        (1, "exit code 1"),
        (126, "exit code 126 (found, and cannot be run)"),
        (127, "exit code 127 (no such program)"),
        (128, "exit code 128"),
        (137, f"exit code 137 (SIGKILL, {WANT})"),
        (139, "exit code 139 (SIGSEGV)"),
        (143, "exit code 143 (SIGTERM)"),
        (255, "exit code 255"),
        (-9, f"signal 9 (SIGKILL, {WANT})"),
        (-11, "signal 11 (SIGSEGV)"),
        (-40, "signal 40"),  # a real-time signal without a name
    ],
)
def test_an_end_is_told_by_its_code_or_its_signal_and_what_that_means(code: int | None, words: str) -> None:
    assert exit_words(code) == words


def test_what_is_known_of_an_end_stands_instead_of_what_its_number_means() -> None:
    assert exit_words(127, "no luxcoreconsole on PATH") == "exit code 127 (no luxcoreconsole on PATH)"
    assert exit_words(None, "the disk was full") == "an unknown exit code (the disk was full)"


def test_nobody_guesses_why_something_ended_that_was_to_end() -> None:
    assert exit_words(-9, asked_for=True) == "signal 9 (SIGKILL)"
    assert exit_words(-9, "its disk was full") == "signal 9 (its disk was full)"
    assert exit_words(1, asked_for=True) == "exit code 1"
