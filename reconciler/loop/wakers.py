"""What wakes the loop: edited files, ended processes, answers of endpoints, time. A wake carries no news."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

DEBOUNCE_MS = 80
STEP_MS = 80
"""Editors write in bursts: a burst is over after 80 ms of silence, or is told 160 ms after it began at the latest.
watchfiles looks at what inotify gathered once a step, day and night: each look costs 0.1 ms on a box that is idle, and
at 40 ms that was a third of what an idle daemon takes."""


WATCHED_S = 1.0
"""So long after watching began, it has begun for certain."""


class Wakers:
    """Sets one event, from wherever something may have changed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._pidfds: set[int] = set()
        self._files: asyncio.Task[None] | None = None
        self._once_more: asyncio.TimerHandle | None = None
        self.files_changed = True
        """Files may have changed since this was last cleared."""
        self.ended: set[str] = set()
        """Incarnations of which a process ended since this was last emptied: what was seen of them is out of date."""
        self._nothing_else = True
        """Nothing but the end of processes has set the event."""

    def wake(self) -> None:
        """Have the loop look again; from the loop's own thread."""
        self._nothing_else = False
        self._event.set()

    def wake_threadsafe(self) -> None:
        """The same, from any thread, also while the loop is being closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.wake)

    async def wait(self, timeout_s: float) -> bool:
        """Until woken, or until the time is up; whether it was woken."""
        woken = not await self.undisturbed(timeout_s)
        self._forget()
        return woken

    async def undisturbed(self, seconds: float) -> bool:
        """Whether nothing woke it for so long; else it is over at once, and the next wait as well."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self._event.wait()
        return not self._event.is_set()

    def pass_over(self, alive: Collection[str]) -> None:
        """Ends of processes of others than these are no news: they were over when the loop looked.

        The shim of one whose end has just been seen is gone a moment later, and is nothing to look again for.
        """
        self.ended.intersection_update(alive)
        if self._nothing_else and not self.ended:
            self._forget()

    def _forget(self) -> None:
        self._nothing_else = True
        self._event.clear()

    def watch_processes(self, pidfds: Mapping[int, str]) -> None:
        """Wake once for each of these descriptors as it becomes readable (its process ended), and only once."""
        for fd in self._pidfds - set(pidfds):
            self._loop.remove_reader(fd)
        for fd in set(pidfds) - self._pidfds:
            self._loop.add_reader(fd, self._ended, fd, pidfds[fd])
        self._pidfds = set(pidfds)

    def _ended(self, fd: int, incarnation: str) -> None:
        self._loop.remove_reader(fd)  # it stays readable for ever
        self.ended.add(incarnation)
        self._event.set()

    def watch_files(self, setpoints: Path, folder: Callable[[], Path | None]) -> None:
        """Wake when the set points' or the overlays' folder changes; folders, since editors replace files.

        To be called after the first look: to load the library takes longer than that. What was edited before files
        are watched is seen by one more look. Called again, it does nothing.
        """
        if self._files is not None:
            return
        self._once_more = self._loop.call_later(WATCHED_S, self.wake)
        self._files = asyncio.create_task(self._watch_files(setpoints, folder), name="watch files")

    async def _watch_files(self, setpoints: Path, folder: Callable[[], Path | None]) -> None:
        from watchfiles import awatch

        while True:
            overlays = folder()
            paths = {p for p in (setpoints.parent, overlays) if p is not None and p.is_dir()}
            if not paths:
                await asyncio.sleep(1.0)  # nothing to watch: the resync looks as well
                continue
            try:
                async for _ in awatch(*paths, debounce=DEBOUNCE_MS, step=STEP_MS, recursive=False):
                    self.files_changed = True
                    self.wake()
                    now = folder()
                    if now != overlays or any(not p.is_dir() for p in paths):
                        break
            except (OSError, RuntimeError):  # a folder went away; the latter: the user's inotify instances are used up
                await asyncio.sleep(1.0)

    async def close(self) -> None:
        """Let go of everything."""
        for fd in self._pidfds:
            self._loop.remove_reader(fd)
        self._pidfds = set()
        if self._once_more is not None:
            self._once_more.cancel()
        if self._files is not None:
            self._files.cancel()
            await asyncio.gather(self._files, return_exceptions=True)
