"""A folder with set points and a simulated node, and the program called as its user calls it."""

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
from files import put
from ports import free_ports

from reconciler.cli.main import run

PROGRAM = [sys.executable, "-m", "reconciler"]
DEADLINE_S = 30.0
OK_SETPOINTS = """\
version: 1
node: {name: desk}
priorities: {high: 800}
capabilities: {chat: {min_available: 1}}
endpoints:
  big: {model: Qwen/Qwen3-8B, gpus: [0, 1], port: %d, priority: high, capabilities: [chat, reasoning]}
  small: {model: Qwen/Qwen3-1.7B, gpus: 1, port: %d, priority: 30, state: standby}
"""


class Desk:
    """A folder with set points and a simulated node, and the program called as its user calls it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "state"
        self.setpoints = self.write("setpoints.yaml", OK_SETPOINTS % tuple(free_ports(2)))
        (root / "overlays").mkdir()
        self.daemon: subprocess.Popen[bytes] | None = None

    @property
    def words(self) -> list[str]:
        return ["--setpoints", str(self.setpoints), "--state-dir", str(self.state), "--simulate", "4x80GiB"]

    def write(self, name: str, text: str) -> Path:
        return put(self.root / name, text)

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROGRAM, *self.words, *words], capture_output=True, text=True, timeout=60, check=False, **options
        )

    def popen(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*PROGRAM, *self.words, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    def data(self, *words: str) -> Any:
        """What a command answers, called within this process: much is asked, and often."""
        answer = self.answer(*words)
        assert answer["format_version"] == "1"
        assert "data" in answer, answer
        return answer["data"]

    def answer(self, *words: str) -> Any:
        """The same, if it may be an error."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            run([*self.words, "--format", "json", *words])
        assert out.getvalue(), err.getvalue()
        return json.loads(out.getvalue())

    def start(self) -> None:
        with (self.root / "daemon.log").open("wb") as log:
            self.daemon = subprocess.Popen(
                [*PROGRAM, *self.words, "run"], stdout=log, stderr=log, start_new_session=True
            )
        self.wait(lambda: self.answer("status").get("data", {}).get("daemon", {}).get("pid"), "the daemon answers")

    def wait(self, look: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + DEADLINE_S
        while not (found := look()):
            log = self.root / "daemon.log"
            if time.monotonic() > end:
                pytest.fail(f"not within {DEADLINE_S:g} s: {what}\n{log.read_text() if log.exists() else ''}")
            time.sleep(0.05)
        return found

    def close(self) -> None:
        if self.daemon is not None:
            self.daemon.terminate()
            self.daemon.wait(20)
            self.answer("down", "--timeout", "40s")


def interrupt(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Ctrl-C, as a terminal sends it; what was said."""
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    return out.decode(), err.decode()
