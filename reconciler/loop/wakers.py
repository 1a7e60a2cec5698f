"""What wakes the loop: edited files, ended processes, answers of endpoints, time. A wake carries no news."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

DEBOUNCE_MS = 80
STEP_MS = 40
"""Editors write in bursts: a burst is over after 40 ms of silence, and is reported after 80 ms at the latest.
watchfiles looks at what inotify gathered once a step, day and night: at 10 ms that alone took 0.3 % of a core."""


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
