"""The simulated engine beside the real vLLM: the same questions to both, and a difference fails.

Answers of the real one hold for 0.32 on the CPU; what only exists with a GPU is not asked here.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from simulated_box import Box, Engine, free_port, until

VLLM = os.environ.get("RECONCILER_TEST_VLLM", "")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not VLLM, reason="RECONCILER_TEST_VLLM names no vllm executable"),
]

DEVELOPER = {"VLLM_SERVER_DEV_MODE": "1"}
ARGS = ("--served-model-name", "tiny", "--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

QUESTIONS: tuple[tuple[str, str, object], ...] = (
    ("GET", "/health", None),
    ("POST", "/health", None),
    ("GET", "/ping", None),
    ("POST", "/ping", None),
    ("GET", "/version", None),
    ("GET", "/load", None),
    ("GET", "/metrics", None),
    ("GET", "/nowhere", None),
    ("GET", "/v1/models", None),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 3}),
    ("POST", "/v1/completions", {"prompt": "x", "max_tokens": 3}),
    ("POST", "/v1/completions", {"model": "other", "prompt": "x"}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": -1}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
    ("GET", "/v1/completions", None),
    ("GET", "/is_sleeping", None),
    ("POST", "/sleep?level=1", None),
    ("GET", "/is_sleeping", None),
    ("GET", "/health", None),
    ("POST", "/wake_up", None),
    ("GET", "/is_sleeping", None),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 3}),
)
FIELDS = {
    "/version": ["version"],
    "/load": ["server_load"],
    "/is_sleeping": ["is_sleeping"],
    "/v1/models": ["data", "object"],
}


class Pair:
    """Starts the same thing twice: once simulated, once real."""

    def __init__(self, box: Box, folder: Path) -> None:
        self.box, self.folder, self.real = box, folder, list[Engine]()

    def serve(self, *args: str, ports: tuple[int, int] | None = None, **env: str) -> dict[str, Engine]:
        simulated, real = ports or (free_port(), free_port())
        given = (*ARGS, *args)
        return {
            "simulated": self.box.serve(*given, port=simulated, CUDA_VISIBLE_DEVICES="0", **env),
            "real": self._serve_real(*given, port=real, **env),
        }

    def _serve_real(self, *args: str, port: int, **env: str) -> Engine:
        log, model = self.folder / f"real-{len(self.real)}.log", Path(VLLM).parents[2] / "tiny-model"
        argv = [VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", *args]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), **QUIET, **env}
        with log.open("wb") as file:
            process = subprocess.Popen(argv, env=environment, stdout=file, stderr=file, start_new_session=True)
        self.real.append(Engine(process, port, log))
        return self.real[-1]

    def sweep(self) -> None:
        for engine in self.real:
            with suppress(ProcessLookupError):
                os.killpg(engine.pid, signal.SIGKILL)
            engine.process.wait(10)


@pytest.fixture
def pair(box: Box, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(box, tmp_path)
    yield pair
    pair.sweep()


def ready(engine: Engine) -> Engine:
    def look() -> bool:
        assert engine.process.poll() is None, engine.said()[-3000:]
        return engine.answers()

    until(look, 400)
    return engine


def answers(engine: Engine) -> list[str]:
    """Each question with its status, and the fields of what is an object."""
    told = []
    with httpx.Client(base_url=f"http://127.0.0.1:{engine.port}", trust_env=False, timeout=60) as client:
        for method, path, body in QUESTIONS:
            answer = client.request(method, path, json=body) if body is not None else client.request(method, path)
            line = f"{method} {path} {body}: {answer.status_code}"
            known = FIELDS.get(path)
            if known is not None and answer.status_code == 200:
                document = answer.json()
                line += f" {[name for name in known if name in document]}"
                line += f" {document['is_sleeping']}" if path == "/is_sleeping" else ""
            if path.startswith("/v1/completions") and answer.status_code == 200:
                line += f" {sorted(answer.json()['usage'].keys() & {'prompt_tokens', 'completion_tokens'})}"
            told.append(line)
    return told


def metric_names(engine: Engine) -> set[str]:
    return set(re.findall(r"^(vllm:\w+)", engine.get("/metrics").text, re.MULTILINE))


def group(engine: Engine) -> set[tuple[int, int]]:
    """(process group, session) of every living member, with the leader's pid as 0."""
    found = set()
    for pid in (engine.pid, *engine.tree().values()):
        found.add((os.getpgid(pid) - engine.pid, os.getsid(pid) - engine.pid))
    return found


def test_both_answer_alike_and_an_orphaned_engine_lives_on_with_the_port_free(pair: Pair) -> None:
    engines = {kind: ready(engine) for kind, engine in pair.serve(**DEVELOPER).items()}
    told = {kind: answers(engine) for kind, engine in engines.items()}
    assert told["simulated"] == told["real"]
    names = {kind: metric_names(engine) for kind, engine in engines.items()}
    assert names["simulated"] - names["real"] == set(), "the simulated one has no figure that the real one lacks"
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:iteration_tokens_total_sum"} <= names[
        "real"
    ]
    assert group(engines["simulated"]) == group(engines["real"]) == {(0, 0)}
    for engine in engines.values():
        core = engine.tree()["VLLM::EngineCore"]
        engine.process.kill()
        engine.process.wait(10)
        assert not engine.answers()
        assert engine.tree()["VLLM::EngineCore"] == core
        with pytest.raises(httpx.ConnectError):
            engine.get("/health")


def test_without_developer_mode_neither_can_be_put_to_sleep_and_both_end_with_0_when_the_engine_dies(
    pair: Pair,
) -> None:
    engines = {kind: ready(engine) for kind, engine in pair.serve().items()}
    for path in ("/sleep", "/wake_up", "/collective_rpc"):
        assert {engine.post(path).status_code for engine in engines.values()} == {404}
    assert {engine.get("/is_sleeping").status_code for engine in engines.values()} == {404}
    for engine in engines.values():
        os.kill(engine.tree()["VLLM::EngineCore"], signal.SIGKILL)
    until(lambda: _unhealthy(engines["real"]), 3)
    assert {kind: engine.exit_code(30) for kind, engine in engines.items()} == {"simulated": 0, "real": 0}


def _unhealthy(engine: Engine) -> bool:
    with suppress(httpx.TransportError):
        return engine.get("/health").status_code == 503
    return False


def test_sigterm_while_idle_ends_both_with_0_and_all_their_processes(pair: Pair) -> None:
    for kind, engine in pair.serve().items():
        ready(engine)
        members = list(engine.tree().values())
        engine.process.terminate()
        assert engine.exit_code(30) == 0, kind
        until(lambda members=members: all(not Path(f"/proc/{pid}").exists() or _gone(pid) for pid in members), 10)  # type: ignore[misc]


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_both_refuse_alike_what_they_cannot_start_with(pair: Pair) -> None:
    unknown = pair.serve("--no-such-option", "1")
    assert {kind: engine.exit_code(120) for kind, engine in unknown.items()} == {"simulated": 2, "real": 2}
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        taken = pair.serve(ports=(one.getsockname()[1], other.getsockname()[1]))
        assert {kind: engine.exit_code(120) for kind, engine in taken.items()} == {"simulated": 1, "real": 1}
        for engine in taken.values():
            assert "Address already in use" in engine.said()
