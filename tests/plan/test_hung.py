"""A hang that `/health` hides: a counter of tokens that stands still with requests running."""

from __future__ import annotations

import pytest
from builders import NOW, endpoint, gpu, incarnation, observed, overlay, ready, spec
from msgspec.structs import replace
from plant import Plant, Run, overlay_state

from reconciler.health.assess import Facts, assess
from reconciler.health.incident import Incident
from reconciler.plan.actions import Plan
from reconciler.plan.endpoints import describe_exit
from reconciler.plan.ledger import EndpointRecord, Exit, Ledger
from reconciler.plan.observed import Probe, StopProgress
from reconciler.plan.planner import plan
from reconciler.plan.requests import reset
from reconciler.spec.spec import Health, Stop

ASK = endpoint("ask", [0], health=Health(unhealthy_for_s=60.0))
RUNS = incarnation(ASK, [0])
SET_POINT = "its set point is running"
KNOWN = Ledger(boot_id="boot", endpoints={"ask": EndpointRecord("ask", "healthy", ready_incarnation=RUNS.id)})


def state(probe: Probe, ledger: Ledger = KNOWN) -> tuple[str, str, list[str]]:
    seen = observed(gpu(0), incarnations=[RUNS])
    decided = plan(spec(ASK), replace(seen, probes={RUNS.id: probe}), ledger, NOW)
    view = decided.endpoints["ask"]
    return view.state, view.reason, [a.op for a in decided.actions]


def frozen(seconds: float, read: float = 0.0) -> Probe:
    """The counter was last read `read` seconds ago, and had stood still for `seconds` then."""
    at = NOW.plus(-read)
    return replace(ready(RUNS), progress=7, moved=at.plus(-seconds), progress_at=at)


@pytest.mark.parametrize("seconds", [120.0, 4000.0])
def test_a_counter_frozen_for_two_minutes_is_a_hang(seconds: float) -> None:
    word, reason, ops = state(frozen(seconds))
    assert word == "unhealthy"
    assert reason.startswith("Hung:")
    assert ops == [], "nothing is killed at once"


@pytest.mark.parametrize("probe", [frozen(119.0), frozen(0.0), frozen(60.0, read=600.0), ready(RUNS)])
def test_a_slow_engine_or_a_page_that_did_not_come_is_not_a_hang(probe: Probe) -> None:
    assert state(probe) == ("healthy", "", [])


def test_one_that_hangs_for_long_enough_is_restarted() -> None:
    record = replace(KNOWN.endpoints["ask"], state="unhealthy", unhealthy_since=NOW.plus(-60))
    _, _, ops = state(frozen(180.0), replace(KNOWN, endpoints={"ask": record}))
    assert ops == ["stop", "wait_memory", "start", "wait_ready"], "its requests cannot finish: no drain"


@pytest.mark.parametrize(
    ("probe", "ops"), [(frozen(119.0), "drain"), (frozen(120.0), "stop"), (frozen(600.0, read=600.0), "stop")]
)
def test_a_drain_lasts_as_long_as_the_engine_gets_on(probe: Probe, ops: str) -> None:
    """It began with an engine that worked; one whose counter moves again does not hang, and may finish."""
    leaving = replace(RUNS, stop=StopProgress(NOW.plus(-10), drained=False, signalled=None))
    known = replace(KNOWN, endpoints={"ask": replace(KNOWN.endpoints["ask"], state="stopping")})
    stopped = replace(ASK, state="stopped", stop=Stop(drain_s=900.0))
    seen = replace(observed(gpu(0), incarnations=[leaving]), probes={RUNS.id: replace(probe, busy=3)})
    assert next(a.op for a in plan(spec(stopped), seen, known, NOW).actions) == ops


def test_status_events_and_the_incident_say_throughout_that_it_was_ended_because_it_hung() -> None:
    run = Run(spec(ASK), Plant())
    run.settle()
    run.plant.advance(600)
    run.settle()
    began, current = run.plant.now, run.plant.current("ask")
    assert current is not None
    run.plant.busy[current.id], run.plant.frozen[current.id] = 2, began.mono
    seen: dict[str, set[str]] = {}
    causes: set[str] = set()
    said: list[str] = []
    incidents: tuple[Incident, ...] = ()

    def watch(run: Run, decided: Plan) -> None:
        nonlocal incidents
        view = decided.endpoints["ask"]
        seen.setdefault(view.state, set()).add(view.reason)
        causes.update(f"{a.op}: {a.reason} [{a.cause}]" for a in decided.actions if a.ready)
        said.extend(f"{e.kind}: {e.message}" for e in decided.events)
        facts = Facts(run.spec, decided.endpoints, decided.ledger, run.plant.observe(), (), decided.blocked)
        incidents, _ = assess(facts, incidents, decided.now)

    run.watch = watch
    run.plant.advance(120)
    run.settle(until=lambda p: p.endpoints["ask"].state == "healthy")
    assert run.plant.now.since(began) == pytest.approx(120 + 60 + 2 + 1 + 40, abs=1), "and no drain"
    hung = "it was unhealthy for 60 s: Hung: requests run and no token was made for 180 s, though it answers"
    assert list(seen) == ["unhealthy", "stopping", "pending", "starting", "healthy"]
    assert all("Hung: " in reason for reason in seen["unhealthy"] | seen["stopping"]), seen
    assert f"start: it was ended because {hung} [drift (it was ended) [setpoints.yaml:1]]" in causes
    assert not [text for text in (*causes, *said) if "by itself" in text]
    assert [i.kind for i in incidents] == ["Hung"], "one trouble, one incident"
    assert "no token was made" in incidents[0].message
    (end,) = run.ledger.endpoints["ask"].exits
    assert describe_exit(end) == f"exit code 0 (ended because {hung})"
    assert (end.planned, run.ledger.endpoints["ask"].ending) == (False, None)


def test_one_that_hangs_and_gives_way_is_said_to_have_given_way() -> None:
    run = Run(spec(ASK), Plant())
    run.settle()
    current = run.plant.current("ask")
    assert current is not None
    run.plant.busy[current.id], run.plant.frozen[current.id] = 2, run.plant.now.mono
    run.plant.advance(150)
    run.step()
    run.plant.advance(30)
    run.spec = spec(ASK, overlay("render", [0]))
    decided = run.decide()
    assert decided.endpoints["ask"].reason == "gives way to render"
    run.settle(until=overlay_state("render", "active"))
    assert [end.ended_for for end in run.ledger.endpoints["ask"].exits] == [None]


def test_what_was_wrong_with_one_is_forgotten_with_the_rest() -> None:
    ends = (Exit("ask-1", NOW, 0, planned=False, ended_for="it hung"),)
    record = replace(KNOWN.endpoints["ask"], state="pending", exits=ends, streak=1)
    known = replace(KNOWN, endpoints={"ask": record})
    for ledger, reason in ((known, "it was ended because it hung"), (reset(known, "ask", {})[0], SET_POINT)):  # type: ignore[index]
        (start, _) = plan(spec(ASK), observed(gpu(0)), ledger, NOW).actions
        assert (start.op, start.reason) == ("start", reason)
