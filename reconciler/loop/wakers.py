"""What wakes the loop: edited files, ended processes, answers of endpoints, time. A wake carries no news."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from reconciler.inotify import EDITS, Notes

QUIET_S, BURST_S = 0.02, 0.08
"""Editors write in bursts: a burst is over after 20 ms of silence, and is reported after 80 ms at the latest."""


class Wakers:
    """Sets one event, from wherever something may have changed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._pidfds: set[int] = set()
        self._notes: Notes | None = None
        self._burst: asyncio.TimerHandle | None = None
        """Its end, while one goes on."""
        self._burst_ends = 0.0
        """At the latest, by the clock of the event loop."""
        self.files_changed = True
        """Files may have changed since this was last cleared."""
        self.process_ended = False
        """A process of ours ended since this was last cleared: what was read of the GPUs before is out of date."""

    def wake(self) -> None:
        """Have the loop look again; from the loop's own thread."""
        self._event.set()

    def wake_threadsafe(self) -> None:
        """The same, from any thread, also while the loop is being closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout_s: float) -> bool:
        """Until woken, or until the time is up; whether it was woken."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._event.wait()
        except TimeoutError:
            pass
        woken = self._event.is_set()
        self._event.clear()
        return woken

    def watch_processes(self, pidfds: Mapping[int, str]) -> None:
        """Wake once for each of these descriptors as it becomes readable (its process ended), and only once."""
        for fd in self._pidfds - set(pidfds):
            self._loop.remove_reader(fd)
        for fd in set(pidfds) - self._pidfds:
            self._loop.add_reader(fd, self._ended, fd)
        self._pidfds = set(pidfds)

    def _ended(self, fd: int) -> None:
        self._loop.remove_reader(fd)  # it stays readable for ever
        self.process_ended = True
        self.wake()

    def watch_folders(self, folders: Collection[Path]) -> bool:
        """Wake when a file is edited in one of these; folders, since editors replace files. To be called at each look.

        Whether one of them is watched that was not before: what was edited there until now is not told. One that is
        not there, or cannot be watched, is tried again at the next look, for which the resync is enough.
        """
        if self._notes is None:
            with suppress(OSError):
                self._notes = Notes(EDITS)
                self._loop.add_reader(self._notes.fileno(), self._edited)
        return self._notes is not None and self._notes.follow(folders)

    def _edited(self) -> None:
        assert self._notes is not None  # noqa: S101 - for the type checker: whose descriptor it is
        self._notes.read()
        now = self._loop.time()
        if self._burst is None:
            self._burst_ends = now + BURST_S
        else:
            self._burst.cancel()
        self._burst = self._loop.call_at(min(now + QUIET_S, self._burst_ends), self._end_burst)

    def _end_burst(self) -> None:
        self._burst = None
        self.files_changed = True
        self.wake()

    def close(self) -> None:
        """Let go of everything."""
        for fd in self._pidfds:
            self._loop.remove_reader(fd)
        self._pidfds = set()
        if self._burst is not None:
            self._burst.cancel()
        if self._notes is not None:
            self._loop.remove_reader(self._notes.fileno())
            self._notes.close()
            self._notes = None
