"""What one tick of the loop saw and decided, and who is shown it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec import Struct, field

from reconciler.health.incident import Incident
from reconciler.loop.specs import SpecInForce
from reconciler.plan.actions import Event, Plan
from reconciler.plan.observed import Observed


class Tick(Struct, frozen=True):
    """What one tick saw and decided."""

    spec: SpecInForce
    observed: Observed
    plan: Plan
    incidents: tuple[Incident, ...]
    idle: bool
    """No operation is under way."""
    seconds: float = 0.0
    """How long it took to look, to decide and to begin, the starts that it carried out included."""
    untold: Mapping[str, int] = field(default_factory=dict)
    """By notifier: deliveries given up since this daemon began."""


class Face(Protocol):
    """Somebody who shows each tick to the outside."""

    async def show(self, tick: Tick) -> Sequence[Event]:
        """Take note of a tick; the answer is what the journal should tell of that."""
        ...

    async def close(self) -> None:
        """Let go of sockets."""
        ...
