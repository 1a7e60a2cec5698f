"""Who is a member: descent while the shim lives, evidence once it is dead; strangers never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from msgspec.structs import replace
from nursery import Nursery, is_running, program, until

from reconciler import census
from reconciler.census import MARKER, members
from reconciler.identity import read_stat

UNMARKED_CHILD = program("""
if os.fork() == 0:
    os.execve(sys.executable, [sys.executable, '-I', '-S', '-c',
        "import os, signal; os.write(1, b'ready'); signal.pause()"], {})
signal.pause()
""")


def kill_shim(nursery: Nursery, incarnation: str) -> None:
    shim = nursery.run_record(incarnation).shim_pid
    os.kill(shim, signal.SIGKILL)
    until(lambda: not is_running(shim))


def test_zombies_are_no_members(nursery: Nursery) -> None:
    incarnation = nursery.started(
        program("""
if os.fork() == 0: os._exit(0)
os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
say('ready')
signal.pause()
""")
    )
    leader = nursery.run_record(incarnation).pid
    assert nursery.members(incarnation) == {leader}


def test_children_of_threads_are_members(nursery: Nursery) -> None:
    incarnation = nursery.started(
        program("""
import _thread
def work():
    if os.fork() == 0:
        say('ready')
        signal.pause()
    time.sleep(1000)
_thread.start_new_thread(work, ())
signal.pause()
""")
    )
    assert len(nursery.members(incarnation)) == 2


def test_an_unmarked_child_is_found_by_the_session_of_a_living_leader(nursery: Nursery) -> None:
    incarnation = nursery.started(UNMARKED_CHILD)
    before = nursery.members(incarnation)
    assert len(before) == 2
    kill_shim(nursery, incarnation)
    assert nursery.members(incarnation) == before


def test_an_unmarked_orphan_of_shim_and_leader_is_left_alone_rather_than_guessed_at(nursery: Nursery) -> None:
    incarnation = nursery.started(UNMARKED_CHILD)
    run = nursery.run_record(incarnation)
    (orphan,) = nursery.members(incarnation) - {run.pid}
    try:
        kill_shim(nursery, incarnation)
        os.kill(run.pid, signal.SIGKILL)
        until(lambda: not is_running(run.pid))
        # a zombie leader still holds its number, so the session is still its own; once it is reaped, nobody can tell
        assert nursery.members(incarnation) == {orphan} or read_stat(run.pid) is None
        gone = replace(run, pid=run.pid, start_ticks=run.start_ticks - 1)
        assert nursery.members_of("another", gone) == set()
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_marked_process_older_than_the_leader_is_a_stranger(nursery: Nursery) -> None:
    """So is one in a session of the recorded number whose leader is another process: the number was used again."""
    other = subprocess.Popen(("sleep", "600"), start_new_session=True, env={MARKER: "me", "PATH": os.environ["PATH"]})
    try:
        until(lambda: b"sleep" in open(f"/proc/{other.pid}/cmdline", "rb").read())  # noqa: SIM115, PTH123
        stat = read_stat(other.pid)
        assert stat is not None

        def found(incarnation: str, *, leader_ticks: int) -> set[int]:
            run = {"pid": other.pid, "session_id": other.pid, "shim_pid": other.pid, "shim_start_ticks": 1}
            return {s.pid for s in members(incarnation=incarnation, start_ticks=leader_ticks, **run)}

        assert found("me", leader_ticks=stat.start_ticks + 1) == set()
        assert found("another", leader_ticks=stat.start_ticks - 1) == set()
        assert found("me", leader_ticks=stat.start_ticks - 1) == {other.pid}, "later and marked: evidence enough"
    finally:
        other.kill()
        other.wait()


def test_a_kernel_that_lists_no_children_changes_nothing(
    nursery: Nursery, tree_with_setsid_grandchild: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = nursery.members(tree_with_setsid_grandchild)
    assert len(expected) == 3
    exists = census.Path.exists
    monkeypatch.setattr(census.Path, "exists", lambda path: "/children" not in str(path) and exists(path))
    monkeypatch.setattr("reconciler.identity.children", lambda pid: ())
    assert nursery.members(tree_with_setsid_grandchild) == expected


def test_an_unreadable_process_table_is_unknown_and_not_empty(
    nursery: Nursery, obedient_process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(census, "is_alive", lambda *_: refuse(0))
    with pytest.raises(OSError, match="Input/output"):
        nursery.members(obedient_process)


def test_the_census_does_not_count_its_own_process(nursery: Nursery) -> None:
    """A daemon started below an incarnation inherits that one's marker."""
    source = (
        "import os\nfrom reconciler.census import members\n"
        "print(members(incarnation='me', pid=2, start_ticks=0, session_id=2, shim_pid=2, shim_start_ticks=1))"
    )
    result = subprocess.run(
        (sys.executable, "-c", source), env={**os.environ, MARKER: "me"}, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "()"
