"""The main job, driven as a user drives it: files in, JSON out, real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from box_driver import Box, is_gone, wait_for
from files import put
from ports import free_port

pytestmark = pytest.mark.e2e


@pytest.fixture
def full_box(box: Box) -> Box:
    """Two GPUs' worth of baseline on a node of two, running, with a daemon."""
    box.node = "2x80GiB"
    box.endpoint("important", gpus=[0], priority=900)
    box.endpoint("humble", gpus=[1], priority=100)
    box.write()
    box.start()
    box.wait_healthy()
    return box


def test_an_overlay_evicts_the_lowest_runs_and_the_baseline_returns(full_box: Box) -> None:
    before = full_box.pids()
    full_box.overlay("render")
    view = full_box.wait_overlay("render", "active")
    assert view["evicted"] == ["humble"]
    assert view["gpus"] == [1]
    seen = full_box.endpoints()
    assert seen["humble"]["state"] in ("stopped", "pending")
    assert seen["humble"]["desired"] == "displaced"
    assert seen["humble"]["scheduled"]["overlay"] == "render"
    assert is_gone(before["humble"])
    full_box.finish("render")
    done = full_box.wait_overlay("render", "done")
    assert done["exit_code"] == 0
    after = full_box.wait_healthy()
    assert after["important"]["pid"] == before["important"]
    assert after["humble"]["pid"] not in (None, before["humble"])
    assert len(full_box.starts("render")) == 1
    assert full_box.status()["incidents"] == []


def test_without_consent_nothing_is_evicted_and_the_reason_is_told(full_box: Box) -> None:
    before = full_box.pids()
    full_box.overlay("render", allow_baseline_eviction=False)
    blocked = wait_for(
        lambda: [b for b in full_box.json("plan")["data"]["blocked"] if b["subject"] == "render"], "render is blocked"
    )
    assert blocked[0]["reason"] == "NoConsent"
    assert "humble" in blocked[0]["message"] or "important" in blocked[0]["message"]
    full_box.wait_overlay("render", "pending")
    assert full_box.pids() == before


def test_a_capability_floor_keeps_its_last_provider(box: Box) -> None:
    box.node = "1x80GiB"
    box.spec["capabilities"] = {"chat": {"min_available": 1}}
    box.endpoint("only", gpus=[0], priority=10, capabilities=["chat"])
    box.write()
    box.start()
    before = box.wait_healthy()["only"]["pid"]
    box.overlay("render")
    blocked = wait_for(lambda: [b for b in box.json("plan")["data"]["blocked"] if b["subject"] == "render"], "blocked")
    assert blocked[0]["reason"] == "FloorWouldBreak"
    assert box.pids()["only"] == before


def test_deleting_the_file_of_a_running_overlay_ends_it_and_restores_the_baseline(full_box: Box) -> None:
    """By the signal that the file named, which the default is not."""
    path = full_box.overlay("render", stop={"signal": "SIGUSR1"})
    pid = full_box.wait_overlay("render", "active")["pid"]
    wait_for(lambda: full_box.starts("render") == [pid], "its work begins")
    path.unlink()
    full_box.wait_healthy()
    assert full_box.overlay_view("render")["state"] == "cancelled"
    assert is_gone(pid)
    intents = [p for p in full_box.state.glob("*/*/intent.json") if json.loads(p.read_text())["name"] == "render"]
    assert [json.loads(p.with_name("exit.json").read_text())["exit_code"] for p in intents] == [-signal.SIGUSR1]


def test_killing_the_daemon_leaves_everything_running_and_the_next_one_adopts_it(full_box: Box) -> None:
    full_box.overlay("render")
    job = full_box.wait_overlay("render", "active")["pid"]
    before = full_box.pids()
    full_box.kill()
    assert not is_gone(before["important"])
    assert not is_gone(job)
    full_box.start()
    assert full_box.pids() == before
    assert full_box.overlay_view("render")["pid"] == job
    full_box.finish("render")
    full_box.wait_overlay("render", "done")
    assert full_box.wait_healthy()["important"]["pid"] == before["important"]


def test_the_exit_code_of_a_job_that_ended_while_no_daemon_ran_is_known(full_box: Box) -> None:
    full_box.overlay("render", exit_code=3)
    job = full_box.wait_overlay("render", "active")["pid"]
    full_box.kill()
    full_box.finish("render")
    wait_for(lambda: is_gone(job), "the job ended")
    full_box.start()
    assert full_box.wait_overlay("render", "failed")["exit_code"] == 3
    full_box.wait_healthy()


def test_sigterm_ends_the_daemon_and_nothing_else(full_box: Box) -> None:
    before = full_box.pids()
    assert full_box.terminate() == 0
    assert not any(is_gone(pid) for pid in before.values())
    assert full_box.pids() == before  # without a daemon, too
    full_box.start()
    assert full_box.pids() == before


def test_a_killed_endpoint_is_replaced_and_nothing_else_is_touched(full_box: Box) -> None:
    before = full_box.pids()
    os.kill(before["humble"], signal.SIGKILL)
    wait_for(lambda: full_box.pids()["humble"] not in (None, before["humble"]), "a new process")
    after = full_box.wait_healthy()
    assert after["important"]["pid"] == before["important"]
    assert after["humble"]["restarts"] == 1


def test_a_grandchild_that_left_the_session_and_ignores_sigterm_is_gone_after_the_stop(box: Box) -> None:
    stray_file = box.root / "stray"
    box.endpoint("messy", gpus=[0], extra=["--stray-file", str(stray_file)])
    box.write()
    box.start()
    pid = box.wait_healthy()["messy"]["pid"]
    stray = int(wait_for(lambda: stray_file.exists() and stray_file.read_text(), "the grandchild runs"))
    box.spec["endpoints"]["messy"]["state"] = "stopped"
    box.write()
    wait_for(lambda: box.endpoints()["messy"]["state"] == "stopped", "stopped")
    assert is_gone(pid)
    assert is_gone(stray)


def test_editing_one_endpoint_restarts_it_once_and_a_comment_restarts_nothing(full_box: Box) -> None:
    before = full_box.pids()
    with full_box.setpoints.open("a") as file:
        file.write("# a comment\n")
    full_box.spec["endpoints"]["humble"]["env"] = {"GREETING": "hello"}
    digest = full_box.json("plan")["data"]["spec_hash"]
    assert full_box.pids() == before
    full_box.write()
    wait_for(lambda: full_box.pids()["humble"] not in (None, before["humble"]), "a new process")
    after = full_box.wait_healthy()
    assert full_box.json("plan")["data"]["spec_hash"] != digest
    assert after["important"]["pid"] == before["important"]
    assert after["humble"]["restarts"] == 0
    assert full_box.status()["incidents"] == []
    starts = [
        e for e in full_box.json("events")["data"]["events"] if e["kind"] == "act.start" and e["subject"] == "humble"
    ]
    assert len(starts) == 2
    assert all(e["data"]["decision"] for e in starts), "each is told with the decision that it comes of"


BAD_EDITS = ("endpoints: [", "", "version: 1\nendpoints: {}\n", "version: 1\nendpoints: {a: {gpsu: 1}}\n", None)
"""What the set points are edited to; None: they are deleted."""


def test_a_bad_edit_changes_nothing_and_is_told(full_box: Box) -> None:
    before = full_box.pids()
    for text in BAD_EDITS:
        if text is None:
            full_box.setpoints.unlink()
        else:
            put(full_box.setpoints, text)
        wait_for(lambda: full_box.status()["spec"]["problems"], f"status tells of {text!r}")
        assert full_box.pids() == before, text
        full_box.kill()
        full_box.start()  # the next daemon falls back on the last good version as well
        assert full_box.status()["spec"]["problems"], text
        assert full_box.pids() == before, text
        full_box.write()
        wait_for(lambda: not full_box.status()["spec"]["problems"], f"the file is in force again after {text!r}")
        assert full_box.pids() == before, text


def test_a_vanished_overlays_folder_cancels_nothing(full_box: Box) -> None:
    full_box.overlay("render")
    job = full_box.wait_overlay("render", "active")["pid"]
    full_box.overlays.rename(full_box.root / "elsewhere")
    wait_for(lambda: full_box.status()["spec"]["problems"], "status tells of it")
    assert full_box.overlay_view("render")["state"] == "active"
    assert not is_gone(job)
    (full_box.root / "elsewhere").rename(full_box.overlays)
    full_box.finish("render")
    full_box.wait_overlay("render", "done")


def test_a_second_daemon_is_refused(full_box: Box) -> None:
    second = full_box.run("run")
    assert second.returncode == 1
    assert str(full_box.daemon.pid) in second.stderr


def test_a_port_in_someone_elses_hands_is_told_with_the_pid_and_nothing_is_started(box: Box) -> None:
    port = free_port()
    listener = subprocess.Popen(
        ["python3", "-m", "http.server", str(port), "--bind", "127.0.0.1"], stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "the stranger listens")
        box.endpoint("unlucky", gpus=[0], port=port)
        box.write()
        box.start()
        reason = wait_for(lambda: box.endpoints()["unlucky"]["reason"], "a reason")
        assert "PortInUse" in reason
        assert str(listener.pid) in reason
        assert box.endpoints()["unlucky"]["pid"] is None
    finally:
        listener.kill()
        listener.wait()
    box.wait_healthy()  # and it comes up by itself once the port is free


def test_a_foreign_tenant_blocks_what_needs_its_memory_and_is_left_alone(box: Box) -> None:
    box.node = "1x80GiB"
    box.endpoint("late", gpus=[0])
    box.write()
    tenant = subprocess.Popen(
        box.argv("sim", "hold", "--gpu", "0", "--memory", "40GiB"), stdout=subprocess.PIPE, text=True
    )
    try:
        tenant.stdout.readline()
        box.start()
        reason = wait_for(lambda: box.endpoints()["late"]["reason"], "a reason")
        assert "GpuOccupied" in reason
        assert tenant.poll() is None
    finally:
        tenant.terminate()
        tenant.wait()
    box.wait_healthy()


def test_without_a_driver_the_message_says_so_and_names_the_simulation(box: Box) -> None:
    box.endpoint("any", gpus=[0])
    box.write()
    words = [w for w in box.argv("run") if w not in ("--simulate", box.node)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "--simulate" in done.stderr
    assert "NVIDIA" in done.stderr or "NVML" in done.stderr


def test_a_state_directory_that_is_a_file_is_refused_at_start(box: Box) -> None:
    box.endpoint("any", gpus=[0])
    box.write()
    box.state = Path("/proc/version")
    done = box.run("run")
    assert done.returncode == 1
    assert "/proc/version" in done.stderr
    assert "Traceback" not in done.stderr


def test_down_stops_everything_and_clean_start_brings_it_back(full_box: Box) -> None:
    before = full_box.pids()
    assert full_box.terminate() == 0
    assert full_box.run("down").returncode == 0
    assert all(is_gone(pid) for pid in before.values())
    assert full_box.run("clean-start", "--yes").returncode == 0
    seen = full_box.endpoints()
    assert all(e["state"] == "healthy" for e in seen.values())


def test_a_clean_start_beside_a_daemon_returns_while_an_overlay_keeps_an_endpoint_away(full_box: Box) -> None:
    full_box.overlay("render")
    job = full_box.wait_overlay("render", "active")
    away = job["evicted"]
    before = full_box.pids()
    done = full_box.run("clean-start", "--yes", timeout=40)
    assert done.returncode == 0, done.stderr
    after = full_box.pids()
    assert all(after[name] != before[name] for name in after if name not in away)
    assert full_box.overlay_view("render")["pid"] == job["pid"]


def test_apply_converges_once_and_a_second_apply_has_nothing_to_do(box: Box) -> None:
    box.endpoint("one", gpus=1)
    box.write()
    assert box.run("plan", "--detailed-exitcode").returncode == 2
    assert box.run("apply", "--yes").returncode == 0
    pid = box.endpoints()["one"]["pid"]
    assert box.run("plan", "--detailed-exitcode").returncode == 0
    assert box.run("apply", "--yes").returncode == 0
    assert box.endpoints()["one"]["pid"] == pid


def test_a_saved_plan_is_refused_once_the_box_has_moved(box: Box) -> None:
    box.endpoint("one", gpus=1)
    box.write()
    saved = box.root / "saved.plan"
    assert box.run("plan", "--out", str(saved)).returncode == 0
    assert box.run("apply", "--yes").returncode == 0
    pid = box.endpoints()["one"]["pid"]
    stale = box.run("apply", str(saved), "--yes")
    assert stale.returncode == 4
    assert box.endpoints()["one"]["pid"] == pid
