"""What a shell is offered where a name belongs."""

from __future__ import annotations

import os
import subprocess

import pytest
from desk import PROGRAM, Desk

OVERLAY = "version: 1\nmakespan: {duration: 5m}\ngpus: 1\nworkload: {command: [render]}\n"


def offered(desk: Desk, *words: str) -> list[str]:
    """What bash would offer after these words, the last of which is being written."""
    line = ["reconciler", "--setpoints", str(desk.setpoints), "--state-dir", str(desk.state), *words]
    asked = {"_RECONCILER_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(line), "COMP_CWORD": str(len(line) - 1)}
    done = subprocess.run(PROGRAM, env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["explain", ""], ["big", "render", "small"]),
        (["logs", "r"], ["render"]),
        (["reset", "s"], ["small"]),
        (["events", "--subject", "b"], ["big"]),
        (["down", "big", ""], ["big", "small"]),
        (["overlay", "cancel", ""], ["render"]),
    ],
    ids=" ".join,
)
def test_the_names_of_the_files_are_offered_where_a_command_takes_them(desk: Desk, words, names):
    desk.write("overlays/render.yaml", OVERLAY)
    assert offered(desk, *words) == names
    assert not desk.state.exists(), "nothing is made, and nothing is started"


def test_files_that_cannot_be_read_are_passed_over_without_a_word(desk: Desk):
    desk.write("overlays/render.yaml", "what: [is this")
    desk.write("setpoints.yaml", "version: 1\nendpoints: [\n")
    assert offered(desk, "explain", "") == ["render"]
    desk.setpoints.unlink()
    assert offered(desk, "explain", "") == []
