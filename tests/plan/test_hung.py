"""A hang that `/health` hides: a counter of tokens that stands still with requests running."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import NOW, endpoint, gpu, incarnation, observed, ready, spec

from reconciler.plan.ledger import EndpointRecord, Ledger
from reconciler.plan.observed import Probe
from reconciler.plan.planner import plan
from reconciler.spec.spec import Health

ASK = endpoint("ask", [0], health=Health(unhealthy_for_s=60.0))
RUNS = incarnation(ASK, [0])
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
    assert ops[-3:] == ["wait_memory", "start", "wait_ready"]
    assert {"drain", "stop"} & set(ops)
