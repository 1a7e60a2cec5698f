"""Endpoints that need no decision: the plan is the same as if every one of them had been decided on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from builders import AN_HOUR_AGO, NOW, endpoint, gpu, incarnation, observed, overlay, ready, spec
from hypothesis import given
from msgspec.structs import replace
from plant import Run
from worlds import World, examples, worlds

from reconciler.plan import situation as situations
from reconciler.plan.actions import Plan
from reconciler.plan.ledger import EndpointRecord, Exit, Ledger, Move, Nap
from reconciler.plan.observed import Incarnation, StopProgress
from reconciler.plan.planner import plan
from reconciler.plan.situation import Situation


@contextmanager
def nobody_calm() -> Iterator[None]:
    """Every endpoint is decided on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(situations, "calm_ones", lambda _spec, seen, *_: ({}, list(seen.incarnations)))
        yield


@given(worlds())
@examples(45)
def test_a_plan_is_the_same_if_every_calm_endpoint_is_decided_on(world: World) -> None:
    found = 0

    def same(run: Run, decided: Plan) -> None:
        nonlocal found
        seen = run.plant.observe()
        found += len(Situation(run.spec, seen, run.ledger, run.plant.now).calm)
        with nobody_calm():
            again = plan(run.spec, seen, run.ledger, run.plant.now)
        assert repr(again) == repr(decided)

    run = Run(world.before, world.plant(), watch=same)
    baseline = run.settle()
    world.happen(run)
    run.settle()
    served = [n for n, view in baseline.endpoints.items() if view.state == "healthy" and view.desired == "running"]
    assert found or not served, "nobody was ever calm: nothing was compared"


CODING = endpoint("coding", 1, memory=20, capabilities=("code",))
RUNS = incarnation(CODING, [0])
CALM = EndpointRecord("coding", "healthy", ready_incarnation=RUNS.id, ready_since=AN_HOUR_AGO, last_gpus=RUNS.gpus)


def is_calm(run: Incarnation = RUNS, record: EndpointRecord = CALM, **probe: object) -> bool:
    seen = observed(gpu(0), incarnations=[run])
    seen = replace(seen, probes={run.id: replace(ready(run), **probe)})  # type: ignore[arg-type]
    return "coding" in Situation(spec(CODING), seen, Ledger("boot", endpoints={"coding": record}), NOW).calm


def test_one_that_runs_as_its_set_point_says_and_answers_is_calm() -> None:
    assert is_calm()


@pytest.mark.parametrize(
    "run",
    [
        replace(RUNS, phase="unknown"),
        replace(RUNS, strays=None),
        replace(RUNS, strays=(7,)),
        replace(RUNS, stop=StopProgress(NOW, drained=False, signalled=None)),
        replace(RUNS, process_hash="of before the edit"),
        replace(RUNS, gpus=(*RUNS.gpus, "GPU-other"), memory_bytes=RUNS.memory_bytes * 2),
    ],
)
def test_one_that_runs_otherwise_is_decided_on(run: Incarnation) -> None:
    assert not is_calm(run)


@pytest.mark.parametrize(
    "change",
    [
        {"state": "unhealthy"},
        {"evictions": (NOW.wall - 60.0,)},
        {"streak": 1},
        {"evicted_by": "render"},
        {"unhealthy_since": AN_HOUR_AGO},
        {"nap": Nap(RUNS.id, 1, NOW)},
        {"move": Move(RUNS.id, RUNS.gpus, "render", NOW)},
        {"failed": "given up"},
        {"renew_before": NOW},
        {"ready_incarnation": "an older one"},
    ],
)
def test_one_with_a_past_that_counts_is_decided_on(change: dict[str, object]) -> None:
    assert not is_calm(record=replace(CALM, **change))  # type: ignore[arg-type]


def test_ends_that_are_in_its_record_already_trouble_nobody() -> None:
    assert is_calm(record=replace(CALM, exits=(Exit("older", AN_HOUR_AGO, 1, planned=False),)))


@pytest.mark.parametrize(
    "answer",
    [{"misses": 3}, {"sleeping": True}, {"moved": AN_HOUR_AGO, "progress_at": NOW}],
    ids=["missed", "sleeps", "hangs"],
)
def test_one_that_does_not_answer_as_it_should_is_decided_on(answer: dict[str, object]) -> None:
    assert not is_calm(**answer)


@pytest.mark.parametrize(
    "second", [replace(RUNS, id="second"), replace(RUNS, id="second", phase="exited", exit_code=0)]
)
def test_one_of_whom_two_are_there_is_decided_on_whichever_is_seen_first(second: Incarnation) -> None:
    for both in ((RUNS, second), (second, RUNS)):
        seen = replace(observed(gpu(0), incarnations=both), incarnations=both)
        situation = Situation(spec(CODING), seen, Ledger("boot", endpoints={"coding": CALM}), NOW)
        assert "coding" not in situation.calm
        assert tuple(situation.incarnations(RUNS.subject)) == both


def test_a_workload_of_the_same_name_is_somebody_else() -> None:
    work = incarnation(overlay("coding", 1, memory=20), [0], key="work")
    seen = observed(gpu(0), incarnations=[RUNS, work])
    situation = Situation(spec(CODING), seen, Ledger("boot", endpoints={"coding": CALM}), NOW)
    assert situation.calm == {"coding": RUNS}
    assert list(situation.incarnations(work.subject)) == list(situation.passing) == [work]


def test_a_calm_one_that_is_displaced_in_the_same_decision_leaves() -> None:
    render = overlay("render", 1, memory=70)
    ledger = Ledger("boot", endpoints={"coding": CALM})
    decided = plan(spec(CODING, render), observed(gpu(0), incarnations=[RUNS]), ledger, NOW)
    assert [(a.op, a.subject.name) for a in decided.actions if a.ready] == [("drain", "coding")]
    assert decided.ledger.endpoints["coding"].evicted_by == "render"
