"""What the tests of this room share: a driver that is under their control, and waiting with a deadline."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pynvml
import pytest
from cradle import Cradle

from reconciler.clock import SystemClock
from reconciler.journal.layout import StateDir
from reconciler.sim import driver
from reconciler.sim.node import SimGpu, SimNode, prepare
from reconciler.units import GIB, MIB


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = 20.0) -> None:
    """Return as soon as `condition` holds; fail after the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.005)


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[..., None]:
    return wait_until


@pytest.fixture
def clock() -> SystemClock:
    return SystemClock()


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    state = StateDir(tmp_path / "state")
    state.ensure()
    return state


@pytest.fixture
def cradle(state: StateDir) -> Iterator[Cradle]:
    cradle = Cradle(state)
    yield cradle
    cradle.end()


@pytest.fixture
def sim_dir(tmp_path: Path) -> Iterator[Path]:
    """A simulated node of three GPUs, below pynvml; the last one is next to NUMA node 1."""
    path = tmp_path / "sim"
    gpus = [SimGpu("NVIDIA A100-SXM4-80GB", 80 * GIB, 500 * MIB, numa_node=0) for _ in range(2)]
    gpus.append(SimGpu("NVIDIA A100-SXM4-80GB", 80 * GIB, 500 * MIB, numa_node=1))
    prepare(path, SimNode(tuple(gpus), time_scale=0.01, release_delay_s=0.0))
    driver.install(path)
    yield path
    driver.uninstall()


@dataclass
class HandMadeGpu:
    uuid: str
    total: int = 24 * GIB
    free: int = 20 * GIB
    codes: dict[str, int] = field(default_factory=dict)
    """NVML name → return code instead of an answer."""
    listings: dict[str, list[tuple[int, int | None]]] = field(default_factory=dict)
    """`Compute`, `Graphics`, `MPSCompute` → (pid, bytes)."""


class HandMadeLibrary:
    """Stands where pynvml keeps the loaded library; does what a test tells it, the worst included."""

    def __init__(self, *gpus: HandMadeGpu) -> None:
        self.gpus = list(gpus)
        self.codes: dict[str, int] = {}
        self.before: dict[str, Callable[[], None]] = {}
        """NVML name → called first; may block."""
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        answers: dict[str, Callable[..., int]] = {
            "nvmlInitWithFlags": lambda *_: 0,
            "nvmlShutdown": lambda: 0,
            "nvmlDeviceGetCount_v2": self.count,
            "nvmlDeviceGetHandleByIndex_v2": self.handle,
        }
        of_gpu: dict[str, Callable[..., int]] = {
            "nvmlDeviceGetUUID": lambda gpu, buffer, _: _put(buffer, gpu.uuid.encode()),
            "nvmlDeviceGetMemoryInfo": self.memory,
            "nvmlDeviceGetMemoryInfo_v2": self.memory,
            "nvmlDeviceGetComputeRunningProcesses_v3": self.listing("Compute"),
            "nvmlDeviceGetGraphicsRunningProcesses_v3": self.listing("Graphics"),
            "nvmlDeviceGetMPSComputeRunningProcesses_v3": self.listing("MPSCompute"),
        }

        def call(*arguments: Any) -> int:
            self.called.append(name)
            self.before.get(name, lambda: None)()
            if name in self.codes:
                return self.codes[name]
            if name in answers:
                return answers[name](*arguments)
            if name not in of_gpu:
                return pynvml.NVML_ERROR_NOT_SUPPORTED
            gpu = self.gpus[_index(arguments[0])]
            return gpu.codes[name] if name in gpu.codes else of_gpu[name](gpu, *arguments[1:])

        return call

    def count(self, number: Any) -> int:
        return _put(number._obj, len(self.gpus))

    def handle(self, index: Any, handle: Any) -> int:
        ctypes.c_void_p.from_address(ctypes.addressof(handle._obj)).value = _FIRST_HANDLE + index.value
        return self.gpus[index.value].codes.get("nvmlDeviceGetHandleByIndex_v2", 0)

    @staticmethod
    def memory(gpu: HandMadeGpu, info: Any) -> int:
        info._obj.total, info._obj.free, info._obj.used = gpu.total, gpu.free, 1  # nobody should look at `used`
        return 0

    @staticmethod
    def listing(kind: str) -> Callable[..., int]:
        def answer(gpu: HandMadeGpu, count: Any, array: Any) -> int:
            found = gpu.listings.get(kind, [])
            room = count._obj.value if array is not None else 0
            count._obj.value = len(found)
            if len(found) > room:
                return pynvml.NVML_ERROR_INSUFFICIENT_SIZE
            for slot, (pid, size) in enumerate(found):
                array[slot].pid = pid
                array[slot].usedGpuMemory = pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value if size is None else size
            return 0

        return answer


_FIRST_HANDLE = 0x1000


def _put(target: Any, value: object) -> int:
    target.value = value
    return 0


def _index(handle: Any) -> int:
    return (ctypes.c_void_p.from_address(ctypes.addressof(handle)).value or 0) - _FIRST_HANDLE


@pytest.fixture
def library() -> Iterator[Callable[..., HandMadeLibrary]]:
    """Puts a hand-made library with these GPUs below pynvml."""

    def make(*gpus: HandMadeGpu) -> HandMadeLibrary:
        made = HandMadeLibrary(*gpus)
        driver._place(made)  # type: ignore[arg-type]
        return made

    yield make
    driver.uninstall()


@pytest.fixture
def gpu() -> type[HandMadeGpu]:
    return HandMadeGpu
