"""A daemon that has too few descriptors, for a while: it looks again, and nobody has lost anything."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
from box_driver import PROGRAM, Box, wait_for

pytestmark = pytest.mark.e2e


def limits(pid: int) -> tuple[int, int]:
    return resource.prlimit(pid, resource.RLIMIT_NOFILE)


def incidents(box: Box) -> list[dict[str, Any]]:
    """Read from the journal itself."""
    found: list[dict[str, Any]] = box.json("incidents")["data"]["incidents"]
    return found


def test_a_daemon_takes_what_it_may_hands_on_what_it_was_given_and_outlives_having_none_left(box: Box) -> None:
    hard = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    box.program = ["prlimit", f"--nofile=128:{hard}", *PROGRAM]
    box.spec["policy"] = {"resync": "1s"}
    box.endpoint("ask", gpus=[0])
    box.write()
    box.start()
    assert box.daemon is not None
    before = box.wait_healthy()["ask"]
    daemon = box.daemon.pid
    assert limits(daemon) == (hard, hard)
    assert limits(before["pid"]) == (128, hard)
    # what it has open stays open, and nothing more can be opened
    resource.prlimit(daemon, resource.RLIMIT_NOFILE, (3, hard))
    kinds = wait_for(lambda: [i["kind"] for i in incidents(box)], "the daemon tells that it has no descriptors left")
    assert kinds == ["Blind"]
    assert Path(f"/proc/{before['pid']}").exists()
    resource.prlimit(daemon, resource.RLIMIT_NOFILE, (hard, hard))
    wait_for(lambda: incidents(box)[0]["state"] == "recovering", "it looks again")
    assert box.daemon.poll() is None
    assert box.wait_healthy()["ask"]["pid"] == before["pid"]
