"""What somebody requested of the ledger: changed by the next tick, and answered once that is committed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from reconciler.clock import Clock, Instant
from reconciler.errors import StateError
from reconciler.plan.actions import Event
from reconciler.plan.ledger import Ledger
from reconciler.plan.observed import Observed
from reconciler.plan.requests import reset, unknown

Change = Callable[[Ledger, Instant], tuple[Ledger, tuple[Event, ...]]]
"""What somebody requested of the ledger, with the events that tell of it."""


class Requested:
    """Gathers changes from one tick to the next."""

    def __init__(self, clock: Clock, wake: Callable[[], None]) -> None:
        self._clock = clock
        self._wake = wake
        self._changes: list[Change] = []
        self._waiting: list[asyncio.Future[None]] = []
        """Whoever waits until what they requested is durable."""
        self._taken: tuple[asyncio.Future[None], ...] = ()

    def note(self, change: Change) -> None:
        """Have the next tick make this change, whenever that comes."""
        self._changes.append(change)

    async def durably(self, change: Change) -> None:
        """Have a tick make this change now; returns once it is committed: what was answered is not forgotten.

        Raises:
            StateError: the daemon ended before.
        """
        committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.note(change)
        self._waiting.append(committed)
        self._wake()
        try:
            await committed
        finally:
            self._waiting.remove(committed)

    def take(self, ledger: Ledger) -> tuple[Ledger, tuple[Event, ...]]:
        """The ledger with all that was requested until now, and what tells of it."""
        events: list[Event] = []
        changes, self._changes = self._changes, []
        for change in changes:
            ledger, said = change(ledger, self._clock.now())
            events.extend(said)
        self._taken = tuple(self._waiting)
        return ledger, tuple(events)

    def committed(self) -> None:
        """What was last taken is durable."""
        for request in self._taken:
            if not request.done():
                request.set_result(None)

    def abandon(self) -> None:
        """There will be no tick any more."""
        for request in self._waiting:
            if not request.done():
                request.set_exception(StateError("the daemon ended before it did that", hint="ask again"))


def forgiving(ledger: Ledger, name: str, observed: Observed) -> tuple[Change, str]:
    """What to change so that `name` is tried again, and that in words.

    Raises:
        UnknownName: nothing has that name.
    """
    known = {str(g.index): g.uuid for g in observed.gpus} | {g.uuid: g.uuid for g in observed.gpus}
    found = reset(ledger, name, known)
    if found is None:
        raise unknown(ledger, name, known)
    said = f"{name} is reset" if found[1] else f"{name} had nothing to reset"
    return lambda then, _: reset(then, name, known) or (then, ()), said
