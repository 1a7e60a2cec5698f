"""Time, injected: nobody else reads a clock."""

from __future__ import annotations

import time
from typing import Protocol

from msgspec import Struct

from reconciler import boottime


class Instant(Struct, frozen=True):
    """One moment on both clocks.

    Windows (start, deadline, cron) are compared on `wall`; durations, grace and back-off on `mono`. `mono` is
    CLOCK_BOOTTIME without the offset of a time namespace, so it means the same to every process of one boot and counts
    while the box is suspended.
    """

    wall: float
    """Seconds since the epoch, UTC."""
    mono: float
    """Seconds since boot."""

    def plus(self, seconds: float) -> Instant:
        """The moment `seconds` later on both clocks."""
        return Instant(self.wall + seconds, self.mono + seconds)

    def since(self, earlier: Instant) -> float:
        """Seconds elapsed since `earlier`, on the monotonic clock."""
        return self.mono - earlier.mono


class Clock(Protocol):
    """What the loop and the actors know of time."""

    def now(self) -> Instant:
        """The present moment."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait that long."""
        ...


class SystemClock:
    """The clocks of this machine."""

    def now(self) -> Instant:
        """Wall clock and CLOCK_BOOTTIME, read together."""
        return Instant(time.time(), boottime.now_s())

    async def sleep(self, seconds: float) -> None:
        """Wait on the event loop."""
        import asyncio  # 20 ms that only a loop needs

        await asyncio.sleep(seconds)
