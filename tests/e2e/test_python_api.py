"""The Python face, beside a daemon and without one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import pytest
from box_driver import Box, is_gone, wait_for

from reconciler import AgendaTracker, EndpointStatus, Orchestrator

pytestmark = pytest.mark.e2e


def orchestrator(box: Box) -> Orchestrator:
    return Orchestrator(box.setpoints, state_dir=box.state, simulate=box.node)


@pytest.mark.parametrize("with_daemon", [True, False])
def test_a_clean_start_replaces_the_named_endpoint_and_no_other(box: Box, with_daemon: bool) -> None:
    box.endpoint("thinking", gpus=[0])
    box.endpoint("asking", gpus=[1])
    box.write()
    box.start()
    before = box.wait_healthy()
    if not with_daemon:
        assert box.terminate() == 0
    orch = orchestrator(box)
    result = asyncio.run(orch.clean_start(endpoints=["thinking"]))
    assert result.ok, result.message
    seen = {e.name: e for e in asyncio.run(orch.status())}
    assert isinstance(seen["thinking"], EndpointStatus)
    assert seen["thinking"].state == seen["asking"].state == "healthy"
    assert seen["thinking"].gpus == (0,)
    assert seen["asking"].pid == before["asking"]["pid"]
    assert is_gone(before["thinking"]["pid"])
    assert asyncio.run(orch.plan()).converged


def test_the_agenda_is_read_from_the_state_directory_without_a_daemon(box: Box) -> None:
    box.endpoint("humble", gpus=[0])
    box.node = "1x80GiB"
    box.write()
    orch = orchestrator(box)
    assert not orch.agenda.is_endpoint_in_scheduled_transition("humble")
    box.start()
    box.wait_healthy()
    box.overlay("render")
    box.wait_overlay("render", "active")
    box.kill()
    tracker: AgendaTracker = orch.agenda
    assert tracker.is_endpoint_in_scheduled_transition("humble")
    assert "stopped" in (tracker.get_scheduled_endpoint_state("humble") or ())
    assert not tracker.is_endpoint_in_scheduled_transition("nobody")
    spent = []
    for _ in range(20):
        began = time.process_time()
        assert orch.agenda.is_endpoint_in_scheduled_transition("humble")
        spent.append(time.process_time() - began)
    assert sorted(spent)[10] < 0.02, "milliseconds, so that an alert may ask each time"
    box.finish("render")
    box.start()
    box.wait_healthy()
    wait_for(lambda: not orch.agenda.is_endpoint_in_scheduled_transition("humble"), "the transition is over")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, reconciler; print(sorted({'pydantic', 'typer', 'yaml', 'asyncio', 'httpx'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
