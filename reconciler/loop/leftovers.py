"""When to look at what incarnations have in /dev/shm, and when to remove what ended ones left there.

What a killed engine leaves can be proven to be its own only if it was seen while it lived: so each is looked at once it
is ready, and now and then. That costs one listing of a folder, unless there is something new.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress

from reconciler.act.shm import Left, note, sweep, told
from reconciler.clock import Clock, Instant
from reconciler.journal.layout import StateDir
from reconciler.plan.actions import Event
from reconciler.plan.observed import Observed

LOADING_PACE_S, PACE_S = 10.0, 60.0
"""Engines make these files while they load, and seldom afterwards."""
NEWBORN_S = 1.0
"""So young nobody has made any yet, and a look would only be in the way of its first steps."""


class Leftovers:
    """Follows the shared memory of the incarnations of one state directory."""

    def __init__(self, state: StateDir, clock: Clock) -> None:
        self._state = state
        self._clock = clock
        self._noted: dict[str, tuple[Instant, bool]] = {}
        """Incarnation → when it was looked at last, and whether it was ready then."""
        self._kept: dict[tuple[str, int], str] = {}
        """Files that stay → whose they are. Each is told once, and tried again with the next end."""
        self._swept = False

    async def follow(self, observed: Observed) -> None:
        """Look at those whose turn it is."""
        now = self._clock.now()
        ready = {i.id: (p := observed.probes.get(i.id)) is not None and bool(p.ready) for i in observed.incarnations}
        running = {i.id: now.since(i.started) for i in observed.incarnations if i.phase == "running"}
        fresh = {i for i, age_s in running.items() if i not in self._noted and age_s < NEWBORN_S and not ready[i]}
        due = [i for i in running if i not in fresh and self._is_due(i, now, ready=ready[i])]
        self._noted = {i: (now, ready[i]) if i in fresh or i in due else self._noted[i] for i in running}
        if due:
            await asyncio.to_thread(self._note, due)

    def _is_due(self, incarnation: str, now: Instant, *, ready: bool) -> bool:
        at, was_ready = self._noted.get(incarnation, (None, False))
        return at is None or ready != was_ready or now.since(at) >= (PACE_S if ready else LOADING_PACE_S)

    def _note(self, incarnations: list[str]) -> None:
        for incarnation in incarnations:
            with suppress(OSError):  # what could not be recorded is not removed
                note(self._state, incarnation)

    async def clear(self, ended: Collection[str]) -> tuple[Event, ...]:
        """Remove what these left, and the first time what any left that ended before; what was done."""
        if self._swept and not ended:
            return ()
        among = {*ended, *self._kept.values()} if self._swept else None
        found: list[Left] = []
        with suppress(OSError):  # tried again by the next daemon
            found = await asyncio.to_thread(sweep, self._state, among)
        self._swept = True
        events: list[Event] = []
        for subject in sorted({one.subject for one in found}):
            mine = [one for one in found if one.subject == subject]
            if gone := [one for one in mine if one.why is None]:
                events.append(Event("shm.removed", subject.name, f"it left {told(gone)}: removed", "cleanup"))
            fresh = [one for one in mine if one.why and (one.file.name, one.file.inode) not in self._kept]
            if fresh:
                self._kept |= {(one.file.name, one.file.inode): one.incarnation for one in fresh}
                message = f"it left {told(fresh)}: not removed, {fresh[0].why}"
                events.append(Event("shm.kept", subject.name, message, "cleanup"))
        return tuple(events)
