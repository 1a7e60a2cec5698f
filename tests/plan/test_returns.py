"""Nobody prolongs an absence that he could not have brought about: the place of who gave way is kept for its return."""

from __future__ import annotations

import re
from typing import Any

import pytest
from builders import endpoint, overlay, spec, uuid
from msgspec.structs import replace
from plant import Behaviour, Plant, Run, overlay_state

from reconciler.plan.actions import Blocked, Plan
from reconciler.plan.board import Board, Hold, Tenant
from reconciler.plan.draft import Draft
from reconciler.plan.observed import Subject
from reconciler.plan.windows import place_owed, still_owed
from reconciler.spec.spec import EndpointSpec, Evict, MemoryBytes, OverlaySpec, Stop
from reconciler.units import GIB

ASK = endpoint("ask", [0], priority=40)
SHORT = overlay("short", [0], memory=20, priority=600, duration=300.0)


def settled(*endpoints: EndpointSpec, gpus: int = 1) -> Run:
    behaviour = Behaviour(run_s={"short": 250.0, "long": 2900.0})
    run = Run(spec(*endpoints), Plant(totals=[80 * GIB] * gpus, behaviour=behaviour))
    run.settle()
    run.plant.advance(600.0)
    run.settle()
    return run


def away(run: Run, *endpoints: EndpointSpec, short: OverlaySpec = SHORT) -> None:
    """`short` has the place of them."""
    run.spec = spec(*endpoints, short)
    run.settle(until=overlay_state("short", "active"))


def why(decided: Plan, name: str) -> Blocked:
    (found,) = [b for b in decided.blocked if b.subject == Subject("workload", name)]
    return found


LONG = {
    "may evict nobody": overlay("long", [0], memory=20, priority=900, evict=False, duration=3000.0),
    "is less important": overlay("long", [0], memory=20, priority=40, duration=3000.0),
}

HELP = {900: "set allow_baseline_eviction: true", 40: "give it a priority above that of ask (40)"}
"""What would give each of them the right to the place, by its priority."""


@pytest.mark.parametrize("long", LONG.values(), ids=LONG)
def test_work_beside_other_work_does_not_keep_away_whom_it_could_not_have_displaced(long: OverlaySpec) -> None:
    run = settled(ASK)
    away(run, ASK)
    run.spec = spec(ASK, SHORT, long)
    blocked = why(run.decide(), "long")
    assert blocked.reason == "WindowTaken"
    assert "ask (which is to be back from 2026-" in blocked.message
    assert any("on_overrun: stop" in hint for hint in blocked.alternatives)
    assert blocked.alternatives[-1] == HELP[long.priority]
    run.settle(until=lambda p: run.plant.is_ready("ask"))
    assert run.ledger.overlays["short"].state == "done"
    assert run.ledger.overlays["long"].state == "pending"


@pytest.mark.parametrize("long", LONG.values(), ids=LONG)
def test_nor_if_it_arrives_together_with_that_other_work(long: OverlaySpec) -> None:
    run = settled(ASK)
    run.spec = spec(ASK, SHORT, long)
    run.settle(until=lambda p: "short" in p.ledger.overlays and p.ledger.overlays["short"].state == "done")
    assert run.plant.is_ready("ask")
    assert run.ledger.overlays["long"].state == "pending"


def test_gpus_that_a_gang_left_idle_are_its_own_when_it_comes_back() -> None:
    gang = endpoint("gang", [0, 1, 2, 3], priority=40)
    run = settled(gang, gpus=4)
    away(run, gang)
    run.spec = spec(gang, SHORT, overlay("long", 3, priority=10, duration=3000.0))
    assert why(run.decide(), "long").reason == "WindowTaken"
    run.settle(until=lambda p: run.plant.is_ready("gang"))
    assert "long" not in run.starts()


def test_work_that_is_surely_over_by_then_uses_them_meanwhile() -> None:
    gang = endpoint("gang", [0, 1, 2, 3], priority=40)
    run = settled(gang, gpus=4)
    run.plant.behaviour.run_s = {"short": 2000.0, "brief": 100.0}
    away(run, gang, short=overlay("short", [0], memory=20, priority=600, duration=2000.0))
    brief = overlay("brief", 3, priority=10, duration=200.0, on_overrun="stop")
    run.spec = spec(gang, overlay("short", [0], memory=20, priority=600, duration=2000.0), brief)
    run.settle(until=overlay_state("brief", "done"))
    assert run.ledger.overlays["short"].state == "active"
    run.settle()
    assert run.plant.is_ready("gang")


def test_work_that_could_have_displaced_it_may_have_its_place() -> None:
    run = settled(ASK)
    away(run, ASK)
    run.spec = spec(ASK, SHORT, overlay("long", [0], memory=20, priority=50, duration=3000.0))
    run.settle(until=overlay_state("short", "done"))
    assert run.ledger.overlays["long"].state == "active"
    run.settle()
    assert run.plant.is_ready("ask")


def test_work_for_which_there_is_room_beside_the_one_that_comes_back_begins() -> None:
    small = endpoint("ask", [0], memory=30, priority=40)
    run = settled(small)
    away(run, small, short=overlay("short", [0], memory=60, priority=600, duration=300.0))
    short = overlay("short", [0], memory=60, priority=600, duration=300.0)
    run.spec = spec(small, short, overlay("long", [0], memory=15, priority=10, evict=False, duration=3000.0))
    run.settle(until=overlay_state("long", "active"))
    run.settle(until=lambda p: run.plant.is_ready("ask"))
    assert run.ledger.overlays["long"].state == "active"


def test_of_several_that_come_back_to_one_gpu_all_have_their_places() -> None:
    both = [endpoint(name, [0], memory=35, priority=40) for name in ("ask", "code")]
    run = settled(*both)
    short = overlay("short", [0], memory=45, priority=600, duration=300.0)
    away(run, *both, short=short)
    run.spec = spec(*both, short, overlay("long", [0], memory=15, priority=10, evict=False, duration=3000.0))
    blocked = why(run.decide(), "long")
    assert blocked.reason == "WindowTaken"
    back = r"\(which is to be back from 2026-11-23 \d\d:\d\d:\d\dZ on\)"
    assert re.fullmatch(f"the place it would need is kept for ask {back}, code {back}", blocked.message)
    above = "set allow_baseline_eviction: true, and give it a priority above that of ask, code (40)"
    assert blocked.alternatives[-1] == above
    run.settle(until=lambda p: all(run.plant.is_ready(e.name) for e in both))
    assert "long" not in run.starts()


def test_nothing_is_advised_that_would_not_help_where_who_comes_back_is_not_preemptible() -> None:
    firm = endpoint("ask", [0], priority=40, preemptible=False)
    aside = overlay("short", [0], memory=20, duration=300.0)
    run = settled(ASK)
    away(run, ASK)
    run.spec = spec(firm, aside, LONG["may evict nobody"])
    (hint,) = why(run.decide(), "long").alternatives
    assert hint.startswith("bound it by a deadline")


def test_of_two_that_no_longer_fit_side_by_side_the_more_important_is_foreseen_to_come_back() -> None:
    minor, major = endpoint("ask", [0], memory=30, priority=20), endpoint("code", [0], memory=30, priority=40)
    work = overlay("work", [0])
    run = settled(minor, major)
    run.spec = spec(minor, major, work)
    run.settle(until=overlay_state("work", "active"))
    run.spec = spec(*(replace(e, memory=MemoryBytes(50 * GIB)) for e in (minor, major)), work)
    assert [a.subject.name for a in run.decide().actions if a.op == "start"] == ["code"]


def gang_away(state: str) -> Run:
    """A gang of three gave way on one GPU, other work would like another one, and the third one is in this state."""
    gang = endpoint("gang", [0, 1, 2], priority=40)
    run = settled(gang, gpus=3)
    away(run, gang)
    run.spec = spec(gang, SHORT, overlay("long", [2], priority=10, duration=3000.0))
    run.plant.overrides[1] = {"state": state}
    return run


def test_a_gpu_that_cannot_be_read_for_a_moment_does_not_cost_a_gang_its_return() -> None:
    run = gang_away("unknown")
    run.settle(until=overlay_state("short", "restoring"))
    run.settle()
    assert "long" not in run.starts()
    del run.plant.overrides[1]
    run.settle(until=lambda p: run.plant.is_ready("gang"))
    assert "long" not in run.starts()


def test_a_gpu_that_is_lost_meanwhile_keeps_nobody_waiting_once_the_work_is_over() -> None:
    run = gang_away("lost")
    run.settle(until=overlay_state("short", "done"))
    run.settle(until=overlay_state("long", "active"))


def test_while_the_work_overruns_no_moment_is_named_nor_is_it_advised_to_be_over_by_then() -> None:
    run = settled(ASK)
    run.plant.behaviour.run_s = {"short": 2000.0}
    away(run, ASK)
    run.spec = spec(ASK, SHORT, LONG["may evict nobody"])
    run.settle(until=overlay_state("short", "overrun"))
    blocked = why(run.decide(), "long")
    assert blocked.message.endswith("ask (which is to be back as soon as it can)")
    assert blocked.alternatives == ("set allow_baseline_eviction: true",)


def test_one_that_may_go_elsewhere_does_not_go_where_another_is_to_be_again() -> None:
    gang = endpoint("gang", [0, 2], priority=40)
    other = endpoint("other", 1, memory=40, priority=50)
    run = Run(spec(gang, other), Plant(totals=[80 * GIB] * 3))
    run.settle()
    assert run.plant.current("other").gpus == (uuid(1),)  # type: ignore[union-attr]
    run.plant.advance(600.0)
    run.settle()
    run.spec = spec(gang, other, overlay("pair", [0, 1], memory=45, priority=600, duration=300.0))
    run.settle(until=overlay_state("pair", "active"))
    (held,) = [b for b in run.decide().blocked if b.subject == Subject("endpoint", "other")]
    assert held.reason == "Held"
    assert "the place of gang" in held.message
    run.settle()
    assert run.ledger.overlays["pair"].state == "done"
    assert run.plant.is_ready("gang")
    assert run.plant.is_ready("other")


def test_nor_does_a_new_one_however_important() -> None:
    gang = endpoint("gang", [0, 1], priority=40)
    run = settled(gang, gpus=2)
    away(run, gang)
    new = endpoint("new", 1, memory=40, priority=900, port=9000)
    run.spec = spec(gang, new, SHORT)
    run.settle(until=lambda p: run.plant.is_ready("gang"))
    assert "new" not in run.starts()


def test_it_goes_there_if_there_is_room_for_both() -> None:
    gang = endpoint("gang", [0, 2], memory=30, priority=40)
    other = endpoint("other", 1, memory=40, priority=50)
    run = Run(spec(gang, other), Plant(totals=[80 * GIB] * 3))
    run.settle()
    run.plant.advance(600.0)
    run.settle()
    run.spec = spec(gang, other, overlay("pair", [0, 1], memory=60, priority=600, duration=300.0))
    run.settle(until=lambda p: run.plant.is_ready("other") and p.ledger.overlays["pair"].state == "active")
    assert run.plant.current("other").gpus == (uuid(2),)  # type: ignore[union-attr]
    run.settle()
    assert run.plant.is_ready("gang")


def test_the_memory_that_a_sleeper_had_is_kept_for_its_waking() -> None:
    dozer = endpoint("dozer", [0], memory=60, priority=40, evict=Evict("sleep", 1, 10 * GIB), stop=Stop(drain_s=0.0))
    run = settled(dozer)
    short = overlay("short", [0], memory=50, priority=600, duration=300.0)
    run.spec = spec(dozer, short)
    run.settle(until=overlay_state("short", "active"))
    assert run.decide().endpoints["dozer"].state == "sleeping"
    long = overlay("long", [0], memory=25, priority=10, evict=False, duration=3000.0)
    new = endpoint("new", 1, memory=25, priority=900, port=9000)
    run.spec = spec(dozer, short, long, new)
    run.settle(until=lambda p: p.endpoints["dozer"].state == "healthy")
    assert run.starts() == ["dozer", "short"], "it woke up, and nobody had its memory"


@pytest.mark.parametrize(("lasts", "begins"), [(100.0, True), (3000.0, False)])
def test_beside_whom_it_comes_back_counts_who_will_be_there_then(lasts: float, begins: bool) -> None:
    ask = endpoint("ask", [0], memory=60, priority=40)
    run = settled(ask)
    run.plant.behaviour.run_s = {"short": 550.0, "other": lasts, "long": 2900.0}
    short = overlay("short", [0], memory=40, priority=600, duration=600.0)
    other = overlay("other", [0], memory=10, priority=600, duration=lasts)
    run.spec = spec(ask, short, other)
    run.settle(until=lambda p: {r.state for r in p.ledger.overlays.values()} == {"active"})
    run.spec = spec(ask, short, other, overlay("long", [0], memory=15, priority=10, evict=False, duration=3000.0))
    assert (run.decide().ledger.overlays["long"].state != "pending") == begins


def test_nor_does_the_removal_of_the_file_that_keeps_it_away_cost_it_its_place() -> None:
    gang = endpoint("gang", [0, 1], priority=40)
    run = settled(gang, gpus=2)
    second = overlay("second", [0], memory=20, priority=600, duration=900.0)
    low = overlay("low", [1], priority=5, duration=60.0)
    away(run, gang)
    run.spec = spec(gang, SHORT, second)
    run.settle(until=overlay_state("short", "done"))
    run.spec = spec(gang, second, low)
    run.settle(until=lambda p: why(p, "low").reason == "WindowTaken")
    run.spec = spec(gang, low)
    run.settle(until=lambda p: run.plant.is_ready("gang"))
    assert "low" not in run.starts()


# ---------------------------------------------------------------- what is owed to it


def test_the_place_that_is_owed_is_the_pinned_one_or_that_in_which_it_ran() -> None:
    pinned, free = endpoint("pinned", [1], memory=20), endpoint("free", 1, memory=30)
    run = settled(pinned, free, gpus=2)
    draft = Draft.of(run.situation())
    (ran,) = run.ledger.endpoints["free"].last_gpus
    assert place_owed(draft, "pinned") == {uuid(1): 20 * GIB}
    assert place_owed(draft, "free") == {ran: 30 * GIB}
    assert place_owed(draft, "nobody") == {}


def test_of_a_place_that_is_owed_only_what_its_endpoint_does_not_have_already_is_left() -> None:
    draft = Draft.of(settled(ASK).situation())
    draft.board = Board({uuid(0): 80 * GIB, uuid(1): 80 * GIB}, {})
    assert still_owed(draft, "ask", uuid(0), 30 * GIB) == 30 * GIB, "it is not there"
    for held, left in ((10, 20), (30, 0), (40, 0)):
        draft.board.add(Tenant("endpoint/ask", 40, {uuid(0): Hold(held * GIB, exclusive=False)}))
        assert still_owed(draft, "ask", uuid(0), 30 * GIB) == left * GIB
    assert still_owed(draft, "ask", uuid(1), 30 * GIB) == 0, "it has another place"


ENDING = {
    "it is less important": (
        {"priority": 40},
        "PriorityTooLow",
        (
            "it would need the place of ask, whose priority is not lower than 40;"
            " and short, which ends, gives it back to ask first"
        ),
        ("give it a priority above that of ask (40)",),
    ),
    "it may evict nobody": (
        {"priority": 900, "evict": False},
        "NoConsent",
        "it would need the place of ask, and may not evict; and short, which ends, gives it back to ask first",
        ("set allow_baseline_eviction: true",),
    ),
    "it is next": (
        {"priority": 500},
        "WaitingForLease",
        "it waits for the place that short, which ends, is giving back",
        (),
    ),
}


@pytest.mark.parametrize(("fields", "reason", "message", "hints"), ENDING.values(), ids=ENDING)
def test_who_waits_for_the_place_of_one_that_ends_is_told_who_comes_back_there_and_not_to_top_what_ends(
    fields: dict[str, Any], reason: str, message: str, hints: tuple[str, ...]
) -> None:
    run = settled(ASK)
    whole = overlay("short", [0], priority=600, duration=300.0)
    away(run, ASK, short=whole)
    run.spec = spec(ASK, whole, overlay("long", [0], **fields))
    told = why(run.settle(until=overlay_state("short", "completing")), "long")
    assert (told.reason, told.message, told.alternatives) == (reason, message, hints)
    assert told.earliest_start is None
    decided = run.settle(until=overlay_state("short", "restoring", "done"))
    begins = decided.ledger.overlays["long"].state != "pending"
    assert begins is (reason == "WaitingForLease"), "what was told came true"


def test_where_nobody_was_before_the_one_that_ends_whoever_waits_is_next() -> None:
    other = endpoint("ask", [1], priority=900)
    run = settled(other, gpus=2)
    whole = overlay("short", [0], priority=600, duration=300.0)
    away(run, other, short=whole)
    run.spec = spec(other, whole, overlay("long", [0], priority=10, evict=False))
    assert why(run.settle(until=overlay_state("short", "completing")), "long").reason == "WaitingForLease"
    run.settle(until=overlay_state("short", "done"))
    assert run.ledger.overlays["long"].state != "pending"
