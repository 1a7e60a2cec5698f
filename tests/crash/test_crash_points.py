"""kill -9 at every call that changes something: of the daemon, its fork server, a shim, a leader. Real processes.

`points.txt` lists the calls. `stopper` stops whoever is about to make one, `scenes` says what happens meanwhile and
what has to hold afterwards: everything as the files say, nothing begun twice, nothing of ours unmanaged, no stranger
signalled. docs/decisions/0023 says why it is done from outside.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import stopper
from scenes import SCENES, Scene, play_all, recorded
from watching import Point, Trap

BOXES = 2
"""At once; a box mostly waits."""

WHOLE = ("evict", "boot", "adopt", "leave")
"""Scenes in which also what is not listed is killed at: the making and closing of the journal, control groups."""

AFTERWARDS = "afterwards"

WHY_NOT = stopper.unavailable()

pytestmark = [pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)), pytest.mark.timeout(600)]


def listed() -> dict[str, list[str]]:
    """Scene → the calls that are first come by in it."""
    found: dict[str, list[str]] = {}
    for line in Path(__file__).with_name("points.txt").read_text().splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            section.append(line)
    return found


POINTS = listed()
NAMES = {name for names in POINTS.values() for name in names}


def chosen(scene: Scene, points: tuple[Point, ...]) -> list[Point]:
    """The moments of this scene that are no repetition of another's.

    Each commit is a decision of its own, and a shim's end is not the same for a job and for an endpoint. What SQLite
    writes before a commit is not seen afterwards; benchmarks/crash.py kills there as well.
    """

    def counts(point: Point) -> bool:
        if point.deed.endswith("the commit") or (scene.name == "evict" and point.role != "daemon"):
            return True
        new = scene.name in WHOLE if point.unlisted or scene.name == "adopt" else point.name in POINTS[scene.name]
        return new and point.occurrence == 1

    return [point for point in points if counts(point)]


def hold(scene: Scene, traps: list[Trap], known: set[str]) -> set[str]:
    """Play them all; the names of what was come by."""
    played = play_all(scene, traps, known, boxes=BOXES)
    assert not played.wrong, "\n\n".join(played.wrong)
    assert not [str(p) for p in played.missed if not p.unlisted]
    assert len(played.missed) <= 2 + len(traps) / 10, [str(p) for p in played.missed]
    return played.names


def test_each_call_is_listed_once_and_under_a_scene() -> None:
    assert sum(map(len, POINTS.values())) == len(NAMES)
    assert set(POINTS) == {*SCENES, AFTERWARDS}


@pytest.mark.parametrize("name", SCENES)
def test_whoever_makes_a_call_is_killed_before_it_and_all_is_as_the_files_say(name: str) -> None:
    scene = SCENES[name]
    points = recorded(scene)
    traps = [Trap(p, p.role) for p in chosen(scene, points)]
    names = hold(scene, traps, NAMES - {*POINTS[AFTERWARDS]}) | {p.name for p in points if not p.unlisted}
    assert names <= NAMES, f"add to points.txt: {sorted(names - NAMES)}"
    made = {p.name for p in points}
    assert made >= set(POINTS[name]), f"no call of this scene any more: {sorted(set(POINTS[name]) - made)}"
    if name == "evict":
        assert names >= set(POINTS[AFTERWARDS]), "no call after a kill any more"


@pytest.mark.parametrize("name", ["evict", "boot"])
def test_the_daemon_is_killed_while_another_is_about_to_make_a_call_and_all_is_as_the_files_say(name: str) -> None:
    scene = SCENES[name]
    points = [p for p in chosen(scene, recorded(scene)) if p.role != "daemon"]
    hold(scene, [Trap(p, "daemon") for p in points], NAMES)
