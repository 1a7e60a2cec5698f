"""The stage of `demo`: a folder, a simulated node, set points, a daemon; and its dismantling, come what may.

It does what a user does: writes files and runs this program's own commands.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from reconciler.errors import ReconcilerError

NODE = "4x80GiB"
RENDER_S = 6.0
COMMAND_S = 60.0
"""More than any command here takes on a busy machine."""
STOP = {"drain": "1s", "grace": "5s"}
"""Shorter than the default: an engine that is asked to end while it loads forgets it, and Ctrl-C should be quick."""
KEPT_EVENTS = 8
_PORTS = range(10_000, 20_000)

ENDPOINTS: dict[str, dict[str, Any]] = {
    "thinking": {"model": "Qwen/Qwen3-32B", "gpus": [0, 1], "priority": 900, "capabilities": ["reasoning", "chat"]},
    "coding": {"model": "Qwen/Qwen3-Coder-30B-A3B-Instruct", "gpus": 1, "priority": 500, "capabilities": ["code"]},
    "drafting": {"model": "Qwen/Qwen3-8B", "gpus": 1, "priority": 100, "capabilities": ["chat"]},
}
VICTIM = "drafting"
OVERLAY = "render"
OVERLAY_FILE: dict[str, Any] = {
    "version": 1,
    "priority": 600,
    "allow_baseline_eviction": True,
    "makespan": {"duration": f"{RENDER_S:g}s"},
    "gpus": 1,
    "workload": {"command": [sys.executable, "-I", "-S", "render.py", f"{RENDER_S:g}"], "cwd": ".."},
}

RENDER = '''"""A pretend render job: holds memory of its GPU for some seconds and says which frame it is at."""

import os
import sys
import time

pid = os.getpid()
with open(f"/proc/{pid}/stat") as file:
    ticks = file.read().rpartition(")")[2].split()[19]
for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(","):
    with open(f"{os.environ['RECONCILER_SIM_DIR']}/gpus/{gpu}/{pid}-{ticks}", "w") as file:
        file.write(str(60 << 30))
frames = 12
for frame in range(1, frames + 1):
    time.sleep(float(sys.argv[1]) / frames)
    print(f"frame {frame} of {frames}", flush=True)
'''


class Stage:
    """A box that exists while it is entered; afterwards nothing of it is left."""

    def __init__(self) -> None:
        self.events: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self.stirred = threading.Event()
        """Set whenever something happened on the stage."""
        self._stack = ExitStack()
        """What has to be ended or put back in any case."""
        self._root = Path()
        self._daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        # SIGTERM must dismantle as Ctrl-C does
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        self._stack.callback(signal.signal, signal.SIGTERM, before)
        self._root = Path(tempfile.mkdtemp(prefix="reconciler-demo-"))
        try:
            self._write_files()
            self._start()
        except BaseException:
            self._dismantle()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dismantle()

    @property
    def daemon_pid(self) -> int:
        """The daemon's pid."""
        assert self._daemon is not None  # noqa: S101 - entered
        return self._daemon.pid

    def ask(self, *words: str) -> dict[str, Any]:
        """The data of one command's JSON answer.

        Raises:
            ReconcilerError: the command failed.
        """
        # a session of its own: Ctrl-C is for the demo, which then asks for the way down
        done = subprocess.run(
            [*self._argv(), "--format", "json", *words],
            capture_output=True,
            env=_environment(),
            start_new_session=True,
            timeout=COMMAND_S,
            check=False,
        )
        try:
            answer = json.loads(done.stdout)
            data: dict[str, Any] = answer["data"]
        except (ValueError, KeyError) as error:
            said = (done.stdout + done.stderr).decode(errors="replace").strip()
            raise ReconcilerError(f"`reconciler {' '.join(words)}` failed: {said[-2000:]}") from error
        return data

    def drop_overlay(self) -> None:
        """Put the overlay's file into the folder, as a user would."""
        _write(self._root / "overlays" / f"{OVERLAY}.yaml", yaml.safe_dump(OVERLAY_FILE, sort_keys=False))

    def check_daemon(self) -> None:
        """Raises ReconcilerError when the daemon is gone."""
        if self._daemon is None or self._daemon.poll() is None:
            return
        log = (self._root / "daemon.log").read_text(errors="replace")[-2000:]
        raise ReconcilerError(f"the daemon ended with exit code {self._daemon.returncode}: {log.strip()}")

    def _argv(self) -> list[str]:
        where = ["--setpoints", str(self._root / "setpoints.yaml"), "--state-dir", str(self._root / "state")]
        return [sys.executable, "-m", "reconciler", *where, "--simulate", NODE]

    def _write_files(self) -> None:
        (self._root / "overlays").mkdir(mode=0o700)
        ports = _free_ports(len(ENDPOINTS))
        endpoints = {
            name: {**fields, "port": port, "health": {"interval": "500ms"}, "stop": STOP}
            for (name, fields), port in zip(ENDPOINTS.items(), ports, strict=True)
        }
        document = {"version": 1, "node": {"name": "demo"}, "endpoints": endpoints}
        _write(self._root / "setpoints.yaml", yaml.safe_dump(document, sort_keys=False))
        _write(self._root / "render.py", RENDER)

    def _start(self) -> None:
        with (self._root / "daemon.log").open("wb") as log:
            self._daemon = subprocess.Popen(
                [*self._argv(), "run"], stdout=log, stderr=log, env=_environment(), start_new_session=True
            )
        listener = subprocess.Popen(
            [*self._argv(), "--format", "json", "events", "-f"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,
        )
        self._stack.callback(_end, listener)
        threading.Thread(target=self._listen, args=(listener,), daemon=True).start()

    def _listen(self, listener: subprocess.Popen[bytes]) -> None:
        assert listener.stdout is not None  # noqa: S101 - asked for above
        for line in listener.stdout:
            with suppress(ValueError):
                self.events.append(json.loads(line))
            self.stirred.set()

    def _dismantle(self) -> None:
        """The daemon first, which leaves its endpoints running; then those; then the folder.

        Raises:
            ReconcilerError: something could not be stopped; the folder is kept, for another try.
        """
        impatient = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        try:
            with self._stack:
                if self._daemon is not None:
                    _end(self._daemon)
                    self._go_down()
                shutil.rmtree(self._root, ignore_errors=True)
        finally:
            signal.signal(signal.SIGINT, impatient)

    def _go_down(self) -> None:
        done = self.ask("down", "--timeout", "30s")
        left = sorted({p["pid"] for gpu in self.ask("status")["gpus"] for p in gpu["processes"]})
        if left or not done["ok"]:
            again = " ".join([*self._argv(), "down"])
            raise ReconcilerError(f"not everything could be stopped: {done['message']} (pids {left})", hint=again)


def _environment() -> dict[str, str]:
    """This process's environment without what would point the demo at a real box."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RECONCILER_")}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end; after a while, insist."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody holds, none of those that the kernel gives to clients (32,768 and up, ip(7)).

    While a server is away, whoever asks the others would take such a one by chance, the daemon itself included.

    Raises:
        ReconcilerError: there are not so many.
    """
    begin = os.getpid() * 7 % len(_PORTS)  # two demos at once rarely look at the same
    found: list[int] = []
    for port in (*_PORTS[begin:], *_PORTS[:begin]):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise ReconcilerError(f"no {count} ports are free from {_PORTS.start} to {_PORTS.stop - 1}")


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(text, "utf-8")
    draft.chmod(0o600)
    draft.rename(path)
