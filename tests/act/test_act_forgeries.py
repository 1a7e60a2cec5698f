"""Records that lie: forged, stale, torn, or another's. Nobody is signalled who is not proven ours."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace
from nursery import BRIEF, IGNORING_SIGTERM, OBEDIENT, Nursery, is_running, program, until

from reconciler.act import claims
from reconciler.act.claims import contradiction
from reconciler.clock import SystemClock
from reconciler.errors import NotOurs
from reconciler.identity import boot_id, read_stat
from reconciler.journal.codec import encode
from reconciler.journal.incarnations import Intent, Run, Unreadable, log_path, new_id, write_intent

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")


def own_record(pid: int, /, **changes: object) -> Run:
    """What a shim would have recorded of a living leader; its own shim is long gone."""
    stat = read_stat(pid)
    assert stat is not None
    truth = Run(
        pid=pid, start_ticks=stat.start_ticks, boot_id=boot_id(), session_id=pid, shim_pid=4_000_000,
        shim_start_ticks=1, pid_namespace=Path("/proc/self/ns/pid").stat().st_ino, at=SystemClock().now(),
    )  # fmt: skip
    return replace(truth, **changes)  # type: ignore[arg-type]


def forged(nursery: Nursery, run: Run | str | bytes) -> str:
    """An incarnation with a sound intent and this run record."""
    launch = nursery.launch(OBEDIENT, name="forged")
    subject = launch.subject
    write_intent(
        nursery.state,
        Intent(
            id=launch.incarnation, kind=subject.kind, name=subject.name, process_hash="hash", gpus=(), memory_bytes=(),
            exclusive=True, port=None, attempt=0, argv=OBEDIENT, started=SystemClock().now(), boot_id=boot_id(),
            log=str(log_path(nursery.state, subject.kind, subject.name, launch.incarnation)),
        ),
    )  # fmt: skip
    content = encode(run) if isinstance(run, Run) else run
    path = nursery.state.run / launch.incarnation / "run.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return launch.incarnation


def intent_of(nursery: Nursery, incarnation: str) -> Intent:
    found = nursery.records(incarnation).intent
    assert isinstance(found, Intent), found
    return found


def end(nursery: Nursery, incarnation: str, *, refused: bool) -> None:
    """Both ways of ending, each refused or finding nothing that lives."""
    for ending in (nursery.actor().ensure_killed, lambda i: nursery.actor().ensure_stopped(i, BRIEF)):
        if refused:
            with pytest.raises(NotOurs):
                nursery.run(ending(incarnation))
        else:
            nursery.run(ending(incarnation))
    assert nursery.records(incarnation).stop is None, "a stop was recorded, which a signal would have followed"


# ---------------------------------------------------------------- numbers that are no process of ours


@pytest.mark.parametrize("pid", [1, 0, -1, -2, 2**22 + 1, 2**31 - 1, 2**31, 2**63, 2**200])
@pytest.mark.parametrize("field", ["pid", "shim_pid", "session_id"])
def test_a_number_that_no_process_of_ours_can_have_is_an_unreadable_record(
    nursery: Nursery, field: str, pid: int
) -> None:
    run = own_record(os.getpid(), pid=4_000_001, session_id=4_000_001)
    incarnation = forged(nursery, encode(replace(run, **{field: pid})))
    assert isinstance(nursery.records(incarnation).run, Unreadable)
    end(nursery, incarnation, refused=True)


@pytest.mark.parametrize(("boot", "refused"), [(boot_id(), True), ("0123456789ab", False)])
def test_an_intent_that_is_torn_is_refused_unless_its_id_is_of_another_boot(
    nursery: Nursery, boot: str, refused: bool
) -> None:
    """Of another boot nothing lives: a power cut left it so, and nobody has to wait for a person to look at it."""
    folder = nursery.state.run / new_id(boot)
    folder.mkdir()
    for left in ("", '{"at": {"wa'):
        (folder / "intent.json").write_text(left)
        end(nursery, folder.name, refused=refused)


def test_a_record_that_names_the_daemon_itself_is_refused(nursery: Nursery) -> None:
    """In a child that stands for the daemon: it would be the one to be killed."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.setsid()
            for run in (own_record(os.getpid()), _with_shim(os.getpid())):
                end(nursery, forged(nursery, run), refused=True)
            os.write(tell, b"alive")
        os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as answer:
        assert answer.read() == b"alive"
    assert os.waitpid(child, 0)[1] == 0


def _with_shim(pid: int) -> Run:
    stat = read_stat(pid)
    assert stat is not None
    return own_record(
        pid, pid=4_000_001, session_id=4_000_001, start_ticks=1, shim_pid=pid, shim_start_ticks=stat.start_ticks
    )


# ---------------------------------------------------------------- processes of others


@pytest.fixture
def another(nursery: Nursery) -> Iterator[Run]:
    """An incarnation of ours that has nothing to do with the forged one; it lives on."""
    run = nursery.run_record(nursery.started(IGNORING_SIGTERM, name="another"))
    yield run
    assert is_running(run.pid)
    assert is_running(run.shim_pid)


def test_a_record_that_names_the_shim_of_another_as_its_leader_is_refused(nursery: Nursery, another: Run) -> None:
    end(nursery, forged(nursery, own_record(another.shim_pid)), refused=True)


def test_a_record_that_names_the_shim_of_another_as_its_shim_is_refused(nursery: Nursery, another: Run) -> None:
    """Everything below a shim is taken for its incarnation's."""
    end(nursery, forged(nursery, _with_shim(another.shim_pid)), refused=True)


def test_a_record_that_names_the_leader_of_another_is_refused(nursery: Nursery, another: Run) -> None:
    end(nursery, forged(nursery, own_record(another.pid)), refused=True)
    copied = replace(another)
    end(nursery, forged(nursery, copied), refused=True)


def test_a_record_that_names_a_stranger_to_the_tick_and_no_living_shim_is_refused(nursery: Nursery) -> None:
    with subprocess.Popen(("sleep", "600"), start_new_session=True) as stranger:
        try:
            incarnation = forged(nursery, own_record(stranger.pid))
            end(nursery, incarnation, refused=True)
            assert stranger.poll() is None
        finally:
            stranger.kill()


@pytest.mark.parametrize("proof", ["mark", "log"])
def test_a_leader_whose_shim_was_killed_is_ended_by_its_mark_or_by_its_log(nursery: Nursery, proof: str) -> None:
    to_null = "import os; os.dup2(0, 1); os.dup2(0, 2); signal.pause()"
    argv = program(to_null) if proof == "mark" else ("env", "-i", *OBEDIENT)
    incarnation = nursery.started(argv, ready=proof == "log")
    run = nursery.run_record(incarnation)
    if proof == "mark":
        until(lambda: str(Path(f"/proc/{run.pid}/fd/1").readlink()) == "/dev/null", "its output to be elsewhere")
    else:
        assert not nursery.marked(incarnation) & {run.pid}
    os.kill(run.shim_pid, signal.SIGKILL)
    until(lambda: not is_running(run.shim_pid), "its end")
    nursery.run(nursery.actor().ensure_stopped(incarnation, BRIEF))
    assert not is_running(run.pid)


def test_a_leader_that_is_no_child_of_its_true_shim_is_refused(nursery: Nursery, another: Run) -> None:
    incarnation = nursery.started(OBEDIENT)
    truth = nursery.run_record(incarnation)
    record = nursery.state.run / incarnation / "run.json"
    false = replace(truth, pid=another.pid, start_ticks=another.start_ticks, session_id=another.session_id)
    record.write_text(encode(false))
    end(nursery, incarnation, refused=True)
    assert is_running(truth.pid)
    record.write_text(encode(truth))


def test_a_leader_whose_shim_was_killed_is_its_own_whoever_else_is_recorded(nursery: Nursery, another: Run) -> None:
    incarnation = nursery.started(OBEDIENT)
    (nursery.state.run / "torn").mkdir()
    (nursery.state.run / "torn" / "run.json").write_text('{"pid"')
    run = nursery.run_record(incarnation)
    os.kill(run.shim_pid, signal.SIGKILL)
    until(lambda: not is_running(run.shim_pid), "its end")
    assert is_running(run.pid)
    intent = intent_of(nursery, incarnation)
    assert contradiction(nursery.state, intent, run) is None
    (nursery.state.run / "torn" / "run.json").write_text(encode(run))
    assert contradiction(nursery.state, intent, run) == f"pid {run.pid} is also in the record of torn"
    shutil.rmtree(nursery.state.run / "torn")


def test_a_living_shim_whose_records_were_moved_away_is_that_of_no_record(nursery: Nursery) -> None:
    incarnation = nursery.started(OBEDIENT)
    run = nursery.run_record(incarnation)
    folder = nursery.state.run / incarnation
    intent = intent_of(nursery, incarnation)
    assert contradiction(nursery.state, intent, run) is None
    folder.rename(nursery.state.run / "moved")
    assert contradiction(nursery.state, intent, run) == f"pid {run.shim_pid} is not its shim"
    (nursery.state.run / "moved").rename(folder)


def test_a_record_whose_session_is_not_its_leaders_is_refused(nursery: Nursery, another: Run) -> None:
    """A sweep without a shim takes the session for the tree."""
    end(nursery, forged(nursery, own_record(os.getpid(), session_id=another.session_id)), refused=True)


# ---------------------------------------------------------------- files of others


def test_a_record_behind_a_link_is_refused(nursery: Nursery, tmp_path: Path) -> None:
    incarnation = nursery.started(OBEDIENT)
    path = nursery.state.run / incarnation / "run.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    end(nursery, incarnation, refused=True)
    path.unlink()
    (tmp_path / "elsewhere.json").rename(path)
    assert is_running(nursery.run_record(incarnation).pid)


@needs_root
@pytest.mark.parametrize("name", ["intent.json", "run.json"])
def test_a_record_of_another_user_is_refused(nursery: Nursery, name: str) -> None:
    incarnation = nursery.started(OBEDIENT)
    path = nursery.state.run / incarnation / name
    os.chown(path, 12345, -1)
    end(nursery, incarnation, refused=True)
    os.chown(path, 0, -1)
    assert is_running(nursery.run_record(incarnation).pid)


def test_a_record_that_is_a_pipe_is_refused_and_not_waited_for(nursery: Nursery) -> None:
    incarnation = forged(nursery, "")
    path = nursery.state.run / incarnation / "run.json"
    path.unlink()
    os.mkfifo(path)
    end(nursery, incarnation, refused=True)


# ---------------------------------------------------------------- numbers that the kernel gave out again


@needs_root
def test_a_pid_that_the_kernel_gave_to_a_stranger_is_not_signalled(nursery: Nursery) -> None:
    """Really recycled: the stranger has the pid, the group and the session that the record speaks of."""
    incarnation = nursery.started(OBEDIENT)
    run = nursery.run_record(incarnation)
    for pid in (run.shim_pid, run.pid):
        os.kill(pid, signal.SIGKILL)
    until(lambda: read_stat(run.pid) is None, "the pid to be free")
    stranger = _process_with_pid(run.pid)
    try:
        assert os.getsid(stranger) == run.session_id
        end(nursery, incarnation, refused=False)
        assert is_running(stranger)
    finally:
        os.kill(stranger, signal.SIGKILL)
        os.waitpid(stranger, 0)


def _process_with_pid(wanted: int) -> int:
    """A child that leads a session and has exactly this pid."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    for _ in range(200):
        try:
            last.write_text(str(wanted - 1))
        except OSError:
            pytest.skip("the kernel does not let the next pid be chosen")
        child = os.fork()
        if child == 0:
            os.setsid()
            while True:
                signal.pause()
        if child == wanted:
            until(lambda: os.getsid(wanted) == wanted)
            return child
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    pytest.skip("other processes took the pid each time")


# ---------------------------------------------------------------- another pid namespace

INSIDE = """
import asyncio, sys
from pathlib import Path
from reconciler.act.process import Launch, ProcessActor
from reconciler.clock import SystemClock
from reconciler.identity import boot_id
from reconciler.journal.layout import StateDir
from reconciler.plan.observed import Subject

state = StateDir(Path(sys.argv[1]))
actor = ProcessActor(state, SystemClock(), boot_id())
asyncio.run(actor.ensure_started(Launch(
    incarnation="inside", subject=Subject("endpoint", "inside"), process_hash="h", gpus=(), memory_bytes=(),
    exclusive=False, port=None, attempt=0, argv=("sleep", "600"), env={"PATH": "/usr/bin:/bin"}, cwd="/",
)))
print("started", flush=True)
sys.stdin.read()
"""


@needs_root
def test_what_runs_in_a_container_is_not_taken_for_a_process_out_here(nursery: Nursery) -> None:
    """Really in a pid namespace of its own, on the same state directory; its small pids are strangers' out here."""
    words = ("unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", INSIDE, str(nursery.state.path))
    container = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert container.stdin is not None
    assert container.stdout is not None
    try:
        if container.stdout.readline() != b"started\n":
            assert container.stderr is not None
            pytest.skip(f"no pid namespace can be made here: {container.stderr.read().decode()[-200:]}")
        run = nursery.run_record("inside")
        assert run.pid < 100, "numbered from one"
        assert run.pid_namespace != Path("/proc/self/ns/pid").stat().st_ino
        end(nursery, "inside", refused=True)
        # even where number and start are those of a process out here, which may happen by chance
        mine = subprocess.Popen(("sleep", "600"), start_new_session=True)
        stat = read_stat(mine.pid)
        assert stat is not None
        path = nursery.state.run / "inside" / "run.json"
        record = json.loads(path.read_text())
        record |= {"pid": mine.pid, "start_ticks": stat.start_ticks, "session_id": mine.pid}
        path.write_text(json.dumps(record))
        end(nursery, "inside", refused=True)
        assert mine.poll() is None
        mine.kill()
        mine.wait()
    finally:
        container.stdin.close()
        container.wait(30)
    # it went down, and its lock with it: nothing of it lives, and there is nothing to refuse
    deadline = time.monotonic() + 10
    while True:
        try:
            nursery.run(nursery.actor().ensure_killed("inside"))
            break
        except NotOurs:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize(("lasts_s", "patience_s", "speaks_against_it"), [(0.2, 60.0, False), (60.0, 0.1, True)])
def test_a_shim_that_has_let_go_of_everything_is_waited_for_and_no_longer_than_a_moment(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, lasts_s: float, patience_s: float, speaks_against_it: bool
) -> None:
    """As it is for some milliseconds of every end: the kernel has closed what a process had, and it is still there."""
    incarnation = nursery.started(OBEDIENT)
    run, nobody = nursery.run_record(incarnation), replace(intent_of(nursery, incarnation), id="nobody")
    monkeypatch.setattr(claims, "_ENDING_S", patience_s)
    source = f"import os, time; os.closerange(0, 1 << 10); time.sleep({lasts_s}); os._exit(0)"
    with subprocess.Popen([sys.executable, "-c", source]) as ending:
        try:
            stat = read_stat(ending.pid)
            assert stat is not None
            with suppress(OSError):  # it is gone already, which is as well
                while list(Path(f"/proc/{ending.pid}/fd").iterdir()):
                    time.sleep(0.005)
            claimed = replace(run, pid=1 << 22, shim_pid=ending.pid, shim_start_ticks=stat.start_ticks)
            doubt = contradiction(nursery.state, nobody, claimed)
            assert doubt == (f"pid {ending.pid} is not its shim" if speaks_against_it else None)
        finally:
            ending.kill()
