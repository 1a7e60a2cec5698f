"""What a box sees of supervision: trees end as a whole before anybody takes their place; logs stay within bounds."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from box_driver import Box, is_gone, wait_for

pytestmark = pytest.mark.e2e


def ended_records(box: Box) -> list[Path]:
    return list((box.state / "ended").glob("*/intent.json"))


def test_a_successor_starts_only_once_the_orphaned_engine_is_gone_and_its_memory_is_seen_free(box: Box) -> None:
    """An engine that leads its own session, is deaf to SIGTERM, and stopped; its server is killed."""
    node = box.root / "node.yaml"
    node.write_text("gpus: [{name: H100, count: 1}]\nrelease_delay: 1s\ntime_scale: 0.02\n")
    box.node = str(node)
    workers = box.root / "workers"
    box.endpoint("ask", gpus=[0], extra=["--worker-file", str(workers)])
    box.write()
    box.start()
    leader = box.wait_healthy()["ask"]["pid"]
    orphan = int(wait_for(lambda: workers.exists() and workers.read_text(), "the engine has its memory"))
    os.kill(orphan, signal.SIGSTOP)
    os.kill(leader, signal.SIGKILL)
    wait_for(lambda: is_gone(orphan), "the engine is ended")
    gone = time.time()
    wait_for(lambda: len(workers.read_text().split()) == 2, "a successor's engine has its memory")
    assert box.wait_healthy()["ask"]["pid"] != leader
    (run,) = (box.state / "run").glob("*/intent.json")
    assert json.loads(run.read_text())["started"]["wall"] >= gone + 0.8, "the driver takes a second to give it back"
    (past,) = [json.loads(path.with_name("exit.json").read_text()) for path in ended_records(box)]
    assert past["exit_code"] == -signal.SIGKILL


def test_of_past_starts_as_many_are_kept_as_the_file_says_and_of_each_as_much(box: Box) -> None:
    box.spec["endpoints"]["talks"] = {
        "engine": "custom",
        "command": ["sh", "-c", "yes | head -c 5000000; exit 1"],
        "gpus": 0,
        "logs": {"max": "1MiB", "keep": 2},
        "restart": {"initial": "0s", "max_restarts": 3},
    }
    box.write()
    box.start()
    wait_for(lambda: box.endpoints()["talks"]["state"] == "failed", "it is given up")
    wait_for(lambda: not list((box.state / "run").iterdir()), "its last start is put away")
    assert len(ended_records(box)) == 2
    logs = list((box.state / "logs").iterdir())
    assert len(logs) == 2
    assert all(log.stat().st_size == 5_000_000 for log in logs)
    assert all(log.stat().st_blocks * 512 <= (1 << 20) * 5 // 4 + (128 << 10) for log in logs)
