"""One whole look: simulated driver, real shim, simulated engine, real HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import threading

import pytest
from cradle import LONG_AGO
from http_box import HttpBox
from msgspec.structs import replace
from ports import free_port

from reconciler.clock import Instant, SystemClock
from reconciler.errors import StateError
from reconciler.identity import read_stat
from reconciler.journal.incarnations import StopRecord, write_stop
from reconciler.observe import snapshot
from reconciler.observe.gpus import NvmlReader
from reconciler.observe.nvml import ReadOptions
from reconciler.observe.prober import Prober
from reconciler.observe.process import ProcessReader
from reconciler.observe.snapshot import ObserveOptions, Observer, probe_targets, wanted_ports
from reconciler.plan.observed import Incarnation, Obstacle, Subject
from reconciler.sim import faults
from reconciler.sim.node import engine_environment
from reconciler.spec.profiles import PROFILES
from reconciler.spec.spec import (
    EndpointSpec,
    Evict,
    GpuCount,
    Health,
    Makespan,
    Node,
    OverlaySpec,
    Policy,
    Restart,
    Source,
    Spec,
    Stop,
    WholeGpu,
)  # fmt: skip
from reconciler.units import GIB

SOURCE = Source("setpoints.yaml", 1, 1)
LOOK_FRESH = ObserveOptions(gpus=ReadOptions(0.0, 0.0))


def endpoint(name, **changes):
    values = {
        "name": name, "model": "Qwen/Qwen3-0.6B", "engine": "vllm", "executable": None, "capabilities": (),
        "gpus": GpuCount(1), "memory": WholeGpu(), "port": 8080, "priority": 1, "state": "running",
        "preemptible": True, "movable": True, "evict": Evict(), "args": (), "command": None, "env": {},
        "env_file": None, "cwd": "/", "health": Health(interval_s=0.1, timeout_s=5.0), "stop": Stop(),
        "restart": Restart(), "process_hash": "hash", "source": SOURCE,
    }  # fmt: skip
    return EndpointSpec(**{**values, **changes})


def spec_of(*endpoints, overlays=()):
    return Spec(
        Node("box", None), Policy(), {}, {e.name: e for e in endpoints}, {o.name: o for o in overlays}, digest="d"
    )


def overlay(name, *endpoints):
    makespan = Makespan(None, 60.0, 60.0, "continue", None, None, None, 0.0)
    return OverlaySpec(
        name=name, priority=1, allow_baseline_eviction=False, makespan=makespan, gpus=None, memory=WholeGpu(),
        requires=(), workload=None, endpoints={e.name: e for e in endpoints}, on_edit="wait", placement_hash="p",
        source=SOURCE,
    )  # fmt: skip


def incarnation(name="thinking", **changes):
    values = {
        "id": f"{name}-1", "subject": Subject("endpoint", name), "process_hash": "hash", "gpus": (),
        "memory_bytes": (), "exclusive": True, "port": 8080, "started": LONG_AGO, "phase": "running", "pid": 1,
        "strays": (), "exit_code": None, "exited": None,
    }  # fmt: skip
    return Incarnation(**{**values, **changes})


@pytest.fixture
def observer(state, sim_dir):
    clock = SystemClock()
    nvml, processes = NvmlReader(clock), ProcessReader(state, clock)
    prober = Prober(clock, lambda: None, owns=processes.owns_listener)
    yield Observer(nvml, processes, prober, clock)
    prober.close()
    processes.close()
    nvml.close()


@pytest.fixture
def port():
    return free_port()


# ---------------------------------------------------------------- the whole


def test_a_simulated_engine_is_seen_from_its_start_to_its_end(observer, cradle, sim_dir, port, wait_until):
    spec = spec_of(endpoint("thinking", port=port))
    env = {**engine_environment(sim_dir, os.environ["PATH"]), "CUDA_VISIBLE_DEVICES": "1"}
    identifier = cradle.start("vllm", "serve", "Qwen/Qwen3-0.6B", "--port", str(port), env=env, port=port)
    wait_until(lambda: (p := observer.observe(spec).probes.get(identifier)) and p.ready, "ready", 60.0)
    seen = observer.observe(spec, LOOK_FRESH)
    assert seen.gpus_known
    assert seen.ports == {}
    assert [(i.id, i.phase) for i in seen.incarnations] == [(identifier, "running")]
    assert [len(g.processes) for g in seen.gpus] == [0, 1, 0]
    (process,) = seen.gpus[1].processes
    assert process.owner == Subject("endpoint", "thinking")
    assert process.pid != seen.incarnations[0].pid  # the engine core holds the memory, not the leader
    assert process.user
    assert process.command
    assert seen.gpus[1].used_bytes > GIB
    os.kill(seen.incarnations[0].pid, signal.SIGTERM)
    wait_until(lambda: not observer.observe(spec).incarnations[0].alive, "the end")
    wait_until(lambda: observer.observe(spec, LOOK_FRESH).gpus[1].processes == (), "its memory is given back")
    seen = observer.observe(spec)
    assert seen.incarnations[0].phase == "exited"
    assert seen.probes == {}  # nobody is asked for a process that is not there


@pytest.mark.parametrize("recorded", [True, False], ids=["its end is recorded", "it vanished with its shim"])
def test_processes_on_the_gpus_of_one_that_ended_are_listed_no_earlier_than_its_end(
    observer, cradle, wait_until, recorded
):
    cached = ObserveOptions(gpus=ReadOptions(3600.0, 3600.0))
    before = {g.uuid: g.at for g in observer.observe(spec_of(), cached).gpus}
    mine, *others = sorted(before)
    identifier = cradle.start("sleep", "600", gpus=(mine,), memory_bytes=(GIB,))
    run = cradle.run_record(identifier)
    assert {g.uuid: g.at for g in observer.observe(spec_of(), cached).gpus} == before
    if not recorded:
        os.kill(run.shim_pid, signal.SIGKILL)
    os.kill(run.pid, signal.SIGKILL)
    wait_until(lambda: not observer.observe(spec_of(), cached).incarnations[0].alive, "the end")
    seen = observer.observe(spec_of(), replace(cached, ended=True))
    listed = {g.uuid: g.at for g in seen.gpus}
    end = seen.incarnations[0].exited
    assert (end is not None) is recorded
    assert listed[mine].mono >= (end or before[mine]).mono
    assert listed[mine] != before[mine]
    assert {uuid: listed[uuid] for uuid in others} == {uuid: before[uuid] for uuid in others}


def test_a_foreign_process_on_a_gpu_is_shown_with_user_and_command(observer, sim_dir):
    with subprocess.Popen(["sleep", "600"]) as stranger:
        ticks = read_stat(stranger.pid).start_ticks
        (sim_dir / "gpus" / "0" / f"{stranger.pid}-{ticks}").write_text(str(3 * GIB))
        (process,) = observer.observe(spec_of(), LOOK_FRESH).gpus[0].processes
        stranger.kill()
    assert (process.pid, process.memory_bytes, process.owner, process.command) == (
        stranger.pid, 3 * GIB, None, "sleep 600",
    )  # fmt: skip
    assert process.user


def test_without_an_answer_of_the_driver_the_rest_is_still_seen(observer, cradle, sim_dir, monkeypatch):
    cradle.start("sleep", "600")
    observer.observe(spec_of())
    faults.unload_driver(sim_dir)
    seen = observer.observe(spec_of(), LOOK_FRESH)
    assert not seen.gpus_known
    assert "not loaded" in seen.gpus_detail
    assert [g.state for g in seen.gpus] == ["unknown"] * 3
    assert [i.phase for i in seen.incarnations] == ["running"]


def test_incarnations_that_cannot_be_listed_end_the_look(observer, state):
    state.run.rmdir()
    state.run.write_text("")
    with pytest.raises(StateError):
        observer.observe(spec_of())


def test_a_strangers_server_on_a_wanted_port_is_shown_and_never_taken_for_ours(observer, cradle, wait_until):
    box = HttpBox().start()
    spec = spec_of(endpoint("thinking", port=box.port))
    holder = observer.observe(spec).ports[box.port]
    assert holder.pid == os.getpid()
    # the endpoint starts all the same, and the stranger's 200 is not its readiness
    identifier = cradle.start("sleep", "600", port=box.port)
    wait_until(lambda: observer.observe(spec).probes.get(identifier), "an answer")
    seen = observer.observe(spec)
    assert seen.probes[identifier].ready is False
    assert "another process" in seen.probes[identifier].detail
    assert seen.ports == {}  # a living incarnation has been given it
    box.stop()


def test_an_endpoint_without_a_port_is_ready_while_it_lives(observer, cradle):
    identifier = cradle.start("sleep", "600", name="worker")
    seen = observer.observe(spec_of(endpoint("worker", port=None)))
    assert seen.probes[identifier].ready is True
    assert seen.probes[identifier].ready_since == seen.incarnations[0].started


def test_a_jump_of_the_wall_clock_is_noticed_once(observer):
    class Jumping:
        offset = 0.0

        def now(self):
            now = SystemClock().now()
            return Instant(now.wall + self.offset, now.mono)

    observer._clock = clock = Jumping()
    assert not observer.observe(spec_of()).clock_jumped
    assert not observer.observe(spec_of()).clock_jumped
    clock.offset = -3600.0
    assert observer.observe(spec_of()).clock_jumped
    assert not observer.observe(spec_of()).clock_jumped


# ---------------------------------------------------------------- whom to ask


def test_only_running_endpoints_with_a_port_are_asked():
    spec = spec_of(endpoint("thinking"))
    asked = probe_targets(spec, [incarnation()])
    assert [(t.port, t.health_path, t.starting, t.busy) for t in asked.values()] == [(8080, "/health", True, False)]
    for other in (
        incarnation(phase="unknown"), incarnation(phase="intent"), incarnation(phase="exited", strays=(5,)),
        incarnation(port=None), incarnation(subject=Subject("workload", "thinking")), incarnation("stranger"),
    ):  # fmt: skip
        assert probe_targets(spec, [other]) == {}


def test_one_that_was_ready_before_is_not_starting():
    spec = spec_of(endpoint("thinking"))
    (target,) = probe_targets(spec, [incarnation()], ObserveOptions(ready_before=("thinking-1",))).values()
    assert not target.starting


def test_the_port_is_the_one_the_incarnation_was_given():
    spec = spec_of(endpoint("thinking", port=9999))
    assert probe_targets(spec, [incarnation(port=8080)])["thinking-1"].port == 8080


def test_a_patched_endpoint_is_asked_as_the_version_it_was_started_for():
    patched = endpoint("thinking", process_hash="other", engine="llamacpp", health=Health(path="/ready"))
    spec = spec_of(endpoint("thinking"), overlays=[overlay("night", patched)])
    assert probe_targets(spec, [incarnation()])["thinking-1"].health_path == "/health"
    target = probe_targets(spec, [incarnation(process_hash="other")])["thinking-1"]
    assert target.health_path == "/ready"
    assert target.busy_metrics == ("llamacpp:requests_processing", "llamacpp:requests_deferred")


def test_a_temporary_endpoint_of_an_overlay_is_asked_too():
    spec = spec_of(overlays=[overlay("night", endpoint("extra", port=8090))])
    assert set(probe_targets(spec, [incarnation("extra", port=8090)])) == {"extra-1"}


def test_requests_are_counted_from_the_request_to_stop_to_the_end_of_the_drain(state, cradle):
    spec = spec_of(endpoint("thinking"))
    intent = cradle.intend(port=8080)
    reader = ProcessReader(state, SystemClock())

    def counted(record):
        write_stop(state, intent.id, record)
        (seen,) = reader.read()
        return probe_targets(spec, [replace(seen, phase="running")])[intent.id].busy

    assert counted(StopRecord(LONG_AGO, drained=False, signalled=None))
    assert not counted(StopRecord(LONG_AGO, drained=True, signalled=None))
    assert not counted(StopRecord(LONG_AGO, drained=False, signalled=LONG_AGO))
    asked_for = ObserveOptions(draining=("thinking-1",))
    assert probe_targets(spec, [incarnation()], asked_for)["thinking-1"].busy


def test_only_an_endpoint_that_is_evicted_by_sleep_is_asked_whether_it_sleeps():
    assert probe_targets(spec_of(endpoint("thinking")), [incarnation()])["thinking-1"].sleep_check is None
    sleeper = endpoint("thinking", evict=Evict("sleep"))
    assert probe_targets(spec_of(sleeper), [incarnation()])["thinking-1"].sleep_check == PROFILES["vllm"].sleep_check


def test_ports_of_living_incarnations_are_not_looked_at():
    spec = spec_of(
        endpoint("a", port=1), endpoint("b", port=2), endpoint("c", port=None),
        overlays=[overlay("night", endpoint("d", port=3), endpoint("e", port=4))],
    )  # fmt: skip
    living = [incarnation("a", port=1), incarnation("d", port=3, phase="unknown")]
    ended = [incarnation("b", port=2, phase="exited"), incarnation("e", port=4, phase="vanished")]
    assert wanted_ports(spec, living + ended) == {2, 4}


def test_a_disk_that_does_not_answer_holds_up_no_look_and_what_was_known_of_programs_stays(
    state, sim_dir, monkeypatch, wait_until
):
    """A program on a file system whose server is away: whoever looks there waits for it."""
    monkeypatch.setattr(snapshot, "LOOKUP_DEADLINE_S", 0.05)
    answers, asked = threading.Event(), []
    answers.set()

    def obstacles(_spec, _running):
        asked.append(True)
        answers.wait(20)
        return {"p": Obstacle(f"missed {len(asked)} times", None)}

    clock = SystemClock()
    nvml, processes = NvmlReader(clock), ProcessReader(state, clock)
    prober = Prober(clock, lambda: None, owns=processes.owns_listener)
    observer = Observer(nvml, processes, prober, clock, obstacles)
    try:
        assert observer.observe(spec_of(endpoint("chat"))).obstacles == {}
        assert asked == [], "nobody would have to end for anything"
        wanted = spec_of(overlays=[overlay("job")])
        wait_until(lambda: observer.observe(wanted).obstacles, "an answer in time")
        known = observer.observe(wanted).obstacles
        answers.clear()
        assert [observer.observe(wanted).obstacles for _ in range(3)] == [known] * 3
        answers.set()
        wait_until(lambda: observer.observe(wanted).obstacles != known, "a new answer")
    finally:
        answers.set()
        observer.close()
        prober.close()
        processes.close()
        nvml.close()
