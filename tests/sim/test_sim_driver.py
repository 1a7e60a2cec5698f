"""The simulated driver, through the real pynvml."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest
from simulated_box import GIB, Box, until

from reconciler import identity
from reconciler.errors import StateError
from reconciler.sim import driver, faults
from reconciler.sim.node import SimGpu, SimNode, prepare


@pytest.fixture
def nvml(box: Box) -> Iterator[Box]:
    """The simulated driver is installed and initialised."""
    driver.install(box.sim_dir)
    pynvml.nvmlInit()
    yield box
    driver.uninstall()


def handle(index: int) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(index)


def code_of(call: Any, *args: Any) -> int:
    with pytest.raises(pynvml.NVMLError) as caught:
        call(*args)
    return int(caught.value.value)


def start_ticks(pid: int) -> int:
    stat = identity.read_stat(pid)
    assert stat is not None
    return stat.start_ticks


def test_the_box_is_described_as_its_description_says(nvml: Box) -> None:
    assert pynvml.nvmlSystemGetDriverVersion() == "580.95.05"
    assert pynvml.nvmlSystemGetCudaDriverVersion() == 13000
    assert pynvml.nvmlSystemGetNVMLVersion().startswith("13.")
    assert pynvml.nvmlDeviceGetCount() == 2
    for index in range(2):
        gpu = handle(index)
        assert pynvml.nvmlDeviceGetName(gpu) == "NVIDIA GeForce RTX 4090"
        assert pynvml.nvmlDeviceGetUUID(gpu) == nvml.node.uuid(index)
        assert pynvml.nvmlDeviceGetIndex(gpu) == index
        assert pynvml.nvmlDeviceGetMinorNumber(gpu) == index
        assert pynvml.nvmlDeviceGetCudaComputeCapability(gpu) == (8, 9)
        assert pynvml.nvmlDeviceGetPersistenceMode(gpu) == 1
        assert pynvml.nvmlDeviceGetSerial(gpu).isdecimal()
        assert 20 < pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU) < 90
        assert pynvml.nvmlDeviceGetPowerUsage(gpu) < pynvml.nvmlDeviceGetPowerManagementLimit(gpu)
        assert pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM) > 0
        assert pynvml.nvmlDeviceGetRemappedRows(gpu) == (0, 0, 0, 0)
        assert pynvml.nvmlDeviceGetRetiredPages(gpu, 0) == []
        assert pynvml.nvmlDeviceGetRetiredPagesPendingStatus(gpu) == 0


def test_a_gpu_is_found_by_its_uuid_and_by_its_bus(nvml: Box) -> None:
    for index in range(2):
        bus = pynvml.nvmlDeviceGetPciInfo(handle(index)).busId
        by_bus = pynvml.nvmlDeviceGetHandleByPciBusId(bus)
        by_uuid = pynvml.nvmlDeviceGetHandleByUUID(nvml.node.uuid(index))
        assert pynvml.nvmlDeviceGetIndex(by_bus) == pynvml.nvmlDeviceGetIndex(by_uuid) == index
    assert code_of(pynvml.nvmlDeviceGetHandleByUUID, "GPU-nobody") == pynvml.NVML_ERROR_NOT_FOUND
    assert code_of(pynvml.nvmlDeviceGetHandleByIndex, 2) == pynvml.NVML_ERROR_INVALID_ARGUMENT


def test_both_memory_structures_show_what_the_ledger_holds(tmp_path: Path) -> None:
    node = SimNode((SimGpu("Odd Card", 10 * GIB, reserved_bytes=GIB, numa_node=1),))
    prepare(tmp_path, node)
    driver.install(tmp_path)
    try:
        pynvml.nvmlInit()
        Box(tmp_path, node).ledger.write(0, os.getpid(), start_ticks(os.getpid()), 4 * GIB)
        first = pynvml.nvmlDeviceGetMemoryInfo(handle(0))
        second = pynvml.nvmlDeviceGetMemoryInfo(handle(0), pynvml.nvmlMemory_v2)
        assert (first.total, first.used, first.free) == (10 * GIB, 5 * GIB, 5 * GIB)
        assert (second.total, second.used, second.free, second.reserved) == (10 * GIB, 4 * GIB, 5 * GIB, GIB)
        assert pynvml.nvmlDeviceGetNumaNodeId(handle(0)) == 1
        # whoever writes nonsense into the ledger gets a full GPU, not one with less than nothing free
        Box(tmp_path, node).ledger.write(0, os.getpid(), start_ticks(os.getpid()), 1 << 60)
        assert pynvml.nvmlDeviceGetMemoryInfo(handle(0)).free == 0
    finally:
        driver.uninstall()


def test_a_dead_process_leaves_the_list_before_its_memory_is_free(nvml: Box) -> None:
    tenant = nvml.tenant(0, 6 * GIB)
    listed = pynvml.nvmlDeviceGetComputeRunningProcesses(handle(0))
    assert [(p.pid, p.usedGpuMemory) for p in listed] == [(tenant.pid, 6 * GIB)]
    assert pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle(0)) == []
    assert pynvml.nvmlDeviceGetMPSComputeRunningProcesses(handle(0)) == []
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(handle(1)) == []
    tenant.kill()
    tenant.wait()
    assert pynvml.nvmlDeviceGetMemoryInfo(handle(0)).used == 6 * GIB
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(handle(0)) == []
    until(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle(0)).used == 0)


def test_many_processes_fit_into_the_list(nvml: Box) -> None:
    waiting = [subprocess.Popen(["sleep", "60"]) for _ in range(12)]
    try:
        for process in waiting:
            nvml.ledger.write(0, process.pid, start_ticks(process.pid), GIB)
        listed = pynvml.nvmlDeviceGetComputeRunningProcesses(handle(0))
        assert sorted(p.pid for p in listed) == sorted(p.pid for p in waiting)
    finally:
        for process in waiting:
            process.kill()
            process.wait()


def test_what_a_board_cannot_do_is_not_supported_and_what_no_driver_knows_is_not_found(nvml: Box) -> None:
    gpu = handle(0)
    for call in (pynvml.nvmlDeviceGetFanSpeed, pynvml.nvmlDeviceGetMigMode, pynvml.nvmlDeviceGetEccMode):
        assert code_of(call, gpu) == pynvml.NVML_ERROR_NOT_SUPPORTED
    assert code_of(pynvml.nvmlEventSetCreate) == pynvml.NVML_ERROR_NOT_SUPPORTED
    assert code_of(pynvml.nvmlDeviceGetNumaNodeId, gpu) == pynvml.NVML_ERROR_NOT_SUPPORTED
    assert code_of(pynvml._nvmlGetFunctionPointer, "nvmlDeviceMakeCoffee") == pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    assert pynvml.nvmlErrorString(pynvml.NVML_ERROR_GPU_IS_LOST) == "GPU is lost"
    assert "12345" in pynvml.nvmlErrorString(12345)


def test_cards_with_nvlink_are_linked_and_others_are_not(tmp_path: Path, nvml: Box) -> None:
    assert code_of(pynvml.nvmlDeviceGetNvLinkState, handle(0), 0) == pynvml.NVML_ERROR_NOT_SUPPORTED
    h100 = SimGpu("NVIDIA H100 80GB HBM3", 80 * GIB, numa_node=0)
    prepare(tmp_path / "linked", SimNode((h100, h100, SimGpu(h100.name, 80 * GIB, numa_node=1))))
    driver.install(tmp_path / "linked")
    pynvml.nvmlInit()
    assert pynvml.nvmlDeviceGetNvLinkState(handle(0), 0) == 1
    levels = [pynvml.nvmlDeviceGetTopologyCommonAncestor(handle(0), handle(i)) for i in range(3)]
    assert levels == [pynvml.NVML_TOPOLOGY_INTERNAL, pynvml.NVML_TOPOLOGY_NODE, pynvml.NVML_TOPOLOGY_SYSTEM]


def test_nvlink_joins_the_cards_of_one_island(tmp_path: Path, nvml: Box) -> None:
    h100, l4 = SimGpu("NVIDIA H100 80GB HBM3", 80 * GIB), SimGpu("NVIDIA L4", 24 * GIB)
    other = SimGpu(h100.name, 80 * GIB, nvlink_island=1)
    prepare(tmp_path / "linked", SimNode((h100, h100, other, l4)))
    driver.install(tmp_path / "linked")
    pynvml.nvmlInit()
    nvlink = pynvml.NVML_P2P_CAPS_INDEX_NVLINK
    joined = [pynvml.nvmlDeviceGetP2PStatus(handle(0), handle(i), nvlink) for i in (1, 2, 3)]
    assert [status == pynvml.NVML_P2P_STATUS_OK for status in joined] == [True, False, False]
    assert pynvml.nvmlDeviceGetNvLinkState(handle(2), 0) == 0, "nobody else is in its island"
    assert code_of(pynvml.nvmlDeviceGetP2PStatus, handle(0), handle(0), nvlink) == pynvml.NVML_ERROR_INVALID_ARGUMENT


def test_nothing_answers_before_initialisation_or_after_the_last_shutdown(nvml: Box) -> None:
    gpu = handle(0)
    pynvml.nvmlInit()
    pynvml.nvmlShutdown()
    assert pynvml.nvmlDeviceGetCount() == 2
    pynvml.nvmlShutdown()
    assert code_of(pynvml.nvmlDeviceGetCount) == pynvml.NVML_ERROR_UNINITIALIZED
    assert code_of(pynvml.nvmlDeviceGetName, gpu) == pynvml.NVML_ERROR_UNINITIALIZED
    assert code_of(pynvml.nvmlShutdown) == pynvml.NVML_ERROR_UNINITIALIZED


def test_uninstalling_leaves_pynvml_as_it_was_without_a_driver(nvml: Box) -> None:
    driver.uninstall()
    assert pynvml.nvmlLib is None
    assert code_of(pynvml.nvmlDeviceGetCount) == pynvml.NVML_ERROR_UNINITIALIZED


def test_installing_needs_a_node(tmp_path: Path) -> None:
    with pytest.raises(StateError):
        driver.install(tmp_path)


@pytest.mark.parametrize(("kind", "code"), [("lost", 15), ("unknown", 999), ("hole", 6)])
def test_a_broken_gpu_fails_in_every_call_and_its_neighbour_does_not(nvml: Box, kind: str, code: int) -> None:
    held = handle(0)
    faults.break_gpu(nvml.sim_dir, 0, kind)
    assert code_of(pynvml.nvmlDeviceGetMemoryInfo, held) == code
    assert code_of(pynvml.nvmlDeviceGetComputeRunningProcesses, held) == code
    assert code_of(pynvml.nvmlDeviceGetHandleByIndex, 0) == code
    assert code_of(pynvml.nvmlDeviceGetHandleByUUID, nvml.node.uuid(0)) == code
    assert pynvml.nvmlDeviceGetCount() == 2
    assert pynvml.nvmlDeviceGetMemoryInfo(handle(1)).free == 24 * GIB
    faults.mend(nvml.sim_dir, 0)
    assert pynvml.nvmlDeviceGetMemoryInfo(held).free == 24 * GIB


def test_a_hanging_gpu_blocks_the_call_for_as_long_as_it_hangs(nvml: Box) -> None:
    gpu = handle(0)
    faults.break_gpu(nvml.sim_dir, 0, "hang", seconds=0.2)
    start = time.monotonic()
    assert pynvml.nvmlDeviceGetMemoryInfo(gpu).used == 0
    assert time.monotonic() - start >= 0.2


def test_process_memory_that_is_not_told_is_none_and_not_zero(nvml: Box) -> None:
    tenant = nvml.tenant(0, GIB)
    faults.break_gpu(nvml.sim_dir, 0, "not_supported_process_memory")
    listed = pynvml.nvmlDeviceGetComputeRunningProcesses(handle(0))
    assert [(p.pid, p.usedGpuMemory) for p in listed] == [(tenant.pid, None)]


def test_a_pending_row_remap_shows(nvml: Box) -> None:
    faults.break_gpu(nvml.sim_dir, 1, "remap_pending")
    assert pynvml.nvmlDeviceGetRemappedRows(handle(1))[2] == 1
    assert pynvml.nvmlDeviceGetRemappedRows(handle(0))[2] == 0


def test_after_the_driver_was_away_nvml_must_be_initialised_again(nvml: Box) -> None:
    faults.unload_driver(nvml.sim_dir)
    assert code_of(pynvml.nvmlDeviceGetCount) == pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    assert code_of(pynvml.nvmlInit) == pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    faults.mend(nvml.sim_dir)
    assert code_of(pynvml.nvmlDeviceGetCount) == pynvml.NVML_ERROR_UNINITIALIZED
    pynvml.nvmlInit()
    assert pynvml.nvmlDeviceGetCount() == 2


def test_unreadable_faults_are_no_faults(nvml: Box) -> None:
    (nvml.sim_dir / "faults.json").write_text('{"gpus": {"0": {"lost"')
    assert pynvml.nvmlDeviceGetMemoryInfo(handle(0)).total == 24 * GIB


def test_pynvml_still_has_the_names_that_installing_relies_on() -> None:
    assert {"nvmlLib", "libLoadLock", "_nvmlLib_refcount", "_nvmlGetFunctionPointer_cache"} <= set(vars(pynvml))
    assert len(driver._names_known_to_pynvml()) > 200
