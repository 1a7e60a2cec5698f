"""A state directory that cannot be used is named before anything is written; an untold lock is not a free one."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import STRANGER, as_a_plain_user
from refusals import refusing

from reconciler.errors import DaemonRunning, StateError
from reconciler.journal import layout
from reconciler.journal.layout import StateDir, WriterInfo, acquire_writer, is_locked, take_lock, writer


@pytest.fixture
def owned() -> Iterator[Path]:
    """A folder of somebody who is not root, which they can reach."""
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    folder = top / "parent" / "state"
    folder.mkdir(parents=True)
    if os.geteuid() == 0:
        for each in (folder.parent, folder):
            os.chown(each, STRANGER, STRANGER)
    yield folder
    folder.parent.chmod(0o755)
    folder.chmod(0o755)
    shutil.rmtree(top)


def ensured_by_its_owner(folder: Path) -> str:
    """The refusal, met by somebody whom file modes bind."""
    return as_a_plain_user(lambda: StateDir(folder).ensure() or "it was used")


# ---------------------------------------------------------------- the directory


def test_a_parent_that_may_not_be_looked_into_is_named(owned: Path) -> None:
    owned.parent.chmod(0)
    said = ensured_by_its_owner(owned)
    assert said.startswith(f"StateError: {owned}")
    assert "cannot be used as state directory: Permission denied" in said
    owned.parent.chmod(0o755)
    assert list(owned.iterdir()) == []


def test_a_directory_that_may_not_be_listed_is_named(owned: Path) -> None:
    owned.chmod(0o300)
    assert ensured_by_its_owner(owned).startswith(
        f"StateError: {owned}: cannot be used as state directory: Permission denied"
    )
    assert list(owned.iterdir()) == []


def test_a_directory_with_other_things_in_it_that_may_not_be_written_keeps_its_mode(owned: Path) -> None:
    (owned / "other").touch()
    owned.chmod(0o500)
    assert ensured_by_its_owner(owned).startswith(f"StateError: {owned}: the state directory is not writable")
    assert stat.S_IMODE(owned.stat().st_mode) == 0o500
    assert [p.name for p in owned.iterdir()] == ["other"]


def test_a_directory_that_cannot_be_made_private_is_not_used(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that is mounted read-only by now."""
    state.locks.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refusing(errno.EROFS))
    with pytest.raises(StateError, match="locks: cannot be used as state directory: Read-only file system"):
        state.ensure()


def test_one_that_vanishes_while_it_is_looked_at_is_an_error_and_not_taken_for_sound(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    tighten = layout._tighten

    def tighten_and_lose_the_next(path: Path, info: os.stat_result) -> None:
        tighten(path, info)
        shutil.rmtree(state.path)

    monkeypatch.setattr(layout, "_tighten", tighten_and_lose_the_next)
    with pytest.raises(StateError, match=f"{state.path}.*(not writable|No such file)"):
        state.ensure()
    monkeypatch.setattr(layout, "_make", lambda _path: False)
    with pytest.raises(StateError, match="cannot be used as state directory: No such file"):
        layout._ensure_private(state.locks)
    assert not state.locks.exists()


# ---------------------------------------------------------------- the one writer


def test_a_writer_that_cannot_say_who_it_is_for_a_full_disk_is_none(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(layout.os, "pwrite", refusing(errno.ENOSPC))
        with pytest.raises(StateError, match=r"daemon\.lock: cannot be used.*No space left"):
            acquire_writer(state)
    assert writer(state) is None
    with acquire_writer(state):
        found = writer(state)
        assert found is not None
        assert found.pid == os.getpid()


def test_a_lock_that_cannot_be_opened_is_not_a_free_one(state: StateDir, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    state.daemon_lock.symlink_to(victim)
    for look in (acquire_writer, writer):
        with pytest.raises(StateError, match=r"daemon\.lock: cannot be used"):
            look(state)
    with pytest.raises(OSError, match="symbolic links"):
        is_locked(state.daemon_lock)
    assert victim.read_bytes() == b"precious"


def test_a_lock_with_a_second_name_is_not_taken(state: StateDir, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    os.link(victim, state.locks / "lock")
    with pytest.raises(PermissionError, match="no file of its own"):
        take_lock(state.locks / "lock")
    assert victim.read_bytes() == b"precious"
    assert not is_locked(victim)


def test_giving_the_directory_back_twice_does_not_take_it_from_the_next_writer(state: StateDir) -> None:
    first = acquire_writer(state)
    first.release()
    with acquire_writer(state):
        first.release()
        found = writer(state)
        assert found is not None
        assert found.pid == os.getpid()
    assert writer(state) is None


def test_a_lock_file_that_was_removed_lets_nobody_in_and_is_made_again(state: StateDir) -> None:
    with acquire_writer(state) as held:
        state.daemon_lock.unlink()
        assert writer(state) == WriterInfo(None, None)
        with pytest.raises(DaemonRunning):
            acquire_writer(state)
        state.daemon_lock.unlink(missing_ok=True)
        held.keep()
        found = writer(state)
        assert found is not None
        assert found.pid == os.getpid()
        inode = state.daemon_lock.stat().st_ino
        held.keep()
        assert state.daemon_lock.stat().st_ino == inode, "one that is there is left alone"
    assert writer(state) is None


def test_who_finds_another_writer_in_its_place_ends(state: StateDir, tmp_path: Path) -> None:
    """The whole directory was exchanged, and a daemon begun on the new one."""
    with acquire_writer(state) as held:
        state.path.rename(tmp_path / "away")
        held.keep()
        state.ensure()
        with acquire_writer(state), pytest.raises(StateError, match="another daemon took this state directory"):
            held.keep()
        held.keep()
        found = writer(state)
        assert found is not None
        assert found.pid == os.getpid(), "and it is its own again once that one has ended"


def test_where_folders_cannot_be_locked_the_lock_file_alone_counts(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = layout.fcntl.flock

    def as_on_nfs(fd: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        lock(fd, operation)

    monkeypatch.setattr(layout.fcntl, "flock", as_on_nfs)
    with acquire_writer(state), pytest.raises(DaemonRunning):
        acquire_writer(state)
    with acquire_writer(state):
        pass
    assert writer(state) is None
