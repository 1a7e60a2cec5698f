"""GPUs through the real pynvml, on the simulated driver and on hand-made libraries that err and hang."""

from __future__ import annotations

import subprocess
import threading
import time

import pynvml
import pytest

from reconciler.errors import DriverError
from reconciler.identity import read_stat
from reconciler.observe import nvml
from reconciler.observe.gpus import NvmlReader, RememberedGpu
from reconciler.observe.nvml import ReadOptions
from reconciler.sim import driver, faults
from reconciler.sim.node import SimGpu, SimNode, prepare
from reconciler.units import GIB, MIB

FRESH = ReadOptions(0.0, 0.0)


@pytest.fixture
def reader(clock):
    reader = NvmlReader(clock)
    yield reader
    reader.close()


def allocate(sim_dir, index, pid, size):
    stat = read_stat(pid)
    (sim_dir / "gpus" / str(index) / f"{pid}-{stat.start_ticks}").write_text(str(size))


# ---------------------------------------------------------------- the simulated driver


def test_an_idle_node_shows_every_gpu_with_the_drivers_reserve_as_used(sim_dir, reader):
    readings = reader.read()
    assert readings.known
    assert [g.index for g in readings.gpus] == [0, 1, 2]
    assert len({g.uuid for g in readings.gpus}) == 3
    assert {g.state for g in readings.gpus} == {"ok"}
    assert {g.total_bytes for g in readings.gpus} == {80 * GIB}
    # what is not free is used: a newcomer finds total - used free, no byte more
    assert {g.used_bytes for g in readings.gpus} == {500 * MIB}
    assert {g.processes for g in readings.gpus} == {()}
    assert [g.numa_node for g in readings.gpus] == [0, 0, 1]


def test_gpus_that_nvlink_joins_are_of_one_island_and_others_of_their_own(tmp_path, reader):
    a100, l4 = SimGpu("NVIDIA A100-SXM4-80GB", 80 * GIB), SimGpu("NVIDIA L4", 24 * GIB)
    other = SimGpu(a100.name, 80 * GIB, nvlink_island=7)
    prepare(tmp_path / "linked", SimNode((a100, other, l4, a100, other)))
    driver.install(tmp_path / "linked")
    assert [g.nvlink_island for g in reader.read().gpus] == [0, 1, 2, 0, 1]


def test_without_nvlink_no_gpu_is_of_an_island(tmp_path, reader):
    prepare(tmp_path / "single", SimNode((SimGpu("NVIDIA L4", 24 * GIB),) * 2))
    driver.install(tmp_path / "single")
    assert [g.nvlink_island for g in reader.read().gpus] == [None, None]


def test_a_process_that_allocates_is_listed_with_its_memory(sim_dir, reader):
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            allocate(sim_dir, 1, child.pid, 7 * GIB)
            gpu = reader.read(FRESH).gpus[1]
            assert [(p.pid, p.memory_bytes, p.owner) for p in gpu.processes] == [(child.pid, 7 * GIB, None)]
            assert gpu.used_bytes == 7 * GIB + 500 * MIB
        finally:
            child.kill()


def test_memory_that_nvml_does_not_tell_is_none_and_never_zero(sim_dir, reader):
    faults.break_gpu(sim_dir, 0, "not_supported_process_memory")
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            allocate(sim_dir, 0, child.pid, GIB)
            (process,) = reader.read(FRESH).gpus[0].processes
            assert process.memory_bytes is None
        finally:
            child.kill()


@pytest.mark.parametrize(("fault", "state"), [("lost", "lost"), ("hole", "lost"), ("unknown", "unknown")])
def test_a_broken_gpu_keeps_its_name_and_total_and_the_others_stay_ok(sim_dir, reader, fault, state):
    before = reader.read(FRESH).gpus
    faults.break_gpu(sim_dir, 1, fault)
    readings = reader.read(FRESH)
    assert readings.known
    assert [g.state for g in readings.gpus] == ["ok", state, "ok"]
    broken = readings.gpus[1]
    assert (broken.uuid, broken.index, broken.total_bytes) == (before[1].uuid, 1, 80 * GIB)
    assert broken.used_bytes is None
    assert broken.processes is None
    assert broken.detail
    faults.mend(sim_dir)
    assert [g.state for g in reader.read(FRESH).gpus] == ["ok", "ok", "ok"]


def test_a_gpu_that_never_told_its_uuid_still_takes_its_place(sim_dir, reader):
    faults.break_gpu(sim_dir, 0, "hole")
    gpus = reader.read(FRESH).gpus
    assert [(g.index, g.state) for g in gpus] == [(0, "lost"), (1, "ok"), (2, "ok")]
    assert gpus[0].total_bytes == 0


def test_a_pending_row_remap_makes_a_gpu_unhealthy_and_says_why(sim_dir, reader):
    faults.break_gpu(sim_dir, 2, "remap_pending")
    gpus = reader.read(FRESH).gpus
    assert [g.healthy for g in gpus] == [True, True, False]
    assert "remap pending" in gpus[2].detail
    assert gpus[2].state == "ok"


def test_a_gpu_remembered_from_an_earlier_run_and_missing_now_is_lost(sim_dir, clock):
    gone = RememberedGpu("GPU-gone", 3, "NVIDIA A100-SXM4-80GB", 80 * GIB)
    reader = NvmlReader(clock, remembered=[gone])
    gpus = reader.read().gpus
    assert [(g.uuid == "GPU-gone", g.state) for g in gpus] == [(False, "ok")] * 3 + [(True, "lost")]
    assert gone in reader.remembered
    assert len(reader.remembered) == 4
    reader.close()


def test_an_unloaded_driver_makes_everything_unknown_and_a_reload_is_noticed(sim_dir, reader, monkeypatch):
    monkeypatch.setattr(nvml, "INIT_RETRY_S", 0.0)
    before = reader.read(FRESH)
    faults.unload_driver(sim_dir)
    readings = reader.read(FRESH)
    assert not readings.known
    assert "not loaded" in readings.detail
    assert [(g.uuid, g.state, g.total_bytes) for g in readings.gpus] == [
        (g.uuid, "unknown", g.total_bytes) for g in before.gpus
    ]
    faults.mend(sim_dir)
    assert reader.read(FRESH).known


def test_parts_that_are_young_enough_are_not_asked_again(library, gpu, reader):
    card = gpu("GPU-a")
    library(card)
    first = reader.read(FRESH)
    card.free -= MIB
    card.listings = {"Compute": [(10, MIB)]}
    assert reader.read(ReadOptions(60.0, 60.0)) is first
    # memory anew, processes from before: `at` is the age of the older part
    mixed = reader.read(ReadOptions(0.0, 60.0)).gpus[0]
    assert mixed.used_bytes == first.gpus[0].used_bytes + MIB
    assert mixed.processes == ()
    assert mixed.at == first.gpus[0].at
    fresh = reader.read(FRESH).gpus[0]
    assert len(fresh.processes) == 1
    assert fresh.at.mono > mixed.at.mono


def test_of_a_gpu_that_somebody_left_processes_are_listed_since_then_whatever_their_age(library, gpu, reader, clock):
    card, other = gpu("GPU-a"), gpu("GPU-b")
    made = library(card, other)
    first = reader.read(FRESH)
    left = clock.now().mono
    card.listings = {"Compute": [(10, MIB)]}
    other.listings = {"Compute": [(11, MIB)]}
    listed = made.called.count("nvmlDeviceGetComputeRunningProcesses_v3")
    since = ReadOptions(60.0, 60.0, {"GPU-a": left})
    seen = reader.read(since)
    assert [len(g.processes) for g in seen.gpus] == [1, 0]
    assert seen.gpus[0].at.mono >= left > first.gpus[0].at.mono
    assert made.called.count("nvmlDeviceGetComputeRunningProcesses_v3") == listed + 2  # its length, and itself
    assert reader.read(since) is seen, "once is enough"


def test_memory_that_moves_has_the_processes_listed_at_once(library, gpu, reader):
    card, other = gpu("GPU-a"), gpu("GPU-b")
    made = library(card, other)
    reader.read(FRESH)
    listed = made.called.count("nvmlDeviceGetComputeRunningProcesses_v3")
    card.free -= GIB
    card.listings = {"Compute": [(10, GIB)]}
    assert len(reader.read(ReadOptions(0.0, 60.0)).gpus[0].processes) == 1
    # two calls for the list that is not empty any more, none for the GPU on which nothing moved
    assert made.called.count("nvmlDeviceGetComputeRunningProcesses_v3") == listed + 2


def test_a_call_that_hangs_on_the_simulated_node_leaves_everything_unknown(sim_dir, clock):
    reader = NvmlReader(clock, deadline_s=1.0)
    reader.read()
    faults.break_gpu(sim_dir, 2, "hang", seconds=5.0)
    readings = reader.read(FRESH)
    assert not readings.known
    assert [g.state for g in readings.gpus] == ["unknown"] * 3
    assert "(2)" in readings.detail  # the GPU is named


# ---------------------------------------------------------------- hand-made libraries


def test_a_hanging_call_blocks_one_read_for_its_deadline_and_later_ones_not_at_all(library, gpu, clock, wait_until):
    made = library(gpu("GPU-a"), gpu("GPU-b"))
    reader = NvmlReader(clock, deadline_s=0.3)
    assert reader.read().known
    release = threading.Event()
    made.before["nvmlDeviceGetMemoryInfo_v2"] = lambda: release.wait(30)
    threads = threading.active_count()
    assert not reader.read(FRESH).known
    began = time.monotonic()
    for _ in range(50):
        readings = reader.read(FRESH)
    assert time.monotonic() - began < 50 * 0.3 / 2, "half of what they would take that wait"
    assert threading.active_count() <= threads
    assert not readings.known
    assert [(g.uuid, g.state, g.total_bytes) for g in readings.gpus] == [
        ("GPU-a", "unknown", 24 * GIB),
        ("GPU-b", "unknown", 24 * GIB),
    ]
    assert "nvmlDeviceGetMemoryInfo(0)" in readings.detail
    del made.before["nvmlDeviceGetMemoryInfo_v2"]
    release.set()
    wait_until(lambda: reader.read(FRESH).known, "the driver is asked again once the call returned")
    reader.close()


def test_processes_are_the_union_of_three_lists_each_pid_once_with_its_largest_figure(library, gpu, reader):
    one = gpu("GPU-a")
    one.listings = {
        "Compute": [(10, 5), (11, None), (12, None)],
        "Graphics": [(10, 7), (13, 1)],
        "MPSCompute": [(11, 3), (12, None)],
    }
    library(one)
    (seen,) = reader.read(FRESH).gpus
    assert [(p.pid, p.memory_bytes) for p in seen.processes] == [(10, 7), (11, 3), (12, None), (13, 1)]


def test_lists_that_a_board_does_not_have_are_empty_but_a_forbidden_one_hides_all(library, gpu, reader):
    one, two, three = gpu("GPU-a"), gpu("GPU-b"), gpu("GPU-c")
    for card in (one, two, three):
        card.listings = {"Compute": [(10, 5)]}
    one.codes["nvmlDeviceGetMPSComputeRunningProcesses_v3"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    two.codes["nvmlDeviceGetGraphicsRunningProcesses_v3"] = pynvml.NVML_ERROR_NO_PERMISSION
    three.codes["nvmlDeviceGetComputeRunningProcesses_v3"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    library(one, two, three)
    gpus = reader.read(FRESH).gpus
    assert [g.state for g in gpus] == ["ok"] * 3
    assert [None if g.processes is None else len(g.processes) for g in gpus] == [1, None, None]


def test_without_the_second_memory_structure_the_first_tells_the_same(library, gpu, reader):
    one = gpu("GPU-a", total=24 * GIB, free=10 * GIB)
    one.codes["nvmlDeviceGetMemoryInfo_v2"] = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    library(one)
    assert reader.read().gpus[0].used_bytes == 14 * GIB


def test_an_integrated_gpu_without_memory_of_its_own_has_the_hosts(library, gpu, reader):
    one = gpu("GPU-a")
    one.codes["nvmlDeviceGetMemoryInfo_v2"] = one.codes["nvmlDeviceGetMemoryInfo"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    library(one)
    (seen,) = reader.read().gpus
    assert seen.state == "ok"
    assert 0 < seen.used_bytes < seen.total_bytes


@pytest.mark.parametrize(
    ("code", "words", "hint"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "libnvidia-ml.so.1", "--simulate 4x80GiB"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "not loaded", "--simulate 4x80GiB"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "upgraded", "new process"),
        (pynvml.NVML_ERROR_UNKNOWN, "nvmlInit", None),
    ],
)
def test_a_driver_that_is_not_there_is_an_error_with_a_way_out(library, gpu, reader, code, words, hint):
    library(gpu("GPU-a")).codes["nvmlInitWithFlags"] = code
    with pytest.raises(DriverError) as caught:
        reader.open()
    assert words in caught.value.message
    assert caught.value.hint is None if hint is None else hint in caught.value.hint
    readings = reader.read()
    assert not readings.known
    assert readings.gpus == ()
    assert words in readings.detail


def test_without_any_library_the_message_says_so(reader):
    driver.uninstall()
    try:
        pynvml._LoadNvmlLibrary()
    except pynvml.NVMLError:
        pass
    else:
        pytest.skip("this machine has a real libnvidia-ml")
    with pytest.raises(DriverError, match="no NVIDIA driver here"):
        reader.open()


def test_a_missing_driver_is_not_asked_for_again_at_every_read(library, gpu, reader):
    made = library(gpu("GPU-a"))
    made.codes["nvmlInitWithFlags"] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    for _ in range(20):
        reader.read(FRESH)
    assert made.called.count("nvmlInitWithFlags") == 3  # the tries of the first read


@pytest.mark.parametrize("refusals", [1, 2])
def test_a_driver_that_is_just_being_reloaded_is_asked_until_it_is_there(library, gpu, reader, refusals):
    made = library(gpu("GPU-a"))
    made.codes["nvmlInitWithFlags"] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED

    def load_in_time() -> None:
        if made.called.count("nvmlInitWithFlags") > refusals:
            made.codes.clear()

    made.before["nvmlInitWithFlags"] = load_in_time
    reader.open()
    assert made.called.count("nvmlInitWithFlags") == refusals + 1


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH])
def test_what_no_wait_mends_is_tried_once(library, gpu, reader, code):
    made = library(gpu("GPU-a"))
    made.codes["nvmlInitWithFlags"] = code
    with pytest.raises(DriverError):
        reader.open()
    assert made.called.count("nvmlInitWithFlags") == 1


def test_handles_that_all_fail_after_a_reload_lead_to_one_new_initialisation(library, gpu, reader):
    made = library(gpu("GPU-a"), gpu("GPU-b"))
    assert reader.read(FRESH).known
    made.codes["nvmlDeviceGetMemoryInfo_v2"] = pynvml.NVML_ERROR_UNKNOWN
    # as with a reloaded driver: a new initialisation mends it
    made.before["nvmlShutdown"] = made.codes.clear
    assert [g.state for g in reader.read(FRESH).gpus] == ["ok", "ok"]
    assert made.called.count("nvmlInitWithFlags") == 2


def test_a_gpu_that_the_driver_no_longer_lists_is_lost_and_the_rest_have_the_drivers_new_numbers(library, gpu, reader):
    made = library(gpu("GPU-a"), gpu("GPU-b"), gpu("GPU-c"))
    reader.read(FRESH)
    del made.gpus[1]
    gpus = reader.read(FRESH).gpus
    assert [(g.uuid, g.index, g.state) for g in gpus] == [
        ("GPU-a", 0, "ok"),
        ("GPU-c", 1, "ok"),
        ("GPU-b", 1, "lost"),
    ]
