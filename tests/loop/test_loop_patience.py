"""How long the loop rests where nothing wakes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.loop.patience import memory_pace_s, patience_s
from reconciler.loop.tick import Tick
from reconciler.plan.actions import Action, Blocked, Cause
from reconciler.plan.ledger import EndpointRecord, Ledger, Nap
from reconciler.plan.observed import Subject

NOW = Instant(1000.0, 1000.0)
CHAT = Subject("endpoint", "chat")
MEMORY = Action(1, (), "wait_memory", CHAT, (), "it ended", Cause("drift"), 30.0, (0.0, 1.0), ready=True)


def tick(**plan: Any) -> Tick:
    """One that waits for what is given; the set points ask for a look each half minute."""
    nothing = {"actions": (), "archive": (), "blocked": (), "next_wake": None, "ledger": Ledger()}
    spec: Any = SimpleNamespace(spec=SimpleNamespace(policy=SimpleNamespace(resync_s=30.0)))
    observed: Any = SimpleNamespace(incarnations=())
    decided: Any = SimpleNamespace(**{**nothing, **plan})
    return Tick(spec, observed, decided, (), idle=True)


@pytest.mark.parametrize(
    ("plan", "rest_s"),
    [
        ({}, 30.0),
        ({"actions": (MEMORY,)}, 0.1),
        ({"actions": (replace(MEMORY, ready=False),)}, 30.0),
        ({"actions": (replace(MEMORY, op="wait_ready"),)}, 30.0),
        ({"archive": ("moved", "stuck")}, 0.1),
        ({"archive": ("stuck",)}, 30.0),
        ({"blocked": (Blocked(CHAT, "GpuOccupied", "a stranger"),)}, 1.0),
        ({"blocked": (Blocked(CHAT, "CoolDown", "not yet"),)}, 30.0),
        ({"next_wake": NOW.plus(3.0)}, 3.001),
        ({"next_wake": NOW.plus(-3.0)}, 0.001),
        ({"next_wake": NOW.plus(3.0), "blocked": (Blocked(CHAT, "PortInUse", "a stranger"),)}, 1.0),
    ],
)
def test_the_loop_rests_until_the_first_of_what_nobody_would_tell_it_of(plan: dict[str, Any], rest_s: float) -> None:
    assert patience_s(tick(**plan), NOW, unmoved={"stuck"}) == pytest.approx(rest_s)


def test_nobody_is_kept_waiting_for_a_retry_or_for_a_sign_of_life() -> None:
    assert patience_s(tick(), NOW, retries=(None, NOW.mono + 2.0, NOW.mono + 1.0)) == pytest.approx(1.001)
    assert patience_s(tick(), NOW, retries=(None, NOW.mono - 9.0)) == pytest.approx(0.001)
    assert patience_s(tick(), NOW, at_least_every_s=20.0) == 20.0


@pytest.mark.parametrize(
    ("ended", "slept", "pace_s"),
    [
        ((), None, 0.1),
        ((None,), None, 0.1),
        ((0.3,), None, 0.1),
        ((4.0,), None, 0.2),
        ((60.0,), None, 1.0),
        ((60.0, 5.0), None, 0.25),
        ((60.0,), 1.0, 0.1),
        ((), 10.0, 0.5),
    ],
)
def test_memory_is_looked_at_the_less_often_the_longer_it_has_not_come_back(
    ended: tuple[float | None, ...], slept: float | None, pace_s: float
) -> None:
    """By how long ago the last one ended, or fell asleep."""

    def ago(seconds: float | None) -> Instant | None:
        return None if seconds is None else NOW.plus(-seconds)

    endpoint = EndpointRecord("chat", nap=None if slept is None else Nap("i", 1, NOW, slept=ago(slept)))
    seen: Any = SimpleNamespace(
        observed=SimpleNamespace(incarnations=[SimpleNamespace(exited=ago(seconds)) for seconds in ended]),
        plan=SimpleNamespace(ledger=Ledger(endpoints={"chat": endpoint})),
    )
    assert memory_pace_s(seen, NOW) == pytest.approx(pace_s)
