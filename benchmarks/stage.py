"""What the benchmarks share: a box driven through the installed program, its stubs' notes, percentiles, a table."""

from __future__ import annotations

import compileall
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

import reconciler
from reconciler.loop.control import ask

STUB = Path(__file__).resolve().with_name("stub.py")
PROGRAM = (sys.executable, "-m", "reconciler")
DEADLINE_S = 60.0


def now_ns() -> int:
    """Nanoseconds of CLOCK_BOOTTIME, the clock of the stubs' notes."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def wait_for(look: Callable[[], Any], what: str, poll_s: float = 0.002) -> Any:
    """The first true value of `look`."""
    end = time.monotonic() + DEADLINE_S
    while not (value := look()):
        if time.monotonic() > end:
            raise SystemExit(f"not within {DEADLINE_S:g} s: {what}")
        time.sleep(poll_s)
    return value


_given: set[int] = set()


def free_port() -> int:
    """One that was not given to anybody before; the kernel may offer it again as soon as it is let go of."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port


class Box:
    """A state directory, its set points, and the daemon that runs on them."""

    def __init__(self, root: Path, node: str = "4x80GiB") -> None:
        self.root, self.node = root, node
        self.setpoints = root / "setpoints.yaml"
        self.spec: dict[str, Any] = {"version": 1, "node": {"name": "box"}, "endpoints": {}}
        self.daemon: subprocess.Popen[bytes] | None = None
        (root / "overlays").mkdir()

    def describe_node(self, *, release_delay: str) -> None:
        """Simulate four 80 GiB cards whose memory comes back so long after the death of its holder."""
        path = self.root / "node.yaml"
        card = "{name: Card, memory: 80GiB, count: 4}"
        path.write_text(f"gpus: [{card}]\ntime_scale: 0.02\nrelease_delay: {release_delay}\n")
        self.node = str(path)

    def notes(self, name: str) -> Path:
        return self.root / f"notes-{name}"

    def stub(self, name: str, port: str, *, gib: float | None = None) -> list[str]:
        """The command line of a stub, the same for the program and for a floor."""
        hold = [] if gib is None else ["--gib", str(gib)]
        return [sys.executable, "-I", "-S", str(STUB), str(self.notes(name)), port, *hold]

    def endpoint(self, name: str, *, gpus: int, gib: float | None = None, **fields: Any) -> None:
        self.spec["endpoints"][name] = {
            "engine": "custom",
            "command": self.stub(name, "{port}", gib=gib),
            "port": free_port(),
            "gpus": gpus,
            "stop": {"drain": "0s", "grace": "3s"},
            **fields,
        }

    def write(self) -> int:
        """Put the set points in place by a rename; the moment just before it."""
        new = self.root / ".setpoints.new"
        new.write_text(yaml.safe_dump(self.spec, sort_keys=False))
        new.chmod(0o644)
        before = now_ns()
        new.rename(self.setpoints)
        return before

    def argv(self, *words: str) -> list[str]:
        place = ["--setpoints", str(self.setpoints), "--state-dir", str(self.root / "state")]
        return [*PROGRAM, *place, "--simulate", self.node, *words]

    def json(self, *words: str) -> Any:
        done = subprocess.run(self.argv("--format", "json", *words), capture_output=True, text=True, check=False)
        if not done.stdout:
            raise SystemExit(f"{words}: {done.stderr}")
        return json.loads(done.stdout)

    def ask(self, op: str, **arguments: object) -> Any:
        """Put a request to the daemon, as the command line does; None: it does not listen yet."""
        return ask(self.root / "state" / "control.sock", op, **arguments)

    def endpoints(self) -> dict[str, dict[str, Any]]:
        return {e["name"]: e for e in (self.ask("status") or {}).get("endpoints", [])}

    def start(self) -> subprocess.Popen[bytes]:
        with (self.root / "daemon.log").open("ab") as log:
            self.daemon = subprocess.Popen(self.argv("run"), stdout=log, stderr=log, start_new_session=True)
        return self.daemon

    def wait_healthy(self) -> dict[str, dict[str, Any]]:
        """Every endpoint as `status` shows it, once all of them answer."""

        seen: dict[str, dict[str, Any]] = {}

        def look() -> bool:
            seen.update(self.endpoints())
            return all(seen.get(name, {}).get("state") == "healthy" for name in self.spec["endpoints"])

        wait_for(look, f"healthy; {self.root / 'daemon.log'}", poll_s=0.02)
        return seen

    def replace_daemon(self) -> None:
        """Kill the daemon with -9 and have another adopt what runs."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()
        self.start()
        self.wait_healthy()

    def noted(self, name: str, what: str, after_ns: int) -> int | None:
        """When the stub first noted `what` after that moment."""
        path = self.notes(name)
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return next((int(ns) for kind, _, ns in lines if kind == what and int(ns) > after_ns), None)

    def wait_noted(self, name: str, what: str, after_ns: int, poll_s: float = 0.002) -> float:
        """Milliseconds from that moment to the stub's first note of `what`."""
        wait_for(lambda: self.noted(name, what, after_ns), f"{name} notes {what!r}", poll_s)
        noted = self.noted(name, what, after_ns)
        assert noted is not None
        return (noted - after_ns) / 1e6

    def close(self) -> None:
        if self.daemon is not None:
            self.daemon.terminate()
            self.daemon.wait()
        subprocess.run(self.argv("down", "--timeout", "20s"), capture_output=True, check=False)


_folders = tempfile.TemporaryDirectory(prefix="bench-")
"""Of all boxes, removed at the end: for half a minute after files were removed, ext4 makes new ones at 0.8 ms each."""


@contextmanager
def box(node: str = "4x80GiB") -> Iterator[Box]:
    """A box in a folder of its own; nothing of it runs afterwards."""
    package = Path(next(iter(reconciler.__path__)))
    compileall.compile_dir(package, quiet=1)  # as installed programs are; a checkout may not write bytecode by itself
    one = Box(Path(tempfile.mkdtemp(dir=_folders.name)), node)
    try:
        yield one
    finally:
        one.close()


def spawn_directly(one: Box, name: str) -> float:
    """The floor of a start: spawn → first instruction of the same stub, by a bare Popen, in milliseconds."""
    before = now_ns()
    child = _popen(one, name)
    taken = one.wait_noted(name, "first", before)
    child.kill()
    child.wait()
    return taken


def respawn_directly(one: Box, name: str) -> float:
    """The floor of a restart: kill -9 → first instruction of the successor, by a bare wait and Popen, in ms."""
    child = _popen(one, name)
    wait_for(lambda: one.noted(name, "first", 0), f"{name} notes 'first'")
    before = now_ns()
    child.kill()
    child.wait()
    child = _popen(one, name)
    taken = one.wait_noted(name, "first", before)
    child.kill()
    child.wait()
    return taken


def _popen(one: Box, name: str) -> subprocess.Popen[bytes]:
    null = subprocess.DEVNULL
    return subprocess.Popen(one.stub(name, str(free_port())), stdin=null, stdout=null, stderr=null)


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def describe(values: Sequence[float]) -> list[str]:
    """p50 and p90, as the cells of a row."""
    return [f"{statistics.median(values):.1f}", f"{percentile(values, 0.9):.1f}"]


def machine() -> str:
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, load {load:.1f}"


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table, in Markdown."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    print(f"\n{title} ({machine()})\n")
    for row in (head, ["-" * w for w in widths], *rows):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")
