"""What the box may refuse at each step (disk, descriptors, rights) is told, and leaves nothing that is not recorded."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from nursery import BRIEF, OBEDIENT, Nursery, is_running, until
from ports import free_port
from refusals import refusing

from reconciler import identity
from reconciler.act import account, forkserver, ports, process, target
from reconciler.act.account import find_account
from reconciler.act.ports import prove_free
from reconciler.act.process import Launch
from reconciler.errors import ActError, NotOurs, StateError
from reconciler.journal import incarnations
from reconciler.journal.archive import archive
from reconciler.journal.incarnations import Exit, lock_path
from reconciler.journal.layout import take_lock


def start(nursery: Nursery, launch: Launch) -> None:
    nursery.run(nursery.actor().ensure_started(launch))


# ---------------------------------------------------------------- starting


def test_an_intent_that_a_full_disk_refuses_starts_nothing_and_the_next_start_goes_on(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = nursery.launch(OBEDIENT)
    with monkeypatch.context() as full:
        full.setattr(incarnations, "write_intent", refusing(errno.ENOSPC))
        with pytest.raises(ActError, match=r"intent to start it cannot be recorded: .*No space left"):
            start(nursery, launch)
    assert nursery.is_over(launch)
    assert nursery.records(launch.incarnation).intent is None
    start(nursery, launch)
    assert len(nursery.members(launch.incarnation)) == 1


def test_logs_that_were_removed_with_their_folder_keep_nothing_from_being_started(nursery: Nursery) -> None:
    nursery.state.logs.rmdir()
    assert nursery.log(nursery.started(OBEDIENT)) == "ready\n"
    assert nursery.state.logs.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("module", "name"), [(process.os, "pipe"), (process.os, "memfd_create")])
def test_a_start_for_which_no_descriptor_is_left_leaves_no_record_and_is_no_failure(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    actor, launch = nursery.actor(), nursery.launch(OBEDIENT)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as short:
        short.setattr(module, name, refusing(errno.EMFILE))
        with pytest.raises(ActError, match="its shim could not be started"):
            nursery.run(actor.ensure_started(launch))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert list(nursery.state.run.iterdir()) == []
    nursery.run(actor.ensure_started(launch))
    assert is_running(nursery.run_record(launch.incarnation).pid)


@pytest.mark.parametrize("disk", ["writable", "full"])
def test_a_fork_server_that_cannot_be_started_is_the_recorded_reason_and_leaks_no_descriptor(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    """An interpreter that went away in an upgrade. Where not even that can be recorded, the intent alone says it."""
    actor = nursery.actor()
    launch = nursery.launch(OBEDIENT)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as gone:
        gone.setattr(forkserver.sys, "executable", "/nowhere/python")
        if disk == "full":
            gone.setattr(incarnations, "write_exit", refusing(errno.ENOSPC))
        actor.warm()
        with pytest.raises(ActError, match=r"its shim could not be started: .*/nowhere/python"):
            nursery.run(actor.ensure_started(launch))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert nursery.is_over(launch)
    found = nursery.records(launch.incarnation).exit
    assert (found is None) if disk == "full" else (isinstance(found, Exit) and found.exit_code == 126)
    nursery.run(actor.ensure_killed(launch.incarnation))
    again = nursery.launch(OBEDIENT)
    nursery.run(actor.ensure_started(again))
    assert len(nursery.members(again.incarnation)) == 1


def test_a_fork_server_that_dies_while_it_is_handed_an_order_is_replaced_and_the_order_is_carried_out_once(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = nursery.actor()
    actor.warm()
    first = actor._forks.pid
    assert first is not None
    launch = nursery.launch(OBEDIENT)
    send = forkserver.socket.send_fds

    def send_to_the_dead(*arguments: Any) -> int:
        if is_running(first):
            os.kill(first, 9)
            until(lambda: not is_running(first), "its end")
        return send(*arguments)

    monkeypatch.setattr(forkserver.socket, "send_fds", send_to_the_dead)
    nursery.run(actor.ensure_started(launch))
    assert len(nursery.members(launch.incarnation)) == 1
    assert actor._forks.pid not in (None, first)


def test_a_lock_that_is_a_link_is_not_taken_and_what_it_leads_to_stays(nursery: Nursery, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    launch = nursery.launch(OBEDIENT)
    lock = lock_path(nursery.state, "endpoint", "thinking")
    lock.symlink_to(victim)
    with pytest.raises(ActError, match="its lock cannot be opened"):
        start(nursery, launch)
    assert nursery.marked(launch.incarnation) == set()
    assert nursery.records(launch.incarnation).intent is None
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["locks", "logs", "run"])
def test_a_link_in_the_place_of_a_folder_is_not_written_through_though_it_came_later(
    nursery: Nursery, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    planted = nursery.state.path / name
    planted.rmdir()
    planted.symlink_to(victim)
    looks_like_a_draft = victim / ".precious.new"
    looks_like_a_draft.mkdir()
    launch = nursery.launch(OBEDIENT)
    with pytest.raises((ActError, StateError), match="symbolic link"):
        start(nursery, launch)
    assert list(victim.iterdir()) == [looks_like_a_draft]
    assert nursery.marked(launch.incarnation) == set()
    assert nursery.records(launch.incarnation).intent is None


def test_what_was_put_away_is_not_started_again(nursery: Nursery) -> None:
    launch = nursery.launch(("/bin/true",))
    start(nursery, launch)
    assert nursery.exit_code(launch.incarnation) == 0
    archive(nursery.state, launch.incarnation, keep=20)
    start(nursery, launch)
    assert nursery.records(launch.incarnation).intent is None
    assert nursery.is_over(launch)


def test_an_earlier_daemons_shim_that_reports_nothing_is_waited_for_no_longer_than_a_start_may_take(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_START_S", 0.1)
    launch = nursery.launch(OBEDIENT)
    incarnations.write_intent(nursery.state, nursery.actor()._intent(launch, None))
    lock = take_lock(lock_path(nursery.state, "endpoint", "thinking"))
    assert lock is not None
    with pytest.raises(ActError, match="its shim has not reported"):
        start(nursery, launch)
    os.close(lock)
    with pytest.raises(ActError, match="was never started; its shim is gone"):
        start(nursery, launch)
    assert nursery.is_over(launch)


# ---------------------------------------------------------------- ending


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (target.identity, "open_pidfd"),
        (target.census, "members"),
        (target, "contradiction"),
        (target, "is_locked"),
    ],
)
def test_what_cannot_be_told_for_want_of_descriptors_is_not_signalled(
    nursery: Nursery, obedient_process: str, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    run = nursery.run_record(obedient_process)
    with monkeypatch.context() as short:
        short.setattr(module, name, refusing(errno.EMFILE))
        with pytest.raises(NotOurs):
            nursery.run(nursery.actor().ensure_killed(obedient_process))
        if name != "members":  # there the leader was known, and only who else belongs to it was not
            assert nursery.records(obedient_process).stop is None
            assert is_running(run.pid)
    nursery.run(nursery.actor().ensure_killed(obedient_process))
    assert not is_running(run.pid)


def test_a_shim_that_cannot_be_told_from_another_process_ends_nobody_but_the_leader_that_was_told(
    nursery: Nursery, tree_with_setsid_grandchild: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = nursery.run_record(tree_with_setsid_grandchild)
    others = nursery.members(tree_with_setsid_grandchild) - {run.pid}
    opened = identity.open_pidfd

    def open_all_but_the_shim(pid: int, start_ticks: int) -> int | None:
        return refusing(errno.EMFILE)() if pid == run.shim_pid else opened(pid, start_ticks)

    with monkeypatch.context() as short:
        short.setattr(target.identity, "open_pidfd", open_all_but_the_shim)
        with pytest.raises(NotOurs, match=f"pid {run.shim_pid}: its identity cannot be verified"):
            nursery.run(nursery.actor().ensure_killed(tree_with_setsid_grandchild))
    assert others
    assert all(is_running(pid) for pid in others)
    nursery.run(nursery.actor().ensure_killed(tree_with_setsid_grandchild))
    assert not any(is_running(pid) for pid in others)


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (errno.EPERM, ActError, "not permitted to end pid"),
        (errno.EMFILE, NotOurs, "its identity cannot be verified"),
    ],
)
def test_a_member_that_may_not_be_signalled_is_named_and_not_waited_for(
    nursery: Nursery,
    root_killed_tree: str,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: type[Exception],
    message: str,
) -> None:
    members = nursery.members(root_killed_tree)
    assert members
    with monkeypatch.context() as forbidden:
        forbidden.setattr(target.identity, "send_signal", refusing(number))
        with pytest.raises(error, match=message) as caught:
            nursery.run(nursery.actor().ensure_killed(root_killed_tree))
    assert any(str(pid) in str(caught.value) for pid in members)
    assert nursery.members(root_killed_tree) == members


def test_a_leader_that_may_not_be_signalled_is_told_and_its_stop_counts_as_begun(
    nursery: Nursery, obedient_process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record came first: the grace counts, and afterwards it is killed."""
    run = nursery.run_record(obedient_process)
    with monkeypatch.context() as forbidden:
        forbidden.setattr(process.signal, "pidfd_send_signal", refusing(errno.EPERM))
        with pytest.raises(ActError, match=f"pid {run.pid} cannot be signalled: Operation not permitted"):
            nursery.run(nursery.actor().ensure_stopped(obedient_process, BRIEF))
    assert is_running(run.pid)
    assert nursery.records(obedient_process).stop is not None
    nursery.run(nursery.actor().ensure_stopped(obedient_process, BRIEF))
    assert not is_running(run.pid)


def test_a_leader_that_ends_right_before_its_signal_is_an_end_like_any_other(
    nursery: Nursery, obedient_process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = nursery.run_record(obedient_process)
    record = incarnations.write_stop

    def record_and_see_it_end(*arguments: Any) -> None:
        record(*arguments)
        os.kill(run.pid, 9)
        until(lambda: not Path(f"/proc/{run.pid}").exists(), "it to be collected")

    monkeypatch.setattr(incarnations, "write_stop", record_and_see_it_end)
    nursery.run(nursery.actor().ensure_stopped(obedient_process, BRIEF))
    assert nursery.exit_code(obedient_process) == -9


# ---------------------------------------------------------------- ports and users


@pytest.fixture
def port() -> int:
    return free_port()


def test_a_port_that_may_not_be_bound_is_not_called_taken(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_bind", refusing(errno.EACCES))
    with pytest.raises(ActError, match=rf"port {port} cannot be bound: Permission denied"):
        prove_free(port)


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_on_a_box_without_ipv6_a_port_can_be_free(port: int, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    bind = ports._bind_on

    def without_ipv6(family: socket.AddressFamily, address: str, wanted: int, *, reuse: bool) -> socket.socket:
        return bind(family, address, wanted, reuse=reuse) if family == socket.AF_INET else refusing(number)()

    monkeypatch.setattr(ports, "_bind_on", without_ipv6)
    prove_free(port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ActError):
            prove_free(port)


def test_a_port_of_which_the_kernel_does_not_tell_who_has_it_is_not_taken_for_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ports, "sockets", refusing(errno.EPERM))
    with socket.socket() as loading:
        loading.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        loading.bind(("127.0.0.1", 0))
        with pytest.raises(ActError, match="the kernel does not tell who holds it"):
            prove_free(loading.getsockname()[1])


def test_a_user_database_that_does_not_answer_is_not_taken_for_a_user_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(account.pwd, "getpwnam", refusing(errno.EIO))
    with pytest.raises(ActError, match="user 'render' cannot be looked up: Input/output error"):
        find_account("render")
