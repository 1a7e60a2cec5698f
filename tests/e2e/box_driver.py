"""A box as its user has it: files in, the installed program's JSON out."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from files import put
from ports import free_port

from reconciler.cli.main import run

HERE = Path(__file__).parent
PROGRAM = [sys.executable, "-m", "reconciler"]
DEADLINE_S = 40.0


def wait_for(look: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """The first true value of `look`, polled; a failed test after the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        value = look()
        if value:
            return value
        if time.monotonic() > end:
            pytest.fail(f"not within {deadline_s:g} s: {what}; last: {value!r}")
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Box:
    """One state directory with its files, and a daemon that may run on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.setpoints = root / "setpoints.yaml"
        self.overlays = root / "overlays"
        self.overlays.mkdir(parents=True)
        self.state = root / "state"
        self.spec: dict[str, Any] = {"version": 1, "node": {"name": "box"}, "endpoints": {}}
        self.daemon: subprocess.Popen[bytes] | None = None
        self.node = "4x80GiB"
        self.program = PROGRAM

    # ------------------------------------------------------------ files

    def endpoint(
        self,
        name: str,
        *,
        gpus: Any,
        priority: int = 100,
        gib: float = 60,
        extra: list[str] | None = None,
        **fields: Any,
    ) -> None:
        port = fields.pop("port", None) or free_port()
        self.spec["endpoints"][name] = {
            "engine": "custom",
            "command": [sys.executable, str(HERE / "stub_server.py"), "{port}", "--gib", str(gib), *(extra or [])],
            "port": port,
            "gpus": gpus,
            "priority": priority,
            "health": {"interval": "500ms", "startup": "30s"},
            "stop": {"drain": "0s", "grace": "3s"},
            **fields,
        }

    def write(self) -> None:
        put(self.setpoints, yaml.safe_dump(self.spec, sort_keys=False))

    def overlay(
        self, name: str, *, gib: float = 60, exit_code: int = 0, stop: dict[str, str] | None = None, **fields: Any
    ) -> Path:
        """Drop an overlay whose job goes on until `finish(name)`."""
        folder = self.root / f"job-{name}"
        folder.mkdir(exist_ok=True)
        body = {
            "version": 1,
            "priority": 600,
            "allow_baseline_eviction": True,
            "makespan": {"duration": "10m"},
            "gpus": 1,
            "workload": {
                "command": [
                    sys.executable,
                    str(HERE / "stub_job.py"),
                    str(folder),
                    "--gib",
                    str(gib),
                    "--exit-code",
                    str(exit_code),
                ],
                "stop": stop or {},
            },
            **fields,
        }
        path = self.overlays / f"{name}.yaml"
        put(path, yaml.safe_dump({k: v for k, v in body.items() if v is not None}, sort_keys=False))
        return path

    def finish(self, name: str) -> None:
        (self.root / f"job-{name}" / "finish").touch()

    def starts(self, name: str) -> list[int]:
        path = self.root / f"job-{name}" / "began"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    # ------------------------------------------------------------ the program

    def argv(self, *words: str) -> list[str]:
        return [
            *self.program,
            "--setpoints",
            str(self.setpoints),
            "--state-dir",
            str(self.state),
            "--simulate",
            self.node,
            *words,
        ]

    def run(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.argv(*words), capture_output=True, text=True, timeout=timeout, check=False)

    def said(self, *words: str) -> tuple[str, str]:
        """What a command says, on stdout and on stderr; called within this process: much is asked, and often."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            run(self.argv(*words)[len(self.program) :])
        return out.getvalue(), err.getvalue()

    def json(self, *words: str) -> Any:
        out, err = self.said("--format", "json", *words)
        assert out, err
        return json.loads(out)

    def status(self) -> dict[str, Any]:
        answer = self.json("status")
        assert "data" in answer, answer
        return answer["data"]

    def start(self) -> None:
        log = (self.root / "daemon.log").open("ab")
        self.daemon = subprocess.Popen(self.argv("run"), stdout=log, stderr=log, start_new_session=True)
        wait_for(
            lambda: (
                self.daemon.poll() is not None or self.json("status").get("data", {}).get("daemon", {}).get("running")
            ),
            "the daemon answers",
        )
        assert self.daemon.poll() is None, self.log()

    def log(self) -> str:
        return (self.root / "daemon.log").read_text()

    def kill(self) -> None:
        """The daemon, with no chance to say goodbye."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()
        self.daemon = None

    def terminate(self) -> int:
        assert self.daemon is not None
        self.daemon.terminate()
        code = self.daemon.wait(20)
        self.daemon = None
        return code

    # ------------------------------------------------------------ what it shows

    def endpoints(self) -> dict[str, dict[str, Any]]:
        return {e["name"]: e for e in self.status()["endpoints"]}

    def overlay_view(self, name: str) -> dict[str, Any]:
        return next((o for o in self.status()["overlays"] if o["name"] == name), {})

    def pids(self) -> dict[str, int | None]:
        return {name: e["pid"] for name, e in self.endpoints().items()}

    def wait_healthy(self, *names: str) -> dict[str, dict[str, Any]]:
        wanted = names or tuple(self.spec["endpoints"])

        def look() -> dict[str, dict[str, Any]] | None:
            seen = self.endpoints()
            return seen if all(seen.get(n, {}).get("state") == "healthy" for n in wanted) else None

        return wait_for(look, f"{', '.join(wanted)} healthy\n{self.log() if self.daemon else ''}")

    def wait_overlay(self, name: str, *states: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            seen = self.overlay_view(name)
            return seen if seen.get("state") in states else None

        return wait_for(look, f"overlay {name} is {' or '.join(states)}")

    def close(self) -> None:
        if self.daemon is not None:
            self.daemon.terminate()  # not killed at once: it saves its part where the branches it ran are measured
            try:
                self.daemon.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
        self.said("down", "--timeout", "20s")
        for record in (self.state / "run").glob("*/run.json"):  # a failed test must not leave processes behind
            content = json.loads(record.read_text())
            for key in ("pid", "shim_pid"):
                try:
                    os.kill(content[key], signal.SIGKILL)
                except ProcessLookupError:
                    continue
