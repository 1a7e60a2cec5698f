"""Under a service manager: told that it is ready once it looked, that it lives while it looks, and that it stops."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import PROGRAM, Desk

from reconciler.cli.service import stop_command, watchdog_s

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        name = str(tmp_path / "notify") if request.param == "path" else f"@reconciler-test-{os.getpid()}"
        listening.bind(name.replace("@", "\0", 1))
        listening.settimeout(30)
        yield name, listening


def test_a_daemon_says_that_it_is_ready_alive_and_stopping(desk: Desk, listener: tuple[str, socket.socket]) -> None:
    name, listening = listener
    desk.write("setpoints.yaml", "version: 1\npolicy: {resync: 1h}\nendpoints: {}\n")
    environment = {**os.environ, "NOTIFY_SOCKET": name, "WATCHDOG_USEC": "900000"}
    environment.pop("WATCHDOG_PID", None)
    with (desk.root / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen([*PROGRAM, *desk.words, "run"], env=environment, stdout=log, stderr=log)
    try:
        first = listening.recv(4096).decode().split("\n")
        assert first[0] == "READY=1"
        assert "STATUS=0 of 0 endpoints ready, 0 overlays active, 0 incidents" in first
        assert [listening.recv(4096) for _ in range(3)] == [b"WATCHDOG=1"] * 3  # though the set points say an hour
        daemon.terminate()
        assert daemon.wait(20) == 0
        last = b""
        while last != b"STOPPING=1":  # after the signs of life that it sent until then
            last = listening.recv(4096)
            assert last in (b"WATCHDOG=1", b"STOPPING=1")
    finally:
        daemon.kill()
        daemon.wait()


def test_a_daemon_that_the_watchdog_ends_says_where_it_stood(desk: Desk, listener: tuple[str, socket.socket]) -> None:
    name, listening = listener
    desk.write("setpoints.yaml", "version: 1\nendpoints: {}\n")
    with (desk.root / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(
            [*PROGRAM, *desk.words, "run"],
            env={**os.environ, "NOTIFY_SOCKET": name},
            stdout=log,
            stderr=log,
            cwd=desk.root,  # where a core would be left
        )
    try:
        assert listening.recv(4096).startswith(b"READY=1")
        daemon.send_signal(signal.SIGABRT)  # WatchdogSignal= of systemd.kill(5)
        assert daemon.wait(20) == -signal.SIGABRT
    finally:
        daemon.kill()
        daemon.wait()
    said = (desk.root / "daemon.log").read_text()
    assert "Fatal Python error: Aborted" in said
    assert "in run_daemon" in said


@pytest.mark.parametrize(
    ("group", "executed", "command"),
    [
        ("0::/system.slice/reconciler.service", 7, "systemctl stop reconciler"),
        ("0::/system.slice/reconciler.service/daemon", 7, "systemctl stop reconciler"),
        ("4:memory:/x\n1:name=systemd:/system.slice/gpus.service\n0::/", 7, "systemctl stop gpus"),
        ("0::/user.slice/user-9.slice/user@9.service/app.slice/llm.service", 7, "systemctl --user stop llm"),
        ("0::/system.slice/cron.service", 6, "kill 7"),
        ("0::/system.slice/cron.service", None, "kill 7"),
        ("0::/user.slice/user-9.slice/session-1.scope", 7, "kill 7"),
        (None, 7, "kill 7"),
    ],
)
def test_who_is_of_a_unit_is_ended_by_its_manager_and_anybody_else_by_a_signal(
    tmp_path: Path, group: str | None, executed: int | None, command: str
) -> None:
    (tmp_path / "7").mkdir()
    variables = [b"PATH=/bin", *([f"SYSTEMD_EXEC_PID={executed}".encode()] if executed else []), b""]
    (tmp_path / "7/environ").write_bytes(b"\0".join(variables))
    if group is not None:
        (tmp_path / "7/cgroup").write_text(f"{group}\n")
    assert stop_command(7, tmp_path) == command


def test_a_manager_that_does_not_listen_holds_up_nobody(desk: Desk) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": str(desk.root / "nobody")}
    done = subprocess.run(
        [*PROGRAM, *desk.words, "down"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 20.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "7"}, 20.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_signs_of_life_are_sent_three_times_as_often_as_asked_for(
    environment: dict[str, str], seconds: float | None
) -> None:
    assert watchdog_s(environment, 7) == seconds


def test_the_shipped_unit_keeps_endpoints_alive_and_is_the_one_that_the_docs_show() -> None:
    unit = (EXAMPLES / "systemd/reconciler.service").read_text()
    for line in ("Type=notify", "KillMode=process", "ExecReload=/bin/kill -HUP $MAINPID", "OOMPolicy=continue"):
        assert line in unit.splitlines()
    assert f"```ini\n{unit}```" in (EXAMPLES.parent / "docs/operations.md").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_shipped_unit(tmp_path: Path) -> None:
    unit = (EXAMPLES / "systemd/reconciler.service").read_text()
    copy = tmp_path / "reconciler.service"
    copy.write_text(unit.replace("/opt/reconciler/bin/reconciler", "/bin/true").replace("User=llm\n", ""))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    assert str(copy) not in done.stderr, done.stderr
