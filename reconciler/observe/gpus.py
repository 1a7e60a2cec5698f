"""The GPUs of the box, seen within a deadline, and remembered while they cannot be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import Lock
from typing import Literal, TypeVar

from msgspec import Struct

from reconciler.clock import Clock, Instant
from reconciler.errors import DriverError
from reconciler.observe.nvml import CACHED, NvmlDriver, ReadOptions, UnreadGpu
from reconciler.observe.worker import DeadlineThread, StillHanging
from reconciler.plan.observed import Gpu

T = TypeVar("T")

INIT_DEADLINE_S = 30.0
"""Without persistence mode nvmlInit wakes every GPU, seconds each."""


class RememberedGpu(Struct, frozen=True):
    """What is known of a GPU even while it cannot be seen."""

    uuid: str
    index: int
    name: str
    total_bytes: int


class GpuReadings(Struct, frozen=True):
    """One look at the GPUs, in index order. The processes have no owner, user or command yet."""

    gpus: tuple[Gpu, ...]
    known: bool
    """False: the driver did not answer; `gpus` are the remembered ones, all `unknown`."""
    detail: str


class NvmlReader:
    """Reads every GPU within a deadline, and remembers those it cannot see.

    `deadline_s` bounds one `read`; `remembered` are GPUs known from an earlier run, so that one that is missing now is
    seen to be lost. Thread-safe.
    """

    def __init__(self, clock: Clock, *, deadline_s: float = 2.0, remembered: Iterable[RememberedGpu] = ()) -> None:
        self._clock = clock
        self._deadline_s = deadline_s
        self._remembered = {gpu.uuid: gpu for gpu in remembered}
        self._driver = NvmlDriver(clock)
        self._thread = DeadlineThread("nvml", clock)
        self._lock = Lock()
        self._answered = False
        self._last: tuple[Instant, GpuReadings] | None = None

    @property
    def remembered(self) -> tuple[RememberedGpu, ...]:
        """Every GPU seen so far, in index order: what to hand to the next reader."""
        return tuple(sorted(self._remembered.values(), key=lambda gpu: (gpu.index, gpu.uuid)))

    def open(self) -> None:
        """Initialise the driver now, for callers that cannot go on without one. `read` does it by itself.

        Raises:
            DriverError: it is not there, or does not answer.
        """
        with self._lock:
            self._call(self._driver.open)

    def versions(self) -> tuple[str, str]:
        """The driver's own version, and the newest CUDA that it serves.

        Raises:
            DriverError: it is not there, or does not answer.
        """
        with self._lock:
            return self._call(self._driver.versions)

    def read(self, options: ReadOptions = CACHED) -> GpuReadings:
        """Every GPU, parts of it as old as `options` allow. Never raises for a driver that does not answer.

        1. Everything is young enough: the last readings.
        2. The driver answers: what it says, and every GPU seen before that it no longer lists, as `lost`.
        3. The driver does not answer in time, or fails as a whole: not known, and every GPU `unknown`. While a call
           hangs, nothing is queued behind it and this returns at once.
        """
        with self._lock:
            now = self._clock.now()
            if self._last is not None and _is_young(*self._last, now, options):  # 1
                return self._last[1]
            try:
                found = self._call(lambda: self._driver.look(options))
            except DriverError as error:  # 3
                self._last = None
                return self._unknown(error, now)
            readings = GpuReadings(self._merge(found, now), known=True, detail="")  # 2
            self._last = now, readings
            return readings

    def close(self) -> None:
        """Give NVML back, unless a call hangs."""
        with self._lock:
            with suppress(DriverError):
                self._call(self._driver.close)
            self._thread.close()

    def _call(self, work: Callable[[], T]) -> T:
        """Run `work` on the driver's thread.

        Raises:
            DriverError: the driver does not answer, or says that it cannot.
        """
        try:
            answer = self._thread.call(work, self._deadline_s if self._answered else INIT_DEADLINE_S)
        except StillHanging as hanging:
            raise DriverError(
                f"NVML does not answer: {self._driver.calling} has not returned for {hanging.for_s:.1f} s",
                hint="dmesg names the GPU (NVRM: Xid …)",
            ) from None
        except Exception as error:
            explained = self._driver.explain(error)
            if explained is None:
                raise
            raise explained from error
        self._answered = True
        return answer

    def _merge(self, found: list[Gpu | UnreadGpu], now: Instant) -> tuple[Gpu, ...]:
        """What was read, what could not be read, and what was seen before and is not listed any more."""
        seen = {gpu.uuid: gpu for gpu in found if isinstance(gpu, Gpu)}
        missing = {uuid: gpu for uuid, gpu in self._remembered.items() if uuid not in seen}
        gone: list[Gpu] = []
        for failed in (gpu for gpu in found if isinstance(gpu, UnreadGpu)):
            uuid = failed.uuid or next((u for u, gpu in missing.items() if gpu.index == failed.index), None)
            known = missing.pop(uuid, None) if uuid else None
            # a GPU that never told its UUID still takes its place in the list, so that a pin to its index is not
            # taken for a pin to nothing
            known = known or RememberedGpu(uuid or f"unread-{failed.index}", failed.index, "GPU", 0)
            gone.append(_unseen(known, failed.state, failed.detail, now))
        gone += [_unseen(gpu, "lost", "the driver no longer lists it", now) for gpu in missing.values()]
        self._remembered |= {g.uuid: RememberedGpu(g.uuid, g.index, g.name, g.total_bytes) for g in seen.values()}
        # `index` is the driver's present number, as CUDA will count them; a GPU that it no longer lists keeps its last
        # one, which may by then be another's, and stands behind it
        return tuple(sorted([*seen.values(), *gone], key=lambda gpu: (gpu.index, gpu.state != "ok", gpu.uuid)))

    def _unknown(self, error: DriverError, now: Instant) -> GpuReadings:
        gpus = tuple(_unseen(gpu, "unknown", error.message, now) for gpu in self.remembered)
        return GpuReadings(gpus, known=False, detail=str(error))


def _is_young(read: Instant, readings: GpuReadings, now: Instant, options: ReadOptions) -> bool:
    if now.since(read) >= options.memory_max_age_s:
        return False
    return all(options.accepts(gpu.uuid, gpu.at, now) for gpu in readings.gpus if gpu.state == "ok")


def _unseen(gpu: RememberedGpu, state: Literal["unknown", "lost"], detail: str, at: Instant) -> Gpu:
    return Gpu(gpu.index, gpu.uuid, gpu.name, state, gpu.total_bytes, None, None, detail, healthy=True, at=at)
