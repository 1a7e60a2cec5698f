"""Starting: what is recorded, what is inherited, and what a kill at any moment leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from nursery import BRIEF, OBEDIENT, Nursery, exiting_on, in_memory, is_running, program, until
from ports import free_port

from reconciler import cgroup
from reconciler.act import process, shim
from reconciler.act.process import Launch, ProcessActor
from reconciler.clock import SystemClock
from reconciler.errors import ActError, PortInUse
from reconciler.identity import boot_id, children, read_stat
from reconciler.journal.incarnations import Exit, Intent, Run, lock_path, log_path, write_intent
from reconciler.journal.layout import is_locked
from reconciler.plan.observed import Subject

SPAWNER = """
import asyncio, json, os, sys, time
from pathlib import Path
from reconciler.act.process import Launch, ProcessActor
from reconciler.clock import SystemClock
from reconciler.identity import boot_id
from reconciler.journal.layout import StateDir
from reconciler.plan.observed import Subject
state, order = StateDir(Path(sys.argv[1])), json.loads(sys.argv[2])
launch = Launch(incarnation=order["id"], subject=Subject("endpoint", "thinking"), process_hash="hash", gpus=(),
                memory_bytes=(), exclusive=True, port=None, attempt=0, argv=tuple(order["argv"]),
                env={"PATH": os.environ["PATH"]}, cwd="/")
actor = ProcessActor(state, SystemClock(), boot_id(), groups_in=order["groups_in"])
print("go", flush=True)
if order["die"]:
    spawn = actor._spawn_shim
    actor._spawn_shim = lambda *a: (spawn(*a), os.kill(os.getpid(), 9))
if order["hang"]:
    actor._let_go = lambda: time.sleep(600)
asyncio.run(actor.ensure_started(launch))
"""


both_ways = pytest.mark.parametrize("groups_in", ["grouped", "ungrouped"], indirect=True)


def spawner(nursery: Nursery, launch: Launch, *, die: bool, hang: bool = False) -> subprocess.Popen[bytes]:
    """A daemon in a process of its own that starts `launch`.

    With `die` it kills itself as soon as the shim exists, with `hang` it hangs in that turn of its event loop.
    """
    how = {"die": die, "hang": hang, "groups_in": nursery.groups_in}
    order = json.dumps({"id": launch.incarnation, "argv": launch.argv, **how})
    return subprocess.Popen([sys.executable, "-c", SPAWNER, str(nursery.state.path), order], stdout=subprocess.PIPE)


def test_intent_and_run_records_say_who_runs_and_for_what(nursery: Nursery, tmp_path: Path) -> None:
    incarnation = nursery.started(OBEDIENT, cwd=str(tmp_path), attempt=3)
    records = nursery.records(incarnation)
    intent, run = records.intent, records.run
    assert isinstance(intent, Intent)
    assert isinstance(run, Run)
    assert (intent.subject, intent.argv, intent.attempt) == (Subject("endpoint", "thinking"), OBEDIENT, 3)
    assert (intent.gpus, intent.memory_bytes, intent.exclusive) == (("GPU-0",), (1 << 30,), True)
    assert intent.boot_id == run.boot_id == boot_id()
    assert intent.started.mono <= run.at.mono
    leader, shim = read_stat(run.pid), read_stat(run.shim_pid)
    assert leader is not None
    assert shim is not None
    assert (leader.start_ticks, shim.start_ticks) == (run.start_ticks, run.shim_start_ticks)
    assert leader.parent_pid == run.shim_pid
    assert leader.session_id == leader.group_id == run.session_id == run.pid
    assert shim.session_id == run.shim_pid
    assert run.pid_namespace == Path("/proc/self/ns/pid").stat().st_ino
    assert Path(f"/proc/{run.pid}/cwd").readlink() == tmp_path
    assert Path(f"/proc/{run.shim_pid}/comm").read_text() == "reconciler-shim\n"
    assert records.exit is None
    assert records.stop is None


def test_a_leader_begins_with_clean_signals_and_three_descriptors(nursery: Nursery) -> None:
    """Also below a daemon that was started by `nohup` in the background of a shell, which ignores these for good."""
    blocked = {signal.SIGUSR1, signal.SIGTERM}
    ignored = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR2, signal.SIGPIPE)
    old = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        incarnation = nursery.started(OBEDIENT)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        for number, handler in old.items():
            signal.signal(number, handler)
    pid = nursery.run_record(incarnation).pid
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert int(status["SigBlk"], 16) == 0
    # Python itself ignores SIGPIPE and SIGXFSZ once it runs
    assert int(status["SigIgn"], 16) & ~(1 << signal.SIGPIPE - 1) & ~(1 << signal.SIGXFSZ - 1) == 0
    assert {entry.name for entry in Path(f"/proc/{pid}/fd").iterdir()} == {"0", "1", "2"}
    assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")


@pytest.mark.parametrize(
    ("argv", "code", "error"),
    [
        (("sh", "-c", "exit 7"), 7, None),
        (("true",), 0, None),
        (("sh", "-c", "kill -9 $$"), -9, None),
        (("no-such-program-anywhere",), 127, "no-such-program-anywhere: no such program on PATH"),
        (("/nowhere/at/all",), 127, "/nowhere/at/all: No such file or directory"),
        (("/etc/passwd",), 126, "/etc/passwd: Permission denied"),
    ],
    ids=["exits 7", "instant exit", "killed", "not on PATH", "no such file", "not executable"],
)
def test_run_and_exit_are_recorded_while_nobody_watches(
    nursery: Nursery, argv: tuple[str, ...], code: int, error: str | None
) -> None:
    incarnation = nursery.started(argv, ready=False)
    assert nursery.exit_code(incarnation) == code
    records = nursery.records(incarnation)
    assert isinstance(records.exit, Exit)
    assert records.exit.error == error
    assert nursery.log(incarnation) == ("" if error is None else f"reconciler: it could not be run: {error}\n")
    assert isinstance(records.run, Run)
    until(lambda: not is_locked(lock_path(nursery.state, "endpoint", "thinking")), "the shim to leave")


def test_the_first_start_clears_away_what_daemons_left_that_died_as_they_recorded_one(nursery: Nursery) -> None:
    draft = nursery.state.run / ".older.new"
    draft.mkdir()
    identifier = nursery.started(("sleep", "600"), ready=False)
    assert [path.name for path in nursery.state.run.iterdir()] == [identifier]


def test_a_missing_working_directory_is_recorded_as_the_reason(nursery: Nursery) -> None:
    incarnation = nursery.started(OBEDIENT, ready=False, cwd="/nowhere/at/all")
    assert nursery.exit_code(incarnation) == 127
    found = nursery.records(incarnation).exit
    assert isinstance(found, Exit)
    assert found.error == "/nowhere/at/all: No such file or directory"


def test_twenty_instant_exits_at_once_each_leave_both_records(nursery: Nursery) -> None:
    async def all_at_once() -> list[Launch]:
        actor = nursery.actor()
        launches = [nursery.launch(("true",), name=f"n{number}") for number in range(20)]
        await asyncio.gather(*(actor.ensure_started(launch) for launch in launches))
        return launches

    for launch in nursery.run(all_at_once()):
        assert nursery.exit_code(launch.incarnation) == 0
        assert isinstance(nursery.records(launch.incarnation).run, Run)


def test_output_of_leader_and_children_is_appended_to_its_log(nursery: Nursery) -> None:
    launch = nursery.launch(("sh", "-c", "echo out; echo err >&2; sh -c 'echo grandchild'"))
    nursery.run(nursery.actor().ensure_started(launch))
    assert nursery.exit_code(launch.incarnation) == 0
    assert nursery.log(launch) == "out\nerr\ngrandchild\n"


def test_everything_is_private_whatever_the_umask(nursery: Nursery) -> None:
    old = os.umask(0)
    try:
        incarnation = nursery.started(OBEDIENT)
        nursery.run(nursery.actor().ensure_drain_requested(incarnation))
    finally:
        os.umask(old)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [nursery.state.path, *nursery.state.path.rglob("*")]}
    assert {"intent.json", "run.json", "stop.json"} <= {path.name for path in modes}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()), modes


@pytest.mark.parametrize(("own", "theirs"), [(0, "0022"), (0o002, "0022"), (0o022, "0022"), (0o077, "0077")])
def test_what_a_leader_makes_others_may_read_and_not_write_unless_the_daemon_is_stricter(
    nursery: Nursery, own: int, theirs: str
) -> None:
    old = os.umask(own)
    try:
        launch = nursery.launch(("sh", "-c", "umask"))
        nursery.run(nursery.actor().ensure_started(launch))
    finally:
        os.umask(old)
    assert nursery.exit_code(launch.incarnation) == 0
    assert nursery.log(launch) == f"{theirs}\n"


def test_a_leader_has_the_soft_limit_of_descriptors_that_it_is_to_have_and_may_raise_it(nursery: Nursery) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    actor = ProcessActor(nursery.state, SystemClock(), boot_id(), open_files=100)
    nursery.actors.append(actor)
    launch = nursery.launch(("sh", "-c", f"ulimit -n; ulimit -Hn; ulimit -n {min(hard, 200)}"))
    nursery.run(actor.ensure_started(launch))
    assert nursery.exit_code(launch.incarnation) == 0
    assert nursery.log(launch) == f"100\n{hard}\n"


def test_secrets_reach_the_leader_and_nothing_else(nursery: Nursery) -> None:
    secret = f"s3cret-{os.urandom(8).hex()}"
    report = program(f"say('ready ' + str(os.environ['HF_TOKEN'] == {secret[::-1]!r}[::-1]))\nsignal.pause()")
    incarnation = nursery.started(report, env={"HF_TOKEN": secret})
    assert "ready True" in nursery.log(incarnation)
    files = [path for path in nursery.state.path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    commands = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            commands.append((entry / "cmdline").read_bytes())
    assert not [line for line in commands if secret.encode() in line]
    shim = nursery.run_record(incarnation).shim_pid
    assert secret.encode() not in Path(f"/proc/{shim}/environ").read_bytes()
    launch = nursery.launch(OBEDIENT, env={"HF_TOKEN": secret})
    assert secret not in repr(launch)


def test_starting_twice_starts_once(nursery: Nursery) -> None:
    launch = nursery.launch(OBEDIENT)

    async def twice() -> None:
        actor = nursery.actor()
        await asyncio.gather(actor.ensure_started(launch), actor.ensure_started(launch))
        await nursery.actor().ensure_started(launch)

    nursery.run(twice())
    assert nursery.members(launch.incarnation) == {nursery.run_record(launch.incarnation).pid}


def test_a_twin_is_refused_while_its_predecessor_lives(nursery: Nursery, double_forked_daemon: str) -> None:
    """Also once the leader is gone, as long as a descendant of it lives."""
    twin = nursery.launch(OBEDIENT)
    with pytest.raises(ActError, match="already running"):
        nursery.run(nursery.actor().ensure_started(twin))
    os.kill(nursery.run_record(double_forked_daemon).pid, 9)
    assert nursery.exit_code(double_forked_daemon) == -9
    with pytest.raises(ActError, match="already running"):
        nursery.run(nursery.actor().ensure_started(twin))
    assert not (nursery.state.run / twin.incarnation).exists()
    nursery.run(nursery.actor().ensure_stopped(double_forked_daemon, BRIEF))
    nursery.run(nursery.actor().ensure_started(twin))
    assert len(nursery.members(twin.incarnation)) == 1


def test_a_start_waits_for_the_lock_and_a_twin_call_meanwhile_joins_it(nursery: Nursery, obedient_process: str) -> None:
    launch = nursery.launch(OBEDIENT)

    async def race() -> None:
        actor = nursery.actor()
        starts = [asyncio.ensure_future(actor.ensure_started(launch)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(start.done() for start in starts)
        os.kill(nursery.run_record(obedient_process).pid, 9)
        await asyncio.gather(*starts)

    nursery.run(race())
    assert len(nursery.members(launch.incarnation)) == 1


def test_a_taken_port_is_refused_before_anything_is_recorded(nursery: Nursery) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
        server.listen()
        port = server.getsockname()[1]
        launch = nursery.launch(OBEDIENT, port=port)
        with pytest.raises(PortInUse) as caught:
            nursery.run(nursery.actor().ensure_started(launch))
    assert (caught.value.code, caught.value.port) == ("PortInUse", port)
    assert not (nursery.state.run / launch.incarnation).exists()
    nursery.run(nursery.actor().ensure_started(launch))
    assert len(nursery.members(launch.incarnation)) == 1


@pytest.mark.parametrize("argv", [(), ("a\0b",)], ids=["empty", "with NUL"])
def test_what_cannot_be_a_command_is_refused_before_anything_is_recorded(
    nursery: Nursery, argv: tuple[str, ...]
) -> None:
    launch = nursery.launch(argv)
    with pytest.raises(ActError):
        nursery.run(nursery.actor().ensure_started(launch))
    assert not (nursery.state.run / launch.incarnation).exists()


def test_large_environments_and_odd_bytes_arrive_whole(nursery: Nursery) -> None:
    report = program("say(f\"ready {len(os.environ['BIG'])} {os.environ['ODD']!r} {sys.argv[1:]!r}\")")
    launch = nursery.launch((*report, "", "ä\n b"), env={"BIG": "x" * 100_000, "ODD": "a=b\nc\udcff"})
    nursery.run(nursery.actor().ensure_started(launch))
    assert nursery.exit_code(launch.incarnation) == 0
    assert "ready 100000 'a=b\\nc\\udcff' ['', 'ä\\n b']" in nursery.log(launch)


@both_ways
def test_a_spawner_killed_right_after_the_spawn_leaves_an_adoptable_leader(nursery: Nursery, tmp_path: Path) -> None:
    """Its later exit code is not lost either."""
    launch = nursery.launch(exiting_on(tmp_path / "end", 7))
    assert spawner(nursery, launch, die=True).wait(30) == -9
    nursery.run(nursery.actor().ensure_started(launch))  # the next daemon: waits for the record, starts no twin
    run = nursery.run_record(launch.incarnation)
    until(lambda: nursery.marked(launch.incarnation), "the leader is its program")  # the record comes before that
    assert nursery.marked(launch.incarnation) == {run.pid}
    (tmp_path / "end").touch()
    assert nursery.exit_code(launch.incarnation) == 7


@both_ways
@pytest.mark.parametrize("delay_ms", [0, 1, 2, 4, 8, 16, 32])
def test_a_spawner_killed_at_any_moment_leaves_one_leader_or_none(nursery: Nursery, delay_ms: int) -> None:
    launch = nursery.launch(OBEDIENT)
    process = spawner(nursery, launch, die=False)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay_ms / 1000)  # the moment is the parameter; nothing is awaited by it
    process.kill()
    process.wait()
    lock = lock_path(nursery.state, "endpoint", "thinking")
    until(lambda: nursery.records(launch.incarnation).run or not is_locked(lock), "a record or a free lock")
    records = nursery.records(launch.incarnation)
    if isinstance(records.run, Run):
        until(lambda: nursery.marked(launch.incarnation), "the program to run")
        assert nursery.marked(launch.incarnation) == {records.run.pid}
    else:
        assert nursery.marked(launch.incarnation) == set()


async def shim_of(actor: ProcessActor) -> int:
    """Pid of the one shim that was just forked, as soon as there is one."""
    while actor._forks.pid is None or not (forked := children(actor._forks.pid)):
        await asyncio.sleep(0)
    return forked[0]


@both_ways
@pytest.mark.parametrize("delay_ms", [0, 0.3, 0.6, 1, 1.5, 2, 3, 5])
def test_a_shim_killed_at_any_moment_leaves_no_leader_without_a_record(nursery: Nursery, delay_ms: float) -> None:
    launch = nursery.launch(OBEDIENT)

    async def start_and_kill() -> None:
        actor = nursery.actor()
        start = asyncio.ensure_future(actor.ensure_started(launch))
        shim = await shim_of(actor)
        time.sleep(delay_ms / 1000)  # as above
        os.kill(shim, signal.SIGKILL)
        with suppress(ActError):
            await start

    nursery.run(start_and_kill())
    until(lambda: not is_locked(lock_path(nursery.state, "endpoint", "thinking")), "the lock to be free")
    records = nursery.records(launch.incarnation)
    assert nursery.marked(launch.incarnation) <= ({records.run.pid} if isinstance(records.run, Run) else set())


def test_a_start_whose_shim_died_is_told_and_not_repeated(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, launch = nursery.actor(), nursery.launch(OBEDIENT)
    monkeypatch.setattr(actor._forks, "fork_shim", lambda *_: True)  # it had its order, and nothing is left of it

    async def start_and_stop() -> None:
        with pytest.raises(ActError, match="before it started anything: it was killed"):
            await actor.ensure_started(launch)
        with pytest.raises(ActError, match="never started"):
            await actor.ensure_started(launch)
        await actor.ensure_stopped(launch.incarnation, BRIEF)

    nursery.run(start_and_stop())
    assert nursery.marked(launch.incarnation) == set()


def test_a_leader_whose_shim_dies_before_the_gate_opens_takes_the_record_of_its_run_back(tmp_path: Path) -> None:
    """So that intent without run and a free lock say *never started*, whenever the shim was killed."""
    (tmp_path / "run.json").write_text("{}")
    folder, log = os.open(tmp_path, os.O_RDONLY), os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    order = in_memory(b"\0".join([b""] * 6 + [b"/", b"", b"2", b"touch", os.fsencode(tmp_path / "ran")]))
    ours, gate = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    leader = os.fork()
    if leader == 0:
        ours.close()
        shim.become_leader(gate, [order, order, order, folder, log], born_in_group=False)
    ours.close()
    gate.close()
    for fd in (order, folder, log):
        os.close(fd)
    os.waitpid(leader, 0)
    assert {p.name for p in tmp_path.iterdir()} == {"log"}


def test_a_leader_killed_at_the_gate_is_recorded_with_its_signal(nursery: Nursery) -> None:
    launch = nursery.launch(OBEDIENT)
    write_intent(nursery.state, nursery.actor()._intent(launch, None))
    order = in_memory(process._encode_order(launch, nursery.state, boot_id(), None))
    record = shim.write_record

    def kill_once_recorded(folder_fd: int, name: str, text: str, *, durable: bool) -> None:
        record(folder_fd, name, text, durable=durable)
        if name == "run.json":
            os.kill(json.loads(text)["pid"], signal.SIGKILL)
            until(lambda: not is_running(json.loads(text)["pid"]), "its end")

    supervisor = os.fork()
    if supervisor == 0:
        shim.write_record = kill_once_recorded
        shim.become_reaper()
        lock, ready, go = (os.open(os.devnull, os.O_RDWR) for _ in range(3))
        os._exit(shim.supervise(shim.own_identity(), None, order, lock, ready, go))
    os.close(order)
    assert os.waitstatus_to_exitcode(os.waitpid(supervisor, 0)[1]) == 0
    assert nursery.exit_code(launch.incarnation) == -signal.SIGKILL


def test_a_cancelled_start_goes_on(nursery: Nursery) -> None:
    """The shim is on its way and cannot be called back; the next look sees what it recorded."""
    launch = nursery.launch(OBEDIENT)

    async def cancel() -> None:
        actor = nursery.actor()
        start = asyncio.ensure_future(actor.ensure_started(launch))
        await asyncio.sleep(0)
        start.cancel()
        await asyncio.wait({start})
        await actor.ensure_started(launch)

    nursery.run(cancel())
    assert len(nursery.members(launch.incarnation)) == 1


def test_the_shim_outlives_polite_signals(nursery: Nursery, obedient_process: str) -> None:
    run = nursery.run_record(obedient_process)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        os.kill(run.shim_pid, number)
    os.kill(run.pid, signal.SIGKILL)
    assert nursery.exit_code(obedient_process) == -9
    until(lambda: not is_running(run.shim_pid), "the shim to leave")


def test_shims_that_ended_leave_no_zombies(nursery: Nursery) -> None:
    actor = nursery.actor()
    launch = nursery.launch(("true",))
    nursery.run(actor.ensure_started(launch))
    nursery.exit_code(launch.incarnation)
    shim = nursery.run_record(launch.incarnation).shim_pid
    until(lambda: read_stat(shim) is None, "the shim to be collected")


# ---------------------------------------------------------------- the process that forks shims


def test_what_runs_and_its_exit_code_survive_the_fork_server(nursery: Nursery) -> None:
    actor = nursery.actor()
    launch = nursery.launch(OBEDIENT)
    nursery.run(actor.ensure_started(launch))
    server = actor._forks.pid
    assert server is not None
    os.kill(server, signal.SIGKILL)
    until(lambda: not is_running(server), "the fork server to be gone")
    run = nursery.run_record(launch.incarnation)
    assert is_running(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    assert nursery.exit_code(launch.incarnation) == -9


def test_a_fork_server_that_died_is_replaced_by_the_next_start(nursery: Nursery) -> None:
    actor = nursery.actor()
    actor.warm()
    first = actor._forks.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: not is_running(first), "the fork server to be gone")
    launch = nursery.launch(OBEDIENT)
    nursery.run(actor.ensure_started(launch))
    assert is_running(nursery.run_record(launch.incarnation).pid)
    assert actor._forks.pid not in (None, first)


def test_a_fork_server_that_hangs_is_given_up_and_its_order_with_it(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = nursery.actor()
    actor.warm()
    first = actor._forks.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    hung, next_one = nursery.launch(OBEDIENT), nursery.launch(OBEDIENT)
    with monkeypatch.context() as short:  # for this order alone: on a busy box the next one takes longer than that
        short.setattr(process, "_START_S", 0.3)
        with pytest.raises(ActError, match="has not reported"):
            nursery.run(actor.ensure_started(hung))
    assert not is_running(first)
    assert not is_locked(lock_path(nursery.state, "endpoint", "thinking"))
    nursery.run(actor.ensure_started(next_one))
    assert is_running(nursery.run_record(next_one.incarnation).pid)
    assert nursery.marked(hung.incarnation) == set()


def spare_of(actor: ProcessActor) -> int:
    """Pid of the shim that was forked in advance."""
    server = actor._forks.pid
    assert server is not None
    until(lambda: len(children(server)) == 1, "a shim forked in advance")
    (spare,) = children(server)
    until(lambda: (stat := read_stat(spare)) is not None and stat.session_id == spare, "it to be on its own")
    return spare


def killed_spare_of(actor: ProcessActor) -> int:
    """What its pid was before it was killed."""
    spare = spare_of(actor)
    os.kill(spare, signal.SIGKILL)
    until(lambda: read_stat(spare) is None, "its end")
    return spare


def test_a_start_takes_the_shim_that_was_forked_in_advance_and_another_takes_its_place(nursery: Nursery) -> None:
    actor = nursery.actor()
    actor.warm()
    spare = spare_of(actor)
    launch = nursery.launch(OBEDIENT)
    nursery.run(actor.ensure_started(launch))
    assert nursery.run_record(launch.incarnation).shim_pid == spare
    server = actor._forks.pid
    assert server is not None
    until(lambda: len(children(server)) == 2, "another one")


def test_a_start_does_without_the_shim_that_was_forked_in_advance_and_killed(nursery: Nursery) -> None:
    actor = nursery.actor()
    actor.warm()
    spare = killed_spare_of(actor)
    launch = nursery.launch(OBEDIENT)
    nursery.run(actor.ensure_started(launch))
    assert nursery.run_record(launch.incarnation).shim_pid != spare
    assert len(nursery.members(launch.incarnation)) == 1


def test_a_shim_that_was_forked_in_advance_and_killed_is_replaced(nursery: Nursery) -> None:
    actor = nursery.actor()
    actor.warm()
    spare = killed_spare_of(actor)
    assert spare_of(actor) != spare


def announced(actor: ProcessActor, group: str | None) -> int:
    """Pid of the leader that the shim in advance forks when a start is announced."""
    spare, seen = spare_of(actor), list[int]()
    before, again = children(spare), 0.0

    def is_there() -> bool:
        nonlocal again
        if time.monotonic() >= again:  # it is let go of within a second, in which a slow box may not have looked
            actor._forks.announce(group)
            again = time.monotonic() + 5.0
        seen[:] = [pid for pid in children(spare) if pid not in before]
        return len(seen) == 1

    until(is_there, "its leader")
    return seen[0]


def announced_and_stopped(actor: ProcessActor, group: str | None) -> int:
    """The same, and that leader stopped as it waits; another one if it was let go of before."""
    while True:
        leader = announced(actor, group)
        until(lambda: (stat := read_stat(leader)) is None or stat.session_id == leader, "it to wait")  # noqa: B023
        with suppress(ProcessLookupError):
            os.kill(leader, signal.SIGSTOP)
            return leader


@both_ways
def test_a_start_that_was_announced_begins_with_the_leader_that_was_forked_meanwhile(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = nursery.actor()
    actor.warm()
    forked: list[int] = []
    record = actor._record

    def record_late(launch: Launch, group: str | None) -> None:
        until(lambda: children(spare), "its leader")
        forked[:] = children(spare)
        record(launch, group)

    monkeypatch.setattr(actor, "_record", record_late)
    for number in range(5):  # a leader is let go of within a second: a box that stands still for so long shows nothing
        spare = spare_of(actor)
        launch = nursery.launch(OBEDIENT, name=f"endpoint-{number}")
        began = time.monotonic()
        nursery.run(actor.ensure_started(launch))
        if time.monotonic() - began < 1.0:
            break
    run, intent = nursery.run_record(launch.incarnation), nursery.records(launch.incarnation).intent
    assert [run.pid] == forked
    until(lambda: nursery.marked(launch.incarnation) == {run.pid}, "its program")
    assert isinstance(intent, Intent)
    assert intent.group is None or run.pid in cgroup.pids(intent.group, launch.incarnation)


@both_ways
def test_a_start_that_is_refused_after_it_was_announced_leaves_no_leader_and_no_group(nursery: Nursery) -> None:
    actor = nursery.actor()
    actor.warm()
    spare = spare_of(actor)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = nursery.launch(OBEDIENT, port=taken.getsockname()[1])
        with pytest.raises(PortInUse):
            nursery.run(actor.ensure_started(refused))
    group = cgroup.path_in(nursery.groups_in, refused.incarnation) if nursery.groups_in else ""
    until(lambda: not children(spare) and not Path(group or "/absent").exists(), "both to be gone")
    launch = nursery.launch(OBEDIENT)
    nursery.run(actor.ensure_started(launch))
    assert nursery.run_record(launch.incarnation).shim_pid == spare, "it went on waiting"


@both_ways
@pytest.mark.parametrize("also", [True, False], ids=["announced itself", "not announced"])
def test_a_leader_that_was_forked_for_another_start_and_its_group_are_let_go_of(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, also: bool
) -> None:
    actor, launch = nursery.actor(), nursery.launch(OBEDIENT)
    actor.warm()
    group = cgroup.path_in(nursery.groups_in, uuid.uuid4().hex) if nursery.groups_in else None
    other = announced(actor, group)
    assert group is None or Path(group).is_dir()
    if not also:
        monkeypatch.setattr(actor._forks, "announce", lambda _: None)
    nursery.run(actor.ensure_started(launch))
    run, intent = nursery.run_record(launch.incarnation), nursery.records(launch.incarnation).intent
    assert isinstance(intent, Intent)
    if intent.group is not None:
        assert run.pid in cgroup.pids(intent.group, launch.incarnation)
        assert run.pid != other
        assert not Path(group or "").exists()
    assert len(nursery.members(launch.incarnation)) == 1


@both_ways
def test_a_start_does_without_the_leader_that_was_forked_for_it_and_killed(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor, launch = nursery.actor(), nursery.launch(OBEDIENT)
    actor.warm()
    group = cgroup.path_in(nursery.groups_in, launch.incarnation) if nursery.groups_in else None
    leader = announced(actor, group)
    with suppress(ProcessLookupError):  # it was let go of before
        os.kill(leader, signal.SIGKILL)
    until(lambda: not is_running(leader), "its end")
    monkeypatch.setattr(actor._forks, "announce", lambda _: None)  # it was
    nursery.run(actor.ensure_started(launch))
    assert nursery.run_record(launch.incarnation).pid != leader
    assert len(nursery.members(launch.incarnation)) == 1


@both_ways
def test_of_a_start_that_a_daemon_announced_before_it_died_nothing_is_left(nursery: Nursery) -> None:
    actor = nursery.actor()
    actor.warm()
    group = cgroup.path_in(nursery.groups_in, uuid.uuid4().hex) if nursery.groups_in else ""
    spare, leader = spare_of(actor), announced(actor, group or None)
    actor.close()
    until(lambda: not is_running(spare) and not is_running(leader), "both to be gone")
    assert not Path(group or "/absent").exists()


@pytest.mark.parametrize("groups_in", ["grouped"], indirect=True)
def test_the_group_of_a_refused_start_whose_shim_was_killed_is_taken_away_by_the_next_daemon(nursery: Nursery) -> None:
    assert nursery.groups_in is not None
    living = nursery.started(OBEDIENT, name="other")
    old, young, foreign = (
        Path(cgroup.path_in(nursery.groups_in, n)) for n in (uuid.uuid4().hex, uuid.uuid4().hex, "x")
    )
    try:
        for group in (old, young, foreign):
            group.mkdir()
        for group in (old, foreign, Path(nursery.group(living) or "")):
            os.utime(group, (0, 0))  # in the time of the box, long ago
        nursery.run(nursery.actor().ensure_started(nursery.launch(OBEDIENT)))
        assert not old.exists()
        assert young.exists(), "somebody may be about to be born there"
        assert foreign.exists(), "that is the group of no incarnation"
        assert nursery.run_record(living).pid in cgroup.pids(nursery.group(living) or "", living)
    finally:
        for group in (old, young, foreign):
            with suppress(FileNotFoundError):
                group.rmdir()


def test_a_leader_that_waits_ends_with_the_shim_that_forked_it(nursery: Nursery) -> None:
    actor = nursery.actor()
    actor.warm()
    spare, leader = spare_of(actor), announced(actor, None)
    os.kill(spare, signal.SIGKILL)
    until(lambda: not is_running(leader), "its end")
    launch = nursery.launch(OBEDIENT)
    nursery.run(actor.ensure_started(launch))
    assert len(nursery.members(launch.incarnation)) == 1


@both_ways
def test_a_leader_that_waits_and_is_stopped_holds_nobody_up(nursery: Nursery) -> None:
    actor = nursery.actor()
    actor.warm()
    group = cgroup.path_in(nursery.groups_in, uuid.uuid4().hex) if nursery.groups_in else None
    leader = announced_and_stopped(actor, group)
    launch = nursery.launch(OBEDIENT)
    nursery.run(actor.ensure_started(launch))  # which announces itself
    assert nursery.run_record(launch.incarnation).pid != leader
    assert not is_running(leader)
    assert group is None or not Path(group).exists()


def test_a_leader_that_waits_and_is_stopped_ends_with_the_shim_that_forked_it(nursery: Nursery) -> None:
    actor = nursery.actor()
    actor.warm()
    spare, leader = spare_of(actor), announced_and_stopped(actor, None)
    os.kill(spare, signal.SIGKILL)
    until(lambda: not is_running(leader), "its end")
    assert spare_of(actor) != spare, "nor does it hide that end from the fork server"


def test_the_fork_server_ends_with_its_daemon_whatever_the_shim_in_advance_does(nursery: Nursery) -> None:
    actor = nursery.actor()
    actor.warm()
    spare, server, control = spare_of(actor), actor._forks.pid, actor._forks._control
    assert server is not None
    assert control is not None
    os.kill(spare, signal.SIGSTOP)
    control.close()  # as the daemon's end does
    until(lambda: not is_running(server) and not is_running(spare), "their ends")


def test_a_daemon_with_more_than_a_thousand_descriptors_starts_as_any_other(nursery: Nursery) -> None:
    """Numbers beyond those that select(2) can be given, as with hundreds of endpoints."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("not so many can be had here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    held: list[int] = []
    try:
        while not held or held[-1] < 1100:
            held.append(os.open(os.devnull, os.O_RDONLY))
        actor = nursery.actor()
        actor.warm()
        spare_of(actor)
        launches = [nursery.launch(OBEDIENT, name=f"endpoint-{number}") for number in range(3)]

        async def start_all() -> None:
            await asyncio.gather(*(actor.ensure_started(launch) for launch in launches))

        nursery.run(start_all())
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(len(nursery.members(launch.incarnation)) == 1 for launch in launches)


def test_of_starts_in_one_turn_no_program_begins_before_all_are_handed_over(nursery: Nursery) -> None:
    actor = nursery.actor()
    launches = [nursery.launch(OBEDIENT, name=f"endpoint-{number}") for number in range(3)]
    begun: list[set[int]] = []
    spawn = actor._spawn_shim

    def spawn_and_look(lock: int, order: bytes) -> int | None:
        ready = spawn(lock, order)
        first = launches[0].incarnation
        until(lambda: nursery.records(first).run, "the first to be at its gate")
        begun.append(nursery.marked(first))
        return ready

    actor._spawn_shim = spawn_and_look  # type: ignore[method-assign]

    async def start_all() -> None:
        await asyncio.gather(*(actor.ensure_started(launch) for launch in launches))

    nursery.run(start_all())
    assert begun == [set(), set(), set()]
    for launch in launches:
        assert nursery.marked(launch.incarnation) == {nursery.run_record(launch.incarnation).pid}


def test_a_program_begins_also_when_its_daemon_died_before_it_said_so(nursery: Nursery) -> None:
    launch = nursery.launch(OBEDIENT)
    daemon = spawner(nursery, launch, die=False, hang=True)
    until(lambda: nursery.records(launch.incarnation).run, "its leader to be at the gate")
    assert nursery.marked(launch.incarnation) == set()
    daemon.kill()
    daemon.wait()
    until(lambda: nursery.marked(launch.incarnation), "its program to run")
    assert nursery.marked(launch.incarnation) == {nursery.run_record(launch.incarnation).pid}


def test_more_orders_than_a_fork_server_has_room_for_wait_for_it(nursery: Nursery) -> None:
    actor = nursery.actor()
    actor.warm()
    server, control = actor._forks.pid, actor._forks._control
    assert server is not None
    assert control is not None
    os.kill(server, signal.SIGSTOP)
    until(lambda: (stat := read_stat(server)) is not None and stat.state == "T", "it to stand still")
    with suppress(BlockingIOError):
        while control.send(b"?"):
            pass
    launch = nursery.launch(OBEDIENT)

    async def start_and_go_on() -> None:
        start = asyncio.ensure_future(actor.ensure_started(launch))
        while not (nursery.state.run / launch.incarnation).exists():
            await asyncio.sleep(0)
        for _ in range(3):  # the order has been refused
            await asyncio.sleep(0)
        assert not start.done()
        os.kill(server, signal.SIGCONT)
        await start

    nursery.run(start_and_go_on())
    assert is_running(nursery.run_record(launch.incarnation).pid)
    assert actor._forks.pid == server


def test_a_fork_server_that_never_has_room_again_fails_the_start_which_leaves_nothing(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_CROWD_S", 0.05)
    actor, launch = nursery.actor(), nursery.launch(OBEDIENT)
    monkeypatch.setattr(actor._forks, "fork_shim", lambda *_: False)
    with pytest.raises(ActError, match="takes no more orders"):
        nursery.run(actor.ensure_started(launch))
    assert not (nursery.state.run / launch.incarnation).exists(), "it was handed to nobody"
    assert not is_locked(lock_path(nursery.state, "endpoint", "thinking"))


def test_a_shim_that_is_stopped_before_it_has_its_order_never_carries_it_out(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_START_S", 0.3)
    actor = nursery.actor()
    actor.warm()
    spare = spare_of(actor)
    os.kill(spare, signal.SIGSTOP)
    hung, next_one = nursery.launch(OBEDIENT), nursery.launch(OBEDIENT)
    with pytest.raises(ActError, match="has not reported"):
        nursery.run(actor.ensure_started(hung))
    until(lambda: not is_running(spare), "its end")
    assert not is_locked(lock_path(nursery.state, "endpoint", "thinking"))
    monkeypatch.setattr(process, "_START_S", 30.0)
    nursery.run(actor.ensure_started(next_one))
    assert is_running(nursery.run_record(next_one.incarnation).pid)
    assert nursery.marked(hung.incarnation) == set()


def test_the_fork_server_ends_with_its_daemon_and_nothing_else_does(nursery: Nursery) -> None:
    launch = nursery.launch(OBEDIENT)
    spawner(nursery, launch, die=False).wait()
    run = nursery.run_record(launch.incarnation)
    assert is_running(run.pid)
    assert is_running(run.shim_pid)

    def parent() -> str:
        shim = read_stat(run.shim_pid)
        assert shim is not None
        return Path(f"/proc/{shim.parent_pid}/comm").read_text().strip()

    until(lambda: parent() != "reconciler-fork", "the fork server to be gone")


DAEMON_WITH_A_FORK_SERVER = """
import signal
from reconciler.act.forkserver import ForkServer
server = ForkServer()
server.open()
print(server.pid, flush=True)
signal.pause()
"""


def test_a_stopped_fork_server_ends_with_its_daemon_too() -> None:
    """It may have been handed an order, with the lock of a subject that nobody could start any more."""
    with subprocess.Popen([sys.executable, "-c", DAEMON_WITH_A_FORK_SERVER], stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        server = int(daemon.stdout.readline())
        until(lambda: Path(f"/proc/{server}/comm").read_text() == "reconciler-fork\n", "it to be ready")
        os.kill(server, signal.SIGSTOP)
        until(lambda: (stat := read_stat(server)) is not None and stat.state == "T", "it to be stopped")
        daemon.kill()
    until(lambda: not is_running(server), "its end")


def test_a_shim_holds_no_lock_but_its_own(nursery: Nursery) -> None:
    actor = nursery.actor()
    one, two = nursery.launch(OBEDIENT, name="one"), nursery.launch(OBEDIENT, name="two")
    nursery.run(actor.ensure_started(one))
    nursery.run(actor.ensure_started(two))
    for launch, other in ((one, two), (two, one)):
        fds = Path(f"/proc/{nursery.run_record(launch.incarnation).shim_pid}/fd")
        open_files = {str(fd.readlink()) for fd in fds.iterdir()}
        assert str(lock_path(nursery.state, "endpoint", launch.subject.name)) in open_files
        assert str(lock_path(nursery.state, "endpoint", other.subject.name)) not in open_files


def test_a_log_that_cannot_be_opened_is_told_and_nothing_runs(nursery: Nursery) -> None:
    launch = nursery.launch(OBEDIENT)
    log_path(nursery.state, "endpoint", launch.subject.name, launch.incarnation).symlink_to("/dev/null")
    with pytest.raises(ActError, match="Too many levels of symbolic links"):
        nursery.run(nursery.actor().ensure_started(launch))
    assert nursery.marked(launch.incarnation) == set()
