"""Endpoints without a place: who is moved so that they have one, and who is not."""

from __future__ import annotations

import pytest
from accounting import settled
from builders import NOW, endpoint, gpu, observed, overlay, spec, uuid
from msgspec.structs import replace
from plant import Run, describe
from test_moves import Box, Trial, box

from reconciler.plan import solver
from reconciler.plan.ledger import Ledger, Timings
from reconciler.plan.observed import PortHolder
from reconciler.plan.planner import plan
from reconciler.spec.spec import EndpointSpec, GpuCount

SMALL = endpoint("small", 1, memory=30, priority=10, movable=True, preemptible=False, port=8001)
FIRM = endpoint("firm", [1], memory=30, priority=900, port=8002)
LARGE = endpoint("large", 1, priority=500, port=8003)


def where(run: Run) -> dict[str, tuple[str, ...]]:
    """Who runs where."""
    return {i.subject.name: i.gpus for i in run.plant.incarnations if i.alive}


def test_one_that_may_be_moved_makes_room_for_a_more_important_one_without_a_place_and_only_once() -> None:
    run = settled(SMALL, FIRM, gpus=2)
    assert where(run)["small"] == (uuid(0),)
    run.spec = spec(SMALL, FIRM, LARGE)
    decided = run.decide()
    move = decided.ledger.endpoints["small"].move
    assert move is not None
    assert (move.gpus, move.by) == ((uuid(1),), "endpoint/large")
    stop = next(a for a in decided.actions if a.op == "stop")
    assert stop.reason == "makes room for large, and moves to GPU 1"
    run.settle()
    assert where(run) == {"small": (uuid(1),), "firm": (uuid(1),), "large": (uuid(0),)}
    assert (run.starts().count("small"), run.stops()) == (2, ["small"])
    assert run.ledger.endpoints["small"].move is None
    assert run.decide().actions == ()


def test_one_that_lost_its_place_with_its_gpu_gets_another_by_a_move() -> None:
    run = settled(SMALL, FIRM, gpus=3)
    run.spec = spec(SMALL, FIRM, LARGE)
    run.settle()
    assert where(run)["large"] == (uuid(2),)
    (large,) = (i.id for i in run.plant.incarnations if i.subject.name == "large")
    run.plant.end(large, 1)
    run.plant.overrides = {2: {"state": "lost"}}
    run.settle()
    assert where(run) == {"small": (uuid(1),), "firm": (uuid(1),), "large": (uuid(0),)}


@pytest.mark.parametrize(
    ("small", "floors"),
    [
        (replace(SMALL, priority=500), {}),
        (replace(SMALL, movable=False), {}),
        (replace(SMALL, capabilities=("ask",)), {"ask": 1}),
    ],
    ids=["as important", "not movable", "the last provider"],
)
def test_nobody_is_moved_for_it_who_would_not_be_for_an_overlay(small: EndpointSpec, floors: dict[str, int]) -> None:
    run = settled(small, FIRM, floors=floors, gpus=2)
    run.spec = spec(small, FIRM, LARGE, floors=floors)
    last = run.settle()
    assert run.stops() == []
    assert [(b.subject.name, b.reason) for b in last.blocked] == [("large", "InsufficientGpus")]


def test_nobody_is_moved_for_one_that_comes_back_when_an_overlay_is_over() -> None:
    run = settled(SMALL, FIRM, gpus=3)
    run.spec = spec(SMALL, FIRM, LARGE)
    run.settle()
    run.spec = spec(SMALL, FIRM, LARGE, overlay("render", [2], priority=600))
    run.settle(until=lambda decided: decided.ledger.overlays["render"].state == "active")
    assert run.ledger.endpoints["small"].move is None
    run.settle()
    assert run.stops() == ["large"]


def test_nobody_is_moved_for_one_whose_port_somebody_else_has() -> None:
    run = settled(SMALL, FIRM, gpus=2)
    run.plant.ports = {8003: PortHolder(8003, 4711, "nginx")}
    run.spec = spec(SMALL, FIRM, LARGE)
    run.settle()
    assert run.stops() == []


def test_it_stays_if_the_other_one_is_wanted_no_more_before_it_was_asked_to_stop() -> None:
    run = settled(SMALL, FIRM, gpus=2)
    run.spec = spec(SMALL, FIRM, LARGE)
    run.ledger = run.decide().ledger
    run.spec = spec(SMALL, FIRM)
    run.settle()
    assert run.stops() == []
    assert run.ledger.endpoints["small"].move is None


@pytest.mark.parametrize("death", range(1, 8))
def test_a_daemon_that_dies_after_any_decision_leaves_the_next_one_the_same_move(death: int) -> None:
    run = settled(SMALL, FIRM, gpus=2)
    run.spec = spec(SMALL, FIRM, LARGE)
    run.die_after(death)
    run.settle()
    assert (run.starts().count("small"), run.stops()) == (2, ["small"])
    assert where(run)["large"] == (uuid(0),)


def test_without_the_solver_nobody_is_moved_for_it_and_the_plan_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = settled(SMALL, FIRM, gpus=2)
    monkeypatch.setattr(solver, "is_available", lambda: False)
    run.spec = spec(SMALL, FIRM, LARGE)
    decided = run.decide()
    assert decided.actions == ()
    (note,) = decided.notes
    assert "small may be moved" in note


def test_the_solver_is_not_asked_where_no_moves_could_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    run = settled(SMALL, FIRM, gpus=2)

    def fail() -> bool:
        raise AssertionError("asked")

    monkeypatch.setattr(solver, "is_available", fail)
    run.spec = spec(SMALL, FIRM, replace(LARGE, gpus=GpuCount(2)))
    assert run.decide().actions == ()


# ---------------------------------------------------------------- against trying out every way


def without_victims(here: Box) -> Box:
    """The same box, on which nobody gives way."""
    firm = {n: replace(e, preemptible=False) for n, e in here.endpoints.items()}
    asks = replace(here.overlays[0], allow_baseline_eviction=True)
    return replace(here, endpoints=firm, overlays=[asks])


@pytest.mark.parametrize("block", range(3))
def test_no_moves_that_make_room_for_an_endpoint_cost_less_than_those_chosen(block: int) -> None:
    moving = 0
    for number in range(block * 60, block * 60 + 60):
        here = without_victims(box(number))
        (asks,) = here.overlays
        assert asks.gpus is not None
        late = endpoint("late", 1, priority=asks.priority, port=9000)
        late = replace(late, gpus=asks.gpus, memory=asks.memory)
        trial = Trial(here)
        seen = observed(*(gpu(i, total=size) for i, size in enumerate(here.sizes)), incarnations=here.running())
        timings = {name: Timings(load, 0.0, 0.0) for name, load in here.loads.items()}
        files = spec(*here.endpoints.values(), late, floors=here.floors)
        decided = plan(files, seen, Ledger(timings=timings), NOW)
        moved = {
            n: tuple(sorted(int(g.removeprefix("GPU-")) for g in r.move.gpus))
            for n, r in decided.ledger.endpoints.items()
            if r.move is not None
        }
        comes = any(a.op == "start" and a.subject.name == "late" for a in decided.actions)
        assert trial.cost(set(), moved, admitted=comes) == trial.best, f"box {number}: {describe(decided)}"
        moving += bool(moved)
    assert moving, "nobody moves on any of these boxes"
