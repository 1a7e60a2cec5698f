"""What a daemon outlives that is removed of its state directory by hand."""

from __future__ import annotations

import shutil

import pytest
from box_driver import Box, wait_for

pytestmark = pytest.mark.e2e


def test_locks_and_socket_that_are_removed_are_made_again_and_no_second_daemon_gets_in(box: Box) -> None:
    box.spec["policy"] = {"resync": "1s"}
    box.endpoint("ask", gpus=[0])
    box.write()
    box.start()
    assert box.daemon is not None
    before = box.wait_healthy()["ask"]["pid"]
    shutil.rmtree(box.state / "locks")
    (box.state / "daemon.lock").unlink()
    (box.state / "control.sock").unlink()
    second = box.run("run")
    assert second.returncode == 1
    assert "a daemon already runs on this state directory" in second.stderr
    wait_for(lambda: box.status()["daemon"]["pid"] == box.daemon.pid, "the daemon answers again")
    assert box.pids() == {"ask": before}
    box.endpoint("other", gpus=[1])
    box.write()
    assert box.wait_healthy()["ask"]["pid"] == before
    assert {path.name for path in (box.state / "locks").iterdir()} == {"endpoint-other.lock"}
    assert box.json("incidents", "--all")["data"]["incidents"] == []
