"""A simulated node in a temporary folder, with real engines and tenants on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx
from ports import free_port

from reconciler import identity
from reconciler.sim.ledger import Ledger
from reconciler.sim.node import ModelFigures, SimGpu, SimNode, engine_environment, prepare

GIB = 1 << 30
T = TypeVar("T")


def until(look: Callable[[], T], deadline_s: float = 30.0) -> T:
    """The first true answer of `look`; fails when there is none in time."""
    end = time.monotonic() + deadline_s
    while True:
        answer = look()
        if answer or time.monotonic() > end:
            assert answer, f"not within {deadline_s} s"
            return answer
        time.sleep(0.01)


@dataclass
class Engine:
    """One `vllm serve`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", trust_env=False, timeout=20)

    def post(self, path: str, **body: object) -> httpx.Response:
        return httpx.post(f"http://127.0.0.1:{self.port}{path}", json=body, trust_env=False, timeout=20)

    def answers(self) -> bool:
        with suppress(httpx.TransportError):
            return self.get("/health").status_code == 200
        return False

    def ready(self) -> Engine:
        def look() -> bool:
            assert self.process.poll() is None, self.said()
            return self.answers()

        until(look)
        return self

    def exit_code(self, deadline_s: float = 30.0) -> int:
        return self.process.wait(deadline_s)

    def said(self) -> str:
        return self.log.read_text("utf-8")

    def tree(self) -> dict[str, int]:
        """Title → pid of the living members of its session, the leader left out."""
        found = {}
        for entry in (path.name for path in Path("/proc").iterdir()):
            if not entry.isdecimal() or int(entry) == self.pid:
                continue
            stat = identity.read_stat(int(entry))
            if stat is not None and stat.session_id == self.pid and not stat.gone:
                with suppress(OSError):
                    title = Path(f"/proc/{entry}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")[0]
                    found[title.decode()] = int(entry)
        return found

    def metric(self, name: str) -> float:
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"vllm:{name}{{"):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(name)


@dataclass
class Box:
    """One simulated node."""

    sim_dir: Path
    node: SimNode
    engines: list[Engine] = field(default_factory=list)
    tenants: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.sim_dir, self.node.release_delay_s)

    def used(self, index: int) -> int:
        return self.ledger.used_bytes(index)

    def holders(self, index: int) -> list[int]:
        return [a.pid for a in self.ledger.allocations(index) if a.alive]

    def serve(self, *args: str, port: int | None = None, model: str = "tiny", **env: str) -> Engine:
        port = port or free_port()
        log = self.sim_dir.parent / f"engine-{len(self.engines)}.log"
        environment = {"PATH": os.environ["PATH"]} | engine_environment(self.sim_dir) | env
        with log.open("wb") as file:
            process = subprocess.Popen(
                [str(self.sim_dir / "bin" / "vllm"), "serve", model, "--port", str(port), *args],
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        engine = Engine(process, port, log)
        self.engines.append(engine)
        return engine

    def sweep(self) -> None:
        """End everything that was started here, orphans too: they keep their leader's group id."""
        for engine in self.engines:
            with suppress(ProcessLookupError):
                os.killpg(engine.pid, signal.SIGKILL)
            engine.process.wait(10)
        for tenant in self.tenants:
            tenant.kill()
            tenant.wait(10)

    def tenant(self, index: int, size: int) -> subprocess.Popen[bytes]:
        """A foreign process that holds memory until it is killed."""
        code = (
            "import sys; from pathlib import Path; from reconciler.sim.tenant import hold;"
            f"hold(Path({str(self.sim_dir)!r}), {index}, {size})"
        )
        process = subprocess.Popen([sys.executable, "-c", code])
        self.tenants.append(process)
        until(lambda: process.pid in self.holders(index) or process.poll() is not None)
        assert process.poll() is None
        return process


MODELS = {
    "tiny": ModelFigures(load_s=30.0, weights_bytes=2 * GIB),
    "slow": ModelFigures(load_s=200.0, weights_bytes=2 * GIB),
    "glacial": ModelFigures(load_s=3000.0, weights_bytes=2 * GIB),
    "big": ModelFigures(load_s=30.0, weights_bytes=100 * GIB),
}


def small_node(count: int = 2, *, time_scale: float = 0.01, release_delay_s: float = 0.2) -> SimNode:
    gpu = SimGpu("NVIDIA GeForce RTX 4090", 24 * GIB)
    return SimNode((gpu,) * count, time_scale=time_scale, release_delay_s=release_delay_s, models=MODELS)


@contextmanager
def box_of(folder: Path, node: SimNode) -> Iterator[Box]:
    """`node` in `folder`, swept at the end."""
    prepare(folder / "sim", node)
    box = Box(folder / "sim", node)
    try:
        yield box
    finally:
        box.sweep()
