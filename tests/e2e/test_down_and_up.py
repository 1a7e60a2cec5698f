"""A box that went down: a daemon of another boot finds what the last one left, and nothing of it lives."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from box_driver import PROGRAM, Box, is_gone, wait_for

from reconciler.journal.incarnations import Intent, Run, list_ids, read
from reconciler.journal.layout import StateDir

pytestmark = pytest.mark.e2e

EARLIER = (
    "from reconciler import identity\n"
    "identity.boot_id = lambda: '01234567-89ab-4cde-8f01-23456789abcd'\n"
    "from reconciler.cli.main import main\n"
    "main()\n"
)
"""The whole program, as it would be in another boot than this one."""


def test_a_shutdown_and_a_power_cut_bring_everybody_back_at_once_as_one_event_and_no_incident(box: Box) -> None:
    """The end of `first` is recorded, as by an orderly shutdown; that of `second` is not, as after a power cut."""
    box.endpoint("first", gpus=0, restart={"max_restarts": 0})
    box.endpoint("second", gpus=1, restart={"max_restarts": 0})
    box.write()
    box.program = [sys.executable, "-c", EARLIER]
    box.start()
    box.wait_healthy()
    box.kill()
    state, runs = StateDir(box.state), dict[str, Run]()
    for records in (read(state.run / name) for name in list_ids(state)):
        assert isinstance(records.intent, Intent)
        assert isinstance(records.run, Run)
        runs[records.intent.name] = records.run
    assert {run.boot_id[:8] for run in runs.values()} == {"01234567"}
    first, second = runs["first"], runs["second"]
    os.kill(second.shim_pid, signal.SIGKILL)
    wait_for(lambda: is_gone(second.shim_pid), "nobody is left who would record its end")
    os.kill(second.pid, signal.SIGKILL)
    os.kill(first.pid, signal.SIGTERM)
    wait_for(lambda: all(is_gone(p) for r in (first, second) for p in (r.pid, r.shim_pid)), "nothing of them lives")
    box.program = PROGRAM
    box.start()
    back = box.wait_healthy()
    assert {name: (one["restarts"], one["pid"] != runs[name].pid) for name, one in back.items()} == {
        "first": (0, True), "second": (0, True),
    }  # fmt: skip
    (event,) = [e for e in box.json("events")["data"]["events"] if e["kind"] == "rebooted"]
    assert event["message"].startswith("the box was rebooted: 2 endpoints ended with it, or unseen before it, ")
    assert ": first at 2" in event["message"]
    assert event["message"].endswith(", second without a record of its end")
    assert box.json("incidents", "--all")["data"]["incidents"] == []
    for name in runs:
        (told,) = [line for line in box.said("explain", name)[0].splitlines() if line.startswith("It last ended at ")]
        assert told.endswith("(ended because the box went down).")
        assert "planned" not in told
