"""The calls to NVML. The only importer of pynvml outside the simulated driver.

pynvml is imported on first use: it defines thousands of names, and most commands never look at a GPU. Nothing here
knows of deadlines, threads, or what was seen before: that is `gpus`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.clock import Clock, Instant
from reconciler.errors import DriverError
from reconciler.plan.observed import Gpu, GpuProcess
from reconciler.units import KIB, MIB

TRAITS_MAX_AGE_S = 60.0
"""Row remaps and retired pages change on a GPU reset or a memory fault: once a minute is soon enough."""
INIT_RETRY_S = 5.0
"""Least time between two attempts to initialise a driver that was not there: each may run nvidia-modprobe."""
INIT_TRIES = 3
INIT_PAUSE_S = 0.1
SIMULATE_HINT = "on a box without NVIDIA GPUs, try it on a simulated node: --simulate 4x80GiB"


class ReadOptions(Struct, frozen=True):
    """How old a part may be before the driver is asked again (seconds; 0: always ask).

    Memory costs 12 µs a GPU; the process lists 4.5 ms, and fast polling of them holds the driver's lock.
    """

    memory_max_age_s: float = 1.0
    processes_max_age_s: float = 5.0
    listed_since: Mapping[str, float] = field(default_factory=dict)
    """By UUID: processes of these GPUs are to be listed at this moment (monotonic seconds) or later, whatever the age
    of the last list. One from before the end of a process says nothing of the memory that it held."""

    def accepts(self, uuid: str, listed: Instant, now: Instant) -> bool:
        """Whether a list of the processes on this GPU is young enough."""
        young = now.since(listed) < self.processes_max_age_s
        return young and listed.mono >= self.listed_since.get(uuid, -math.inf)


CACHED = ReadOptions()
WAITING = ReadOptions(memory_max_age_s=0.0, processes_max_age_s=1.0)
"""While someone waits for memory to come back, many times a second."""
MOVED_BYTES = 16 * MIB
"""Memory that moves by more than this means that processes came or went: their list is read at once, whatever its
age, so that nobody needs to poll it."""


class UnreadGpu(Struct, frozen=True):
    """A GPU that is listed and could not be read."""

    index: int
    uuid: str | None
    """None: not even its name came back."""
    state: Literal["unknown", "lost"]
    detail: str


class _Listing(Struct, frozen=True):
    """The processes on one GPU, and when they were listed."""

    processes: tuple[GpuProcess, ...] | None
    at: Instant
    free_bytes: int
    """Of the GPU, then."""


class _Traits(Struct, frozen=True):
    """What of one GPU hardly ever changes."""

    name: str
    numa_node: int | None
    gate: str
    """Why nothing new should be placed on it; empty: no reason."""
    at: Instant


class NvmlDriver:
    """The calls themselves. Lives on the driver's thread and raises what pynvml raises."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._nv: Any = None
        self._initialised = False
        self._refused: tuple[Instant, Exception] | None = None
        self._listings: dict[str, _Listing] = {}
        self._traits: dict[str, _Traits] = {}
        self._islands: tuple[tuple[str, ...], dict[str, int]] | None = None
        """The GPUs that were read together, and which NVLink joins."""
        self.calling = ""
        """The call that is out now: what a message names when it hangs."""

    def open(self) -> None:
        """Initialise NVML if it is not; a refusal is remembered for `INIT_RETRY_S`.

        Raises:
            NVMLError: it cannot be initialised.
        """
        if self._initialised:
            return
        if self._refused is not None and self._clock.now().since(self._refused[0]) < INIT_RETRY_S:
            raise self._refused[1]
        if self._nv is None:
            import pynvml

            self._nv = pynvml
        self.calling = "nvmlInit"
        try:
            self._init()
        except self._nv.NVMLError as error:
            self._refused = (self._clock.now(), error)
            raise
        self._refused = None
        self._initialised = True

    def _init(self) -> None:
        """Some tries, for a driver that is just being reloaded; a missing library or a newer driver will not mend."""
        try:
            self._nv.nvmlInit()
        except self._nv.NVMLError as error:
            if not self._may_mend(error):
                raise
        else:
            return
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_fixed  # 8 ms, hardly ever needed

        time.sleep(INIT_PAUSE_S)  # the driver's own thread
        retrying = Retrying(
            retry=retry_if_exception(self._may_mend),
            stop=stop_after_attempt(INIT_TRIES - 1),
            wait=wait_fixed(INIT_PAUSE_S),
            reraise=True,
        )
        retrying(self._nv.nvmlInit)

    def _may_mend(self, error: BaseException) -> bool:
        nv = self._nv
        terminal = (nv.NVML_ERROR_LIBRARY_NOT_FOUND, nv.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
        return isinstance(error, nv.NVMLError) and error.value not in terminal

    def close(self) -> None:
        """Give NVML back; that the driver is gone is no error."""
        if not self._initialised:
            return
        self._initialised = False
        self._listings.clear()
        self._traits.clear()
        self.calling = "nvmlShutdown"
        with suppress(self._nv.NVMLError):
            self._nv.nvmlShutdown()

    def versions(self) -> tuple[str, str]:
        """The driver's own, and the newest CUDA that it serves.

        Raises:
            NVMLError: the driver does not answer.
        """
        self.open()
        self.calling = "nvmlSystemGetDriverVersion"
        cuda = int(self._nv.nvmlSystemGetCudaDriverVersion())
        return str(self._nv.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}"

    def look(self, options: ReadOptions) -> list[Gpu | UnreadGpu]:
        """Every GPU that the driver lists; initialises first, and once more where the driver no longer knows us.

        Raises:
            NVMLError: the driver as a whole does not answer.
        """
        fresh = not self._initialised
        self.open()
        try:
            found = self._list(options)
        except self._nv.NVMLError:
            if fresh:
                raise
        else:
            # the handles of a driver that was reloaded may answer "unknown error" instead, for every GPU
            if fresh or not found or not all(isinstance(gpu, UnreadGpu) and gpu.state == "unknown" for gpu in found):
                return found
        self.close()
        self.open()
        return self._list(options)

    def explain(self, error: Exception) -> DriverError | None:
        """What pynvml said, for a person; None: pynvml did not say this."""
        nv = self._nv
        if nv is None or not isinstance(error, nv.NVMLError):
            return None
        match error.value:
            case nv.NVML_ERROR_LIBRARY_NOT_FOUND:
                return DriverError("no NVIDIA driver here: libnvidia-ml.so.1 was not found", hint=SIMULATE_HINT)
            case nv.NVML_ERROR_DRIVER_NOT_LOADED:
                return DriverError("the NVIDIA driver is not loaded", hint=f"modprobe nvidia; {SIMULATE_HINT}")
            case nv.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
                return DriverError(
                    "the NVIDIA driver was upgraded: this process still holds the old library",
                    hint="only a new process helps: restart the daemon (endpoints keep running); "
                    "if that says the same, reboot",
                )
            case value:
                return DriverError(f"NVML does not answer: {self.calling}: {error} ({value})")

    def _list(self, options: ReadOptions) -> list[Gpu | UnreadGpu]:
        self.calling = "nvmlDeviceGetCount"
        found = [self._gpu(index, options) for index in range(self._nv.nvmlDeviceGetCount())]
        read = [gpu for gpu in found if isinstance(gpu, Gpu)]
        islands = self._join(read)
        return [replace(g, nvlink_island=islands.get(g.uuid)) if isinstance(g, Gpu) else g for g in found]

    def _join(self, gpus: list[Gpu]) -> dict[str, int]:
        """The NVLink island of each GPU: the least index of those that it is joined to; empty where there is no NVLink.

        nvmlDeviceGetP2PStatus for NVLink says yes of two GPUs that are joined directly or through switches. Asked once
        for each set of GPUs: links do not change while a driver is loaded. A failure makes no GPU unknown: it is asked
        again on the next look.
        """
        uuids = tuple(gpu.uuid for gpu in gpus)
        if self._islands is not None and self._islands[0] == uuids:
            return self._islands[1]
        island, linked = {gpu.uuid: gpu.index for gpu in gpus}, False
        for one, other in combinations(gpus, 2):
            self.calling = f"nvmlDeviceGetP2PStatus({one.index}, {other.index})"
            try:
                joined = self._trait(self._linked, one.index, other.index)
            except self._nv.NVMLError:
                return {}
            if joined:
                linked = True
                low, high = sorted((island[one.uuid], island[other.uuid]))
                island = {uuid: low if index == high else index for uuid, index in island.items()}
        self._islands = uuids, island if linked else {}
        return self._islands[1]

    def _linked(self, one: int, other: int) -> bool:
        nv = self._nv
        first, second = nv.nvmlDeviceGetHandleByIndex(one), nv.nvmlDeviceGetHandleByIndex(other)
        status = nv.nvmlDeviceGetP2PStatus(first, second, nv.NVML_P2P_CAPS_INDEX_NVLINK)
        return bool(status == nv.NVML_P2P_STATUS_OK)

    def _gpu(self, index: int, options: ReadOptions) -> Gpu | UnreadGpu:
        nv = self._nv
        whole_driver = (
            nv.NVML_ERROR_UNINITIALIZED, nv.NVML_ERROR_DRIVER_NOT_LOADED, nv.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        )  # fmt: skip
        uuid: str | None = None
        try:
            self.calling = f"nvmlDeviceGetHandleByIndex({index})"
            handle = nv.nvmlDeviceGetHandleByIndex(index)
            self.calling = f"nvmlDeviceGetUUID({index})"
            uuid = nv.nvmlDeviceGetUUID(handle)
            return self._read(index, uuid, handle, options)
        except nv.NVMLError as error:
            if error.value in whole_driver:
                raise
            # a hole in the indices is NOT_FOUND for a listed index. 999 and the rest say that a call failed, and
            # nothing of the GPU
            hole = error.value == nv.NVML_ERROR_NOT_FOUND and "HandleByIndex" in self.calling
            lost = hole or error.value == nv.NVML_ERROR_GPU_IS_LOST
            return UnreadGpu(index, uuid, "lost" if lost else "unknown", f"{self.calling}: {error} ({error.value})")

    def _read(self, index: int, uuid: str, handle: Any, options: ReadOptions) -> Gpu:
        nv, now = self._nv, self._clock.now()
        self.calling = f"nvmlDeviceGetMemoryInfo({index})"
        total_bytes, free_bytes = self._memory(handle)
        listing = self._listings.get(uuid)
        if (
            listing is None
            or not options.accepts(uuid, listing.at, now)
            or abs(listing.free_bytes - free_bytes) > MOVED_BYTES
        ):
            self.calling = f"nvmlDeviceGetComputeRunningProcesses({index})"
            listing = self._listings[uuid] = _Listing(self._list_processes(handle), now, free_bytes)
        traits = self._traits.get(uuid)
        if traits is None or now.since(traits.at) >= TRAITS_MAX_AGE_S:
            self.calling = f"nvmlDeviceGetRemappedRows({index})"
            name = self._trait(nv.nvmlDeviceGetName, handle) or "GPU"
            traits = self._traits[uuid] = _Traits(name, self._numa_node(handle), self._gate(handle), now)
        return Gpu(
            index=index,
            uuid=uuid,
            name=traits.name,
            state="ok",
            total_bytes=total_bytes,
            used_bytes=total_bytes - free_bytes,
            processes=listing.processes,
            detail=traits.gate,
            healthy=not traits.gate,
            at=listing.at,  # never younger than the memory: `at` is the age of the oldest part
            numa_node=traits.numa_node,
        )

    def _memory(self, handle: Any) -> tuple[int, int]:
        """Total and free bytes.

        Not `used`: version 2 leaves the driver's own reserve out of it, version 1 counts it in. What a newcomer can
        have is `free` in both, so what is not free is used, and total less used is what an engine will find.
        """
        nv = self._nv
        memory = self._optional(nv.nvmlDeviceGetMemoryInfo, handle, nv.nvmlMemory_v2)
        memory = memory or self._optional(nv.nvmlDeviceGetMemoryInfo, handle)
        if memory is not None:
            return memory.total, memory.free
        # an integrated GPU (Jetson, GB10) answers NOT_SUPPORTED: it has no memory but the host's
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        return int(lines["MemTotal"].split()[0]) * KIB, int(lines["MemAvailable"].split()[0]) * KIB

    def _list_processes(self, handle: Any) -> tuple[GpuProcess, ...] | None:
        """Compute, graphics and MPS clients, each pid once with the most it was said to hold; None: not to be seen."""
        nv = self._nv
        memory_bytes: dict[int, int | None] = {}
        kinds = (
            nv.nvmlDeviceGetComputeRunningProcesses,
            nv.nvmlDeviceGetGraphicsRunningProcesses,
            nv.nvmlDeviceGetMPSComputeRunningProcesses,
        )
        try:
            compute, graphics, mps = (self._optional(self._twice_if_grown, kind, handle) for kind in kinds)
        except nv.NVMLError_NoPermission:
            return None  # a list that leaves out what may not be seen is no list
        if compute is None:
            return None
        for process in (*compute, *(graphics or ()), *(mps or ())):
            known = memory_bytes.get(process.pid)
            said = process.usedGpuMemory
            memory_bytes[process.pid] = known if said is None else max(said, known or 0)
        return tuple(GpuProcess(pid, memory_bytes[pid], None, None, None) for pid in sorted(memory_bytes))

    def _twice_if_grown(self, kind: Callable[[Any], Any], handle: Any) -> Any:
        """The listing, asked again if more processes came between its two calls than it had left room for."""
        try:
            return kind(handle)
        except self._nv.NVMLError_InsufficientSize:
            return kind(handle)

    def _gate(self, handle: Any) -> str:
        """Why nothing new should be placed here; empty: no reason."""
        nv = self._nv
        rows = self._trait(nv.nvmlDeviceGetRemappedRows, handle)  # (corrected, uncorrected, pending, failed)
        if rows and rows[3]:
            return "row remapping failed: the GPU needs service"
        if rows and rows[2]:
            return "row remap pending: reset the GPU"
        if self._trait(nv.nvmlDeviceGetRetiredPagesPendingStatus, handle):
            return "page retirement pending: reset the GPU"
        return ""

    def _numa_node(self, handle: Any) -> int | None:
        """The host memory node next to it, where that is one.

        nvmlDeviceGetMemoryAffinity gives a bit set of nodes. nvmlDeviceGetNumaNodeId is for boards whose own memory is
        a node (Grace), and the second choice.
        """
        nv = self._nv
        words = self._trait(nv.nvmlDeviceGetMemoryAffinity, handle, 16, nv.NVML_AFFINITY_SCOPE_NODE)
        nodes = [64 * i + bit for i, word in enumerate(words or ()) for bit in range(64) if word >> bit & 1]
        if len(nodes) == 1:
            return nodes[0]
        node = self._trait(nv.nvmlDeviceGetNumaNodeId, handle)
        return node if isinstance(node, int) and node >= 0 else None

    def _trait(self, function: Callable[..., Any], *arguments: object) -> Any:
        """As `_optional`, and also None where it is forbidden: no trait is worth calling a GPU unknown for."""
        try:
            return self._optional(function, *arguments)
        except self._nv.NVMLError_NoPermission:
            return None

    def _optional(self, function: Callable[..., Any], *arguments: object) -> Any:
        """The answer, or None where this driver or this GPU does not offer the question."""
        nv = self._nv
        not_offered = (nv.NVML_ERROR_NOT_SUPPORTED, nv.NVML_ERROR_FUNCTION_NOT_FOUND, nv.NVML_ERROR_INVALID_ARGUMENT,
                       nv.NVML_ERROR_ARGUMENT_VERSION_MISMATCH)  # fmt: skip
        try:
            return function(*arguments)
        except nv.NVMLError as error:
            if error.value not in not_offered:
                raise
            return None
