"""Standby endpoints that run because an overlay requires what they offer: who else has them, and whom they end with."""

from __future__ import annotations

from accounting import lawful
from builders import endpoint, overlay, spec
from msgspec.structs import replace
from plant import Plant, Run, overlay_state

from reconciler.plan.actions import Blocked, Plan
from reconciler.spec.spec import EndpointSpec, OverlaySpec
from reconciler.units import GIB

HELPER = endpoint("helper", [1], memory=40, state="standby", capabilities=("draw",), port=8001)
LARGE = replace(HELPER, memory=endpoint("large", memory=70).memory)
SPARE = endpoint("spare", [2], memory=70, state="standby", capabilities=("draw",), port=8002)
SKETCH = overlay("sketch", [0], priority=100, duration=900.0, requires=("draw",), preemptible=True)
PAINT = overlay("paint", [0, 1], memory=20, priority=600, duration=900.0, requires=("draw",))


def settled(*items: EndpointSpec | OverlaySpec, gpus: int = 2) -> Run:
    """A box on which `sketch` runs beside what it requires; every decision is checked."""
    run = Run(spec(*items), Plant(totals=[80 * GIB] * gpus), watch=lawful)
    run.plant.behaviour.default_run_s = 850.0
    run.settle(until=overlay_state("sketch", "active"))
    return run


def why(decided: Plan, name: str) -> Blocked:
    (found,) = [b for b in decided.blocked if b.subject.name == name]
    return found


def states(decided: Plan) -> dict[str, str]:
    return {n: r.state for n, r in decided.ledger.overlays.items()}


def test_who_displaces_an_overlay_takes_over_the_provider_that_both_require_as_it_runs() -> None:
    run = settled(HELPER, SKETCH)
    run.spec = spec(HELPER, SKETCH, PAINT)
    run.settle(until=overlay_state("paint", "completing"))
    assert run.starts() == ["helper", "sketch", "paint"], "nothing of the provider was started anew"
    run.settle(until=overlay_state("sketch", "done"))
    last = run.settle()
    assert last.ledger.leases == ()
    assert run.plant.current("helper") is None


def test_nobody_is_displaced_for_work_that_would_then_have_no_room_for_the_provider_which_both_require() -> None:
    run = settled(LARGE, SKETCH)
    run.spec = spec(LARGE, SKETCH, PAINT)
    decided = run.decide()
    assert states(decided) == {"paint": "pending", "sketch": "active"}
    said = why(decided, "paint")
    assert said.reason == "FloorWouldBreak"
    assert said.message.endswith("helper, which offers draw, runs for sketch, and has no place beside this one")
    assert said.alternatives == ("wait for sketch to end, or add a provider",)
    run.settle(until=overlay_state("sketch", "done"))
    assert run.starts() == ["helper", "sketch"]


def test_where_the_provider_has_no_room_beside_it_another_one_is_started_in_its_stead() -> None:
    run = settled(LARGE, SKETCH, gpus=3)
    run.spec = spec(LARGE, SPARE, SKETCH, PAINT)
    run.settle(until=overlay_state("paint", "active"))
    assert run.starts() == ["helper", "sketch", "spare", "paint"]


def test_a_provider_that_is_still_to_be_started_is_taken_over_wherever_it_fits() -> None:
    roams = replace(HELPER, gpus=endpoint("any", 1).gpus)
    run = Run(spec(roams, SKETCH), Plant(totals=[80 * GIB] * 2), watch=lawful)
    run.ledger = run.decide().ledger
    assert states(run.decide()) == {"sketch": "starting"}
    run.spec = spec(roams, SKETCH, PAINT)
    run.settle(until=overlay_state("paint", "done"))
    assert run.starts()[:2] == ["helper", "paint"]


def test_work_is_not_displaced_with_the_provider_that_other_work_needs_as_well() -> None:
    """Which is what it started first, for both: it would be stopped, and its place is wanted."""
    third = overlay("third", [2], priority=50, duration=900.0, requires=("draw",))
    takes = overlay("takes", [0, 1], priority=600)
    run = settled(HELPER, SKETCH, gpus=3)
    run.spec = spec(HELPER, SKETCH, third)
    run.settle(until=overlay_state("third", "active"))
    run.spec = spec(HELPER, SKETCH, third, takes)
    decided = run.decide()
    assert states(decided) == {"sketch": "active", "takes": "pending", "third": "active"}
    assert why(decided, "takes").reason == "FloorWouldBreak"
    run.spec = spec(HELPER, SKETCH, takes)
    run.settle(until=overlay_state("takes", "active"))


def test_of_two_who_come_together_one_takes_over_the_provider_for_both() -> None:
    other = overlay("other", [2], priority=500, duration=900.0, requires=("draw",))
    run = settled(HELPER, SKETCH, gpus=3)
    run.spec = spec(HELPER, SKETCH, PAINT, other)
    run.settle(until=lambda d: {"paint", "other"} <= {n for n, s in states(d).items() if s == "active"})
    assert run.starts().count("helper") == 1
    last = run.settle()
    assert last.ledger.leases == ()


def test_work_that_waits_for_a_provider_to_load_is_not_robbed_of_it() -> None:
    ask = endpoint("ask", [1], priority=40, capabilities=("ask",))
    run = Run(spec(ask), Plant(totals=[80 * GIB] * 2), watch=lawful)
    run.step()
    waits = overlay("waits", [0], priority=50, requires=("ask",))
    run.spec = spec(ask, waits)
    run.settle(until=overlay_state("waits", "starting"))
    assert not run.plant.is_ready("ask")
    run.spec = spec(ask, waits, overlay("takes", [1], priority=600))
    assert states(run.decide()) == {"takes": "pending", "waits": "starting"}


def test_a_window_has_a_place_for_the_provider_that_ends_with_other_work_before_it() -> None:
    run = settled(LARGE, SKETCH)
    start = run.plant.now.wall + 3000
    night = replace(PAINT, gpus=SKETCH.gpus, makespan=replace(PAINT.makespan, start=start))
    run.spec = spec(LARGE, SKETCH, night)
    decided, _ = run.step()
    assert why(decided, "paint").reason == "NotYet"
    run.plant.advance(1.0)
    run.spec = spec(LARGE, SKETCH, night, overlay("other", [1], start=start))
    assert why(run.decide(), "other").reason == "WindowTaken"
    run.settle(until=overlay_state("paint", "active"))
    assert "other" not in run.starts()


def test_whoever_waits_for_an_overlay_to_end_is_told_that_the_provider_ends_with_it() -> None:
    run = settled(LARGE, SKETCH)
    later = overlay("later", [0], priority=50, requires=("draw",))
    run.spec = spec(LARGE, SKETCH, later)
    run.settle(until=overlay_state("sketch", "completing"))
    said = why(run.decide(), "later")
    assert (said.reason, said.transient) == ("NoProvider", True)
    assert said.message == "it requires draw, and what offers it has no place: helper (ends with sketch)"
    run.settle(until=overlay_state("later", "done"))


def test_what_an_overlay_sets_aside_itself_is_no_provider_for_it() -> None:
    run = settled(HELPER, SKETCH)
    run.spec = spec(HELPER)
    run.settle()
    run.spec = spec(HELPER, overlay("torn", [0], requires=("draw",), sets=[replace(HELPER, state="stopped")]))
    assert why(run.decide(), "torn").reason == "NoProvider"


def test_work_whose_provider_is_edited_to_offer_something_else_before_it_began_gives_back_its_place() -> None:
    chat = endpoint("chat", [0], priority=40, port=8003)
    run = Run(spec(HELPER, chat), Plant(totals=[80 * GIB] * 2), watch=lawful)
    run.settle()
    run.spec = spec(HELPER, chat, SKETCH)
    run.settle(until=overlay_state("sketch", "starting"))
    edited = replace(HELPER, capabilities=("ask",))
    run.spec = spec(edited, chat, SKETCH)
    last = run.settle()
    assert why(last, "sketch").message == "nothing offers draw"
    assert run.plant.is_ready("chat")
    run.spec = spec(HELPER, chat, SKETCH)
    run.settle(until=overlay_state("sketch", "done"))
