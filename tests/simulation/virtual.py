"""An event loop whose time passes only when nobody has anything to do, and then at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from reconciler.clock import Instant

STEP_S = 1e-6
"""Added to each wait, so that its moment has really come: loops call what is due up to a nanosecond early."""


class _Skipping(selectors.DefaultSelector):
    """Looks at descriptors without waiting, and lets virtual time pass instead."""

    passed: Callable[[float], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found:
            if timeout is None:
                raise AssertionError("everybody waits, and for nothing that could ever come")
            if timeout > 0:
                self.passed(timeout + STEP_S)
        return found


class _Inline(ThreadPoolExecutor):
    """What is given to a thread is done at once: nothing runs beside anything."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(call(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - whoever waits for it has it raised
            done.set_exception(error)
        return done


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at the given monotonic second."""

    def __init__(self, start: Instant) -> None:
        selector = _Skipping()
        selector.passed = self._pass
        self._now = start.mono
        super().__init__(selector)
        self.set_default_executor(_Inline(1))
        self.clock = VirtualClock(self, start)

    def time(self) -> float:
        return self._now

    def _pass(self, seconds: float) -> None:
        self._now += seconds


class VirtualClock:
    """The loop's time on both clocks; the wall clock may be set."""

    def __init__(self, loop: VirtualLoop, start: Instant) -> None:
        self._loop = loop
        self._ahead = start.wall - start.mono

    def now(self) -> Instant:
        mono = self._loop.time()
        return Instant(mono + self._ahead, mono)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def set_wall(self, by: float) -> None:
        """Somebody sets the clock, by this many seconds."""
        self._ahead += by
