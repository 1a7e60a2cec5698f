"""Work whose program is not there fails and nobody gives way for it; a reset has it begin once the program has come."""

from __future__ import annotations

import sys

import pytest
from box_driver import HERE, Box

pytestmark = pytest.mark.e2e


def test_nobody_gives_way_for_work_whose_program_is_not_there(box: Box) -> None:
    box.node = "1x80GiB"
    box.spec["policy"] = {"resync": "1s"}
    box.endpoint("ask", gpus=[0])
    box.write()
    box.start()
    pid = box.wait_healthy()["ask"]["pid"]
    folder = box.root / "job-render"
    folder.mkdir()
    box.overlay("render", workload={"command": ["./tool", str(folder), "--gib", "60"], "cwd": str(folder)})
    box.wait_overlay("render", "failed")
    assert box.overlay_view("render")["reason"] == "its work cannot be started: ./tool is not there"
    incidents = box.json("incidents")["data"]["incidents"]
    assert [(i["kind"], i["subject"]) for i in incidents] == [("OverlayFailed", "render")]
    assert (ask := box.endpoints()["ask"])["pid"] == pid
    assert ask["state"] == "healthy"
    tool = folder / "tool"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "stub_job.py"} "$@"\n')
    tool.chmod(0o755)
    box.said("reset", "render")
    box.wait_overlay("render", "active")
    box.finish("render")
    box.wait_overlay("render", "done")
    assert box.wait_healthy()["ask"]["pid"] != pid
    evictions = [e for e in box.json("events")["data"]["events"] if e["kind"] == "evicted"]
    assert len(evictions) == 1
