"""The folder of the node, and the ledger in it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from simulated_box import GIB, Box, small_node, until

from reconciler import identity
from reconciler.errors import ActError, StateError, UsageError
from reconciler.sim import faults
from reconciler.sim.engine.box import Node
from reconciler.sim.ledger import Ledger
from reconciler.sim.node import load, prepare
from reconciler.sim.report import report
from reconciler.sim.tenant import hold


def process_that_waits() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def enter(box: Box, index: int, pid: int, size: int) -> str:
    """Write as any program may: by hand, with the pid and start ticks in the name."""
    stat = identity.read_stat(pid)
    assert stat is not None
    name = f"{pid}-{stat.start_ticks}"
    (box.sim_dir / "gpus" / str(index) / name).write_text(f" {size}\n")
    return name


def test_a_prepared_node_is_read_back_as_it_was_and_preparing_it_again_changes_nothing(box: Box) -> None:
    before = {path: path.stat().st_mtime_ns for path in box.sim_dir.rglob("*")}
    prepare(box.sim_dir, box.node)
    assert load(box.sim_dir) == box.node
    assert {path: path.stat().st_mtime_ns for path in box.sim_dir.rglob("*")} == before
    assert (box.sim_dir / "gpus" / "0").stat().st_mode & 0o777 == 0o700


def test_another_node_is_refused_while_a_process_holds_memory_and_taken_afterwards(box: Box) -> None:
    other = small_node(1)
    with process_that_waits() as process:
        enter(box, 1, process.pid, GIB)
        with pytest.raises(StateError, match=str(process.pid)):
            prepare(box.sim_dir, other)
        assert load(box.sim_dir) == box.node
        process.communicate()
    prepare(box.sim_dir, other)
    assert load(box.sim_dir) == other
    assert Ledger(box.sim_dir, 0).indices() == (0,)


def test_a_folder_without_a_node_says_so(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no simulated node"):
        load(tmp_path)
    (tmp_path / "node.json").write_text("{}")
    with pytest.raises(StateError, match="not the description"):
        load(tmp_path)


def test_memory_of_a_dead_process_comes_back_after_the_delay_and_not_before(box: Box) -> None:
    with process_that_waits() as process:
        name = enter(box, 0, process.pid, 3 * GIB)
        assert [(a.memory_bytes, a.alive) for a in box.ledger.allocations(0)] == [(3 * GIB, True)]
        process.communicate()
    seen = time.monotonic()
    assert [(a.memory_bytes, a.alive) for a in box.ledger.allocations(0)] == [(3 * GIB, False)]
    until(lambda: not box.used(0))
    assert time.monotonic() - seen > 0.15
    assert not (box.sim_dir / "gpus" / "0" / name).exists()
    assert not (box.sim_dir / "dying" / "0" / name).exists()


def test_a_zombie_holds_nothing(box: Box) -> None:
    process = process_that_waits()
    enter(box, 0, process.pid, GIB)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
    assert [a.alive for a in box.ledger.allocations(0)] == [False]
    until(lambda: not box.used(0))
    process.wait()


def test_an_entry_with_the_pid_but_not_the_start_of_a_living_process_is_dead(box: Box) -> None:
    (box.sim_dir / "gpus" / "0" / f"{os.getpid()}-1").write_text("5")
    assert [a.alive for a in box.ledger.allocations(0)] == [False]


def test_what_is_no_entry_is_passed_over(box: Box) -> None:
    folder = box.sim_dir / "gpus" / "0"
    for name, content in (
        ("notes.txt", b"x"),
        ("1-x", b"1"),
        ("2-2", b"much"),
        ("3-3", b""),
        ("4-4", b"\xff"),
        (".5-5", b"1"),
    ):
        (folder / name).write_bytes(content)
    (folder / "6-6").mkdir()
    assert box.ledger.allocations(0) == ()
    assert box.ledger.allocations(7) == ()


def test_a_claim_replaces_ones_own_and_is_refused_when_it_does_not_fit(box: Box) -> None:
    ledger = box.ledger
    ledger.claim(0, 20 * GIB, limit_bytes=24 * GIB)
    mine = ledger.claim(0, 24 * GIB, limit_bytes=24 * GIB)
    with process_that_waits() as process:
        enter(box, 1, process.pid, 10 * GIB)
        with pytest.raises(ActError, match="GPU 1 has 14GiB free, 20GiB wanted"):
            ledger.claim(1, 20 * GIB, limit_bytes=24 * GIB)
        process.communicate()
    ledger.remove(0, mine.pid, mine.start_ticks)
    assert ledger.used_bytes(0) == 0


def test_the_engines_own_reader_sees_what_the_ledger_sees(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONCILER_SIM_DIR", str(box.sim_dir))
    engine = Node()
    with process_that_waits() as process:
        name = enter(box, 0, process.pid, 7 * GIB)
        (box.sim_dir / "gpus" / "0" / "junk").write_text("1")
        (box.sim_dir / "gpus" / "0" / "9-9").write_text("junk")
        assert engine.others(0) == box.used(0) == 7 * GIB
        process.communicate()
    # the engine is the first to see it dead, and its note counts for the ledger, too
    assert engine.others(0) == 7 * GIB
    assert (box.sim_dir / "dying" / "0" / name).exists()
    assert box.used(0) == 7 * GIB
    until(lambda: not engine.others(0))
    assert not (box.sim_dir / "gpus" / "0" / name).exists()
    assert box.used(0) == 0


def test_a_tenant_holds_its_memory_until_it_is_killed(box: Box) -> None:
    tenant = box.tenant(1, 6 * GIB)
    held = report(box.sim_dir).gpus[1]
    assert (held.used_bytes, [h.pid for h in held.holdings]) == (6 * GIB, [tenant.pid])
    assert "reconciler.sim.tenant" in (held.holdings[0].command or "")
    tenant.kill()
    tenant.wait()
    assert [h.alive for h in report(box.sim_dir).gpus[1].holdings] == [False]
    until(lambda: not report(box.sim_dir).gpus[1].holdings)


def test_a_tenant_that_does_not_fit_or_names_no_gpu_is_refused(box: Box) -> None:
    with pytest.raises(ActError, match="24GiB free, 25GiB wanted"):
        hold(box.sim_dir, 0, 25 * GIB, 0)
    with pytest.raises(UsageError, match="no GPU 2"):
        hold(box.sim_dir, 2, GIB, 0)


def test_a_tenant_may_go_by_itself(box: Box) -> None:
    seen: list[int] = []
    hold(box.sim_dir, 0, GIB, 0.01, held=lambda _: seen.append(box.used(0)))
    assert seen == [GIB]


def test_faults_add_up_and_are_mended_one_gpu_at_a_time(box: Box) -> None:
    faults.break_gpu(box.sim_dir, 0, "lost")
    faults.break_gpu(box.sim_dir, 0, "hang", seconds=2.5)
    faults.break_gpu(box.sim_dir, 1, "remap_pending")
    faults.unload_driver(box.sim_dir)
    seen = report(box.sim_dir)
    assert [gpu.faults for gpu in seen.gpus] == [("lost", "hang 2.5s"), ("remap_pending",)]
    assert not seen.driver_loaded
    faults.mend(box.sim_dir, 0)
    assert [gpu.faults for gpu in report(box.sim_dir).gpus] == [(), ("remap_pending",)]
    assert faults.read(box.sim_dir).no_driver
    faults.mend(box.sim_dir)
    assert faults.read(box.sim_dir) == faults.Faults()
    with pytest.raises(UsageError, match="tired"):
        faults.break_gpu(box.sim_dir, 0, "tired")
    with pytest.raises(UsageError, match="seconds"):
        faults.break_gpu(box.sim_dir, 0, "hang")


def test_a_fault_that_somebody_wrote_as_1_is_one(box: Box) -> None:
    (box.sim_dir / "faults.json").write_text('{"gpus": {"0": {"lost": 1, "hang": 3}}}')
    seen = report(box.sim_dir)
    assert seen.gpus[0].faults == ("lost", "hang 3s")
    assert seen.faults_problem is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"gpus": {"0": {"lost"', "truncated"),
        ('{"gpus": {"0": {"losst": true}}}', "losst"),
        ('{"gpus": {"0": {"lost": "perhaps"}}}', "gpus"),
        ('{"gpus": {"0": {"hang": -1}}}', "hang"),
    ],
)
def test_a_file_of_faults_that_cannot_be_read_is_told_of_and_not_written_over(box: Box, text: str, why: str) -> None:
    written = box.sim_dir / "faults.json"
    written.write_text(text)
    told = report(box.sim_dir).faults_problem
    assert told is not None
    assert told.startswith(f"{written}: ")
    assert why in told
    assert faults.read(box.sim_dir) == faults.Faults()
    for change in (
        lambda: faults.break_gpu(box.sim_dir, 1, "lost"),
        lambda: faults.unload_driver(box.sim_dir),
        lambda: faults.mend(box.sim_dir, 0),
    ):
        with pytest.raises(StateError, match=why):
            change()
    assert written.read_text() == text
    faults.mend(box.sim_dir)
    assert report(box.sim_dir).faults_problem is None
