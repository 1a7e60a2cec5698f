"""The NVML functions of the simulated driver, as they stand below pynvml: C calling convention, ctypes arguments.

`calls` maps NVML's names to what answers to them. Out-parameters arrive as `byref(x)` (the object is its `_obj`),
buffers and arrays as themselves. A call returns nothing for success and raises `Refused` for any other return code.
Figures nobody allocates (utilisation, temperature, power) follow the memory in use, so that they are plausible and the
same in every run.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from reconciler.sim import faults
from reconciler.sim.ledger import Ledger
from reconciler.sim.node import SimGpu, SimNode

UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NOT_FOUND, INSUFFICIENT_SIZE = 1, 2, 3, 6, 7
DRIVER_NOT_LOADED, GPU_IS_LOST, UNKNOWN = 9, 15, 999
NOT_AVAILABLE = ctypes.c_ulonglong(-1).value
CUDA_VERSION = 13000
# handles are opaque; small numbers would look like indices, and 0 like no handle
_FIRST_HANDLE = 0x51A0
_TOPOLOGY_NODE, _TOPOLOGY_SYSTEM, _TOPOLOGY_INTERNAL = 40, 50, 0
_P2P_NVLINK, _P2P_OK, _P2P_NOT_SUPPORTED = 2, 0, 5
_NVLINK_CARDS = ("B200", "H200", "H100", "H20", "A100", "V100")
_CAPABILITY = (
    ("B200", (10, 0)), ("PRO 6000", (12, 0)), ("5090", (12, 0)), ("H200", (9, 0)), ("H100", (9, 0)), ("H20", (9, 0)),
    ("L40", (8, 9)), ("L4", (8, 9)), ("RTX 40", (8, 9)), ("A100", (8, 0)), ("A40", (8, 6)), ("A10", (8, 6)),
    ("A6000", (8, 6)), ("3090", (8, 6)), ("T4", (7, 5)), ("V100", (7, 0)),
)  # fmt: skip
"""(part of the name, CUDA compute capability); the first that matches wins."""


class Refused(Exception):  # noqa: N818 - a return code on its way down to C
    """The call ends with an NVML return code other than success."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Box:
    """What the simulated driver knows."""

    def __init__(self, sim_dir: Path, node: SimNode) -> None:
        self.sim_dir = sim_dir
        self.node = node
        self.ledger = Ledger(sim_dir, node.release_delay_s)
        self.users = 0
        """How often it was initialised less how often shut down."""

    # ------------------------------------------------------------ library

    def init(self, *_flags: Any) -> None:
        if faults.read(self.sim_dir).no_driver:
            raise Refused(DRIVER_NOT_LOADED)
        self.users += 1

    def shutdown(self) -> None:
        self.awake()
        self.users -= 1

    def awake(self) -> faults.Faults:
        """Refuse unless initialised; a driver that went away forgets that it was (NVML must be re-initialised)."""
        broken = faults.read(self.sim_dir)
        if broken.no_driver:
            self.users = 0
            raise Refused(DRIVER_NOT_LOADED)
        if self.users <= 0:
            raise Refused(UNINITIALIZED)
        return broken

    def driver_version(self, buffer: Any, size: Any) -> None:
        self.awake()
        _put_text(buffer, self.node.driver_version, size)

    def nvml_version(self, buffer: Any, size: Any) -> None:
        _put_text(buffer, f"13.{self.node.driver_version}", size)

    def cuda_version(self, version: Any) -> None:
        _put(version, CUDA_VERSION)

    def process_name(self, pid: Any, buffer: Any, size: Any) -> None:
        try:
            words = Path(f"/proc/{_number(pid)}/cmdline").read_bytes().split(b"\0")
        except OSError as error:
            raise Refused(NOT_FOUND) from error
        _put_text(buffer, words[0].decode(errors="replace"), size)

    # ------------------------------------------------------------ finding a GPU

    def count(self, number: Any) -> None:
        self.awake()
        _put(number, len(self.node.gpus))

    def by_index(self, index: Any, handle: Any) -> None:
        wanted = _number(index)
        if wanted >= len(self.node.gpus):
            self.awake()
            raise Refused(INVALID_ARGUMENT)
        self._check(wanted)
        _put_handle(handle, wanted)

    def by_uuid(self, uuid: Any, handle: Any) -> None:
        self._by(_bytes(uuid), handle, [self.node.uuid(i) for i in range(len(self.node.gpus))])

    def by_pci(self, bus_id: Any, handle: Any) -> None:
        ids = [_bus_id(i) for i in range(len(self.node.gpus))]
        wanted = _bytes(bus_id).upper()
        self._by(wanted, handle, ids if len(wanted) == len(ids[0]) else [i.removeprefix("0000") for i in ids])

    def _by(self, wanted: str, handle: Any, names: list[str]) -> None:
        self.awake()
        if wanted not in names:
            raise Refused(NOT_FOUND)
        self._check(names.index(wanted))
        _put_handle(handle, names.index(wanted))

    def _check(self, index: int) -> faults.GpuFaults:
        broken = self.awake().of(index)
        if broken.hang:
            time.sleep(broken.hang)
        if broken.lost:
            raise Refused(GPU_IS_LOST)
        if broken.unknown:
            raise Refused(UNKNOWN)
        if broken.hole:
            raise Refused(NOT_FOUND)
        return broken

    def _gpu(self, handle: Any) -> tuple[int, SimGpu, faults.GpuFaults]:
        address = ctypes.c_void_p.from_address(ctypes.addressof(handle)).value or 0
        index = address - _FIRST_HANDLE
        if not 0 <= index < len(self.node.gpus):
            self.awake()
            raise Refused(INVALID_ARGUMENT)
        return index, self.node.gpus[index], self._check(index)

    # ------------------------------------------------------------ what a GPU is

    def name(self, handle: Any, buffer: Any, size: Any) -> None:
        _put_text(buffer, self._gpu(handle)[1].name, size)

    def uuid(self, handle: Any, buffer: Any, size: Any) -> None:
        _put_text(buffer, self.node.uuid(self._gpu(handle)[0]), size)

    def serial(self, handle: Any, buffer: Any, size: Any) -> None:
        _put_text(buffer, str(int(self.node.uuid(self._gpu(handle)[0])[4:12], 16)), size)

    def index(self, handle: Any, number: Any) -> None:
        _put(number, self._gpu(handle)[0])

    def pci(self, handle: Any, info: Any) -> None:
        index = self._gpu(handle)[0]
        target = _target(info)
        target.domain, target.bus, target.device = 0, index + 1, 0
        target.pciDeviceId, target.pciSubSystemId = 0x233010DE, 0x16C110DE
        target.busId = _bus_id(index).encode()
        if hasattr(target, "busIdLegacy"):
            target.busIdLegacy = _bus_id(index).removeprefix("0000").encode()

    def capability(self, handle: Any, major: Any, minor: Any) -> None:
        name = self._gpu(handle)[1].name
        found = next((version for part, version in _CAPABILITY if part in name), (8, 0))
        _put(major, found[0])
        _put(minor, found[1])

    def numa(self, handle: Any, node: Any) -> None:
        _put(node, self._or_not_supported(self._gpu(handle)[1].numa_node))

    def common_ancestor(self, one: Any, other: Any, level: Any) -> None:
        (first, a, _), (second, b, _) = self._gpu(one), self._gpu(other)
        if first == second:
            _put(level, _TOPOLOGY_INTERNAL)
        else:
            _put(level, _TOPOLOGY_NODE if a.numa_node == b.numa_node else _TOPOLOGY_SYSTEM)

    def nvlink_state(self, handle: Any, link: Any, active: Any) -> None:
        index, gpu, _ = self._gpu(handle)
        if not _has_nvlink(gpu):
            raise Refused(NOT_SUPPORTED)
        if not 0 <= _number(link) < 18:
            raise Refused(INVALID_ARGUMENT)
        _put(active, int(any(_joined(gpu, other) for i, other in enumerate(self.node.gpus) if i != index)))

    def p2p_status(self, one: Any, other: Any, kind: Any, status: Any) -> None:
        (first, a, _), (second, b, _) = self._gpu(one), self._gpu(other)
        if first == second:
            raise Refused(INVALID_ARGUMENT)
        if _number(kind) == _P2P_NVLINK:
            _put(status, _P2P_OK if _joined(a, b) else _P2P_NOT_SUPPORTED)
        else:
            _put(status, _P2P_OK)

    # ------------------------------------------------------------ what it does

    def _used(self, handle: Any) -> tuple[SimGpu, int]:
        index, gpu, _ = self._gpu(handle)
        # whoever writes too much into the ledger gets a full GPU, not an impossible one
        return gpu, min(self.ledger.used_bytes(index), gpu.memory_bytes - gpu.reserved_bytes)

    def memory(self, handle: Any, info: Any) -> None:
        gpu, used = self._used(handle)
        target = _target(info)
        target.total, target.used = gpu.memory_bytes, used + gpu.reserved_bytes
        target.free = gpu.memory_bytes - target.used

    def memory_v2(self, handle: Any, info: Any) -> None:
        gpu, used = self._used(handle)
        target = _target(info)
        target.total, target.used, target.reserved = gpu.memory_bytes, used, gpu.reserved_bytes
        target.free = gpu.memory_bytes - used - gpu.reserved_bytes

    def bar1(self, handle: Any, info: Any) -> None:
        self._gpu(handle)
        target = _target(info)
        target.bar1Total, target.bar1Used, target.bar1Free = 256 << 20, 1 << 20, 255 << 20

    def processes(self, handle: Any, count: Any, array: Any) -> None:
        index, _, broken = self._gpu(handle)
        # the dead are off the list before their memory is back, as with the real driver
        living = [a for a in self.ledger.allocations(index) if a.alive]
        room = _target(count).value if array is not None else 0
        _put(count, len(living))
        if len(living) > room:
            raise Refused(INSUFFICIENT_SIZE)
        for slot, allocation in enumerate(living):
            entry = array[slot]
            entry.pid = allocation.pid
            entry.usedGpuMemory = NOT_AVAILABLE if broken.not_supported_process_memory else allocation.memory_bytes
            if hasattr(entry, "gpuInstanceId"):
                entry.gpuInstanceId = entry.computeInstanceId = 0xFFFFFFFF

    def no_processes(self, handle: Any, count: Any, _array: Any) -> None:
        self._gpu(handle)
        _put(count, 0)

    def utilisation(self, handle: Any, info: Any) -> None:
        gpu, used = self._used(handle)
        _target(info).gpu = _target(info).memory = 100 * used // gpu.memory_bytes

    def temperature(self, handle: Any, _sensor: Any, degrees: Any) -> None:
        gpu, used = self._used(handle)
        _put(degrees, 32 + 40 * used // gpu.memory_bytes)

    def temperature_v(self, handle: Any, info: Any) -> None:
        gpu, used = self._used(handle)
        _target(info).temperature = 32 + 40 * used // gpu.memory_bytes

    def power(self, handle: Any, milliwatts: Any) -> None:
        gpu, used = self._used(handle)
        _put(milliwatts, 25_000 + 275_000 * used // gpu.memory_bytes)

    def constant(self, value: int) -> Callable[..., None]:
        """A call whose last argument receives the same value always."""

        def call(handle: Any, *rest: Any) -> None:
            self._gpu(handle)
            _put(rest[-1], value)

        return call

    def remapped_rows(self, handle: Any, corrected: Any, uncorrected: Any, pending: Any, failed: Any) -> None:
        broken = self._gpu(handle)[2]
        for target, value in ((corrected, 0), (uncorrected, int(broken.remap_pending)), (failed, 0)):
            _put(target, value)
        _put(pending, int(broken.remap_pending))

    def retired_pages(self, handle: Any, _cause: Any, count: Any, *_arrays: Any) -> None:
        self._gpu(handle)
        _put(count, 0)

    @staticmethod
    def _or_not_supported(value: int | None) -> int:
        if value is None:
            raise Refused(NOT_SUPPORTED)
        return value


def calls(sim_dir: Path, node: SimNode) -> dict[str, Callable[..., None]]:
    """NVML's names, and what answers to them. Known names that are missing here answer NOT_SUPPORTED (`driver`)."""
    box = _Box(sim_dir, node)
    return {
        "nvmlInit_v2": box.init, "nvmlInitWithFlags": box.init, "nvmlShutdown": box.shutdown,
        "nvmlSystemGetDriverVersion": box.driver_version, "nvmlSystemGetNVMLVersion": box.nvml_version,
        "nvmlSystemGetCudaDriverVersion": box.cuda_version, "nvmlSystemGetCudaDriverVersion_v2": box.cuda_version,
        "nvmlSystemGetProcessName": box.process_name,
        "nvmlDeviceGetCount_v2": box.count, "nvmlDeviceGetHandleByIndex_v2": box.by_index,
        "nvmlDeviceGetHandleByUUID": box.by_uuid, "nvmlDeviceGetHandleByPciBusId_v2": box.by_pci,
        "nvmlDeviceGetName": box.name, "nvmlDeviceGetUUID": box.uuid, "nvmlDeviceGetSerial": box.serial,
        "nvmlDeviceGetIndex": box.index, "nvmlDeviceGetMinorNumber": box.index, "nvmlDeviceGetBoardId": box.index,
        "nvmlDeviceGetPciInfo_v3": box.pci, "nvmlDeviceGetPciInfoExt": box.pci,
        "nvmlDeviceGetCudaComputeCapability": box.capability, "nvmlDeviceGetNumaNodeId": box.numa,
        "nvmlDeviceGetTopologyCommonAncestor": box.common_ancestor, "nvmlDeviceGetNvLinkState": box.nvlink_state,
        "nvmlDeviceGetP2PStatus": box.p2p_status,
        "nvmlDeviceGetMemoryInfo": box.memory, "nvmlDeviceGetMemoryInfo_v2": box.memory_v2,
        "nvmlDeviceGetBAR1MemoryInfo": box.bar1,
        "nvmlDeviceGetComputeRunningProcesses_v2": box.processes,
        "nvmlDeviceGetComputeRunningProcesses_v3": box.processes,
        "nvmlDeviceGetGraphicsRunningProcesses_v2": box.no_processes,
        "nvmlDeviceGetGraphicsRunningProcesses_v3": box.no_processes,
        "nvmlDeviceGetMPSComputeRunningProcesses_v2": box.no_processes,
        "nvmlDeviceGetMPSComputeRunningProcesses_v3": box.no_processes,
        "nvmlDeviceGetUtilizationRates": box.utilisation, "nvmlDeviceGetTemperature": box.temperature,
        "nvmlDeviceGetTemperatureV": box.temperature_v, "nvmlDeviceGetPowerUsage": box.power,
        "nvmlDeviceGetPowerManagementLimit": box.constant(300_000),
        "nvmlDeviceGetEnforcedPowerLimit": box.constant(300_000),
        "nvmlDeviceGetPersistenceMode": box.constant(1), "nvmlDeviceGetPerformanceState": box.constant(0),
        "nvmlDeviceGetComputeMode": box.constant(0), "nvmlDeviceIsMigDeviceHandle": box.constant(0),
        "nvmlDeviceGetClockInfo": box.constant(1_410), "nvmlDeviceGetMaxClockInfo": box.constant(1_980),
        "nvmlDeviceGetRetiredPagesPendingStatus": box.constant(0),
        "nvmlDeviceGetRetiredPages": box.retired_pages, "nvmlDeviceGetRetiredPages_v2": box.retired_pages,
        "nvmlDeviceGetRemappedRows": box.remapped_rows,
    }  # fmt: skip


def _has_nvlink(gpu: SimGpu) -> bool:
    return any(card in gpu.name for card in _NVLINK_CARDS)


def _joined(one: SimGpu, other: SimGpu) -> bool:
    return _has_nvlink(one) and _has_nvlink(other) and one.nvlink_island == other.nvlink_island


def _bus_id(index: int) -> str:
    return f"00000000:{index + 1:02X}:00.0"


def _target(reference: Any) -> Any:
    """The object behind `byref(x)`; an object passed as it is stays what it is."""
    return getattr(reference, "_obj", reference)


def _put(reference: Any, value: int) -> None:
    _target(reference).value = value


def _put_handle(reference: Any, index: int) -> None:
    ctypes.c_void_p.from_address(ctypes.addressof(_target(reference))).value = _FIRST_HANDLE + index


def _put_text(buffer: Any, text: str, size: Any) -> None:
    encoded = text.encode()
    if len(encoded) >= _number(size):
        _refuse(INSUFFICIENT_SIZE)
    buffer.value = encoded


def _number(value: Any) -> int:
    return int(getattr(value, "value", value))


def _bytes(value: Any) -> str:
    return bytes(getattr(value, "value", value) or b"").decode(errors="replace")


def _refuse(code: int) -> NoReturn:
    raise Refused(code)
