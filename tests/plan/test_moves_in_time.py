"""One move from the decision until everybody is back: what is expected of whom, and what a crash on the way changes."""

from __future__ import annotations

import sys

import pytest
from accounting import settled
from builders import endpoint, overlay, spec, uuid
from msgspec.structs import replace
from plant import Plant, Run, overlay_state

from reconciler.plan import solver
from reconciler.plan.agenda import AgendaTracker
from reconciler.plan.forecast import forecast
from reconciler.spec.spec import Spec
from reconciler.units import GIB

CODE = endpoint("code", 1, memory=30, priority=500, movable=True, preemptible=False, port=8001)
CHAT = endpoint("chat", [1], memory=30, priority=900, port=8002)
RENDER = overlay("render", 1, priority=600)


@pytest.fixture
def run() -> Run:
    """Two GPUs, an endpoint on each: only after a move is one of them whole."""
    found = settled(CODE, CHAT, gpus=2)
    assert place(found) == (uuid(0),)
    return found


def place(run: Run, name: str = "code") -> tuple[str, ...]:
    """Where an endpoint runs."""
    current = run.plant.current(name)
    assert current is not None
    return current.gpus


def asked(run: Run) -> Spec:
    """The set points, with the overlay."""
    return spec(CODE, CHAT, RENDER) if "render" not in run.spec.overlays else run.spec


def test_it_is_stopped_and_started_once_and_stays_where_it_is_when_the_overlay_is_over(run: Run) -> None:
    run.spec = asked(run)
    run.settle(until=overlay_state("render", "active"))
    assert run.plant.current("render", "workload") is not None
    last = run.settle(until=overlay_state("render", "done"))
    assert last.ledger.overlays["render"].moved == ("code",)
    run.settle()
    assert (run.starts().count("code"), run.stops().count("code")) == (2, 1)
    assert place(run) == (uuid(1),)
    assert run.plant.is_ready("code")
    assert run.ledger.endpoints["code"].move is None


def test_its_new_place_is_recorded_before_it_is_stopped_and_what_is_expected_of_it_is_on_the_agenda(run: Run) -> None:
    run.spec = asked(run)
    decided, _ = run.step()
    move = decided.ledger.endpoints["code"].move
    assert move is not None
    assert (move.gpus, move.by) == ((uuid(1),), "render")
    assert not any(a.op == "stop" and a.ready for a in decided.actions), "it drains first"
    seen = set()
    while not run.plant.is_ready("code") or run.ledger.endpoints["code"].move is not None:
        decided, acted = run.step()
        state = decided.endpoints["code"].state
        seen.add(state)
        if state != "healthy":
            entry = AgendaTracker(decided.ledger.agenda, decided.now.wall).entry("code")
            assert entry is not None, f"{state} and not expected"
            assert state in entry.expected_states
        if not acted:
            run.plant.advance(1.0)
    assert {"stopping", "pending", "starting"} <= seen
    decided, _ = run.step()
    assert not [e for e in decided.ledger.agenda if e.endpoint == "code"]


@pytest.mark.parametrize("death", range(1, 12))
def test_a_daemon_that_dies_after_any_decision_leaves_the_next_one_the_same_move(run: Run, death: int) -> None:
    run.spec = asked(run)
    run.die_after(death)
    run.settle()
    assert (run.starts().count("code"), run.stops().count("code")) == (2, 1)
    assert run.starts().count("render") == 1
    assert place(run) == (uuid(1),)


def test_it_stays_if_the_overlay_is_withdrawn_before_it_was_asked_to_stop(run: Run) -> None:
    run.spec = asked(run)
    run.ledger = run.decide().ledger
    assert run.ledger.endpoints["code"].move is not None
    run.spec = spec(CODE, CHAT)
    run.settle()
    assert run.stops() == []
    assert run.ledger.endpoints["code"].move is None


def test_it_is_seen_through_if_the_overlay_is_withdrawn_while_it_stops(run: Run) -> None:
    run.spec = asked(run)
    run.settle(until=lambda _: "code" in run.stops())
    run.spec = spec(CODE, CHAT)
    run.settle()
    assert run.plant.is_ready("code")
    assert (run.starts().count("code"), run.stops().count("code")) == (2, 1)


def test_it_finds_another_place_if_the_promised_one_breaks_on_the_way() -> None:
    run = Run(spec(CODE, CHAT, RENDER), Plant([80 * GIB, 80 * GIB]))
    run.spec = spec(CODE, CHAT)
    run.settle()
    run.spec = spec(CODE, CHAT, RENDER)
    run.settle(until=lambda _: "code" in run.stops())
    run.plant.overrides = {1: {"healthy": False}}
    last = run.settle(until=overlay_state("render", "active"))
    assert run.plant.current("code") is None
    assert any(b.subject.name == "code" for b in last.blocked), "it has no place, and nobody says so"
    run.settle(until=overlay_state("render", "done"))
    run.settle()
    assert run.plant.is_ready("code")
    assert place(run) == (uuid(0),)


def test_who_was_moved_lately_is_not_moved_again_at_once(run: Run) -> None:
    run.spec = asked(run)
    run.settle(until=lambda _: run.plant.is_ready("code") and place(run) == (uuid(1),))
    run.spec = spec(CODE, CHAT, RENDER, overlay("next", [1], memory=30, priority=700))
    decided, _ = run.step()
    assert decided.ledger.overlays["next"].state == "pending"
    assert run.ledger.endpoints["code"].move is None or run.ledger.endpoints["code"].move.by == "render"


def test_a_forecast_shows_the_move_and_how_long_it_does_not_answer(run: Run) -> None:
    ahead = forecast(asked(run), run.plant.observe(), run.ledger, run.plant.now, 3600.0)
    assert [m.message for m in ahead.moments if m.kind == "evict"] == ["has code moved"]
    (outage,) = ahead.outages
    assert (outage.endpoint, outage.overlay, outage.lasts) == ("code", "render", False)
    assert outage.end - outage.begin < 120
    assert {b.gpu for b in ahead.bars if b.name == "code"} == {uuid(0), uuid(1)}


def test_without_the_solver_nobody_is_moved_and_the_plan_says_what_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "is_available", lambda: False)
    run.spec = asked(run)
    decided = run.decide()
    assert decided.actions == ()
    assert decided.ledger.overlays["render"].state == "pending"
    (note,) = decided.notes
    assert "code may be moved" in note
    assert "pip install 'reconciler[solver]'" in note


def test_a_solver_that_is_there_and_cannot_be_imported_moves_nobody(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    run.spec = asked(run)
    decided = run.decide()
    assert decided.ledger.overlays["render"].state == "pending"
    assert decided.actions == ()
    assert not solver.can_be_imported()


def test_what_fits_without_a_move_asks_no_solver(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise AssertionError("asked")

    monkeypatch.setattr(solver, "is_available", fail)
    run.spec = spec(CODE, CHAT, replace(overlay("small", 1, memory=20), priority=1000))
    decided = run.decide()
    assert not decided.solved
    assert decided.ledger.overlays["small"].state != "pending"


def test_a_window_that_fits_only_after_a_move_is_told_so_and_begins_after_it(run: Run) -> None:
    start = run.plant.now.wall + 3600.0
    run.spec = spec(CODE, CHAT, replace(RENDER, makespan=replace(RENDER.makespan, start=start)))
    decided = run.decide()
    (told,) = (b for b in decided.blocked if b.subject.name == "render")
    assert "it fits once code is moved, which is decided when it is due" in told.message
    assert told.earliest_start == start
    assert decided.actions == ()
    run.settle(until=overlay_state("render", "active"))
    assert run.plant.now.wall - start < 30
    assert place(run) == (uuid(1),)


def test_a_window_for_which_no_move_makes_room_is_told_nothing_of_one(run: Run) -> None:
    start = run.plant.now.wall + 3600.0
    run.spec = spec(CODE, CHAT, replace(overlay("wide", 2), makespan=replace(RENDER.makespan, start=start)))
    (told,) = (b for b in run.decide().blocked if b.subject.name == "wide")
    assert "moved" not in told.message


def test_without_the_solver_a_window_that_a_move_would_help_is_told_what_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "is_available", lambda: False)
    start = run.plant.now.wall + 3600.0
    run.spec = spec(CODE, CHAT, replace(RENDER, makespan=replace(RENDER.makespan, start=start)))
    (told,) = (b for b in run.decide().blocked if b.subject.name == "render")
    assert any(
        "pip install 'reconciler[solver]'" in hint and "once code is moved" in hint for hint in told.alternatives
    )
