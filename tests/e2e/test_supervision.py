"""What a box sees of supervision: trees end as a whole before anybody takes their place; logs stay within bounds."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from box_driver import Box, is_gone, wait_for

pytestmark = pytest.mark.e2e


def ended_records(box: Box) -> list[Path]:
    return list((box.state / "ended").glob("*/intent.json"))


def test_a_successor_starts_only_once_the_orphaned_engine_is_gone_and_its_memory_is_seen_free(box: Box) -> None:
    """An engine that leads its own session, is deaf to SIGTERM, and stopped; its server is killed."""
    node = box.root / "node.yaml"
    node.write_text("gpus: [{name: H100, count: 1}]\nrelease_delay: 1s\ntime_scale: 0.02\n")
    box.node = str(node)
    workers = box.root / "workers"
    box.endpoint("ask", gpus=[0], extra=["--worker-file", str(workers)])
    box.write()
    box.start()
    leader = box.wait_healthy()["ask"]["pid"]
    orphan = int(wait_for(lambda: workers.exists() and workers.read_text(), "the engine has its memory"))
    os.kill(orphan, signal.SIGSTOP)
    os.kill(leader, signal.SIGKILL)
    wait_for(lambda: is_gone(orphan), "the engine is ended")
    gone = time.time()
    wait_for(lambda: len(workers.read_text().split()) == 2, "a successor's engine has its memory")
    assert box.wait_healthy()["ask"]["pid"] != leader
    (run,) = (box.state / "run").glob("*/intent.json")
    assert json.loads(run.read_text())["started"]["wall"] >= gone + 0.8, "the driver takes a second to give it back"
    (past,) = [json.loads(path.with_name("exit.json").read_text()) for path in ended_records(box)]
    assert past["exit_code"] == -signal.SIGKILL


FREEZER = Path("/sys/fs/cgroup/freezer")
"""Of version 1: who is frozen there dies only once thawed, as one that the kernel waits for (state D)."""


def is_killed(pid: int) -> bool:
    """Whether SIGKILL waits for it to be able to die (ShdPnd and SigPnd of proc_pid_status(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = [int(line.split()[1], 16) for line in lines if line.startswith(("ShdPnd:", "SigPnd:"))]
    return any(mask & 1 << signal.SIGKILL - 1 for mask in pending)


@pytest.fixture
def freezer() -> Iterator[Path]:
    if not os.access(FREEZER / "cgroup.procs", os.W_OK):
        pytest.skip("no freezer of cgroup version 1 is mounted writable: nothing else makes a process that cannot die")
    folder = FREEZER / f"undying-{os.getpid()}"
    folder.mkdir()
    yield folder
    (folder / "freezer.state").write_text("THAWED")
    wait_for(lambda: not (folder / "cgroup.procs").read_text(), "who was frozen has ended")
    folder.rmdir()


def test_one_that_does_not_die_quarantines_its_gpu_alone_until_it_is_gone_and_the_gpu_reset(
    box: Box, freezer: Path
) -> None:
    box.node = "2x80GiB"
    box.endpoint("stuck", gpus=[0], stop={"drain": "0s", "grace": "200ms"})
    box.endpoint("other", gpus=[1])
    box.write()
    box.start()
    pids = {name: one["pid"] for name, one in box.wait_healthy().items()}
    (freezer / "cgroup.procs").write_text(str(pids["stuck"]))
    (freezer / "freezer.state").write_text("FROZEN")
    # that it was killed a minute ago already saves this test the minute; the first such record stands
    (record,) = [p for p in (box.state / "run").glob("*/run.json") if json.loads(p.read_text())["pid"] == pids["stuck"]]
    ago = {"mono": time.clock_gettime(time.CLOCK_BOOTTIME) - 61, "wall": time.time() - 61}
    record.with_name("undying.json").write_text(json.dumps({"since": ago}))
    box.spec["endpoints"]["stuck"]["state"] = "stopped"
    box.write()
    wait_for(lambda: is_killed(pids["stuck"]), "SIGKILL is sent")
    os.kill(pids["other"], signal.SIGKILL)

    def quarantined() -> bool:
        return [gpu["state"] for gpu in box.status()["gpus"]] == ["quarantined", "ok"]

    wait_for(quarantined, "its GPU is given up")
    assert "GpuQuarantined" in {incident["kind"] for incident in box.status()["incidents"]}
    wait_for(lambda: box.endpoints()["other"]["state"] == "healthy", "the other one is replaced")
    assert box.endpoints()["other"]["pid"] != pids["other"]
    box.run("reset", "0")
    wait_for(quarantined, "a reset changes nothing as long as it lives")
    (freezer / "freezer.state").write_text("THAWED")
    wait_for(lambda: is_gone(pids["stuck"]), "it dies at last")
    wait_for(lambda: len(list((box.state / "run").iterdir())) == 1, "its records are put away")
    assert quarantined()
    box.spec["endpoints"]["stuck"]["state"] = "running"
    box.write()
    box.run("reset", "0")
    assert box.wait_healthy()["stuck"]["gpus"] == [0]


def test_of_past_starts_as_many_are_kept_as_the_file_says_and_of_each_as_much(box: Box) -> None:
    box.spec["endpoints"]["talks"] = {
        "engine": "custom",
        "command": ["sh", "-c", "yes | head -c 5000000; exit 1"],
        "gpus": 0,
        "logs": {"max": "1MiB", "keep": 2},
        "restart": {"initial": "0s", "max_restarts": 3},
    }
    box.write()
    box.start()
    wait_for(lambda: box.endpoints()["talks"]["state"] == "failed", "it is given up")
    wait_for(lambda: not list((box.state / "run").iterdir()), "its last start is put away")
    assert len(ended_records(box)) == 2
    logs = list((box.state / "logs").iterdir())
    assert len(logs) == 2
    assert all(log.stat().st_size == 5_000_000 for log in logs)
    assert all(log.stat().st_blocks * 512 <= (1 << 20) * 5 // 4 + (128 << 10) for log in logs)
