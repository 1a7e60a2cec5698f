"""`apply` ends when nothing is left to do, when waiting does not help, or when time is up; and says which it was."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.loop.converging import AWAITED, Goal
from reconciler.loop.tick import Tick
from reconciler.plan.actions import Action, Blocked, Cause, EndpointView, Plan
from reconciler.plan.ledger import EndpointRecord, Ledger, OverlayRecord
from reconciler.plan.observed import Observed, Subject
from reconciler.spec.spec import Source

NOW = Instant(1000.0, 1000.0)
CHAT = Subject("endpoint", "chat")
START = Action(1, (), "start", CHAT, (), "it is down", Cause("drift"), 30.0, (0.0, 1.0), ready=True)
DONE = Plan(
    spec_hash="", observed_fingerprint="", now=NOW, converged=True, drift=(), changes=(), actions=(), blocked=(),
    budgets=(), objective={}, proof="", agenda=(), ledger=Ledger(), events=(), endpoints={}, next_wake=None,
)  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.at = NOW

    def now(self) -> Instant:
        return self.at


def tick(*, idle: bool = True, **changes: Any) -> Tick:
    unused: Any = None
    return Tick(unused, Observed(NOW, "boot", (), ()), replace(DONE, **changes), (), idle=idle)


def blocked(reason: str) -> tuple[Blocked, ...]:
    return (Blocked(CHAT, reason, "so it is"),)


def renewing(*, failed: bool = False) -> Ledger:
    return Ledger(endpoints={"chat": EndpointRecord("chat", renew_before=NOW, failed=failed)})


def overlay(state: Any) -> Ledger:
    record = OverlayRecord("render", state, NOW, NOW.wall, "hash", 600, Source("render.yaml", 1, 1))
    return Ledger(overlays={"render": record})


def view(state: Any, desired: str = "running") -> EndpointView:
    made: Any = type("View", (), {"state": state, "desired": desired, "reason": "CrashLoop"})()
    return made


def goal(clock: Clock | None = None, *, timeout_s: float | None = None, names: tuple[str, ...] = ()) -> Goal:
    made: Any = clock or Clock()
    return Goal(made, timeout_s=timeout_s, progress=lambda *_: None, names=names)


@pytest.mark.parametrize(
    ("seen", "over"),
    [
        (tick(), True),
        (tick(idle=False), False),
        (tick(archive=("i-1",)), False),
        (tick(converged=False), False),
        (tick(blocked=blocked("NoConsent")), True),
        *[(tick(blocked=blocked(reason)), False) for reason in AWAITED],
        (tick(ledger=renewing()), False),
        (tick(ledger=renewing(failed=True)), True),
    ],
)
def test_it_is_over_when_nothing_is_under_way_and_nothing_passes_by_itself(seen: Tick, over: bool) -> None:
    assert goal(names=("chat", "unheard-of")).reached(seen) is over


def test_when_the_time_is_up_it_is_over_whatever_is_under_way_and_every_tick_is_shown() -> None:
    clock, shown = Clock(), []
    made: Any = clock
    limited = Goal(made, timeout_s=10.0, progress=lambda plan, _: shown.append(plan))
    seen = tick(idle=False, converged=False)
    assert not limited.reached(seen)
    clock.at = NOW.plus(9.99)
    assert not limited.reached(seen)
    clock.at = NOW.plus(10.0)
    assert limited.reached(seen)
    assert shown == [seen.plan] * 3


@pytest.mark.parametrize(
    ("seen", "success", "said"),
    [
        (tick(), True, "the box matches its set points"),
        (tick(blocked=blocked("NotYet")), True, "the box matches its set points"),
        (tick(ledger=overlay("overrun")), True, "converged; render runs on, and only a daemon brings"),
        (tick(ledger=overlay("ended")), True, "the box matches its set points"),
        (tick(endpoints={"chat": view("failed"), "b": view("ready")}), False, "failed: chat (CrashLoop)"),
        (tick(endpoints={"chat": view("failed", "stopped")}), True, "the box matches its set points"),
        (tick(blocked=blocked("NoConsent")), False, f"{CHAT}: NoConsent: so it is"),
        (tick(converged=False, actions=(START,)), False, "not done in time; waiting for chat"),
        (tick(ledger=renewing(), actions=(START,)), False, "not done in time; waiting for chat"),
    ],
)
def test_the_verdict_says_what_is_wrong_and_a_failure_outweighs_the_rest(seen: Tick, success: bool, said: str) -> None:
    found = goal(names=("chat",)).verdict(seen)
    assert found[0] is success
    assert found[1].startswith(said)


def test_one_that_was_interrupted_is_no_success_even_if_nothing_is_left() -> None:
    stopped: list[str] = []
    interrupted = goal()
    interrupted.interrupt(lambda: stopped.append("asked"))
    assert stopped == ["asked"]
    assert interrupted.verdict(tick()) == (False, "interrupted; what runs goes on running")
