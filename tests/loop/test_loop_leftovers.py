"""Shared memory is looked at when it may have changed, and swept when somebody ended; what stays is told once."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from reconciler.act.shm import Left
from reconciler.clock import Instant
from reconciler.journal.incarnations import SharedFile
from reconciler.journal.layout import StateDir
from reconciler.loop import leftovers
from reconciler.loop.leftovers import LOADING_PACE_S, NEWBORN_S, PACE_S, Leftovers
from reconciler.plan.observed import Incarnation, Observed, Probe, Subject

START = Instant(1000.0, 1000.0)


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.at = START

    def now(self) -> Instant:
        return self.at


def seen(*ids: str, ready: bool = False, phase: Any = "running") -> Observed:
    each = tuple(
        Incarnation(i, Subject("endpoint", i), "hash", (), (), exclusive=False, port=None, started=START, phase=phase,
                    pid=1, strays=(), exit_code=None, exited=None)
        for i in ids
    )  # fmt: skip
    probes = {i: Probe(i, START, ready=ready, misses=0, failing_since=None, ready_since=None) for i in ids}
    return Observed(START, "boot", (), each, probes)


def left(incarnation: str, inode: int, why: str | None) -> Left:
    file = SharedFile(f"psm_{inode:08x}", 1, inode, 1.0, 0, sole=why is None)
    return Left(incarnation, Subject("endpoint", "chat"), file, 4096, why)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def followed(tmp_path: Path, clock: Clock) -> Leftovers:
    return Leftovers(StateDir(tmp_path), clock)  # type: ignore[arg-type]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whom was looked at."""
    made: list[str] = []
    monkeypatch.setattr(leftovers, "note", lambda _state, incarnation: made.append(incarnation))
    return made


def test_one_is_looked_at_at_first_when_it_gets_ready_and_then_at_the_pace_of_its_state(
    followed: Leftovers, clock: Clock, noted: list[str]
) -> None:
    def look(after_s: float, *, ready: bool) -> list[str]:
        noted.clear()
        clock.at = clock.at.plus(after_s)
        asyncio.run(followed.follow(seen("a", ready=ready)))
        return list(noted)

    assert look(NEWBORN_S, ready=False) == ["a"]
    assert look(LOADING_PACE_S - 1, ready=False) == []
    assert look(1, ready=False) == ["a"]
    assert look(1, ready=True) == ["a"]
    assert look(PACE_S - 1, ready=True) == []
    assert look(1, ready=True) == ["a"]


def test_a_newborn_is_left_alone_until_it_is_ready_or_its_turn_comes(
    followed: Leftovers, clock: Clock, noted: list[str]
) -> None:
    asyncio.run(followed.follow(seen("a", "b")))
    asyncio.run(followed.follow(seen("c", ready=True)))
    assert noted == ["c"], "one that was adopted, or is as quick as that"
    asyncio.run(followed.follow(seen("a", "b")))
    asyncio.run(followed.follow(Observed(START, "boot", (), (), {})))
    noted.clear()
    asyncio.run(followed.follow(seen("a", "b")))
    both = [*seen("a", ready=True).incarnations, *seen("b").incarnations]
    probes = {**seen("a", ready=True).probes, **seen("b").probes}
    asyncio.run(followed.follow(Observed(START, "boot", (), tuple(both), probes)))
    assert noted == ["a"]
    clock.at = clock.at.plus(LOADING_PACE_S)
    asyncio.run(followed.follow(Observed(START, "boot", (), tuple(both), probes)))
    assert noted == ["a", "b"]


def test_who_does_not_run_is_not_looked_at_and_begins_anew(followed: Leftovers, clock: Clock, noted: list[str]) -> None:
    clock.at = clock.at.plus(NEWBORN_S)
    for phase in ("running", "exited", "running"):
        asyncio.run(followed.follow(seen("a", phase=phase)))
    assert noted == ["a", "a"]


def test_one_that_cannot_be_recorded_does_not_keep_the_others_from_it(
    followed: Leftovers, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.at = clock.at.plus(NEWBORN_S)
    noted: list[str] = []

    def note(_state: StateDir, incarnation: str) -> None:
        if incarnation == "a":
            raise OSError(28, "No space left on device")
        noted.append(incarnation)

    monkeypatch.setattr(leftovers, "note", note)
    asyncio.run(followed.follow(seen("a", "b")))
    assert noted == ["b"]


def test_the_first_sweep_is_of_all_later_ones_of_who_ended_and_of_what_stayed_which_is_told_once(
    followed: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Collection[str] | None] = []
    found: list[Left] = []

    def sweep(_state: StateDir, among: Collection[str] | None) -> list[Left]:
        asked.append(None if among is None else sorted(among))
        return found

    monkeypatch.setattr(leftovers, "sweep", sweep)

    def clear(*ended: str) -> list[tuple[str, str, str]]:
        return [(e.kind, e.subject, e.message) for e in asyncio.run(followed.clear(ended))]

    found[:] = [left("a", 1, None), left("a", 2, "pid 7 has it")]
    told = clear()
    assert [(kind, subject) for kind, subject, _ in told] == [("shm.removed", "chat"), ("shm.kept", "chat")]
    assert "psm_00000001" in told[0][2]
    assert told[1][2].endswith("not removed, pid 7 has it")
    found[:] = [left("a", 2, "pid 7 has it"), left("b", 3, "pid 8 has it")]
    assert clear() == []
    again = clear("b")
    assert [kind for kind, _, _ in again] == ["shm.kept"]
    assert "psm_00000003" in again[0][2]
    assert "psm_00000002" not in again[0][2]
    found[:] = []
    assert clear("c") == []
    assert asked == [None, ["a", "b"], ["a", "b", "c"]]


def test_a_sweep_that_fails_says_nothing_and_the_next_end_is_swept(
    followed: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[Left]] = [[left("b", 3, None)]]

    def sweep(_state: StateDir, among: Collection[str] | None) -> list[Left]:
        if among is None:
            raise OSError(13, "Permission denied")
        return found[0]

    monkeypatch.setattr(leftovers, "sweep", sweep)
    assert asyncio.run(followed.clear(())) == ()
    assert [e.kind for e in asyncio.run(followed.clear(("b",)))] == ["shm.removed"]
