"""The simulated vLLM: the process tree, memory and manners of the real one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from ports import free_port
from simulated_box import GIB, Box, Engine, box_of, until

from reconciler import identity
from reconciler.sim import faults
from reconciler.sim.engine.box import Node
from reconciler.sim.engine.flags import parse
from reconciler.sim.node import ModelFigures, SimGpu, SimNode, prepare

FULL = int(24 * GIB * 0.92)


class Asking:
    """A completion asked for in a thread of its own."""

    def __init__(self, engine: Engine, tokens: int) -> None:
        self.client = httpx.Client(trust_env=False, timeout=60)
        self.answer: httpx.Response | None = None
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self.ask, args=(engine, tokens), daemon=True)
        self.thread.start()

    def ask(self, engine: Engine, tokens: int) -> None:
        try:
            url = f"http://127.0.0.1:{engine.port}/v1/completions"
            self.answer = self.client.post(url, json={"prompt": "x", "max_tokens": tokens})
        except httpx.HTTPError as error:
            self.error = error

    def status(self, deadline_s: float = 30.0) -> int:
        self.thread.join(deadline_s)
        assert self.answer is not None, self.error or "no answer"
        return self.answer.status_code

    @property
    def pending(self) -> bool:
        return self.thread.is_alive()


class ImpatientClient:
    """A client that asks for a long completion and can hang up."""

    def __init__(self, engine: Engine) -> None:
        body = b'{"prompt": "x", "max_tokens": 1000000}'
        self.sock = socket.create_connection(("127.0.0.1", engine.port))
        self.sock.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

    def hang_up(self) -> None:
        self.sock.close()


def all_gone(pids: list[int]) -> Callable[[], bool]:
    return lambda: all((stat := identity.read_stat(pid)) is None or stat.gone for pid in pids)


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# ---------------------------------------------------------------- starting


def test_the_port_refuses_and_memory_grows_until_it_is_ready(box: Box) -> None:
    engine = box.serve(model="slow", CUDA_VISIBLE_DEVICES="0")
    seen: set[int] = set()
    while not engine.answers():
        assert engine.process.poll() is None, engine.said()
        seen.add(box.used(0))
    assert box.used(0) == FULL
    assert len(seen - {0, FULL}) >= 2, "weights come in parts, before the KV cache"
    assert box.used(1) == 0


def test_with_one_gpu_the_engine_core_holds_the_memory(box: Box) -> None:
    engine = box.serve(CUDA_VISIBLE_DEVICES=box.node.uuid(1)).ready()
    assert set(engine.tree()) == {"VLLM::EngineCore"}
    assert box.holders(1) == [engine.tree()["VLLM::EngineCore"]]
    assert box.holders(0) == []


def test_with_several_gpus_each_worker_holds_its_own(box: Box) -> None:
    engine = box.serve("--tensor-parallel-size", "2", "--gpu-memory-utilization=0.5").ready()
    tree = engine.tree()
    assert set(tree) == {"VLLM::EngineCore", "VLLM::Worker_TP0", "VLLM::Worker_TP1"}
    assert identity.children(engine.pid) == (tree["VLLM::EngineCore"],)
    assert set(identity.children(tree["VLLM::EngineCore"])) == {tree["VLLM::Worker_TP0"], tree["VLLM::Worker_TP1"]}
    assert [box.holders(0), box.holders(1)] == [[tree["VLLM::Worker_TP0"]], [tree["VLLM::Worker_TP1"]]]
    assert box.used(0) == box.used(1) == 12 * GIB
    assert Path(f"/proc/{tree['VLLM::Worker_TP0']}/comm").read_text() == "VLLM::Worker_TP\n"


def test_renaming_wipes_the_environment_unless_told_not_to(box: Box) -> None:
    plain = box.serve(MARKER="seen", CUDA_VISIBLE_DEVICES="0").ready()
    kept = box.serve(MARKER="seen", CUDA_VISIBLE_DEVICES="1", SPT_NOENV="1").ready()
    assert identity.read_marker(plain.pid, "MARKER") == "seen"
    assert identity.read_marker(plain.tree()["VLLM::EngineCore"], "MARKER") is None
    assert identity.read_marker(kept.tree()["VLLM::EngineCore"], "MARKER") == "seen"


@pytest.mark.parametrize(
    ("args", "model", "gpus", "code", "said"),
    [
        (("--unheard-of",), "tiny", "0,1", 2, "unrecognized arguments: --unheard-of"),
        (("another",), "tiny", "0,1", 2, "unrecognized arguments: another"),
        (("-tp", "many"), "tiny", "0,1", 2, "invalid int value"),
        (("-tp", "3"), "tiny", "0,1", 1, "World size (3) is larger"),
        ((), "tiny", "", 1, "Failed to infer device type"),
        ((), "./nowhere/model", "0,1", 1, "Can't load the configuration"),
        ((), "big", "0,1", 1, "CUDA out of memory"),
        (("--gpu-memory-utilization", "0.05"), "tiny", "0,1", 1, "No available memory for the cache blocks"),
    ],
)
def test_a_start_that_cannot_work_ends_with_vllms_code_and_words(
    box: Box, args: tuple[str, ...], model: str, gpus: str, code: int, said: str
) -> None:
    engine = box.serve(*args, model=model, CUDA_VISIBLE_DEVICES=gpus)
    assert engine.exit_code() == code
    assert said in engine.said()
    until(lambda: not box.used(0))


def test_too_little_free_memory_ends_the_start(box: Box) -> None:
    box.tenant(0, 10 * GIB)
    engine = box.serve(CUDA_VISIBLE_DEVICES="0")
    assert engine.exit_code() == 1
    assert (
        "ValueError: Free memory on device cuda:0 (14.00/24.00 GiB) on startup is less than desired GPU memory "
        "utilization (0.92, 22.08 GiB)." in engine.said()
    )


def test_a_neighbour_that_frees_memory_meanwhile_ends_the_start(box: Box) -> None:
    tenant = box.tenant(0, 2 * GIB)
    engine = box.serve("--gpu-memory-utilization", "0.8", model="slow", CUDA_VISIBLE_DEVICES="0")
    until(lambda: box.used(0) > 2 * GIB)
    tenant.kill()
    tenant.wait()
    assert engine.exit_code() == 1
    assert "AssertionError: Error in memory profiling." in engine.said()


def test_a_lost_gpu_ends_the_start(box: Box) -> None:
    faults.break_gpu(box.sim_dir, 0, "lost")
    assert box.serve(CUDA_VISIBLE_DEVICES="0").exit_code() == 1
    assert box.serve(CUDA_VISIBLE_DEVICES="1").ready().answers()


def test_a_port_with_a_listener_ends_the_start(box: Box) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        engine = box.serve(port=other.getsockname()[1])
        assert engine.exit_code() == 1
        assert "Address already in use" in engine.said()


def test_of_two_starts_on_one_port_both_live_and_one_never_listens(box: Box) -> None:
    port = free_port()
    engines = [box.serve(port=port, CUDA_VISIBLE_DEVICES=str(gpu)) for gpu in (0, 1)]
    for engine in engines:
        until(lambda engine=engine: "Application startup complete" in engine.said())  # type: ignore[misc]
    assert [engine.process.poll() for engine in engines] == [None, None]
    assert engines[0].answers()
    assert box.used(0) == box.used(1) == FULL


def test_starting_is_cheap_and_being_idle_costs_nothing(box: Box) -> None:
    before = os.times()
    subprocess.run([str(box.sim_dir / "bin" / "vllm"), "--version"], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 0.2, "a busy machine needs a multiple of the usual 30 ms"
    engine = box.serve("-tp", "2").ready()
    pids = [engine.pid, *engine.tree().values()]
    ticks = sum(cpu_ticks(pid) for pid in pids)
    time.sleep(0.5)
    assert sum(cpu_ticks(pid) for pid in pids) - ticks <= 2


# ---------------------------------------------------------------- stopping and dying


def test_sigterm_while_idle_ends_everything_with_0(box: Box) -> None:
    engine = box.serve("-tp", "2").ready()
    pids = list(engine.tree().values())
    engine.process.terminate()
    assert engine.exit_code() == 0
    assert all_gone(pids)()
    until(lambda: not box.used(0) + box.used(1))


def test_sigterm_to_the_whole_group_ends_everything_with_0(box: Box) -> None:
    engine = box.serve("-tp", "2").ready()
    pids = list(engine.tree().values())
    os.killpg(engine.pid, signal.SIGTERM)
    assert engine.exit_code() == 0
    until(all_gone(pids))


def test_sigterm_while_it_loads_is_lost(box: Box) -> None:
    engine = box.serve(model="slow", CUDA_VISIBLE_DEVICES="0")
    until(lambda: box.used(0))
    engine.process.terminate()
    engine.ready()
    assert engine.tree()


def test_sigterm_before_the_engine_core_is_there_ends_it_by_the_signal(tmp_path: Path) -> None:
    with box_of(tmp_path, SimNode((SimGpu("a", 24 * GIB),))) as box:
        engine = box.serve()
        until(lambda: "API server version" in engine.said())
        engine.process.terminate()
        assert engine.exit_code() == -signal.SIGTERM


def test_sigint_while_it_loads_ends_everything_by_the_signal(box: Box) -> None:
    engine = box.serve("-tp", "2", model="slow")
    until(lambda: box.used(0) and box.used(1))
    pids = list(engine.tree().values())
    engine.process.send_signal(signal.SIGINT)
    assert engine.exit_code() == -signal.SIGINT
    assert all_gone(pids)()


def test_sigkill_of_the_server_frees_the_port_and_not_the_memory(box: Box) -> None:
    engine = box.serve("-tp", "2").ready()
    tree = engine.tree()
    engine.process.kill()
    engine.process.wait()
    with socket.create_server(("127.0.0.1", engine.port)):
        pass
    time.sleep(2 * box.node.release_delay_s)
    assert engine.tree() == tree
    assert box.used(0) == box.used(1) == FULL
    again = box.serve("-tp", "2", port=engine.port)
    assert again.exit_code() == 1
    assert "less than desired GPU memory utilization" in again.said()
    # orphans end on SIGTERM, children first or not
    os.kill(tree["VLLM::EngineCore"], signal.SIGTERM)
    until(all_gone(list(tree.values())))
    until(lambda: not box.used(0) + box.used(1))


@pytest.mark.parametrize("part", ["VLLM::EngineCore", "VLLM::Worker_TP1"])
def test_the_death_of_a_part_shows_at_once_and_ends_the_server_with_0(tmp_path: Path, part: str) -> None:
    # slow enough that the 4.7 s between the two can be looked into on a busy machine
    node = SimNode((SimGpu("a", 24 * GIB),) * 2, time_scale=0.5, models={"quick": ModelFigures(load_s=2.0)})
    with box_of(tmp_path, node) as box:
        engine = box.serve("-tp", "2", model="quick").ready()
        tree = engine.tree()
        os.kill(tree[part], signal.SIGKILL)
        until(lambda: engine.get("/health").status_code == 503, 2.0)
        assert engine.post("/v1/completions", prompt="x").status_code == 500
        assert engine.exit_code() == 0
        until(all_gone(list(tree.values())))


def test_the_death_of_the_engine_core_while_it_loads_is_a_failed_start(box: Box) -> None:
    engine = box.serve(model="slow", CUDA_VISIBLE_DEVICES="0")
    until(lambda: box.used(0))
    os.kill(engine.tree()["VLLM::EngineCore"], signal.SIGKILL)
    assert engine.exit_code() == 1
    assert "Engine core initialization failed" in engine.said()


def test_sigterm_with_requests_in_flight_cuts_them_off_with_what_there_is(box: Box) -> None:
    engine = box.serve(CUDA_VISIBLE_DEVICES="0").ready()
    client, asking = ImpatientClient(engine), Asking(engine, 1_000_000)
    until(lambda: engine.metric("num_requests_running") == 2)
    core = engine.tree()["VLLM::EngineCore"]
    engine.process.terminate()
    assert asking.status() == 200
    assert asking.answer is not None
    assert asking.answer.json()["choices"][0]["finish_reason"] == "abort"
    assert engine.exit_code() == 0
    assert all_gone([core])()
    client.hang_up()


def test_with_a_shutdown_timeout_requests_in_flight_are_finished_first(box: Box) -> None:
    engine = box.serve("--shutdown-timeout", "500").ready()
    asking = Asking(engine, 2000)
    until(lambda: engine.metric("num_requests_running") == 1)
    engine.process.terminate()
    assert asking.status() == 200
    assert engine.exit_code() == 0


def test_a_drain_that_takes_longer_than_the_shutdown_timeout_is_cut_off(box: Box) -> None:
    engine = box.serve("--shutdown-timeout", "20").ready()
    client = ImpatientClient(engine)
    until(lambda: engine.metric("num_requests_running") == 1)
    engine.process.terminate()
    assert engine.exit_code(10) == 0
    client.hang_up()


# ---------------------------------------------------------------- answering


def test_it_answers_what_vllm_answers(box: Box) -> None:
    engine = box.serve("--served-model-name", "one", "two", "--api-key", "secret").ready()
    with httpx.Client(
        base_url=f"http://127.0.0.1:{engine.port}", trust_env=False, headers={"Authorization": "Bearer secret"}
    ) as client:
        assert [row["id"] for row in client.get("/v1/models").json()["data"]] == ["one", "two"]
        assert client.get("/version").json() == {"version": "0.33.0"}
        assert client.get("/load").json() == {"server_load": 0}
        assert client.get("/ping").status_code == client.post("/ping").status_code == 200
        assert client.get("/nowhere").status_code == 404
        assert client.post("/health").status_code == 405
        said = client.post("/v1/completions", json={"model": "two", "prompt": "x", "max_tokens": 3}).json()
        assert said["usage"]["completion_tokens"] == 3
        said = client.post("/v1/chat/completions", json={"messages": [], "max_tokens": 2}).json()
        assert said["choices"][0]["message"]["role"] == "assistant"
        assert client.post("/v1/completions", json={"model": "three"}).status_code == 404
        assert client.post("/v1/completions", content=b"x").status_code == 400
        lines = client.post("/v1/completions", json={"stream": True}).text.split("\n\n")
        assert lines[-2] == "data: [DONE]"
        assert client.post("/sleep").status_code == 404, "not without developer mode"
    assert engine.get("/v1/models").status_code == 401
    assert engine.get("/health").status_code == 200


def test_nonsense_on_the_port_does_not_harm_it(box: Box) -> None:
    engine = box.serve(VLLM_SERVER_DEV_MODE="1").ready()
    for nonsense in (
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"\xff\x00 :\r\n:\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", engine.port)) as sock:
            sock.sendall(nonsense)
            assert sock.recv(100).startswith(b"HTTP/1.1 404")
    assert engine.post("/wake_up?tags=a+b+c+d").status_code == 200
    assert engine.post("/v1/completions", max_tokens=-1).status_code == 400
    assert engine.post("/v1/completions", max_tokens=1).status_code == 200


def test_requests_are_counted_while_they_run_and_wait_when_there_are_too_many(box: Box) -> None:
    engine = box.serve("--max-num-seqs", "1", "--enable-server-load-tracking").ready()
    clients = [ImpatientClient(engine) for _ in range(3)]
    until(lambda: engine.metric("num_requests_waiting") == 2)
    assert engine.metric("num_requests_running") == 1
    assert engine.get("/load").json() == {"server_load": 3}
    made = engine.metric("iteration_tokens_total_sum")
    until(lambda: engine.metric("iteration_tokens_total_sum") > made)
    for client in clients:
        client.hang_up()
    until(lambda: engine.metric("num_requests_running") == 0)
    assert Asking(engine, 5).status() == 200


@pytest.mark.parametrize("part", ["VLLM::EngineCore", "VLLM::Worker_TP0"])
def test_a_stopped_part_leaves_health_green_and_completions_hanging(box: Box, part: str) -> None:
    engine = box.serve("-tp", "2").ready()
    pid = engine.tree()[part]
    asking = Asking(engine, 50_000)
    until(lambda: engine.metric("num_requests_running") == 1)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.3)
    made = engine.metric("iteration_tokens_total_sum")
    time.sleep(0.3)
    assert asking.pending
    assert engine.get("/health").status_code == 200
    assert engine.metric("num_requests_running") == 1
    assert engine.metric("iteration_tokens_total_sum") == made
    os.kill(pid, signal.SIGCONT)
    assert asking.status() == 200


def test_a_part_that_stood_still_before_the_request_came_shows_nothing_at_work(box: Box) -> None:
    """The figures are the engine core's: what it was never told of, it does not count."""
    engine = box.serve(CUDA_VISIBLE_DEVICES="0").ready()
    pid = engine.tree()["VLLM::EngineCore"]
    os.kill(pid, signal.SIGSTOP)
    asking = Asking(engine, 10)
    time.sleep(0.5)
    assert asking.pending
    assert engine.metric("num_requests_running") == engine.metric("num_requests_waiting") == 0
    os.kill(pid, signal.SIGCONT)
    assert asking.status() == 200


def test_sleep_leaves_a_residue_lets_requests_wait_and_waking_takes_the_memory_back(box: Box) -> None:
    engine = box.serve(
        "--enable-sleep-mode", "--enable-server-load-tracking", "-tp", "2", VLLM_SERVER_DEV_MODE="1"
    ).ready()
    assert engine.get("/is_sleeping").json() == {"is_sleeping": False}
    assert engine.post("/sleep?level=1").status_code == 200
    assert box.used(0) == box.used(1) == int(1.2 * GIB)
    assert engine.get("/is_sleeping").json() == {"is_sleeping": True}
    assert engine.get("/health").status_code == 200
    asking = Asking(engine, 5)
    until(lambda: engine.get("/load").json() == {"server_load": 1})
    assert engine.metric("num_requests_running") == engine.metric("num_requests_waiting") == 0, "it steps no more"
    assert engine.post("/wake_up?tags=weights").status_code == 200
    assert int(1.2 * GIB) < box.used(0) < FULL
    assert engine.get("/is_sleeping").json() == {"is_sleeping": True}
    assert asking.pending
    assert engine.post("/wake_up?tags=kv_cache").status_code == 200
    assert box.used(0) == FULL
    assert asking.status() == 200
    assert engine.post("/sleep?level=2").status_code == 200
    assert engine.post("/wake_up").status_code == 200
    assert box.used(1) == FULL


def test_without_sleep_mode_a_sleep_only_pauses(box: Box) -> None:
    engine = box.serve(VLLM_SERVER_DEV_MODE="1", CUDA_VISIBLE_DEVICES="0").ready()
    assert engine.post("/sleep").status_code == 200
    assert engine.get("/is_sleeping").json() == {"is_sleeping": True}
    assert box.used(0) == FULL


def test_waking_where_a_neighbour_has_settled_kills_the_engine(box: Box) -> None:
    engine = box.serve("--enable-sleep-mode", VLLM_SERVER_DEV_MODE="1", CUDA_VISIBLE_DEVICES="0").ready()
    engine.post("/sleep")
    box.tenant(0, 20 * GIB)
    with suppress(httpx.TransportError):
        assert engine.post("/wake_up").status_code == 500
    assert engine.exit_code() == 0
    assert "torch.OutOfMemoryError" in engine.said()


# ---------------------------------------------------------------- pure parts


@pytest.mark.parametrize(
    ("visible", "order", "shown"),
    [
        (None, "PCI_BUS_ID", [0, 1, 2]),
        (None, None, [1, 0, 2]),
        ("0", None, [1]),
        ("0", "PCI_BUS_ID", [0]),
        ("2,0", "PCI_BUS_ID", [2, 0]),
        ("", "PCI_BUS_ID", []),
        ("-1", "PCI_BUS_ID", []),
        ("0,7,1", "PCI_BUS_ID", [0]),
        ("0,0", "PCI_BUS_ID", [0]),
        ("GPU-nobody,0", "PCI_BUS_ID", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, order: str | None, shown: list[int]
) -> None:
    prepare(tmp_path, SimNode((SimGpu("a", GIB), SimGpu("b", 2 * GIB), SimGpu("c", GIB))))
    monkeypatch.setenv("RECONCILER_SIM_DIR", str(tmp_path))
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert Node().visible() == shown


def test_uuids_may_be_cut_short_as_long_as_they_are_unique(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = SimNode((SimGpu("a", GIB),) * 3)
    prepare(tmp_path, node)
    monkeypatch.setenv("RECONCILER_SIM_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{node.uuid(2)},{node.uuid(0)[:12]}")
    assert Node().visible() == [2, 0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-")
    assert Node().visible() == []


def test_options_are_read_in_all_of_vllms_spellings() -> None:
    line = (
        "serve org/m -tp 2 --max_model_len=8 --no-enable-prefix-caching -O3 --served-model-name a b "
        "--compilation-config.level 3 --enforce-eager"
    )
    assert parse(line.split()) == {
        "model": "org/m",
        "tensor-parallel-size": "2",
        "max-model-len": "8",
        "no-enable-prefix-caching": "true",
        "optimization-level": "3",
        "served-model-name": "a b",
        "compilation-config": "3",
        "enforce-eager": "true",
    }
