"""`doctor`, called as its user calls it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from desk import PROGRAM, Desk

from reconciler.checkup.check import Check


def test_a_box_on_which_everything_works_is_fine(desk: Desk) -> None:
    done = desk.run("doctor")
    assert done.returncode == 0, done.stdout
    assert "driver" in done.stdout
    data = desk.data("doctor")
    assert data["ok"] is True
    assert set(data["checks"][0]) == set(Check.__slots__)
    areas = list(dict.fromkeys(check["area"] for check in data["checks"]))
    assert areas == [
        "versions", "kernel", "driver", "GPUs", "files", "programs", "ports", "state", "leftovers", "service",
    ]  # fmt: skip


def test_files_that_are_wrong_and_a_program_that_is_not_there_make_it_fail(desk: Desk) -> None:
    text = desk.setpoints.read_text().replace("gpus: 1,", "gpus: 1, executable: /no/such/vllm,")
    desk.write("setpoints.yaml", text)
    desk.write("overlays/bad.yaml", "version: 1\nmakespam: {}\n")
    done = desk.run("--format", "json", "doctor")
    assert done.returncode == 1
    errors = [c for c in json.loads(done.stdout)["data"]["checks"] if c["level"] == "error"]
    assert any(c["area"] == "programs" and "small: /no/such/vllm" in c["message"] for c in errors)
    assert any(c["area"] == "files" and "bad.yaml:2:1" in c["message"] for c in errors)
    assert all(c["hint"] for c in errors if c["area"] == "programs")


def test_a_box_without_a_driver_is_told_everything_else_all_the_same(tmp_path: Path, desk: Desk) -> None:
    words = [*PROGRAM, "--setpoints", str(desk.setpoints), "--state-dir", str(tmp_path / "other"), "--format", "json"]
    done = subprocess.run(
        [*words, "doctor"], capture_output=True, text=True, check=False,
        env={**os.environ, "LD_LIBRARY_PATH": "", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    checks = json.loads(done.stdout)["data"]["checks"]
    levels = {check["area"]: check["level"] for check in checks}
    if levels["driver"] == "error":  # a box with a driver is shown by the other tests
        assert done.returncode == 1
        assert "GPUs" not in levels
    assert levels["files"] == "ok"
    assert any(c["area"] == "programs" and "big, small: vllm is not on PATH" in c["message"] for c in checks)


def test_it_changes_nothing_beside_a_running_daemon(desk: Desk) -> None:
    desk.start()
    desk.wait(lambda: any(e["state"] == "healthy" for e in desk.data("status")["endpoints"]), "an endpoint is healthy")
    before = {e["name"]: e["pid"] for e in desk.data("status")["endpoints"]}
    data = desk.data("doctor")
    assert data["ok"], data
    assert any("in use by the daemon" in check["message"] for check in data["checks"])
    assert {e["name"]: e["pid"] for e in desk.data("status")["endpoints"]} == before


def test_without_set_points_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, "--state-dir", str(tmp_path / "s"), "--simulate", "1x8GiB", "--format", "json", "doctor"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    errors = [c["message"] for c in json.loads(done.stdout)["data"]["checks"] if c["level"] == "error"]
    assert any("no set points found" in message for message in errors)
