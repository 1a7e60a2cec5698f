"""The shim alone, where nothing goes as it should: a record, a line in the log, or a word to its starter says so."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from forked import in_child
from nursery import OBEDIENT, Nursery, OpenLog, in_memory

from reconciler.act import process, shim
from reconciler.identity import boot_id
from reconciler.journal.incarnations import write_intent
from reconciler.plan.observed import Subject


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    made = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield made
    os.close(made)


# ---------------------------------------------------------------- the fork server


def test_a_message_that_brings_too_little_is_passed_over_and_the_next_order_is_carried_out(nursery: Nursery) -> None:
    actor = nursery.actor()
    actor.warm()
    control, server = actor._forks._control, actor._forks.pid
    assert control is not None
    control.send(b"+")
    with Path(os.devnull).open() as null:
        socket.send_fds(control, [b"+"], [null.fileno()])
    launch = nursery.launch(OBEDIENT)
    nursery.run(actor.ensure_started(launch))
    assert len(nursery.members(launch.incarnation)) == 1
    assert actor._forks.pid == server
    assert os.devnull not in {str(fd.readlink()) for fd in Path(f"/proc/{server}/fd").iterdir() if int(fd.name) > 2}


def test_a_shim_that_cannot_be_forked_is_told_to_its_starter(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(shim.os, "fork", fork)
    ready, report = os.pipe()
    unused: Any = None
    assert shim.fork_shim(unused, [-1, -1, report, -1]) is None
    assert shim.fork_shim(unused, []) is None, "of one in advance there is nobody to tell"
    os.close(report)
    with os.fdopen(ready, "rb") as pipe:
        assert pipe.read().startswith(b"it cannot be forked: [Errno 11]")


def test_a_shim_whose_server_died_before_it_asked_to_be_told_takes_no_order() -> None:
    server, waits = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with server, waits, Path(os.devnull).open() as null:
        socket.send_fds(server, [b"+"], [null.fileno()] * 4)
        assert shim.wait_in_advance(waits, os.getpid()) == ([], None), "its parent is not that one any more"


# ---------------------------------------------------------------- becoming the leader


def test_a_folder_that_is_no_control_group_is_not_born_in_and_the_leader_is_forked_all_the_same(tmp_path: Path) -> None:
    for group in (tmp_path, tmp_path / "absent"):
        leader, born_in_group = shim.fork_into(os.fsencode(group))
        if leader == 0:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1]) == 7
        assert not born_in_group


def test_a_group_is_entered_by_the_writer_itself_and_one_that_cannot_be_is_told_in_the_log(
    tmp_path: Path, open_log: OpenLog
) -> None:
    (tmp_path / "cgroup.procs").touch()
    open_log(tmp_path / "log")
    shim.join_group(os.fsencode(tmp_path))
    assert (tmp_path / "cgroup.procs").read_text() == "0"
    assert (tmp_path / "log").read_text() == ""
    shim.join_group(os.fsencode(tmp_path / "absent"))
    assert (tmp_path / "log").read_text().startswith("reconciler: it has no control group of its own: [Errno 2]")


def test_who_is_not_root_can_run_nothing_as_another_user() -> None:
    def become_another() -> str:
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        shim.become_user(b"1 1 1")
        return "it became another"

    assert "only root may run it as another user" in in_child(become_another)


def test_an_order_that_makes_no_sense_is_an_exit_with_its_reason_and_never_a_second_shim(
    folder: int, tmp_path: Path
) -> None:
    order = in_memory(b"\0".join([b"", b"", b"", b"", b"", b"", b"/", b"one", b"1", b"true"]))
    ours, gate = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(b"1")
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    leader = os.fork()
    if leader == 0:
        ours.close()
        shim.become_leader(gate, [order, order, order, folder, log], born_in_group=False)
    gate.close()
    for fd in (order, log):
        os.close(fd)
    with ours:
        assert ours.recv(4096).startswith(b"126 ValueError: ")
    assert os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1]) == 126


@pytest.mark.parametrize(("last", "code"), [("fine", 0), ("absent", 126)])
def test_a_program_that_may_not_be_executed_is_looked_for_further_along_the_path(
    nursery: Nursery, tmp_path: Path, last: str, code: int
) -> None:
    for name, mode in (("plain", 0o644), ("fine", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "render").write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name / "render").chmod(mode)
    path = f"{tmp_path}/absent:{tmp_path}/plain:{tmp_path}/plain/render:{tmp_path}/{last}"
    launch = nursery.launch(("render",), env={"PATH": path})
    nursery.run(nursery.actor().ensure_started(launch))
    assert nursery.exit_code(launch.incarnation) == code
    found: Any = nursery.records(launch.incarnation).exit
    assert found.error == (None if code == 0 else f"{tmp_path}/plain/render: Permission denied")


# ---------------------------------------------------------------- afterwards


def refused_so_often(monkeypatch: pytest.MonkeyPatch, failures: int, number: int = errno.ENOSPC) -> None:
    """Have a record refused at first."""
    tries: list[str] = []
    write = shim.write_record

    def refusing_at_first(folder_fd: int, name: str, text: str, *, durable: bool) -> None:
        tries.append(text)
        if len(tries) <= failures:
            raise OSError(number, os.strerror(number))
        write(folder_fd, name, text, durable=durable)

    monkeypatch.setattr(shim, "write_record", refusing_at_first)
    monkeypatch.setattr(shim, "_RETRY_S", 0.001)
    monkeypatch.setattr(shim, "_MOST_RETRY_S", 0.002)


def watched(folder: int, log: Path) -> str:
    """A leader that ends with 9 at once, watched to its end."""

    def supervise() -> str:
        shim.become_reaper()
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
        shim._signal.pthread_sigmask(shim._signal.SIG_BLOCK, shim._WAKERS)
        leader = os.fork()
        if leader == 0:
            os._exit(9)
        shim.watch(leader, folder, 1 << 20, shim.ask_for_notes(folder), "", durable=True)
        return "it is over"

    return in_child(supervise)


@pytest.mark.parametrize("failures", [0, 2, 100])
@pytest.mark.parametrize("told", [True, False], ids=["told of writes", "by the clock"])
def test_the_exit_code_waits_for_a_full_disk_to_have_room_again(
    folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, told: bool
) -> None:
    refused_so_often(monkeypatch, failures)
    if not told:
        monkeypatch.setattr(shim, "ask_for_notes", lambda _: -1)
    assert watched(folder, tmp_path / "log") == "it is over"
    assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == 9
    assert {p.name for p in tmp_path.iterdir()} == {"exit.json", "log", "over"}


def test_an_exit_code_that_nobody_can_read_any_more_is_not_waited_with(
    folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the records was removed by hand: its shim would stay for ever, and its lock be held."""
    refused_so_often(monkeypatch, 1_000_000, errno.ENOENT)
    assert watched(folder, tmp_path / "log") == "it is over"


def test_why_a_program_could_not_be_run_waits_for_room_as_well(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launch = nursery.launch(("/nowhere/at/all",), subject=Subject("workload", "thinking"))
    write_intent(nursery.state, nursery.actor()._intent(launch, None))
    order = in_memory(process._encode_order(launch, nursery.state, boot_id(), None))
    write, tries = shim.write_record, []

    def full(folder_fd: int, name: str, text: str, *, durable: bool) -> None:
        tries.append(name)
        if name == "exit.json" and len(tries) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder_fd, name, text, durable=durable)

    monkeypatch.setattr(shim, "write_record", full)
    monkeypatch.setattr(shim, "_RETRY_S", 0.001)
    monkeypatch.setattr(shim, "_MOST_RETRY_S", 0.002)
    null = os.open(os.devnull, os.O_RDWR)

    def supervise() -> int:
        shim.become_reaper()
        return shim.supervise(shim.own_identity(), None, order, os.dup(null), os.dup(null), os.dup(null))

    assert in_child(supervise) == "0"
    os.close(order)
    os.close(null)
    assert nursery.exit_code(launch.incarnation) == 127
    found: Any = nursery.records(launch.incarnation).exit
    assert found.error == "/nowhere/at/all: No such file or directory"


@pytest.mark.parametrize(("kind", "synced"), [("endpoint", []), ("workload", [".exit.json.tmp", "ID"])])
def test_the_exit_of_work_reaches_the_disk_and_of_an_endpoint_does_not(
    nursery: Nursery, kind: Literal["endpoint", "workload"], synced: list[str]
) -> None:
    launch = nursery.launch(("true",), subject=Subject(kind, "thinking"))
    write_intent(nursery.state, nursery.actor()._intent(launch, None))
    order = in_memory(process._encode_order(launch, nursery.state, boot_id(), None))

    def supervise() -> list[str]:
        names, sync = [], os.fsync

        def note(fd: int) -> None:
            names.append(Path(f"/proc/self/fd/{fd}").readlink().name)
            sync(fd)

        shim.os.fsync = note
        shim.become_reaper()
        lock, ready, go = (os.open(os.devnull, os.O_RDWR) for _ in range(3))
        shim.supervise(shim.own_identity(), None, order, lock, ready, go)
        return ["ID" if name == launch.incarnation else name for name in names]

    assert in_child(supervise) == str(synced)
    os.close(order)
    assert nursery.exit_code(launch.incarnation) == 0


def test_a_record_that_a_full_disk_takes_only_a_part_of_is_no_record(
    folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(shim.os, "write", lambda fd, data: write(fd, data[:5]))
    assert shim.record_exit(folder, '{"exit_code":9}', durable=False) == '{"exit_code":9}'
    monkeypatch.undo()
    assert not (tmp_path / "exit.json").exists()


def test_word_that_nobody_is_left_is_not_left_through_a_link(folder: int, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "over").symlink_to(victim)
    shim.say_over(folder)
    assert not victim.exists()
    (tmp_path / "over").unlink()
    shim.say_over(folder)
    assert (tmp_path / "over").stat().st_mode & 0o777 == 0o600


def test_a_box_that_does_not_say_how_many_watches_there_are_is_asked_for_none() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert shim.ask_for_notes(2**20) == -1
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_less_than_a_block_is_not_given_back(tmp_path: Path, open_log: OpenLog) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 2000)
    open_log(path)
    assert shim.trim_log(0, 1000) == 0
    assert path.read_bytes() == b"x" * 2000


def test_a_log_that_cannot_be_shortened_at_all_does_not_end_its_shim(tmp_path: Path, open_log: OpenLog) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * (1 << 20))
    open_log(path, os.O_RDONLY)  # as on a file system that became read-only
    assert shim.trim_log(-1, 1000) == -1
    assert path.stat().st_size == 1 << 20
