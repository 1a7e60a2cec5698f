"""One thread for a driver whose calls may hang: every call has a deadline, and a hung one stays alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from msgspec import Struct, field

from reconciler.clock import Clock, Instant

T = TypeVar("T")


class StillHanging(Exception):  # noqa: N818 - a state of the world; never leaves the room
    """The call did not return in time, or an earlier one has not returned yet; `for_s` is how long it has been out."""

    def __init__(self, for_s: float) -> None:
        super().__init__(f"no answer for {for_s:.1f} s")
        self.for_s = for_s


class _Job(Struct, Generic[T]):
    """One call, and what came of it."""

    work: Callable[[], T]
    began: Instant
    done: threading.Event = field(default_factory=threading.Event)
    result: T | None = None
    error: BaseException | None = None


class DeadlineThread:
    """Runs calls one after the other on one daemon thread.

    A daemon thread, not an executor: the interpreter joins executor threads at exit, and one stuck in a driver would
    keep the whole program from ending.
    """

    def __init__(self, name: str, clock: Clock) -> None:
        self._name = name
        self._clock = clock
        self._jobs: queue.SimpleQueue[_Job[object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._current: _Job[object] | None = None

    def call(self, work: Callable[[], T], deadline_s: float) -> T:
        """The result of `work`, run on the thread; what it raises is raised here. One caller at a time.

        Raises:
            StillHanging: it did not return within `deadline_s` (its late result is dropped), or an earlier call has
                not returned yet: then nothing is queued behind it, and this returns at once.
        """
        current = self._current
        if current is not None and not current.done.is_set():
            raise StillHanging(self._clock.now().since(current.began))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        job = _Job(work, self._clock.now())
        self._current = cast("_Job[object]", job)
        self._jobs.put(self._current)
        if not job.done.wait(deadline_s):
            raise StillHanging(self._clock.now().since(job.began))
        if job.error is not None:
            raise job.error
        return cast("T", job.result)

    def close(self) -> None:
        """Let the thread end once it is idle; it is not waited for."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.result = job.work()
            except BaseException as error:  # noqa: BLE001 - it is raised again in the caller's thread
                job.error = error
            job.done.set()
