"""Questions to whatever calls itself `vllm serve`: what it answers, does on signals, and leaves behind.

The same to the simulated one and to the real one; the answers are plain data, so that they can be compared and kept.
A question never asks how long something takes, only whether it happened by a deadline, or had not happened yet after a
pause that is long enough for the kind of server asked.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import httpx
from msgspec import Struct
from msgspec.structs import replace
from ports import free_port
from simulated_box import MODELS, Box, Engine, box_of, small_node, until

from reconciler import identity

Answers = dict[str, Any]

DEVELOPER = {"VLLM_SERVER_DEV_MODE": "1"}
LONGEST = 512
"""Tokens of the longest context of the model that is served."""

HTTP: tuple[tuple[str, str, object], ...] = (
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
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "x" * 40 * LONGEST, "max_tokens": 3}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 2 * LONGEST}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
    ("GET", "/v1/completions", None),
    ("GET", "/is_sleeping", None),
    ("POST", "/sleep?level=1", None),
    ("GET", "/is_sleeping", None),
    ("GET", "/health", None),
    ("GET", "/v1/models", None),
    ("POST", "/wake_up", None),
    ("GET", "/is_sleeping", None),
    ("POST", "/sleep?level=2", None),
    ("POST", "/wake_up?tags=weights", None),
    ("POST", "/wake_up?tags=kv_cache", None),
    ("GET", "/is_sleeping", None),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 3}),
)
FIELDS = {
    "/version": ["version"],
    "/load": ["server_load"],
    "/is_sleeping": ["is_sleeping"],
    "/v1/models": ["data", "object"],
    "/v1/completions": ["choices", "usage"],
    "/v1/chat/completions": ["choices", "usage"],
}
"""Of an answer 200: the fields that are looked for."""


class Kind(Struct):
    """One kind of server, and how to live with it."""

    name: str
    start: Callable[..., Engine]
    """Starts one: options of the command line, `port=`, environment."""
    many: tuple[str, ...]
    """Options with which it has worker processes."""
    bounded: tuple[str, ...]
    """Options that bound the context to `LONGEST` tokens."""
    slow: dict[str, str]
    """What makes a start slow enough to be looked at while it loads."""
    long_job: dict[str, Any]
    """A completion that outlasts whatever is done meanwhile."""
    job: dict[str, Any]
    """One that outlasts a moment, and ends."""
    pause_s: float
    """Long enough for what happens at once to have happened."""
    patience_s: float
    """For a start, on a busy machine."""

    def ready(self, *args: str, **options: Any) -> Engine:
        """Start one, and wait until it answers."""
        return self.await_ready(self.start(*args, **options))

    def await_ready(self, engine: Engine) -> Engine:
        def look() -> bool:
            assert engine.process.poll() is None, engine.said()[-3000:]
            return engine.answers()

        until(look, self.patience_s)
        return engine

    def loading(self, *args: str) -> Engine:
        """Start one, and wait until its engine core is there and busy loading."""
        engine = self.start(*args, **self.slow)
        until(lambda: core_of(engine), self.patience_s)
        time.sleep(self.pause_s)
        assert not engine.answers(), "it was to be asked while it loads"
        return engine


class Client:
    """A completion asked for in a thread, by a client that can hang up."""

    def __init__(self, engine: Engine, body: dict[str, Any]) -> None:
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{engine.port}", trust_env=False, timeout=600)
        self.status: int | None = None
        self.thread = threading.Thread(target=self._ask, args=(body,), daemon=True)
        self.thread.start()

    def _ask(self, body: dict[str, Any]) -> None:
        try:
            # streamed: closing the client ends the read, and with it the connection
            with self.http.stream("POST", "/v1/completions", json=body) as answer:
                answer.read()
            self.status = answer.status_code
        except (httpx.HTTPError, RuntimeError, OSError):
            self.status = -1

    @property
    def pending(self) -> bool:
        return self.thread.is_alive()

    def answer(self, deadline_s: float) -> int | None:
        self.thread.join(deadline_s)
        return self.status


class Caller:
    """A client with a socket of its own, to be hung up at once."""

    def __init__(self, engine: Engine, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.sock = socket.create_connection(("127.0.0.1", engine.port))
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        self.sock.sendall(f"{head}content-length: {len(text)}\r\n\r\n".encode() + text)

    def hang_up(self) -> None:
        self.sock.close()


# ---------------------------------------------------------------- the scenes


def answering(kind: Kind) -> Answers:
    """A ready server in developer mode, asked everything; then its API server is killed."""
    engine = kind.ready(*kind.bounded, SPT_NOENV="1", MARKER="seen", **DEVELOPER)
    told: Answers = {"http": http(engine), "processes": processes(engine)}
    told["metrics"] = sorted(set(re.findall(r"^(vllm:\w+)", engine.get("/metrics").text, re.MULTILINE)))
    told["marker kept with SPT_NOENV"] = identity.read_marker(core_of(engine), "MARKER") == "seen"
    engine.post("/sleep?level=1")
    client = Client(engine, {"model": "tiny", "prompt": "x", "max_tokens": 3})
    time.sleep(kind.pause_s)
    told["asleep"] = [client.pending, engine.get("/health").status_code, engine.get("/is_sleeping").json()]
    told["asleep, at work and waiting"] = [engine.metric(f"num_requests_{what}") for what in ("running", "waiting")]
    engine.post("/wake_up")
    told["woken"] = client.answer(60)
    core = core_of(engine)
    engine.process.kill()
    engine.process.wait(10)
    time.sleep(kind.pause_s)
    told["server killed: engine core lives"] = core_of(engine) == core
    told["server killed: port is free"] = _is_free(engine.port)
    return told


def hanging(kind: Kind) -> Answers:
    """Counters at work, a client that hangs up, an engine core that stands still, a server that does, SIGTERM."""
    engine = kind.ready("--enable-server-load-tracking")
    told: Answers = {"idle": _counters(engine)[0]}
    caller = Caller(engine, kind.long_job)
    until(lambda: _counters(engine)[0] > 0, 30)
    made = _counters(engine)[1]
    until(lambda: _counters(engine)[1] > made, 30)
    told["at work: the counter moves"] = True
    caller.hang_up()
    told["hung up: nothing runs"] = _within(10, lambda: _counters(engine)[0] == 0)
    told["hung up: load"] = engine.get("/load").json()["server_load"]

    client = Client(engine, kind.job)
    until(lambda: _counters(engine)[0] > 0, 30)
    os.kill(core_of(engine), signal.SIGSTOP)
    time.sleep(kind.pause_s)
    first = _counters(engine)
    time.sleep(kind.pause_s)
    told["core stopped at work"] = {
        "pages": [engine.get(path).status_code for path in ("/health", "/ping", "/metrics", "/v1/models")],
        "pending": client.pending,
        "runs": first[0] > 0,
        "frozen": _counters(engine)[1] == first[1],
    }
    os.kill(core_of(engine), signal.SIGCONT)
    told["core goes on"] = client.answer(300)

    until(lambda: _counters(engine)[0] == 0, 30)
    os.kill(core_of(engine), signal.SIGSTOP)
    client = Client(engine, {"model": "tiny", "prompt": "x", "max_tokens": 3})
    time.sleep(2 * kind.pause_s)
    told["core stopped while idle, then asked"] = {
        "pending": client.pending,
        "health": engine.get("/health").status_code,
        "running": _counters(engine)[0],
        "waiting": engine.metric("num_requests_waiting"),
        "load": engine.get("/load").json()["server_load"] - told["hung up: load"],
    }
    os.kill(core_of(engine), signal.SIGCONT)
    told["core goes on again"] = client.answer(60)

    members = [pid for _, pid in members_of(engine)]
    os.kill(engine.pid, signal.SIGSTOP)
    with socket.create_connection(("127.0.0.1", engine.port), timeout=5) as sock:
        sock.settimeout(max(1.0, kind.pause_s))
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        try:
            told["server stopped: answers"] = sock.recv(10) != b""
        except TimeoutError:
            told["server stopped: answers"] = False
    engine.process.terminate()
    time.sleep(kind.pause_s)
    told["server stopped: SIGTERM ends it"] = engine.process.poll() is not None
    os.kill(engine.pid, signal.SIGCONT)
    told["SIGTERM while idle: exit code"] = engine.exit_code(60)
    told["SIGTERM while idle: all gone"] = _within(15, lambda: all(map(_gone, members)))
    return told


def engine_dies(kind: Kind) -> Answers:
    """The engine core of a ready server is killed; before that, what is missing without developer mode."""
    engine = kind.ready(MARKER="seen")
    told: Answers = {
        f"{method} {path}": getattr(engine, method.lower())(path).status_code
        for method, path in (
            ("POST", "/sleep"),
            ("POST", "/wake_up"),
            ("GET", "/is_sleeping"),
            ("POST", "/collective_rpc"),
        )
    }
    told["marker kept"] = identity.read_marker(core_of(engine), "MARKER") == "seen"
    return told | _death(engine, core_of(engine))


def worker_dies(kind: Kind) -> Answers:
    """A worker of a ready server is killed."""
    engine = kind.ready(*kind.many)
    return _death(engine, next(pid for title, pid in members_of(engine) if "Worker" in title))


def stopped_at_work(kind: Kind) -> Answers:
    """SIGTERM with requests in flight, one of them streamed."""
    engine = kind.ready()
    streamed = Caller(engine, kind.long_job | {"stream": True, "n": 1})
    until(lambda: _counters(engine)[0] > 0, 30)
    plain = Client(engine, kind.long_job)
    until(lambda: _counters(engine)[0] > 1, 30)
    core = core_of(engine)
    engine.process.terminate()
    told: Answers = {"core ends": _within(30, lambda: _gone(core))}
    told["port refuses"] = _within(5, lambda: not engine.answers())
    # not asked: when the server itself ends. The real one did within seconds or after minutes, by chance
    streamed.hang_up()
    plain.http.close()
    return told


def drained(kind: Kind) -> Answers:
    """SIGTERM with a request in flight and time to finish it."""
    engine = kind.ready("--shutdown-timeout", "300" if kind.name == "real" else "100000")
    client = Client(engine, kind.job)
    until(lambda: _counters(engine)[0] > 0, 30)
    engine.process.terminate()
    return {"answer": client.answer(300), "exit code": engine.exit_code(60)}


def signalled_while_it_loads(kind: Kind) -> Answers:
    """SIGTERM, which is lost; SIGINT; and the death of the engine core."""
    engine = kind.loading()
    engine.process.terminate()
    time.sleep(2 * kind.pause_s)
    told: Answers = {"SIGTERM ends it": engine.process.poll() is not None}
    os.killpg(engine.pid, signal.SIGKILL)
    engine.process.wait(10)
    engine = kind.loading()
    engine.process.send_signal(signal.SIGINT)
    told["SIGINT: exit code"] = engine.exit_code(120)
    told["SIGINT: all gone"] = _within(15, lambda: not [t for t, _ in members_of(engine) if t.startswith("VLLM")])
    engine = kind.loading()
    os.kill(core_of(engine), signal.SIGKILL)
    told["core killed: exit code"] = engine.exit_code(120)
    return told


def two_on_one_port(kind: Kind) -> Answers:
    """Two starts at once on one port: both live, one of them listens."""
    port = free_port()
    engines = [kind.start(port=port, CUDA_VISIBLE_DEVICES=str(gpu)) for gpu in (0, 1)]
    for engine in engines:
        until(
            lambda engine=engine: "Application startup complete" in engine.said() or engine.process.poll() is not None,
            kind.patience_s,
        )  # type: ignore[misc]
    time.sleep(kind.pause_s)
    return {"exit codes": [e.process.poll() for e in engines], "one listens": engines[0].answers()}


def refused(kind: Kind) -> Answers:
    """Starts that cannot work."""
    told: Answers = {"unknown flag": kind.start("--no-such-option", "1").exit_code(kind.patience_s)}
    with socket.create_server(("127.0.0.1", 0)) as other:
        engine = kind.start(port=other.getsockname()[1])
        told["port held"] = [engine.exit_code(kind.patience_s), "Address already in use" in engine.said()]
    told["wrong model"] = kind.start(model="/nowhere/model").exit_code(kind.patience_s)
    told["not a number"] = kind.start("--max-num-seqs", "many").exit_code(kind.patience_s)
    return told


SCENES: dict[str, Callable[[Kind], Answers]] = {
    scene.__name__: scene
    for scene in (
        answering, hanging, engine_dies, worker_dies, stopped_at_work, drained, signalled_while_it_loads,
        two_on_one_port, refused,
    )
}  # fmt: skip


def differences(simulated: Answers, real: Answers) -> dict[str, tuple[Any, Any]]:
    """Where the simulated one answers otherwise: question → (its answer, the real one's).

    Of metrics it may have fewer, but none that the real one lacks.
    """
    found = {}
    for question in simulated.keys() | real.keys():
        one, other = simulated.get(question), real.get(question)
        if question == "metrics" and one and other:
            one, other = sorted(set(one) - set(other)), []
        if one != other:
            found[question] = (one, other)
    return found


# ---------------------------------------------------------------- looking


def http(engine: Engine) -> list[str]:
    """Each question of `HTTP` with its status, and the fields of what is an object."""
    told = []
    with httpx.Client(base_url=f"http://127.0.0.1:{engine.port}", trust_env=False, timeout=60) as client:
        for method, path, body in HTTP:
            answer = client.request(method, path, json=body) if body is not None else client.request(method, path)
            asked = str(body) if len(str(body)) < 200 else f"{str(body)[:40]}…{str(body)[-20:]}"
            line = f"{method} {path} {asked}: {answer.status_code}"
            known = FIELDS.get(path)
            if known is not None and answer.status_code == 200:
                document = answer.json()
                line += f" {[name for name in known if name in document]}"
                line += f" {document['is_sleeping']}" if path == "/is_sleeping" else ""
                line += f" {document['usage']['completion_tokens']}" if "usage" in known else ""
            elif answer.status_code in (400, 404) and path.startswith("/v1"):
                line += f" {sorted(answer.json().get('error', {}))} {answer.json()['error']['type']}"
            told.append(line)
    return told


def processes(engine: Engine) -> list[str]:
    """Title, parent, group and session of every member but the resource tracker, relative to the leader."""
    found = []
    titles = {pid: _plain(title) for title, pid in members_of(engine)} | {engine.pid: "leader"}
    for pid, title in titles.items():
        stat = identity.read_stat(pid)
        if stat is not None and title != "leader":
            parent = "".join(titles.get(p, "") for p in titles if pid in identity.children(p)) or "none of ours"
            own = [os.getpgid(pid) - engine.pid, os.getsid(pid) - engine.pid]
            found.append(f"{title} below {parent}, group and session {own}")
    return sorted(line for line in found if line.startswith("VLLM::EngineCore"))


def members_of(engine: Engine) -> list[tuple[str, int]]:
    return list(engine.tree().items())


def core_of(engine: Engine) -> int:
    """Its engine core; 0 while there is none."""
    return next((pid for title, pid in members_of(engine) if title.startswith("VLLM::EngineCore")), 0)


def _plain(title: str) -> str:
    return re.sub(r"_TP\d+", "", title)


def _death(engine: Engine, victim: int) -> Answers:
    os.kill(victim, signal.SIGKILL)
    told: Answers = {"503 within 3 s": _within(3, lambda: _health(engine) == 503)}
    told["exit code"] = engine.exit_code(60)
    told["all gone"] = _within(15, lambda: not [t for t, _ in members_of(engine) if t.startswith("VLLM")])
    return told


def _health(engine: Engine) -> int:
    connection = HTTPConnection("127.0.0.1", engine.port, timeout=5)  # at once: httpx takes longer on a busy machine
    with suppress(OSError, HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status
    return 0


def _counters(engine: Engine) -> tuple[float, float]:
    """Requests at work, and tokens made."""
    return engine.metric("num_requests_running"), engine.metric("iteration_tokens_total_sum")


def _within(deadline_s: float, look: Callable[[], bool]) -> bool:
    end = time.monotonic() + deadline_s
    while not (seen := look()) and time.monotonic() < end:
        time.sleep(0.02)
    return seen


def _is_free(port: int) -> bool:
    with suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def _gone(pid: int) -> bool:
    stat = identity.read_stat(pid)
    return stat is None or stat.gone


@contextmanager
def simulated_kind(scene: str, folder: Path) -> Iterator[Kind]:
    """The simulated one: a hundred times faster than life; less where a moment has to last for a busy machine."""
    scale = 1.0 if scene.endswith("_dies") else 0.01
    models = {name: replace(figures, load_s=(figures.load_s or 0) * 0.01 / scale) for name, figures in MODELS.items()}
    with box_of(folder, replace(small_node(time_scale=scale), models=models)) as box:
        yield _simulated(box)


def _simulated(box: Box) -> Kind:

    def start(*args: str, model: str = "tiny", **options: Any) -> Engine:
        return box.serve(
            "--served-model-name", "tiny", *args, model=model, **{"CUDA_VISIBLE_DEVICES": "0,1", **options}
        )

    bounded = ("--max-model-len", str(LONGEST))
    a_second = round(1.0 / 0.02 / box.node.time_scale)  # 20 ms a token
    jobs = [{"model": "tiny", "prompt": "x", "max_tokens": seconds * a_second} for seconds in (600, 5)]
    return Kind("simulated", start, ("-tp", "2"), bounded, {"model": "glacial"}, *jobs, 0.3, 30.0)


def real_kind(vllm: Path, folder: Path, started: list[Engine]) -> Kind:
    """The real one, for the CPU, with the model that `examples/cpu-vllm/setup.sh` made beside it."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }

    def start(*args: str, port: int | None = None, model: str | None = None, **env: str) -> Engine:
        port, log = port or free_port(), folder / f"real-{len(started)}.log"
        argv = [
            str(vllm),
            "serve",
            model or str(vllm.parents[2] / "tiny-model"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        argv += ["--served-model-name", "tiny", "--dtype", "bfloat16", "--enforce-eager"]
        argv += ["--max-model-len", str(LONGEST), *([] if "--max-num-seqs" in args else ["--max-num-seqs", "4"]), *args]
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **quiet, **env}
        with log.open("wb") as file:
            process = subprocess.Popen(argv, env=environment, stdout=file, stderr=file, start_new_session=True)
        started.append(Engine(process, port, log))
        return started[-1]

    # 32 times 500 tokens, four at a time: a quarter of a minute on two idle cores
    job = {"model": "tiny", "prompt": "x", "max_tokens": 500, "n": 32, "ignore_eos": True}
    return Kind("real", start, (), (), {}, job, job, 4.0, 900.0)
