"""The last step before an engine is told to sleep or to wake: it is told as its profile says, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.errors import StateError
from reconciler.loop.calling import order_of
from reconciler.loop.specs import SpecKeeper
from reconciler.plan.actions import Action, Cause
from reconciler.plan.ledger import EndpointRecord, Ledger, Nap
from reconciler.plan.observed import Incarnation, Observed, Subject
from reconciler.spec.spec import Spec

NOW = Instant(1000.0, 1000.0)
SETPOINTS = """\
version: 1
endpoints:
  chat: {engine: vllm, model: tiny, gpus: [0], port: 8080, evict: {method: sleep}}
"""
CHAT = Subject("endpoint", "chat")
ONE = Incarnation("i-1", CHAT, "hash", ("GPU-0",), (), True, 8080, NOW, "running", 1, (), exit_code=None, exited=None)
SLEEP = Action(
    1, (), "sleep", CHAT, ("GPU-0",), "gives way", Cause("overlay"), 30.0, (0.0, 1.0), ready=True, incarnation="i-1"
)


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    (tmp_path / "setpoints.yaml").write_text(SETPOINTS)
    return SpecKeeper(tmp_path / "setpoints.yaml", {}, transform=None).load(Ledger()).spec


def seen(*incarnations: Incarnation) -> Observed:
    return Observed(NOW, "boot", (), incarnations)


def ledger(level: int | None) -> Ledger:
    nap = None if level is None else Nap("i-1", level, NOW)
    return Ledger(endpoints={"chat": EndpointRecord("chat", nap=nap)})


@pytest.mark.parametrize("level", [1, 2])
def test_it_is_told_to_sleep_as_deeply_as_was_decided_and_to_wake_up_from_there(spec: Spec, level: int) -> None:
    profile = spec.endpoints["chat"].profile
    asleep = order_of(SLEEP, spec, seen(ONE), ledger(level))
    awake = order_of(replace(SLEEP, op="wake"), spec, seen(ONE), ledger(level))
    assert (asleep.calls, asleep.asleep) == (profile.sleep_levels[level].sleep, True)
    assert (awake.calls, awake.asleep) == (profile.sleep_levels[level].wake, False)
    assert {(order.incarnation, order.port, order.check) for order in (asleep, awake)} == {
        ("i-1", 8080, profile.sleep_check)
    }


def test_an_engine_that_is_gone_by_now_or_does_not_nap_any_more_is_not_called(spec: Spec) -> None:
    stranger = replace(ONE, subject=Subject("endpoint", "other"))
    for incarnations, level in (((), 1), ((replace(ONE, port=None),), 1), ((stranger,), 1), ((ONE,), None)):
        with pytest.raises(StateError, match="chat is no longer there to sleep"):
            order_of(SLEEP, spec, seen(*incarnations), ledger(level))
    with pytest.raises(StateError, match="chat is no longer there to wake"):
        order_of(replace(SLEEP, op="wake"), spec, seen(ONE), Ledger())
