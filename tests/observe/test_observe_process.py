"""Phases, strays, owners and listeners, on real processes below the real shim."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cradle import LONG_AGO
from ports import free_port

from reconciler.clock import Instant
from reconciler.errors import StateError
from reconciler.identity import descendants, is_alive, read_stat
from reconciler.journal.archive import archive
from reconciler.journal.incarnations import Exit as ExitRecord
from reconciler.journal.incarnations import StopRecord, is_over, lock_path, new_id, write_exit, write_stop
from reconciler.journal.layout import take_lock
from reconciler.observe import incarnation as incarnation_module
from reconciler.observe.process import ProcessReader
from reconciler.plan.observed import Subject

LISTENER = (
    "import socket,sys,time; s=socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1);"
    "s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen(); time.sleep(600)"
)
CHILD_OUTLIVES = (sys.executable, "-c", "import subprocess,sys; subprocess.Popen(['sleep','600']); sys.exit(7)")
DAEMONISED_CHILD_OUTLIVES = (
    sys.executable, "-c",
    "import subprocess,time; subprocess.Popen(['sleep','600'], start_new_session=True); time.sleep(600)",
)  # fmt: skip


@pytest.fixture
def reader(state, clock):
    reader = ProcessReader(state, clock)
    yield reader
    reader.close()


def only(reader):
    (incarnation,) = reader.read()
    return incarnation


# ---------------------------------------------------------------- phases


def test_an_empty_state_directory_has_no_incarnations(reader):
    assert reader.read() == ()


def test_records_that_cannot_be_listed_are_an_error_and_not_nobody(state, reader):
    state.run.rmdir()
    state.run.write_text("not a folder")
    with pytest.raises(StateError, match="run"):
        reader.read()


@pytest.mark.parametrize("linked", [False, True])
def test_who_runs_is_not_gone_because_the_records_were_moved_away(state, cradle, reader, wait_until, linked):
    """As where the disk of the state directory is unmounted for a while, or a link to another folder has its place; who
    ends meanwhile is unknown."""
    for name in ("a", "b"):
        cradle.start("sleep", "600", name=name)
    pids = [seen.pid for seen in reader.read()]
    state.run.rename(state.path / "elsewhere")
    if linked:
        (state.path / "another").mkdir()
        state.run.symlink_to(state.path / "another")
    assert [(seen.subject.name, seen.phase, seen.pid) for seen in reader.read()] == [
        ("a", "running", pids[0]),
        ("b", "running", pids[1]),
    ]
    os.kill(pids[1], signal.SIGKILL)
    wait_until(lambda: sorted(seen.phase for seen in reader.read()) == ["running", "unknown"], "its end is noticed")
    state.run.unlink(missing_ok=True)
    (state.path / "elsewhere").rename(state.run)
    wait_until(lambda: [seen.phase for seen in reader.read()] == ["running", "exited"], "its end is known")


def test_a_living_leader_is_running(cradle, reader):
    identifier = cradle.start("sleep", "600", port=8080)
    seen = only(reader)
    run = cradle.run_record(identifier)
    assert (seen.id, seen.phase, seen.pid, seen.port) == (identifier, "running", run.pid, 8080)
    assert seen.subject == Subject("endpoint", "thinking")
    assert seen.strays == ()
    assert seen.alive


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -9 $$", -9), ("exit 0", 0)])
def test_an_end_is_exited_with_its_code(cradle, reader, script, code, wait_until):
    cradle.start("sh", "-c", script)
    wait_until(lambda: only(reader).phase == "exited", "the end is seen")
    seen = only(reader)
    assert seen.exit_code == code
    assert seen.exited is not None
    wait_until(lambda: not only(reader).alive, "nothing of it is left")


def test_a_program_that_could_not_be_run_is_told_as_the_failure(cradle, reader, wait_until):
    cradle.start("/nowhere/at/all")
    wait_until(lambda: only(reader).phase == "exited", "the end is seen")
    assert (only(reader).exit_code, only(reader).failure) == (127, "/nowhere/at/all: No such file or directory")


def test_the_end_is_told_with_its_code_from_the_first_look_after_it(cradle, reader, monkeypatch, wait_until):
    """The loop wakes before the shim has written the exit: no look in between says `unknown` or `vanished`."""
    monkeypatch.setattr(incarnation_module, "EXIT_RECORD_WAIT_S", 20.0)  # the shim may be slow here, not so the look
    for _ in range(5):
        identifier = cradle.start("sleep", "600")
        assert only(reader).phase == "running"
        (leader,) = [fd for fd, i in reader.watches().items() if i == identifier and _pid_of(fd) == only(reader).pid]
        os.kill(only(reader).pid, signal.SIGTERM)
        assert select.select([leader], [], [], 20)[0]
        seen = only(reader)
        assert (seen.phase, seen.exit_code) == ("exited", -15)
        wait_until(lambda: not only(reader).alive, "the shim is gone")
        archive(reader._reader._state, identifier, keep=20)


def _pid_of(pidfd):
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pid:"))


def _open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_leader_that_ended_under_a_frozen_shim_is_unknown_and_not_gone(cradle, reader, monkeypatch, wait_until):
    monkeypatch.setattr(incarnation_module, "EXIT_RECORD_WAIT_S", 0.05)
    run = cradle.run_record(cradle.start("sleep", "600"))
    os.kill(run.shim_pid, signal.SIGSTOP)
    os.kill(run.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(run.pid, run.start_ticks), "the leader is gone")
    assert only(reader).phase == "unknown"
    assert only(reader).alive
    os.kill(run.shim_pid, signal.SIGCONT)
    wait_until(lambda: only(reader).phase == "exited", "its exit is recorded after all")
    assert only(reader).exit_code == -9


def test_a_leader_that_ended_without_shim_is_vanished(cradle, reader, wait_until):
    run = cradle.run_record(cradle.start("sleep", "600"))
    os.kill(run.shim_pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(run.shim_pid, run.shim_start_ticks), "the shim is gone")
    assert only(reader).phase == "running"
    os.kill(run.pid, signal.SIGKILL)
    wait_until(lambda: only(reader).phase == "vanished", "the end is seen")
    assert only(reader).exit_code is None
    assert not only(reader).alive


def test_the_word_of_a_shim_that_nobody_is_left_spares_the_search_of_all_processes(
    cradle, reader, state, monkeypatch, wait_until
):
    def searched(**_):
        raise AssertionError("all processes were searched")

    identifier = cradle.start("true")
    run = cradle.run_record(identifier)
    wait_until(lambda: not is_alive(run.shim_pid, run.shim_start_ticks), "the shim is gone")
    monkeypatch.setattr(incarnation_module, "members", searched)
    assert (only(reader).phase, only(reader).strays) == ("exited", ())


def test_a_shim_that_was_killed_leaves_no_such_word_and_its_family_is_found(cradle, reader, state, wait_until):
    identifier = cradle.start("sh", "-c", "sleep 600 & sleep 600")
    run = cradle.run_record(identifier)
    wait_until(lambda: list(descendants(run.pid)), "a child is there")
    os.kill(run.shim_pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(run.shim_pid, run.shim_start_ticks), "the shim is gone")
    os.kill(run.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(run.pid, run.start_ticks), "the leader is gone")
    assert not is_over(state.run / identifier)
    assert len(only(reader).strays) >= 1


def test_a_leader_that_took_the_record_of_its_run_back_never_started(cradle, reader, state, wait_until):
    """As one does whose shim was killed before it ran anything; the record was seen before."""
    incarnation = cradle.start("sleep", "1000")
    run = cradle.run_record(incarnation)
    os.kill(run.shim_pid, signal.SIGKILL)
    (seen,) = reader.read()
    assert (seen.phase, seen.pid) == ("running", run.pid)
    (state.run / incarnation / "run.json").unlink()
    os.kill(run.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(run.pid, run.start_ticks), "its end")
    wait_until(lambda: not is_alive(run.shim_pid, run.shim_start_ticks), "the shim to let go of the lock")
    (seen,) = reader.read()
    assert (seen.phase, seen.pid, seen.strays) == ("vanished", None, ())


def test_an_intent_whose_lock_is_held_is_an_intent_and_never_started_once_it_is_free(cradle, reader, state):
    cradle.intend()
    lock = take_lock(lock_path(state, "endpoint", "thinking"))
    assert only(reader).phase == "intent"
    assert only(reader).alive
    os.close(lock)
    assert only(reader).phase == "vanished"
    assert not only(reader).alive


def test_a_lock_held_by_a_later_incarnation_does_not_revive_an_intent(cradle, reader):
    lost = cradle.intend()
    living = cradle.start("sleep", "600")
    assert {i.id: i.phase for i in reader.read()} == {lost.id: "vanished", living: "running"}


def test_an_incarnation_of_another_boot_is_vanished_or_as_it_was_recorded(cradle, reader, state):
    crashed = cradle.intend("a", boot_id="another")
    ended = cradle.intend("b", boot_id="another")
    write_exit(state, ended.id, ExitRecord(4, LONG_AGO))
    seen = {i.id: i for i in reader.read()}
    assert (seen[crashed.id].phase, seen[crashed.id].alive) == ("vanished", False)
    assert (seen[ended.id].phase, seen[ended.id].exit_code, seen[ended.id].alive) == ("exited", 4, False)
    assert seen[crashed.id].bygone
    assert seen[ended.id].bygone


def test_no_moment_of_a_longer_boot_lies_ahead_in_this_one(cradle, reader, state):
    begun = Instant(1_000.0, 1e9)  # the monotonic clock begins anew with each boot
    ended = cradle.intend("a", boot_id="another", started=begun)
    write_exit(state, ended.id, ExitRecord(0, begun.plus(40.0)))
    vanished = cradle.intend("b", boot_id="another", started=begun)
    seen = {i.id: i for i in reader.read()}
    assert (seen[ended.id].started, seen[ended.id].exited) == (Instant(1_000.0, -40.0), Instant(1_040.0, 0.0))
    assert (seen[vanished.id].started, seen[vanished.id].exited) == (Instant(1_000.0, 0.0), None)


@pytest.mark.parametrize("left", ["", '{"at": {"wa', None])
@pytest.mark.parametrize("name", ["intent.json", "run.json", "exit.json", "stop.json"])
def test_what_a_power_cut_emptied_tore_or_took_is_vanished_in_the_next_boot(cradle, reader, state, name, left):
    cut = cradle.intend(id=new_id("0123456789ab-of-another-boot"), boot_id="0123456789ab-of-another-boot")
    folder = state.run / cut.id
    (folder / name).write_text(left or "") if left is not None else (folder / name).unlink(missing_ok=True)
    seen = only(reader)
    assert (seen.phase, seen.alive, seen.strays) == ("vanished", False, ())


def test_an_exit_that_a_power_cut_left_is_told_where_it_tore_the_rest(cradle, reader, state):
    cut = cradle.intend(id=new_id("0123456789ab"), boot_id="0123456789ab")
    write_exit(state, cut.id, ExitRecord(4, LONG_AGO))
    (state.run / cut.id / "intent.json").write_text("")
    seen = only(reader)
    assert (seen.phase, seen.exit_code, seen.alive) == ("exited", 4, False)


def test_a_pid_that_became_another_process_is_not_the_leader(cradle, reader, state, wait_until):
    run = cradle.run_record(cradle.start("sleep", "600"))
    os.kill(run.shim_pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(run.shim_pid, run.shim_start_ticks), "the shim is gone")
    os.kill(run.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(run.pid, run.start_ticks), "the leader is gone")
    path = state.run / cradle.ids[0] / "run.json"
    # the same record, as if the kernel had handed the pid to this test
    text = path.read_text().replace(f'"pid":{run.pid},', f'"pid":{os.getpid()},')
    path.write_text(text.replace(f'"session_id":{run.pid},', f'"session_id":{os.getpid()},'))
    seen = only(reader)
    assert seen.phase == "vanished"
    assert seen.strays == ()


@pytest.mark.parametrize("name", ["intent.json", "run.json", "exit.json", "stop.json"])
def test_a_torn_record_is_unknown_and_alive(cradle, reader, state, name):
    identifier = cradle.start("sleep", "600")
    assert only(reader).phase == "running"
    (state.run / identifier / name).write_text('{"at": {"wa')
    _touch(state.run / identifier)
    seen = only(reader)
    assert seen.phase == "unknown"
    assert seen.alive


def _touch(folder):
    """Records are replaced by renames, which show in the folder's time; writing into one in place does not."""
    now = time.time_ns()
    os.utime(folder, ns=(now, now))


@pytest.mark.parametrize("field", ["pid_namespace", "boot_id"])
def test_pids_of_another_namespace_or_boot_are_unknown(cradle, reader, state, field):
    identifier = cradle.start("sleep", "600")
    run = cradle.run_record(identifier)
    path = state.run / identifier / "run.json"
    path.write_text(path.read_text().replace(str(getattr(run, field)), "1"))
    assert only(reader).phase == "unknown"
    assert only(reader).alive


@pytest.mark.parametrize("recorded", [True, False])
def test_what_ran_in_a_container_that_is_gone_ended_with_it(cradle, reader, state, clock, wait_until, recorded):
    identifier = cradle.start("sleep", "600")
    run = cradle.run_record(identifier)
    path = state.run / identifier / "run.json"
    path.write_text(path.read_text().replace(f'"pid_namespace":{run.pid_namespace}', '"pid_namespace":1'))
    assert (only(reader).phase, only(reader).bygone) == ("unknown", False), "its container lives"
    if not recorded:
        os.kill(run.shim_pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(run.shim_pid, run.shim_start_ticks), "the shim is gone")
    os.kill(run.pid, signal.SIGKILL)
    wait_until(lambda: not only(reader).alive, "its lock is free")
    seen = only(reader)
    assert (seen.phase, seen.strays, seen.bygone) == ("exited" if recorded else "vanished", (), True)
    cradle.start("sleep", "600")
    fresh = ProcessReader(state, clock)
    for each in (reader, fresh):
        first, second = each.read()
        assert (first.id, first.alive, first.bygone) == (identifier, False, True), "its successor's lock is another's"
        assert (second.phase, second.bygone) == ("running", False)
    fresh.close()


def test_one_that_ended_here_and_now_is_not_bygone(cradle, reader, wait_until):
    cradle.start("false")
    wait_until(lambda: only(reader).phase == "exited", "its end")
    assert not only(reader).bygone


def test_the_progress_of_a_stop_is_seen_each_time_it_moves(cradle, reader, state):
    identifier = cradle.start("sleep", "600")
    assert only(reader).stop is None
    write_stop(state, identifier, StopRecord(LONG_AGO, drained=False, signalled=None))
    assert only(reader).stop.drained is False
    later = Instant(2000.0, 20.0)
    write_stop(state, identifier, StopRecord(LONG_AGO, drained=True, signalled=later))
    assert (only(reader).stop.drained, only(reader).stop.signalled) == (True, later)


def test_incarnations_are_sorted_by_subject_then_start(cradle, reader):
    late = cradle.intend("b", started=Instant(2.0, 2.0))
    early = cradle.intend("b", started=Instant(1.0, 1.0))
    job = cradle.intend("a", kind="workload", started=Instant(0.0, 0.0))
    first = cradle.intend("a", started=Instant(9.0, 9.0))
    assert [i.id for i in reader.read()] == [first.id, early.id, late.id, job.id]


# ---------------------------------------------------------------- strays


def test_children_that_outlive_their_leader_are_strays_until_they_end(cradle, reader, wait_until):
    cradle.start(*CHILD_OUTLIVES)
    wait_until(lambda: only(reader).phase == "exited", "the leader's end")
    seen = only(reader)
    assert seen.exit_code == 7
    assert len(seen.strays) == 1
    assert seen.alive
    assert seen.lived_until.since(seen.exited) >= 0
    os.kill(seen.strays[0], signal.SIGKILL)
    wait_until(lambda: not only(reader).alive, "nothing of it is left")
    over = only(reader)
    assert over.lived_until.since(seen.lived_until) >= 0
    assert only(reader).lived_until == over.lived_until, "that is past, and stays so"


def test_a_child_that_left_the_session_is_a_stray_even_without_shim(cradle, reader, wait_until):
    run = cradle.run_record(cradle.start(*DAEMONISED_CHILD_OUTLIVES))
    wait_until(lambda: _children(run.pid), "the child runs")
    (child,) = _children(run.pid)
    ticks = read_stat(child).start_ticks
    os.kill(run.shim_pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(run.shim_pid, run.shim_start_ticks), "the shim is gone")
    os.kill(run.pid, signal.SIGKILL)
    wait_until(lambda: only(reader).phase == "vanished", "the leader's end")
    assert only(reader).strays == (child,)
    assert only(reader).alive
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: not is_alive(child, ticks), "the child is gone")
    assert only(reader).strays == ()
    assert not only(reader).alive


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_all_of_proc_is_swept_rarely_and_once_more_before_nobody_is_said_to_be_left(
    cradle, reader, monkeypatch, wait_until
):
    sweeps = []
    real = incarnation_module.members

    def counted(**arguments):
        sweeps.append(1)
        return real(**arguments)

    monkeypatch.setattr(incarnation_module, "members", counted)
    run = cradle.run_record(cradle.start(*DAEMONISED_CHILD_OUTLIVES))
    wait_until(lambda: _children(run.pid), "the child runs")
    for pid in (run.shim_pid, run.pid):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: only(reader).phase == "vanished", "the leader's end")
    monkeypatch.setattr(incarnation_module, "SWEEP_EVERY_S", 3600.0)
    (child,) = only(reader).strays
    done = len(sweeps)
    for _ in range(50):
        assert only(reader).strays == (child,)
    assert len(sweeps) == done
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: only(reader).strays == (), "nobody is left")
    assert len(sweeps) == done + 1
    for _ in range(50):
        assert only(reader).strays == ()
    assert len(sweeps) == done + 1


def test_a_sweep_that_fails_leaves_the_strays_unknown(cradle, reader, monkeypatch, wait_until):
    run = cradle.run_record(cradle.start(*DAEMONISED_CHILD_OUTLIVES))
    wait_until(lambda: _children(run.pid), "the child runs")
    for pid in (run.shim_pid, run.pid):  # a shim that lives on might say itself that nobody is left
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: only(reader).phase == "vanished", "the leader's end")

    def unreadable(**_arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(incarnation_module, "members", unreadable)
    fresh = ProcessReader(reader._reader._state, reader._reader._clock)
    assert only(fresh).strays is None
    assert only(fresh).alive


# ---------------------------------------------------------------- watches


def test_leader_and_shim_are_watched_until_their_end_and_no_descriptor_leaks(cradle, reader, wait_until):
    before = _open_descriptors()
    identifier = cradle.start("sleep", "600")
    reader.read()
    run = cradle.run_record(identifier)
    watches = reader.watches()
    assert {_pid_of(fd) for fd in watches} == {run.pid, run.shim_pid}
    assert set(watches.values()) == {identifier}
    assert reader.watches() == watches  # the same descriptors as long as they live
    assert not select.select(list(watches), [], [], 0)[0]
    os.kill(run.pid, signal.SIGKILL)
    assert len(select.select(list(watches), [], [], 20)[0]) >= 1
    wait_until(lambda: not only(reader).alive, "the end")
    assert reader.watches() == {}
    # still open, so that the caller can take them out of its selector before their numbers are used again
    for fd in watches:
        os.fstat(fd)
    reader.watches()
    cradle.forks.close()
    assert _open_descriptors() <= before


def test_a_hundred_looks_open_nothing_more(cradle, reader):
    cradle.start("sleep", "600")
    reader.read()
    reader.watches()
    before = _open_descriptors()
    for _ in range(100):
        reader.read()
        reader.watches()
    assert _open_descriptors() == before


# ---------------------------------------------------------------- owners


def test_a_whole_tree_belongs_to_its_endpoint_and_a_strangers_process_to_nobody(cradle, reader, wait_until):
    identifier = cradle.start(
        sys.executable, "-c",
        "import subprocess,time; subprocess.Popen(['sh','-c','sleep 600 & wait'], start_new_session=True);"
        "time.sleep(600)", name="coding",
    )  # fmt: skip
    run = cradle.run_record(identifier)
    wait_until(lambda: _children(run.pid) and _children(_children(run.pid)[0]), "the grandchild runs")
    (child,) = _children(run.pid)
    (grandchild,) = _children(child)
    with subprocess.Popen(["sleep", "600"]) as stranger:
        reader.read()
        for pid in (run.shim_pid, run.pid, child, grandchild):
            assert reader.owner_of(pid) == Subject("endpoint", "coding")
        assert reader.owner_of(stranger.pid) is None
        assert reader.owner_of(os.getpid()) is None
        assert reader.owner_of(1) is None
        description = reader.describe(stranger.pid)
        assert description.owner is None
        assert description.command == "sleep 600"
        assert description.user
        stranger.kill()


def test_an_orphan_is_owned_by_its_session_or_its_marker(cradle, reader, wait_until):
    run = cradle.run_record(cradle.start(*DAEMONISED_CHILD_OUTLIVES))
    wait_until(lambda: _children(run.pid), "the child runs")
    (child,) = _children(run.pid)
    for pid in (run.shim_pid, run.pid):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: only(reader).phase == "vanished", "the leader's end")
    assert reader.owner_of(child) == Subject("endpoint", "thinking")


def test_who_was_foreign_before_its_incarnation_was_known_is_not_foreign_for_ever(cradle, reader):
    run = cradle.run_record(cradle.start("sleep", "600"))
    assert reader.owner_of(run.pid) is None  # nothing was read yet
    reader.read()
    assert reader.owner_of(run.pid) == Subject("endpoint", "thinking")


def test_a_strangers_command_is_shown_without_its_secrets(reader, wait_until):
    """It goes into plans, events and messages to others."""
    words = [sys.executable, "-c", "import time; time.sleep(600)", "--api-key", "hunter2", "--password=hunter2"]
    with subprocess.Popen(words) as stranger:
        wait_until(lambda: b"hunter2" in Path(f"/proc/{stranger.pid}/cmdline").read_bytes(), "it runs")
        command = reader.describe(stranger.pid).command
        stranger.kill()
    assert command.endswith("--api-key *** --password=***")


def test_a_strangers_command_of_any_length_is_shown_in_no_time(reader, wait_until):
    """Anybody on the box may have one, made to be looked at for long: it holds nobody up."""
    words = [sys.executable, "-c", "import time; time.sleep(600)", *["eyJ-" * 30_000] * 10]
    with subprocess.Popen(words) as stranger:
        wait_until(lambda: b"eyJ-" in Path(f"/proc/{stranger.pid}/cmdline").read_bytes(), "it runs")
        began = time.process_time()
        command = reader.describe(stranger.pid).command
        seconds = time.process_time() - began
        stranger.kill()
    assert command.startswith(f"{sys.executable} -c import time; time.sleep(600) eyJ-")
    assert seconds < 5.0


def test_a_pid_that_is_not_in_proc_has_neither_owner_nor_command(reader):
    process = subprocess.Popen(["true"])
    process.wait()
    description = reader.describe(process.pid)
    assert (description.owner, description.user, description.command) == (None, None, None)
    assert reader.owner_of(2**22 + 1) is None


# ---------------------------------------------------------------- listeners


@pytest.fixture
def port():
    return free_port()


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::", "::1"])
def test_a_strangers_listener_is_named(reader, address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip("no such address here")
    with server:
        port = server.getsockname()[1]
        holder = reader.foreign_listener(port)
        assert (holder.port, holder.pid) == (port, os.getpid())
        assert "python" in holder.command
        assert reader.foreign_listener(port) == holder
    assert reader.foreign_listener(port) is None


def test_a_bound_socket_that_does_not_listen_is_no_listener(reader, port):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", port))
        assert reader.foreign_listeners([port]) == {}


def test_our_own_listener_is_not_foreign_and_is_its_own(cradle, reader, port, wait_until):
    identifier = cradle.start(sys.executable, "-c", LISTENER, str(port), port=port)
    wait_until(lambda: listens(port), "it listens")
    reader.read()
    assert reader.foreign_listener(port) is None
    assert reader.owns_listener(identifier, port) is True


def test_a_childs_listener_is_its_parents_own(cradle, reader, port, wait_until):
    identifier = cradle.start("sh", "-c", f'{sys.executable} -c "$0" {port} & wait', LISTENER, port=port)
    wait_until(lambda: listens(port), "it listens")
    reader.read()
    assert reader.owns_listener(identifier, port) is True


def test_somebody_elses_listener_is_not_its_own(cradle, reader, port, wait_until):
    """Of two servers started on one port the loser stays alive and never listens."""
    loser = cradle.start("sleep", "600", name="loser", port=port)
    winner = cradle.start(sys.executable, "-c", LISTENER, str(port), name="winner", port=port)
    wait_until(lambda: listens(port), "the winner listens")
    reader.read()
    assert reader.owns_listener(loser, port) is False
    assert reader.owns_listener(winner, port) is True


def test_without_any_listener_or_record_ownership_cannot_be_told(cradle, reader, port):
    identifier = cradle.start("sleep", "600", port=port)
    reader.read()
    assert reader.owns_listener(identifier, port) is None
    assert reader.owns_listener("nobody", port) is None


# ---------------------------------------------------------------- cost


def test_a_look_at_twenty_running_incarnations_costs_little(cradle, reader, state):
    identifier = cradle.start("sleep", "600")
    source = state.run / identifier
    for number in range(19):
        twin = state.run / f"{identifier}{number}"
        twin.mkdir()
        for name in ("intent.json", "run.json"):
            (twin / name).write_text((source / name).read_text().replace(identifier, twin.name))
    for folder in state.run.iterdir():  # settled long ago
        os.utime(folder, ns=(1, 1))
    assert len(reader.read()) == 20
    best = min(_timed(reader.read) for _ in range(20))
    assert best < 0.02, f"{best / 20 * 1e6:.0f} µs per incarnation"


def _timed(call):
    began = time.process_time()
    call()
    return time.process_time() - began
