"""Endpoints that an overlay sets aside or sets otherwise: when they are expected back, and who has their place then."""

from __future__ import annotations

from typing import Any

import pytest
from builders import NOW, endpoint, overlay, spec, uuid
from msgspec.structs import replace
from plant import Behaviour, Plant, Run, overlay_state

from reconciler.plan.actions import Blocked, Plan
from reconciler.spec.spec import EndpointSpec, GpuPins, MemoryBytes, OverlaySpec, Restart

ASK = endpoint("ask", [0], priority=40, capabilities=("ask",))
LONG = overlay("long", [0], memory=20, priority=5, duration=3000.0)


def settled(*endpoints: EndpointSpec, gpus: int = 1) -> Run:
    """A box on which the baseline has been ready for a while."""
    run = Run(spec(*endpoints), Plant(totals=[80 << 30] * gpus, behaviour=Behaviour(run_s={"long": 2900.0})))
    run.settle()
    run.plant.advance(600.0)
    run.settle()
    return run


def aside(*endpoints: EndpointSpec, duration: float = 300.0, priority: int = 5) -> OverlaySpec:
    """Maintenance: they are stopped for a while."""
    sets = [replace(e, state="stopped") for e in endpoints]
    return overlay("mend", None, priority=priority, duration=duration, workload=False, sets=sets)


def why(decided: Plan, name: str) -> Blocked:
    (found,) = [b for b in decided.blocked if b.subject.name == name]
    return found


def test_a_window_has_its_place_where_nobody_is_to_be_back_before_it() -> None:
    firm = replace(ASK, priority=900)
    run = settled(firm)
    mend = aside(firm, duration=2000.0)
    run.spec = spec(firm, mend)
    run.settle(until=overlay_state("mend", "active"))
    start = run.plant.now.wall + 600
    night = overlay("night", [0], priority=600, start=start, duration=300.0, on_overrun="stop")
    run.spec = spec(firm, mend, night)
    assert why(run.decide(), "night").reason == "NotYet"
    run.spec = spec(firm, mend, night, LONG)
    run.settle(until=overlay_state("night", "active"))
    assert run.plant.now.wall == start
    assert "long" not in run.starts()


def test_a_window_may_displace_whom_an_overlay_sets_aside_until_then() -> None:
    run = settled(ASK)
    mend = aside(ASK)
    run.spec = spec(ASK, mend)
    run.settle(until=overlay_state("mend", "active"))
    start = run.plant.now.wall + 2000
    night = overlay("night", [0], priority=600, start=start, duration=300.0)
    run.spec = spec(ASK, mend, night)
    assert why(run.decide(), "night").reason == "NotYet"
    run.settle(until=overlay_state("night", "active"))
    assert run.plant.now.wall == start


def test_a_window_may_require_what_is_set_aside_until_then() -> None:
    run = settled(ASK, gpus=2)
    mend = aside(ASK)
    run.spec = spec(ASK, mend)
    run.settle(until=overlay_state("mend", "active"))
    now = run.plant.now.wall
    night = overlay("night", [1], priority=600, start=now + 2000, duration=300.0, requires=("ask",))
    run.spec = spec(ASK, mend, night)
    assert why(run.decide(), "night").reason == "NotYet"
    run.spec = spec(ASK, mend, night, replace(LONG, gpus=night.gpus, priority=600))
    assert why(run.decide(), "long").reason == "WindowTaken"


def test_work_that_requires_what_is_set_aside_is_told_by_whom_and_until_when() -> None:
    run = settled(ASK, gpus=2)
    mend = aside(ASK)
    run.spec = spec(ASK, mend)
    run.settle(until=overlay_state("mend", "active"))
    end = run.plant.now.wall + 300
    run.spec = spec(ASK, mend, overlay("review", [1], requires=("ask",)))
    told = why(run.decide(), "review")
    assert told.message == "it requires ask, and what offers it has no place: ask (set aside by mend)"
    assert told.earliest_start == end + 1.5


def test_a_window_is_told_at_once_that_nothing_provides_what_it_requires_or_that_its_pin_does_not_exist() -> None:
    run = settled(ASK)
    start = NOW.wall + 7200
    for impossible, reason in (
        (overlay("night", [0], start=start, requires=("draw",)), "NoProvider"),
        (overlay("night", [7], start=start), "NoSuchGpu"),
    ):
        run.spec = spec(ASK, impossible)
        assert why(run.decide(), "night").reason == reason


@pytest.mark.parametrize(
    "meanwhile",
    [{"state": "stopped"}, {"process_hash": "other", "memory": MemoryBytes(20 << 30)}],
    ids=["stopped", "set"],
)
def test_work_does_not_keep_from_its_place_whom_maintenance_took_from_it(meanwhile: dict[str, Any]) -> None:
    run = settled(ASK)
    mend = overlay("mend", None, priority=5, duration=300.0, workload=False, sets=[replace(ASK, **meanwhile)])
    run.spec = spec(ASK, mend)
    run.settle(until=overlay_state("mend", "active"))
    run.spec = spec(ASK, mend, LONG)
    told = why(run.decide(), "long")
    assert told.reason == "WindowTaken"
    assert "ask (which is to be back from " in told.message
    run.settle(until=overlay_state("mend", "done"))
    assert run.plant.is_ready("ask")
    assert "long" not in run.starts()


def test_nor_if_it_arrives_with_the_maintenance_unless_it_might_have_displaced_it() -> None:
    for priority, begins in ((5, False), (50, True)):
        run = settled(ASK)
        run.spec = spec(ASK, aside(ASK), replace(LONG, priority=priority))
        run.settle(until=overlay_state("mend", "done"))
        assert ("long" in run.starts()) == begins


def test_a_new_endpoint_does_not_take_the_place_of_one_that_is_set_aside() -> None:
    run = settled(ASK)
    new, mend = endpoint("new", 1, memory=20, priority=900, port=9000), aside(ASK)
    run.spec = spec(ASK, mend)
    run.settle(until=overlay_state("mend", "active"))
    run.spec = spec(ASK, new, mend)
    told = why(run.decide(), "new")
    assert told.reason == "Held"
    assert told.message == "it would have the place of ask, kept for its return"
    run.settle(until=overlay_state("mend", "done"))
    assert run.plant.is_ready("ask")


def test_a_window_is_told_at_once_that_what_it_sets_aside_is_not_preemptible_or_is_a_last_provider() -> None:
    firm = replace(ASK, preemptible=False)
    run = settled(ASK)
    later = run.plant.now.wall + 600
    mend = replace(aside(ASK), makespan=replace(aside(ASK).makespan, start=later))
    run.spec = spec(firm, mend)
    assert why(run.decide(), "mend").reason == "NotPreemptible"
    run.spec = spec(ASK, mend, floors={"ask": 1})
    assert why(run.decide(), "mend").reason == "FloorWouldBreak"
    run.spec = spec(ASK, mend)
    assert why(run.decide(), "mend").reason == "NotYet"


def test_where_another_version_of_an_endpoint_ran_is_not_its_place_afterwards() -> None:
    gang, roam = endpoint("gang", [0, 1], priority=20), endpoint("roam", 1, priority=40)
    run = settled(gang, roam, gpus=3)
    assert run.plant.current("roam").gpus == (uuid(2),)  # type: ignore[union-attr]
    other = replace(roam, process_hash="other", gpus=GpuPins((1,)))
    run.spec = spec(gang, roam, overlay("swap", None, priority=30, duration=300.0, workload=False, sets=[other]))
    run.settle(until=overlay_state("swap", "active"))
    assert run.plant.current("roam").gpus == (uuid(1),)  # type: ignore[union-attr]
    run.spec = spec(gang, roam)
    run.settle()
    assert run.plant.is_ready("gang")
    assert run.plant.current("roam").gpus == (uuid(2),)  # type: ignore[union-attr]


def test_work_whose_provider_has_failed_gives_back_its_place_and_waits() -> None:
    helper = endpoint("helper", [1], state="standby", capabilities=("draw",), restart=Restart(max_restarts=1))
    run = settled(ASK, helper, gpus=2)
    run.plant.behaviour.crashes = frozenset({"helper"})
    run.spec = spec(ASK, helper, overlay("paint", [0], requires=("draw",)))
    run.settle(until=overlay_state("paint", "starting"))
    run.settle(until=lambda decided: run.plant.is_ready("ask") and not decided.ledger.leases)
    assert run.plant.is_ready("ask")
    assert why(run.decide(), "paint").message.endswith("has no place: helper (failed)")


def test_nobody_displaces_work_that_has_yet_to_start_the_provider_which_both_require() -> None:
    helper = endpoint("helper", [1], state="standby", capabilities=("draw",))
    run = settled(helper, gpus=2)
    sketch = overlay("sketch", [0], priority=100, requires=("draw",), preemptible=True)
    paint = overlay("paint", [0, 1], memory=20, priority=600, requires=("draw",))
    run.spec = spec(helper, sketch, paint)
    run.settle(until=overlay_state("sketch", "done"))
    assert run.starts().count("sketch") == 1


def test_who_waits_for_another_version_to_end_is_told_when_there_is_a_place_as_well_or_nothing() -> None:
    first = overlay(
        "first", None, duration=300.0, workload=False, sets=[replace(ASK, process_hash="a", gpus=GpuPins((1,)))]
    )
    other = overlay("other", None, priority=100, duration=300.0, workload=False, sets=[replace(ASK, process_hash="b")])
    stays = overlay("stays", [0], priority=900, duration=5000.0, workload=False)
    run = settled(ASK, gpus=2)
    run.spec = spec(ASK, first)
    run.settle(until=overlay_state("first", "active"))
    run.spec = spec(ASK, first, other)
    said, now = why(run.decide(), "other"), run.plant.now.wall
    assert (said.reason, said.message) == ("SetByAnother", "first sets the same endpoint otherwise, or runs on it")
    assert said.earliest_start == pytest.approx(now + 300, abs=5.0)
    run.spec = spec(ASK, first, stays)
    run.settle(until=overlay_state("stays", "active"))
    run.spec = spec(ASK, first, stays, other)
    late = why(run.decide(), "other").earliest_start
    assert late == pytest.approx(run.plant.now.wall + 5000, abs=5.0)
    run.spec = spec(ASK, first, stays, replace(other, makespan=replace(other.makespan, deadline=now + 1000)))
    assert why(run.decide(), "other").earliest_start is None


def test_an_endpoint_that_goes_on_for_others_is_not_promised_at_the_end_of_its_first_user() -> None:
    helper = endpoint("helper", [0], state="standby", capabilities=("draw",))
    run = settled(helper, gpus=3)
    brief = overlay("brief", [1], duration=300.0, requires=("draw",))
    lasting = overlay("lasting", [2], duration=3000.0, requires=("draw",))
    run.plant.behaviour.run_s = {"brief": 290.0, "lasting": 2900.0}
    run.spec = spec(helper, brief, lasting)
    run.settle(until=lambda d: all(r.state == "active" for r in d.ledger.overlays.values()))
    now = run.plant.now.wall
    other = [replace(helper, state="running", process_hash="other")]
    run.spec = spec(helper, brief, lasting, overlay("other", None, workload=False, sets=other))
    assert why(run.decide(), "other").earliest_start == pytest.approx(now + 3000, abs=5.0)


def test_who_gave_way_and_is_set_aside_later_comes_back_after_both_on_account_of_the_last() -> None:
    run = settled(ASK)
    render, mend = overlay("render", [0], duration=300.0), aside(ASK, duration=1000.0)
    run.spec = spec(ASK, render)
    run.settle(until=overlay_state("render", "active"))
    run.spec = spec(ASK, render, mend)
    run.settle(until=overlay_state("mend", "active"))

    def planned(decided: Plan) -> tuple[str, float]:
        (start,) = [a for a in decided.actions if a.op == "start"]
        return start.reason, round(start.expected[0] - now)

    now = run.plant.now.wall
    assert planned(run.decide()) == ("mend, render no longer need its place", 1000)
    run.settle(until=overlay_state("render", "done"))
    assert planned(run.decide()) == ("mend no longer needs its place", 1000)
    last = run.settle(until=overlay_state("mend", "done"))
    assert planned(last) == ("mend no longer needs its place", 1000)
