"""Tells notifiers of incidents, beside the loop and never in its way.

At most one delivery per notifier is under way. What happens meanwhile is not queued: once it is over, what is due is
found again from the incidents as they are then. What was told is on record, so nobody is told twice but after a crash
between the delivery and its record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from reconciler.clock import Clock
from reconciler.errors import ReconcilerError
from reconciler.health.incident import Incident
from reconciler.health.notices import Notice, after, due
from reconciler.journal.journal import Journal
from reconciler.plan.actions import Event
from reconciler.spec.spec import Notifier, Spec

GATHER_S = 1.0
"""Wait before a delivery: what one cause does to several endpoints is seen over some ticks, and is one message."""
PAUSE_S = 300.0
"""Wait after a delivery that was given up, before the next attempt to bring this notifier up to date."""

Deliver = Callable[[Notifier, Sequence[Notice]], Awaitable[None]]


class Notifying:
    """Keeps every notifier up to date."""

    def __init__(self, journal: Journal, clock: Clock, *, deliver: Deliver, wake: Callable[[], None]) -> None:
        self._journal = journal
        self._clock = clock
        self._deliver = deliver
        self._wake = wake
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}
        """Monotonic seconds, of those whose last delivery was given up."""
        self._told: dict[str, Mapping[str, Incident]] = {}
        self.failures: dict[str, int] = {}
        """Deliveries given up since this daemon began, by notifier."""

    def offer(self, spec: Spec, incidents: Iterable[Incident]) -> None:
        """Begin what deliveries these incidents ask for; returns at once."""
        current = tuple(incidents)
        for name in [n for n in self._not_before if n not in spec.notify]:
            del self._not_before[name]
        for name, notifier in spec.notify.items():
            if name in self._tasks or self._clock.now().mono < self._not_before.get(name, 0.0):
                continue
            if self._due(notifier, current):
                self._tasks[name] = asyncio.create_task(self._tell(notifier), name=f"notify {name}")

    def next_retry(self) -> float | None:
        """Monotonic seconds at which a notifier that could not be told may be told again."""
        return min(self._not_before.values(), default=None)

    async def close(self) -> None:
        """Let go of deliveries under way: what was not told stays due for the next daemon."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _due(self, notifier: Notifier, incidents: tuple[Incident, ...]) -> tuple[Notice, ...]:
        if notifier.name not in self._told:
            self._told[notifier.name] = self._journal.told(notifier.name)
        told = self._told[notifier.name]
        if not told and not incidents:
            return ()
        if told.keys() <= {incident.id for incident in incidents}:
            return due(incidents, told, notifier.severity)
        return due(self._journal.incidents(include_resolved=True), told, notifier.severity)  # when it was resolved

    async def _tell(self, notifier: Notifier) -> None:
        name = notifier.name
        try:
            await asyncio.sleep(GATHER_S)
            notices = self._due(notifier, self._journal.incidents())
            if notices:
                await self._deliver(notifier, notices)
                told = after(self._told[name], notices)
                self._journal.save_told(name, told)
                self._told[name] = told
            self._not_before.pop(name, None)
            if self._is_said_to_fail(name):
                self._report("NotificationsBack", name, f"{name} is told of incidents again")
        except ReconcilerError as error:
            self.failures[name] = self.failures.get(name, 0) + 1
            if not self._is_said_to_fail(name):
                self._report("NotificationFailed", name, f"{name} could not be told: {error.message}")
            self._not_before[name] = self._clock.now().mono + PAUSE_S
        finally:
            self._tasks.pop(name, None)
            self._wake()

    def _is_said_to_fail(self, name: str) -> bool:
        """What the journal last said, be it by an earlier daemon: what fails still is no news."""
        kinds = ("NotificationFailed", "NotificationsBack")
        last = [e for kind in kinds for e in self._journal.events(subject=name, kind=kind, limit=1, newest=True)]
        return max(last, key=lambda event: event.id).kind == kinds[0] if last else False

    def _report(self, kind: str, name: str, message: str) -> None:
        self._journal.append([Event(kind, name, message, f"notify.{name}")], self._clock.now())
