"""Ending: one signal, grace, everything gone; and never a signal to a stranger."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from nursery import (
    BRIEF,
    COUNTING_SIGTERMS,
    DEADLINE_S,
    IGNORING_SIGTERM,
    LEAVING_A_DOUBLE_FORKED_DAEMON,
    OBEDIENT,
    PATIENT,
    Nursery,
    is_running,
    until,
)

from reconciler import identity
from reconciler.act import target
from reconciler.clock import Instant, SystemClock
from reconciler.errors import ActError, NotOurs
from reconciler.identity import boot_id, read_stat
from reconciler.journal.archive import archive
from reconciler.journal.codec import encode
from reconciler.journal.incarnations import (
    Intent,
    Run,
    StopRecord,
    Unreadable,
    lock_path,
    log_path,
    write_intent,
    write_stop,
)
from reconciler.journal.layout import is_locked, take_lock
from reconciler.observe.process import ProcessReader
from reconciler.plan.observed import Incarnation
from reconciler.spec.spec import Stop

# ---------------------------------------------------------------- with control groups, and where none can be had


@pytest.fixture(params=["grouped", "ungrouped"])
def groups_in(request: pytest.FixtureRequest) -> str | None:
    return request.getfixturevalue("control_groups") if request.param == "grouped" else None


# ---------------------------------------------------------------- who is asked to end, ends


def gone(nursery: Nursery, incarnation: str) -> bool:
    return not nursery.members(incarnation) and not nursery.marked(incarnation)


def test_a_polite_process_ends_by_its_signal_long_before_its_grace(nursery: Nursery, obedient_process: str) -> None:
    begin = time.monotonic()
    nursery.run(nursery.actor().ensure_stopped(obedient_process, PATIENT))
    assert time.monotonic() - begin < PATIENT.grace_s / 2
    assert nursery.exit_code(obedient_process) == -signal.SIGTERM
    assert gone(nursery, obedient_process)
    assert not is_locked(lock_path(nursery.state, "endpoint", "thinking"))
    stop = nursery.records(obedient_process).stop
    assert isinstance(stop, StopRecord)
    assert stop.drained
    assert stop.signalled is not None


def test_the_signal_is_the_one_that_was_asked_for(nursery: Nursery, obedient_process: str) -> None:
    nursery.run(nursery.actor().ensure_stopped(obedient_process, Stop("SIGUSR1", 0, 30)))
    assert nursery.exit_code(obedient_process) == -signal.SIGUSR1


def test_an_unknown_signal_name_is_an_error_and_nothing_is_recorded(nursery: Nursery, obedient_process: str) -> None:
    with pytest.raises(ActError, match="SIGNOSUCH"):
        nursery.run(nursery.actor().ensure_stopped(obedient_process, Stop("SIGNOSUCH", 0, 30)))
    assert nursery.records(obedient_process).stop is None


def test_a_process_ignoring_sigterm_is_killed_after_its_grace_and_not_before(
    nursery: Nursery, process_ignoring_sigterm: str
) -> None:
    begin = time.monotonic()
    nursery.run(nursery.actor().ensure_stopped(process_ignoring_sigterm, BRIEF))
    assert time.monotonic() - begin >= BRIEF.grace_s
    assert nursery.exit_code(process_ignoring_sigterm) == -signal.SIGKILL
    assert gone(nursery, process_ignoring_sigterm)


def test_a_stopped_process_dies(nursery: Nursery, stopped_process: str) -> None:
    nursery.run(nursery.actor().ensure_stopped(stopped_process, BRIEF))
    assert nursery.exit_code(stopped_process) == -signal.SIGKILL


def test_a_stopped_child_of_a_polite_leader_dies(nursery: Nursery, tree_with_setsid_grandchild: str) -> None:
    leader = nursery.run_record(tree_with_setsid_grandchild).pid
    others = nursery.members(tree_with_setsid_grandchild) - {leader}
    assert len(others) == 2
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    nursery.run(nursery.actor().ensure_stopped(tree_with_setsid_grandchild, PATIENT))
    assert not [pid for pid in others if is_running(pid)]


def test_a_setsid_grandchild_that_ignores_sigterm_is_gone_too(
    nursery: Nursery, tree_with_setsid_grandchild: str
) -> None:
    assert len(nursery.members(tree_with_setsid_grandchild)) == 3
    nursery.run(nursery.actor().ensure_stopped(tree_with_setsid_grandchild, PATIENT))
    assert gone(nursery, tree_with_setsid_grandchild)
    assert nursery.exit_code(tree_with_setsid_grandchild) == -signal.SIGTERM


def test_a_double_forked_daemon_is_gone_too(nursery: Nursery, double_forked_daemon: str) -> None:
    assert len(nursery.members(double_forked_daemon)) == 2
    nursery.run(nursery.actor().ensure_stopped(double_forked_daemon, PATIENT))
    assert gone(nursery, double_forked_daemon)
    assert nursery.exit_code(double_forked_daemon) == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT, errno.ESRCH])
def test_a_number_that_lives_on_as_that_of_a_session_alone_is_no_process_whatever_the_kernel_calls_it(
    nursery: Nursery, root_killed_tree: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Before Linux 6.15 pidfd_open says EINVAL of it, and the rest of the tree would live on for ever."""
    leader, pidfd_open = nursery.run_record(root_killed_tree).pid, os.pidfd_open

    def as_that_kernel(pid: int) -> int:
        if pid == leader:
            raise OSError(number, os.strerror(number))
        return pidfd_open(pid)

    monkeypatch.setattr(identity.os, "pidfd_open", as_that_kernel)
    nursery.run(nursery.actor().ensure_killed(root_killed_tree))
    assert gone(nursery, root_killed_tree)


def test_the_number_of_a_thread_is_no_process_and_of_no_process_nothing_is_claimed() -> None:
    ends = threading.Event()
    thread = threading.Thread(target=ends.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        found = read_stat(thread.native_id)
        assert found is not None
        assert identity.open_pidfd(thread.native_id, found.start_ticks) is None
    finally:
        ends.set()
        thread.join()
    with pytest.raises(OSError, match="Invalid argument"):
        identity.open_pidfd(-1, 0)


def test_a_tree_whose_root_was_killed_is_cleared_at_once(nursery: Nursery, root_killed_tree: str) -> None:
    assert len(nursery.members(root_killed_tree)) == 2
    nursery.run(nursery.actor().ensure_stopped(root_killed_tree, PATIENT))
    assert gone(nursery, root_killed_tree)
    assert nursery.records(root_killed_tree).stop is None, "its end was not asked for, and is not to look so"


def test_a_tree_that_forks_without_end_is_outrun(nursery: Nursery, tree_forking_without_end: str) -> None:
    nursery.run(nursery.actor().ensure_killed(tree_forking_without_end))
    assert gone(nursery, tree_forking_without_end)


def test_without_group_kill_the_members_are_killed_one_by_one(
    nursery: Nursery, tree_with_setsid_grandchild: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on kernels before 6.9, which answer EINVAL to an unknown flag."""
    monkeypatch.setattr(target, "_PROCESS_GROUP", 1 << 30)
    nursery.run(nursery.actor().ensure_killed(tree_with_setsid_grandchild))
    assert gone(nursery, tree_with_setsid_grandchild)


def test_killing_asks_nobody(nursery: Nursery, process_counting_sigterms: str) -> None:
    nursery.run(nursery.actor().ensure_killed(process_counting_sigterms))
    assert nursery.exit_code(process_counting_sigterms) == -signal.SIGKILL
    assert "term" not in nursery.log(process_counting_sigterms)
    stop = nursery.records(process_counting_sigterms).stop
    assert isinstance(stop, StopRecord)
    assert stop.signalled is not None


def test_ending_what_has_ended_changes_nothing(nursery: Nursery, obedient_process: str) -> None:
    actor = nursery.actor()
    nursery.run(actor.ensure_stopped(obedient_process, PATIENT))
    before = nursery.records(obedient_process)
    for _ in range(2):
        nursery.run(actor.ensure_stopped(obedient_process, PATIENT))
        nursery.run(actor.ensure_killed(obedient_process))
    assert nursery.records(obedient_process) == before
    archive(nursery.state, obedient_process, keep=20)
    nursery.run(actor.ensure_stopped(obedient_process, PATIENT))
    nursery.run(actor.ensure_killed("never-was"))
    assert not (nursery.state.run / "never-was").exists()


# ---------------------------------------------------------------- one signal, however often it is asked for


def count_terms(nursery: Nursery, incarnation: str) -> int:
    return nursery.log(incarnation).count("term")


def test_an_interrupted_stop_is_resumed_by_the_next_daemon_without_a_second_signal(
    nursery: Nursery, process_counting_sigterms: str
) -> None:
    async def begin_and_abandon() -> None:
        stop = asyncio.ensure_future(nursery.actor().ensure_stopped(process_counting_sigterms, PATIENT))
        while not count_terms(nursery, process_counting_sigterms):
            await asyncio.sleep(0.005)
        stop.cancel()
        await asyncio.wait({stop})

    nursery.run(begin_and_abandon())
    first = nursery.records(process_counting_sigterms).stop
    assert isinstance(first, StopRecord)
    assert first.signalled is not None
    grace_s = SystemClock().now().since(first.signalled) + 0.4
    nursery.run(nursery.actor().ensure_stopped(process_counting_sigterms, Stop("SIGTERM", 0, grace_s)))
    assert SystemClock().now().since(first.signalled) >= grace_s, "the grace counts from the first signal"
    assert count_terms(nursery, process_counting_sigterms) == 1
    assert nursery.records(process_counting_sigterms).stop == first
    assert nursery.exit_code(process_counting_sigterms) == -signal.SIGKILL


def test_a_grace_that_is_over_when_the_next_daemon_comes_is_not_granted_again(
    nursery: Nursery, process_counting_sigterms: str
) -> None:
    long_ago = Instant(1.0, 1.0)
    write_stop(nursery.state, process_counting_sigterms, StopRecord(long_ago, drained=True, signalled=long_ago))
    nursery.run(nursery.actor().ensure_stopped(process_counting_sigterms, Stop("SIGTERM", 0, 2 * DEADLINE_S)))
    assert count_terms(nursery, process_counting_sigterms) == 0


def test_calls_at_the_same_time_signal_once_and_a_shortened_grace_takes_effect(
    nursery: Nursery, process_counting_sigterms: str
) -> None:
    async def all_at_once() -> None:
        actor = nursery.actor()
        stops = [asyncio.ensure_future(actor.ensure_stopped(process_counting_sigterms, PATIENT)) for _ in range(3)]
        while not count_terms(nursery, process_counting_sigterms):
            await asyncio.sleep(0.005)
        assert not any(stop.done() for stop in stops)
        stops[0].cancel()
        await actor.ensure_stopped(process_counting_sigterms, BRIEF)
        await asyncio.gather(*stops[1:])

    nursery.run(all_at_once())
    assert count_terms(nursery, process_counting_sigterms) == 1
    assert gone(nursery, process_counting_sigterms)


def test_an_unreadable_stop_record_counts_as_a_signal_sent(nursery: Nursery, process_counting_sigterms: str) -> None:
    (nursery.state.run / process_counting_sigterms / "stop.json").write_text('{"requested"')
    assert isinstance(nursery.records(process_counting_sigterms).stop, Unreadable)
    nursery.run(nursery.actor().ensure_stopped(process_counting_sigterms, BRIEF))
    assert count_terms(nursery, process_counting_sigterms) == 0
    assert nursery.exit_code(process_counting_sigterms) == -signal.SIGKILL


def test_a_stop_that_cannot_be_recorded_is_not_signalled(
    nursery: Nursery, process_counting_sigterms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reconciler.journal.incarnations.write_stop", disk_full)
    with pytest.raises(ActError, match="No space left"):
        nursery.run(nursery.actor().ensure_stopped(process_counting_sigterms, BRIEF))
    monkeypatch.undo()
    assert is_running(nursery.run_record(process_counting_sigterms).pid)
    nursery.run(nursery.actor().ensure_killed(process_counting_sigterms))
    assert count_terms(nursery, process_counting_sigterms) == 0


def test_a_drain_is_recorded_once_and_its_moment_survives_the_signal(nursery: Nursery, obedient_process: str) -> None:
    actor = nursery.actor()
    nursery.run(actor.ensure_drain_requested(obedient_process))
    asked = nursery.records(obedient_process).stop
    assert isinstance(asked, StopRecord)
    assert not asked.drained
    assert asked.signalled is None
    nursery.run(actor.ensure_drain_requested(obedient_process))
    assert nursery.records(obedient_process).stop == asked
    nursery.run(actor.ensure_stopped(obedient_process, PATIENT))
    ended = nursery.records(obedient_process).stop
    assert isinstance(ended, StopRecord)
    assert (ended.requested, ended.drained) == (asked.requested, True)


def test_an_abandoned_stop_leaves_no_descriptor_behind(nursery: Nursery, process_counting_sigterms: str) -> None:
    async def begin_and_abandon() -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            stop = asyncio.ensure_future(nursery.actor().ensure_stopped(process_counting_sigterms, PATIENT))
            await asyncio.sleep(0.01)
            stop.cancel()
            await asyncio.wait({stop})
        assert len(list(Path("/proc/self/fd").iterdir())) == before

    nursery.run(begin_and_abandon())


# ---------------------------------------------------------------- who does not die

FREEZER = Path("/sys/fs/cgroup/freezer")
"""Of version 1: who is frozen there dies only once thawed, as one that the kernel waits for (state D)."""


@pytest.fixture
def undying_process(nursery: Nursery) -> Iterator[tuple[str, Callable[[], None]]]:
    """An incarnation that SIGKILL does not end, and what lets it die."""
    folder = FREEZER / f"undying-{os.getpid()}"
    if not os.access(FREEZER / "cgroup.procs", os.W_OK):
        pytest.skip("no freezer of cgroup version 1 is mounted writable: nothing else makes a process that cannot die")
    folder.mkdir()
    incarnation = nursery.started(IGNORING_SIGTERM)
    (folder / "cgroup.procs").write_text(str(nursery.run_record(incarnation).pid))
    (folder / "freezer.state").write_text("FROZEN")
    until(lambda: (folder / "freezer.state").read_text() == "FROZEN\n")

    def thaw() -> None:
        (folder / "freezer.state").write_text("THAWED")

    yield incarnation, thaw
    thaw()
    nursery.run(nursery.actor().ensure_killed(incarnation))
    until(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


def test_one_that_sigkill_does_not_end_is_recorded_waited_for_and_ends_once_it_can(
    nursery: Nursery, undying_process: tuple[str, Callable[[], None]]
) -> None:
    incarnation, thaw = undying_process
    other = nursery.started(OBEDIENT, name="another")
    reader = ProcessReader(nursery.state, SystemClock())

    def seen() -> Incarnation:
        return next(i for i in reader.read() if i.id == incarnation)

    async def kill() -> None:
        stop = asyncio.ensure_future(nursery.actor().ensure_killed(incarnation))
        while nursery.records(incarnation).undying is None:
            await asyncio.sleep(0.01)
        assert not stop.done()
        assert seen().alive
        await nursery.actor().ensure_stopped(other, PATIENT)  # nobody else is held up
        twin = nursery.launch(OBEDIENT)
        with pytest.raises(ActError, match="still ending"):
            await nursery.actor().ensure_started(twin)
        stop.cancel()  # as by a daemon that ends
        await asyncio.wait({stop})
        first = nursery.records(incarnation).undying
        again = asyncio.ensure_future(nursery.actor().ensure_killed(incarnation))
        await asyncio.sleep(1.2)
        assert nursery.records(incarnation).undying == first, "the first moment stands"
        assert first is not None
        assert seen().undying_since == first.since
        thaw()
        await again

    nursery.run(kill())
    assert nursery.exit_code(incarnation) == -signal.SIGKILL
    assert not seen().alive


def test_who_ends_at_once_is_not_recorded_as_undying(nursery: Nursery, tree_with_setsid_grandchild: str) -> None:
    nursery.run(nursery.actor().ensure_killed(tree_with_setsid_grandchild))
    assert nursery.records(tree_with_setsid_grandchild).undying is None


# ---------------------------------------------------------------- without a shim


def test_a_shim_killed_alone_does_not_take_its_leader_along(nursery: Nursery, obedient_process: str) -> None:
    run = nursery.run_record(obedient_process)
    os.kill(run.shim_pid, signal.SIGKILL)
    until(lambda: not is_running(run.shim_pid))
    assert nursery.members(obedient_process) == {run.pid}
    nursery.run(nursery.actor().ensure_stopped(obedient_process, PATIENT))
    assert not is_running(run.pid)
    assert nursery.records(obedient_process).exit is None, "nobody could know its exit code"


@pytest.mark.parametrize("leader_too", [False, True], ids=["shim", "shim and leader"])
def test_strays_are_found_and_ended_after_the_shim_was_killed(
    nursery: Nursery, tree_with_setsid_grandchild: str, leader_too: bool
) -> None:
    run = nursery.run_record(tree_with_setsid_grandchild)
    everyone = nursery.members(tree_with_setsid_grandchild)
    killed = {run.shim_pid, run.pid} if leader_too else {run.shim_pid}
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(is_running(pid) for pid in killed))
    assert nursery.members(tree_with_setsid_grandchild) == everyone - killed
    nursery.run(nursery.actor().ensure_stopped(tree_with_setsid_grandchild, BRIEF))
    assert gone(nursery, tree_with_setsid_grandchild)


def test_a_stopped_shim_does_not_hold_up_the_end(
    nursery: Nursery, obedient_process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "_SHIM_END_S", 0.1)
    run = nursery.run_record(obedient_process)
    os.kill(run.shim_pid, signal.SIGSTOP)
    try:
        nursery.run(nursery.actor().ensure_stopped(obedient_process, BRIEF))
        assert not is_running(run.pid)
    finally:
        os.kill(run.shim_pid, signal.SIGCONT)
    assert nursery.exit_code(obedient_process) == -signal.SIGTERM


# ---------------------------------------------------------------- never a stranger


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own that nobody here started as an incarnation."""
    process = subprocess.Popen(("sleep", "600"), start_new_session=True)
    until(lambda: b"sleep" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
    yield process
    process.kill()
    process.wait()


Forge = Callable[[Run], Run]


def record_of(nursery: Nursery, stranger: subprocess.Popen[bytes], forge: Forge, *, boot: str | None = None) -> str:
    """The id of an incarnation whose records name the stranger, as `forge` has them; its shim is long gone."""
    launch = nursery.launch(OBEDIENT)
    subject = launch.subject
    write_intent(
        nursery.state,
        Intent(
            id=launch.incarnation, kind=subject.kind, name=subject.name, process_hash="hash", gpus=(), memory_bytes=(),
            exclusive=True, port=None, attempt=0, argv=OBEDIENT, started=SystemClock().now(), boot_id=boot or boot_id(),
            log=str(log_path(nursery.state, subject.kind, subject.name, launch.incarnation)),
        ),
    )  # fmt: skip
    stat = read_stat(stranger.pid)
    assert stat is not None
    truth = Run(
        pid=stranger.pid, start_ticks=stat.start_ticks, boot_id=boot_id(), session_id=stat.session_id,
        shim_pid=stranger.pid, shim_start_ticks=stat.start_ticks - 1, at=SystemClock().now(),
        pid_namespace=Path("/proc/self/ns/pid").stat().st_ino,
    )  # fmt: skip
    (nursery.state.run / launch.incarnation / "run.json").write_text(encode(forge(truth)))
    return launch.incarnation


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(lambda run: replace(run, start_ticks=run.start_ticks - 1), id="recycled pid"),
        pytest.param(lambda run: replace(run, start_ticks=run.start_ticks + 1), id="younger record"),
        pytest.param(lambda run: replace(run, boot_id="another"), id="another boot"),
        pytest.param(lambda run: replace(run, pid_namespace=1), id="another pid namespace"),
    ],
)
def test_a_record_that_names_a_stranger_signals_nobody(
    nursery: Nursery, stranger: subprocess.Popen[bytes], forge: Forge
) -> None:
    incarnation = record_of(nursery, stranger, forge)
    nursery.run(nursery.actor().ensure_stopped(incarnation, BRIEF))
    nursery.run(nursery.actor().ensure_killed(incarnation))
    assert stranger.poll() is None
    assert nursery.records(incarnation).stop is None


def test_an_intent_of_another_boot_signals_nobody(nursery: Nursery, stranger: subprocess.Popen[bytes]) -> None:
    incarnation = record_of(nursery, stranger, lambda run: run, boot="another")
    nursery.run(nursery.actor().ensure_killed(incarnation))
    assert stranger.poll() is None


@pytest.mark.parametrize(("told", "other"), [("namespace", {"pid_namespace": 1}), ("boot", {"boot_id": "another"})])
def test_pids_of_another_namespace_or_boot_with_a_living_shim_are_refused(
    nursery: Nursery, stranger: subprocess.Popen[bytes], told: str, other: dict[str, Any]
) -> None:
    incarnation = record_of(nursery, stranger, lambda run: replace(run, **other))
    lock = take_lock(lock_path(nursery.state, "endpoint", "thinking"))
    assert lock is not None
    try:
        with pytest.raises(NotOurs, match=told):
            nursery.run(nursery.actor().ensure_killed(incarnation))
    finally:
        os.close(lock)
    assert stranger.poll() is None


@pytest.mark.parametrize("name", ["intent.json", "run.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "null", "\xff"])
def test_a_torn_record_is_refused_and_signals_nobody(
    nursery: Nursery, obedient_process: str, name: str, text: str
) -> None:
    path = nursery.state.run / obedient_process / name
    whole = path.read_bytes()
    path.write_bytes(text.encode("latin-1"))
    for end in (nursery.actor().ensure_killed, lambda i: nursery.actor().ensure_stopped(i, BRIEF)):
        with pytest.raises(NotOurs):
            nursery.run(end(obedient_process))
    path.write_bytes(whole)
    assert is_running(nursery.run_record(obedient_process).pid)


def test_a_start_that_is_under_way_is_not_ended_blindly(nursery: Nursery, stranger: subprocess.Popen[bytes]) -> None:
    incarnation = record_of(nursery, stranger, lambda run: run)
    (nursery.state.run / incarnation / "run.json").unlink()
    lock = take_lock(lock_path(nursery.state, "endpoint", "thinking"))
    assert lock is not None
    try:
        with pytest.raises(ActError, match="still being started"):
            nursery.run(nursery.actor().ensure_killed(incarnation))
    finally:
        os.close(lock)
    nursery.run(nursery.actor().ensure_killed(incarnation))
    assert stranger.poll() is None


def test_ending_one_incarnation_leaves_the_others_alone(nursery: Nursery) -> None:
    first = nursery.started(LEAVING_A_DOUBLE_FORKED_DAEMON, name="a")
    second = nursery.started(COUNTING_SIGTERMS, name="b")
    nursery.run(nursery.actor().ensure_killed(first))
    assert gone(nursery, first)
    assert is_running(nursery.run_record(second).pid)
    assert nursery.records(second).stop is None
