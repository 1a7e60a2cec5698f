"""What a killed engine leaves in /dev/shm, end to end: removed when it is its own, told when it has to stay."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from box_driver import Box, wait_for

SHM = Path("/dev/shm")


@pytest.fixture
def names() -> Iterator[tuple[Path, Path]]:
    """One for the endpoint's file, one for a stranger's."""
    ours, theirs = (SHM / f"psm_{secrets.token_hex(4)}" for _ in range(2))
    theirs.write_bytes(b"theirs")
    theirs.chmod(0o600)
    yield ours, theirs
    for path in (ours, theirs):
        path.unlink(missing_ok=True)


def events(box: Box, kind: str) -> list[dict[str, Any]]:
    return [e for e in box.json("events")["data"]["events"] if e["kind"] == kind]


def test_what_a_killed_endpoint_left_is_removed_and_a_strangers_file_stays(box: Box, names: tuple[Path, Path]) -> None:
    ours, theirs = names
    box.endpoint("ask", gpus=1, extra=["--shared-memory", ours.name])
    box.write()
    box.start()
    pid = box.wait_healthy("ask")["ask"]["pid"]
    run = box.state / "run"
    wait_for(lambda: list(run.glob("*/shared.json")), "it was seen what the endpoint has in /dev/shm")
    inode = ours.stat().st_ino
    os.killpg(pid, signal.SIGKILL)
    told = wait_for(lambda: events(box, "shm.removed"), "it is removed")
    assert (told[0]["subject"], ours.name in told[0]["message"]) == ("ask", True)
    assert not ours.exists() or ours.stat().st_ino != inode  # its successor may make one of that name
    assert theirs.read_bytes() == b"theirs"
    assert box.wait_healthy("ask")["ask"]["pid"] != pid


def test_what_was_left_while_no_daemon_ran_is_told_by_doctor_and_removed_by_the_next_daemon(
    box: Box, names: tuple[Path, Path]
) -> None:
    ours, theirs = names
    box.endpoint("ask", gpus=1, extra=["--shared-memory", ours.name])
    box.write()
    box.start()
    pid = box.wait_healthy("ask")["ask"]["pid"]
    wait_for(lambda: list((box.state / "run").glob("*/shared.json")), "it was seen")
    with ours.open("rb"):
        box.spec["endpoints"]["ask"]["state"] = "stopped"
        os.killpg(pid, signal.SIGKILL)  # it has no time to clean up
        box.write()
        told = wait_for(lambda: events(box, "shm.kept"), "it is told that it stays")
        assert f"pid {os.getpid()} has it" in told[0]["message"]
        assert ours.exists()
        said = box.json("doctor")["data"]["checks"]
        assert [c["message"] for c in said if ours.name in c["message"]] == [
            f"ask left 1 file in /dev/shm (1MiB: {ours.name}): pid {os.getpid()} has it"
        ]
        box.terminate()
    assert ours.exists()
    box.start()
    wait_for(lambda: not ours.exists(), "the next daemon removes it")
    assert theirs.read_bytes() == b"theirs"
