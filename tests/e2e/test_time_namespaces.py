"""A daemon in another time namespace than the one before: whose processes are ours is the same there."""

from __future__ import annotations

import subprocess

import pytest
from box_driver import PROGRAM, Box, wait_for

pytestmark = pytest.mark.e2e

A_DAY_LATER = ["unshare", "--time", "--boottime", "86400"]


def test_a_daemon_in_another_time_namespace_adopts_what_runs_and_what_it_starts_is_adopted(box: Box) -> None:
    if subprocess.run([*A_DAY_LATER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no time namespace may be made here")
    box.endpoint("first", gpus=0)
    box.write()
    box.start()
    first = box.wait_healthy()["first"]
    box.kill()
    box.program = [*A_DAY_LATER, *PROGRAM]
    box.endpoint("second", gpus=0)
    box.write()
    box.start()
    there = box.wait_healthy()
    assert there["first"]["pid"] == first["pid"]
    assert 0 <= there["first"]["uptime_seconds"] < 3600
    box.kill()
    box.program = PROGRAM
    box.start()
    here = box.wait_healthy()
    assert {name: one["pid"] for name, one in here.items()} == {name: one["pid"] for name, one in there.items()}
    wait_for(lambda: box.json("incidents", "--all")["data"]["incidents"] == [], "nobody is told of anything")
    del box.spec["endpoints"]["second"]
    box.write()
    wait_for(lambda: "second" not in box.endpoints(), "who was started there is ended from here")
