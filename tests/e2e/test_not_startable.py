"""Work whose program is not there: nobody gives way for it, and it begins once the program has come."""

from __future__ import annotations

import sys

import pytest
from box_driver import HERE, Box, wait_for

pytestmark = pytest.mark.e2e


def test_nobody_gives_way_for_a_program_that_is_not_there_until_it_is(box: Box) -> None:
    box.node = "1x80GiB"
    box.spec["policy"] = {"resync": "1s"}
    box.endpoint("ask", gpus=[0])
    box.write()
    box.start()
    pid = box.wait_healthy()["ask"]["pid"]
    folder = box.root / "job-render"
    folder.mkdir()
    box.overlay("render", workload={"command": ["./tool", str(folder), "--gib", "60"], "cwd": str(folder)})
    told = wait_for(lambda: box.overlay_view("render").get("reason"), "why the overlay waits is shown")
    assert told == "CannotStart: its work cannot be started: ./tool is not there"
    assert "correct the path, or install it" in box.said("explain", "render")[0]
    assert (ask := box.endpoints()["ask"])["pid"] == pid
    assert ask["state"] == "healthy"
    tool = folder / "tool"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "stub_job.py"} "$@"\n')
    tool.chmod(0o755)
    box.wait_overlay("render", "active")
    box.finish("render")
    box.wait_overlay("render", "done")
    assert box.wait_healthy()["ask"]["pid"] != pid
    evictions = [e for e in box.json("events")["data"]["events"] if e["kind"] == "evicted"]
    assert len(evictions) == 1
