"""Every planned transition is on the agenda before its first act, whatever brings it about."""

from __future__ import annotations

import pytest
from builders import NOW, endpoint, foreign, overlay, spec
from hypothesis import given
from msgspec.structs import replace
from plant import Behaviour, Plant, Run, overlay_state
from worlds import World, examples, worlds

from reconciler.errors import Problem
from reconciler.health.assess import Facts, assess
from reconciler.health.incident import Incident
from reconciler.plan.actions import WAITS, Plan
from reconciler.plan.agenda import (
    LEAVING_STATES,
    PLANNED_CAUSES,
    RETURNING_STATES,
    SLACK_FACTOR,
    SLACK_S,
    AgendaTracker,
)
from reconciler.plan.ledger import AgendaEntry, Timings
from reconciler.plan.overlays import MEMORY_RETURN_S, next_window
from reconciler.plan.requests import clean_start, stopped
from reconciler.spec.spec import OverlaySpec
from reconciler.units import GIB

ASK = endpoint("ask", [0], priority=100)
HOUR = 3600.0
RENDER = overlay("render", gpus=[0], priority=500, duration=300.0)


def settled() -> Run:
    run = Run(spec(ASK), Plant(totals=[80 << 30] * 2))
    run.settle()
    run.plant.advance(600.0)
    run.settle()
    return run


def decided_timings(run: Run) -> Timings:
    return run.situation().timings(ASK)


def acts(decided: Plan) -> list[str]:
    return [a.op for a in decided.actions if a.ready and a.op not in WAITS and a.subject.name == "ask"]


CHANGES = {
    "evict": (spec(ASK, RENDER), "stopping"),
    "edit": (spec(replace(ASK, process_hash="edited")), "stopping"),
    "move": (spec(replace(endpoint("ask", [1], priority=100), process_hash="moved")), "stopping"),
    "maintenance": (spec(replace(ASK, state="stopped")), "stopping"),
    "removal": (spec(), "stopping"),
    "down": (stopped(spec(ASK), ("ask",)), "stopping"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_file_or_a_person_brings_about_is_on_the_agenda_in_the_decision_that_first_acts(change: str) -> None:
    run = settled()
    run.spec, state = CHANGES[change]
    decided = run.decide()
    assert acts(decided)
    tracker = AgendaTracker(decided.ledger.agenda, decided.now.wall)
    assert tracker.is_endpoint_in_scheduled_transition("ask")
    assert state in (tracker.get_scheduled_endpoint_state("ask") or ())


def test_an_entry_advances_what_is_behind_it_is_expected_no_more() -> None:
    run = settled()
    run.spec = spec(ASK, RENDER)
    seen: list[tuple[str, tuple[str, ...]]] = []

    def note(_: Run, decided: Plan) -> None:
        for entry in decided.ledger.agenda:
            seen.append((decided.endpoints["ask"].state, entry.expected_states))

    run.watch = note
    run.settle(until=lambda p: p.ledger.overlays["render"].state == "done" and not p.ledger.agenda)
    leaving = {states for state, states in seen if state == "stopping"}
    starting = {states for state, states in seen if state == "starting"}
    assert all(states[-1] == "healthy" and "stopping" in states for states in leaving)
    assert starting == {("pending", "starting", "healthy")}


def test_one_that_is_edited_again_while_it_comes_back_is_expected_to_stop_again() -> None:
    run = settled()
    run.spec = spec(replace(ASK, process_hash="edited"))
    decided = run.settle(until=lambda p: p.endpoints["ask"].state == "starting")
    assert AgendaTracker(decided.ledger.agenda, decided.now.wall).get_scheduled_endpoint_state("ask") is not None
    run.spec = spec(replace(ASK, process_hash="edited again"))
    decided = run.decide()
    assert "stop" in acts(decided)
    expected = AgendaTracker(decided.ledger.agenda, decided.now.wall).get_scheduled_endpoint_state("ask")
    assert expected == (*LEAVING_STATES, *RETURNING_STATES)


STAGES = {
    "edit": (spec(replace(ASK, process_hash="edited")), (*LEAVING_STATES, *RETURNING_STATES)),
    "maintenance": (spec(replace(ASK, state="stopped")), LEAVING_STATES),
    "removal": (spec(), LEAVING_STATES),
}


@pytest.mark.parametrize("change", STAGES)
def test_what_is_done_for_a_file_has_twice_its_way_and_a_minute(change: str) -> None:
    run = settled()
    times = decided_timings(run)
    way = times.drain_s + times.stop_s + times.load_s if change != "removal" else SLACK_S
    run.spec, states = STAGES[change]
    decided = run.decide()
    first = decided.actions[0]
    until = first.expected[0] + SLACK_FACTOR * way + SLACK_S
    assert decided.ledger.agenda == (AgendaEntry("ask", states, decided.now.wall, until, first.reason, None),)


def test_a_first_start_and_the_second_half_of_an_edit_are_expected_to_come_up_and_nothing_else() -> None:
    run = Run(spec(ASK), Plant(totals=[80 << 30]))
    (first,) = run.decide().ledger.agenda
    assert (first.expected_states, first.start) == (("pending", *RETURNING_STATES), NOW.wall)
    run = settled()
    run.spec = STAGES["edit"][0]
    (before,) = run.decide().ledger.agenda
    decided = run.settle(until=lambda p: any(a.op == "start" and a.ready for a in p.actions))
    assert decided.ledger.agenda == (replace(before, expected_states=("pending", *RETURNING_STATES)),)


def test_one_that_gives_way_is_expected_back_its_way_and_slack_after_the_end_foreseen_then_after_the_true_one() -> None:
    run = settled()
    run.spec = spec(ASK, RENDER)
    begun = run.decide().now.wall
    times = decided_timings(run)
    way = SLACK_FACTOR * (times.drain_s + times.stop_s + times.load_s) + SLACK_S
    states = (*LEAVING_STATES, *RETURNING_STATES)

    def entry(until: float) -> AgendaEntry:
        return AgendaEntry("ask", states, begun, until, "gives way to render", "render")

    decided = run.settle(until=overlay_state("render", "active"))
    assert decided.ledger.agenda == (entry(decided.ledger.overlays["render"].since.wall + 300.0 + 60.0 + way),)
    decided = run.settle(until=overlay_state("render", "completing"))
    assert decided.ledger.agenda == (entry(decided.ledger.overlays["render"].since.wall + way),)


def test_one_that_a_stranger_keeps_from_coming_back_has_the_time_of_its_way_from_when_the_work_was_over() -> None:
    run = settled()
    run.spec = spec(ASK, RENDER)
    run.settle(until=overlay_state("render", "active"))
    run.plant.foreign = {0: [foreign(99, 70 << 30)]}
    decided = run.settle(until=overlay_state("render", "restoring", "done"))
    while decided.ledger.agenda and "stopped" in decided.ledger.agenda[0].expected_states:
        decided, _ = run.step()
        run.plant.advance(0.5)
    times = decided_timings(run)
    (entry,) = decided.ledger.agenda
    way = SLACK_FACTOR * (times.drain_s + times.stop_s + times.load_s) + SLACK_S
    assert entry.expected_states == ("pending", *RETURNING_STATES)
    assert entry.until == decided.now.wall + way
    run.plant.advance(20.0)
    assert run.decide().ledger.agenda == (entry,), "it stays, overdue or not"
    run.plant.advance(way)
    assert run.decide().ledger.agenda == (entry,)


def test_those_that_load_one_after_the_other_on_one_gpu_have_each_the_time_of_its_turn() -> None:
    several = [endpoint(name, [0], memory=15, priority=40) for name in ("a", "b", "c")]
    run = Run(spec(*several), Plant(totals=[80 << 30]))
    run.settle()
    run.plant.advance(600.0)
    run.settle()
    run.spec = spec(*several, RENDER)
    run.settle(until=overlay_state("render", "active"))
    decided = run.settle(until=lambda p: any(a.op == "start" and a.ready for a in p.actions))
    last = {a.subject.name: a.expected[1] for a in decided.actions if a.op == "start"}
    turns = {e.endpoint: (e.until - SLACK_S - decided.now.wall) / SLACK_FACTOR for e in decided.ledger.agenda}
    assert sorted(last) == sorted(turns) == ["a", "b", "c"]
    assert max(turns.values()) > min(turns.values())
    for name, at in last.items():
        times = run.situation().timings(next(e for e in several if e.name == name))
        way = times.drain_s + times.stop_s + times.load_s
        assert turns[name] == pytest.approx(max(way, at - decided.now.wall))


def test_an_endpoint_that_an_overlay_alone_wants_has_its_entry_on_the_account_of_that_one() -> None:
    run = settled()
    run.spec = spec(ASK, overlay("sets", None, workload=False, sets=[endpoint("aux", [1], port=8100)]))
    run.settle(until=overlay_state("sets", "active"))
    (entry,) = run.ledger.agenda
    assert (entry.endpoint, entry.reason, entry.overlay) == ("aux", "as overlay sets sets it", "sets")


def test_what_is_expected_of_one_that_is_away_stays_as_it_was_while_the_overlay_cannot_be_read() -> None:
    run = settled()
    run.spec = spec(ASK, RENDER)
    run.settle(until=overlay_state("render", "active"))
    before = run.ledger.agenda
    run.spec = replace(spec(ASK), problems=(Problem("overlays/render.yaml", 3, 1, "what is this?"),))
    run.plant.advance(10.0)
    assert run.decide().ledger.agenda == before
    assert [entry.endpoint for entry in before] == ["ask"]


def test_a_clean_start_is_on_the_agenda() -> None:
    run = settled()
    run.ledger, _ = clean_start(run.ledger, ["ask"], run.plant.now)
    decided = run.decide()
    assert acts(decided)
    assert AgendaTracker(decided.ledger.agenda, decided.now.wall).is_endpoint_in_scheduled_transition("ask")


def test_a_window_to_come_is_listed_before_it_opens_and_in_force_when_its_victims_leave() -> None:
    run = settled()
    start = run.plant.now.wall + 3000.0
    run.spec = spec(ASK, overlay("render", gpus=[0], priority=500, duration=300.0, start=start))
    decided = run.decide()
    (to_come,) = decided.agenda
    assert (to_come.endpoint, to_come.overlay) == ("ask", "render")
    times = decided_timings(run)
    way = times.drain_s + times.stop_s + times.load_s
    assert decided.now.wall < to_come.start < start
    assert to_come.until == start + 300.0 + MEMORY_RETURN_S + SLACK_FACTOR * way + SLACK_S
    assert to_come.expected_states == (*LEAVING_STATES, *RETURNING_STATES)
    assert to_come.reason == "gives way to render"
    assert decided.ledger.agenda == (), "what is to come explains nothing yet"
    run.settle(until=lambda p: bool(acts(p)))
    (entry,) = run.ledger.agenda
    assert to_come.start == pytest.approx(entry.start, abs=2.0)


@given(worlds())
@examples(30)
def test_nothing_planned_is_done_to_an_endpoint_without_an_entry_that_expects_where_it_stands(world: World) -> None:
    def covered(_: Run, decided: Plan) -> None:
        tracker = AgendaTracker(decided.ledger.agenda, decided.now.wall)
        for action in decided.actions:
            if action.subject.kind != "endpoint" or not action.ready or action.op in WAITS:
                continue
            if action.cause.kind in PLANNED_CAUSES and action.subject.name in decided.endpoints:
                assert tracker.is_endpoint_in_scheduled_transition(action.subject.name), action

    run = Run(world.before, world.plant(), watch=covered)
    run.settle()
    world.happen(run)
    run.settle()


def test_a_night_of_a_schedule_whose_place_a_more_important_window_has_is_not_listed() -> None:
    run, day = settled(), 86400.0
    night = overlay("night", [0], priority=500, duration=300.0, on_overrun="stop")
    night = replace(night, makespan=replace(night.makespan, schedule="0 22 * * *", timezone="UTC"))
    first = next_window(night.makespan, run.plant.now.wall)

    def listed(*others: OverlaySpec) -> list[tuple[str | None, float]]:
        run.spec = spec(ASK, night, *others)
        way = MEMORY_RETURN_S + decided_timings(run).stop_s + decided_timings(run).drain_s
        return [(e.overlay, round(e.start + way - first, 3)) for e in run.decide().agenda]

    both = [("night", 0.0), ("night", day)]
    assert sorted(listed()) == both
    main = overlay("main", [0], priority=900, start=first + day + 60.0, duration=300.0)
    assert sorted(listed(main)) == [("main", day + 60.0), ("night", 0.0)]
    assert both == [e for e in sorted(listed(replace(main, priority=400))) if e[0] == "night"], "that one is hindered"
    elsewhere = replace(main, gpus=overlay("main", [1]).gpus)
    assert sorted(listed(elsewhere)) == both
    earlier = replace(main, makespan=replace(main.makespan, start=first + day - HOUR, on_overrun="stop"))
    assert sorted(listed(earlier)) == [("main", day - HOUR), *both], "over before it begins"


def test_what_is_over_or_to_come_schedules_nothing() -> None:
    run = settled()
    run.spec = spec(ASK, RENDER)
    entry = run.decide().ledger.agenda[0]
    for moment in (entry.start - 1, entry.until):
        tracker = AgendaTracker([entry], moment)
        assert not tracker.is_endpoint_in_scheduled_transition("ask")
        assert tracker.get_scheduled_endpoint_state("ask") is None
    assert NOW.wall < entry.until


def test_while_several_overlays_keep_one_away_the_entry_is_on_the_account_of_the_one_that_ends_last() -> None:
    run = settled()
    mend = overlay("tidy", None, priority=50, duration=3000.0, workload=False, sets=[replace(ASK, state="stopped")])
    run.spec = spec(ASK, RENDER)
    run.settle(until=overlay_state("render", "active"))
    run.spec = spec(ASK, RENDER, mend)
    run.settle(until=overlay_state("tidy", "active"))
    (entry,) = run.ledger.agenda
    assert entry.overlay == "tidy"
    assert entry.until > run.plant.now.wall + 3000
    run.spec = spec(ASK, RENDER)
    run.settle(until=overlay_state("tidy", "cancelled"))
    (entry,) = run.ledger.agenda
    assert entry.overlay == "render"


def test_an_endpoint_that_is_wanted_again_while_it_stops_is_expected_to_start() -> None:
    ask = endpoint("ask", [0])
    run = Run(spec(ask), Plant(totals=[80 * GIB], behaviour=Behaviour(stop_s=20.0)))
    run.settle()
    incidents: tuple[Incident, ...] = ()

    def judged(run: Run, decided: Plan) -> None:
        nonlocal incidents
        facts = Facts(run.spec, decided.endpoints, decided.ledger, run.plant.observe(), (), decided.blocked)
        incidents, _ = assess(facts, incidents, decided.now)
        assert incidents == ()

    run.watch = judged
    run.spec = spec(replace(ask, state="stopped"))
    run.settle(until=lambda decided: decided.endpoints["ask"].state == "stopping")
    run.plant.advance(1.0)
    run.spec = spec(ask)
    run.settle()
    assert run.plant.is_ready("ask")
    assert run.starts() == ["ask", "ask"]
