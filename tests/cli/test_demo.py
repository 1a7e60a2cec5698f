"""The demo, played to the end and broken off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from desk import DEADLINE_S, PROGRAM


def start_demo(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, "demo", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(folder)}, start_new_session=True,
    )  # fmt: skip


def processes_that_mention(folder: Path) -> list[str]:
    """Command lines, and simulated engines whose environment points into the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"{folder}/reconciler-demo-".encode() in words:
                found.append(words[:80].decode(errors="replace"))
    return found


@pytest.fixture
def folder():
    # short: it holds the control socket of a daemon
    with tempfile.TemporaryDirectory(prefix="rd-") as path:
        yield Path(path)
        assert processes_that_mention(Path(path)) == []
        assert list(Path(path).iterdir()) == []


def test_the_demo_shows_eviction_work_and_return_and_leaves_nothing_behind(folder):
    playing = start_demo(folder, "--format", "json")
    out, err = playing.communicate(timeout=90)
    assert playing.returncode == 0, err
    data = json.loads(out)["data"]
    assert data["wrong"] == []
    assert all(data["checks"].values())
    assert data["seconds"] < 60
    assert data["overlay"]["evicted"] == ["drafting"]
    assert "Traceback" not in err


@pytest.mark.parametrize("moment", ["daemon", "healthy", "gave way"])
@pytest.mark.parametrize("number", [signal.SIGINT])
def test_a_demo_that_is_interrupted_cleans_up_at_any_point(folder, moment, number):
    playing = start_demo(folder)
    for line in playing.stdout:
        if moment in line:
            break
    os.killpg(playing.pid, number)
    _, err = playing.communicate(timeout=DEADLINE_S + 30)
    assert playing.returncode == 130, err
    assert "Traceback" not in err
