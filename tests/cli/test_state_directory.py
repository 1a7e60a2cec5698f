"""The state directory under attack: any umask, links planted where the program writes, others' parents and files."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from desk import Desk

from reconciler.cli.eyes import prepare_node
from reconciler.clock import SystemClock
from reconciler.errors import ReconcilerError, StateError
from reconciler.journal.incarnations import lock_path
from reconciler.journal.journal import Journal
from reconciler.journal.layout import StateDir, acquire_writer, is_locked, take_lock, writer
from reconciler.loop.control import ControlServer
from reconciler.plan.ledger import Ledger

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


async def nobody(_op: str, _arguments: object) -> dict[str, object]:
    return {}


def begin(state: StateDir) -> None:
    """A look, then everything that a daemon creates under names that anybody can foresee, up to the first error."""

    async def listen() -> None:
        door = ControlServer(state.control_socket, nobody)
        await door.open()
        await door.close()

    def commit() -> None:
        journal = Journal.open(state.journal, SystemClock())
        try:
            journal.commit(Ledger(boot_id="boot"), [], SystemClock().now())
        finally:
            journal.close()

    def lock() -> None:
        held = take_lock(lock_path(state, "endpoint", "one"))
        assert held is not None
        os.close(held)

    with suppress(ReconcilerError):
        prepare_node("2x8GiB", state)
    with suppress(ReconcilerError, OSError):
        state.ensure()
        acquire_writer(state).release()
        prepare_node("2x8GiB", state)
        commit()
        asyncio.run(listen())
        lock()


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated node's files are made; the driver under pynvml stays as it is."""
    monkeypatch.setattr("reconciler.sim.driver.install", lambda _folder: None)


FORESEEN = [
    "daemon.lock", "control.sock", "journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm", "journal.sqlite.new",
    "locks/endpoint-one.lock", "sim/node.json", "sim/.node.json.{pid}", "sim/bin/vllm", "sim/bin/.vllm.{pid}",
]  # fmt: skip
FORESEEN_FOLDERS = ["run", "ended", "logs", "locks", "sim", "sim/gpus", "sim/dying", "sim/bin", "sim/gpus/0"]


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("existing", [True, False], ids=["to a file", "to nowhere yet"])
@pytest.mark.parametrize("name", FORESEEN)
def test_nothing_is_written_through_a_link_in_the_place_of_a_file(tmp_path: Path, name: str, existing: bool) -> None:
    state = StateDir(tmp_path / "state")
    begin(state)
    victim = tmp_path / "victim"
    if existing:
        victim.write_bytes(b"precious")
        victim.chmod(0o644)
    planted = state.path / name.format(pid=os.getpid())
    planted.unlink(missing_ok=True)
    planted.symlink_to(victim)
    begin(state)
    if existing:
        assert (victim.read_bytes(), victim.stat().st_mode & 0o777) == (b"precious", 0o644)
    else:
        assert not os.path.lexists(victim)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("name", FORESEEN_FOLDERS)
def test_nothing_is_written_through_a_link_in_the_place_of_a_folder(tmp_path: Path, name: str) -> None:
    state = StateDir(tmp_path / "state")
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o755)
    planted = state.path / name
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.symlink_to(victim)
    begin(state)
    assert list(victim.iterdir()) == []
    assert victim.stat().st_mode & 0o777 == 0o755


def test_a_link_in_the_place_of_the_state_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "state").symlink_to("elsewhere")
    with pytest.raises(StateError, match="symbolic link"):
        StateDir(tmp_path / "state").ensure()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_lock_that_is_also_another_file_is_not_written(tmp_path: Path) -> None:
    """A hard link: the writer's lock says whose it is, over whatever stood there."""
    state = StateDir(tmp_path / "state")
    state.ensure()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    os.link(victim, state.daemon_lock)
    with pytest.raises(StateError, match="no file of its own"):
        acquire_writer(state)
    assert victim.read_bytes() == b"precious"


def test_a_journal_behind_a_link_is_told_to_whom_it_may_concern(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    begin(state)
    state.journal.rename(tmp_path / "elsewhere")
    state.journal.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match=r"journal\.sqlite is a symbolic link"):
        Journal.open(state.journal, SystemClock())
    with pytest.raises(StateError, match=r"journal\.sqlite is a symbolic link"):
        Journal.open_readonly(state.journal)


@pytest.mark.parametrize("name", ["daemon.lock", "journal.sqlite", "journal.sqlite-wal", "locks/endpoint-one.lock"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    state = StateDir(tmp_path / "state")
    state.ensure()
    os.mkfifo(state.path / name)
    if "lock" in name:
        with pytest.raises(OSError, match="no file of its own"):
            take_lock(state.path / name)
        is_locked(state.path / name)
        writer(state)
    else:
        for open_it in (
            lambda: Journal.open(state.journal, SystemClock()),
            lambda: Journal.open_readonly(state.journal),
        ):
            with pytest.raises(StateError, match=f"{state.path / name}".rpartition("/")[2] + " is no regular file"):
                open_it()


# ---------------------------------------------------------------- who else may write


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_a_parent_that_is_missing_is_made_private(tmp_path: Path, mask: int) -> None:
    os.umask(mask)
    StateDir(tmp_path / "a/b/state").ensure()
    assert [stat.S_IMODE((tmp_path / p).stat().st_mode) for p in ("a", "a/b", "a/b/state")] == [0o700] * 3


def test_a_parent_that_others_may_write_is_refused_unless_it_is_sticky(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(StateError, match=r"can be written by everybody, and the state directory lies in it") as caught:
        StateDir(shared / "state").ensure()
    assert f"chmod o-w {shared}" in (caught.value.hint or "")
    shared.chmod(0o1777)
    StateDir(shared / "state").ensure()


@pytest.mark.parametrize("planted", ["link", "hard link", "stranger"])
def test_what_others_may_have_left_in_it_is_not_built_on(tmp_path: Path, planted: str) -> None:
    state = StateDir(tmp_path / "state")
    state.ensure()
    state.path.chmod(0o777)
    bait = state.run / "bait"
    if planted == "link":
        bait.symlink_to("/etc/passwd")
    elif planted == "hard link":
        (tmp_path / "victim").touch()
        os.link(tmp_path / "victim", bait)
    else:
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        bait.touch()
        os.chown(bait, 12345, -1)
    with pytest.raises(StateError, match="bait is a link or another user's"):
        state.ensure()
    bait.unlink()
    state.ensure()
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


@needs_root
@pytest.mark.parametrize("name", ["", "run", "locks"])
def test_a_folder_of_another_user_is_refused(tmp_path: Path, name: str) -> None:
    state = StateDir(tmp_path / "state")
    state.ensure()
    os.chown(state.path / name, 12345, -1)
    with pytest.raises(StateError, match="belongs to uid 12345"):
        state.ensure()


# ---------------------------------------------------------------- a whole life under any umask


def modes(state: Path) -> dict[str, tuple[str, str]]:
    """What is not private: kind and mode by path. The simulated engines are programs, which have to be executable."""
    found = {}
    for path in (state, *state.rglob("*")):
        info = path.lstat()
        mode = stat.S_IMODE(info.st_mode)
        if stat.S_ISDIR(info.st_mode):
            wanted = 0o700
        elif path.parent == state / "sim/bin":
            wanted = 0o755
        else:
            wanted = mode & 0o600  # less is private as well
        if mode != wanted:
            found[str(path.relative_to(state))] = (stat.filemode(info.st_mode), f"{mode:04o}")
    return found


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_all_that_a_daemon_makes_is_private_whatever_the_umask(desk: Desk, mask: int) -> None:
    desk.write(
        "setpoints.yaml",
        "version: 1\nendpoints:\n"
        "  one: {engine: custom, command: [sh, -c, 'umask > umask; exec sleep 600'], gpus: 0}\n",
    )
    os.umask(mask)
    desk.state = desk.root / "deep" / "state"
    assert desk.run("status").returncode == 0  # a look makes the simulated node before any daemon
    desk.start()
    desk.wait((desk.root / "umask").exists, "it runs")
    assert stat.S_ISSOCK((desk.state / "control.sock").stat().st_mode)
    assert stat.S_IMODE((desk.state / "control.sock").stat().st_mode) == 0o600
    assert desk.run("overlay", "submit", "--gpus", "1", "--name", "job", "--", "true").returncode == 0
    assert not modes(desk.state)
    assert stat.S_IMODE((desk.root / "overlays/job.yaml").stat().st_mode) & 0o022 == 0
    assert desk.run("--format", "json", "validate").returncode == 0, "what was written is read"
    desk.close()
    desk.daemon = None
    assert not modes(desk.state)
    assert stat.S_IMODE(desk.state.parent.stat().st_mode) == 0o700
