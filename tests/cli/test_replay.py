"""`explain --replay`: a decision of the past, made again."""

from __future__ import annotations

import json
import re
import sqlite3

import pytest
from desk import Desk

from reconciler.cli.main import run


@pytest.fixture
def lived(desk: Desk) -> Desk:
    """A box on which a daemon has brought up what should run, and is gone."""
    done = desk.run("apply", "--yes", "--timeout", "30s")
    assert done.returncode == 0, done.stderr
    desk.run("down")
    return desk


def test_a_past_decision_is_shown_as_it_was_and_is_the_same_plan(lived: Desk) -> None:
    told = lived.run("explain", "big")
    assert "(decision 1)" in told.stdout
    again = lived.run("explain", "--replay", "1")
    assert again.returncode == 0, again.stderr
    assert "+ big" in again.stdout
    assert "the plan is the same, byte for byte" in again.stdout
    of_big = json.loads(lived.run("explain", "big", "--replay", "last", "--format", "json").stdout)["data"]
    assert of_big["same"] is True
    assert of_big["decision"] > 1
    assert {"decision", "time", "version", "same", "plan"} == set(of_big)


def test_a_plan_that_comes_out_otherwise_is_told_with_exit_1(lived: Desk) -> None:
    with sqlite3.connect(lived.state / "journal.sqlite") as raw:
        raw.execute("UPDATE decisions SET outcome = 'another', version = '0.0.1' WHERE id = 1")
    again = lived.run("explain", "--replay", "1")
    assert again.returncode == 1
    assert "the plan is another one" in again.stdout
    assert "version 0.0.1" in again.stdout
    with sqlite3.connect(lived.state / "journal.sqlite") as raw:
        raw.execute("UPDATE decisions SET outcome = 'another' WHERE id = 2")
    assert re.search(
        r"by version \d[\d.]*\+[0-9a-f]{8}, and again by the same\.", lived.run("explain", "--replay", "2").stdout
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--replay", "99"], 1, "decision 99 is not kept"),
        (["--replay", "last"], 1, "no decision is kept yet"),
        (["nobody", "--replay", "last"], 1, "no decision about 'nobody'"),
        (["--replay", "first"], 64, "not the number of a decision"),
        ([], 64, "explain whom?"),
    ],
)
def test_what_cannot_be_replayed_says_so(
    desk: Desk, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert run([*desk.words, "explain", *words]) == code
    assert said in capsys.readouterr().err
