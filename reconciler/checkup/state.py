"""The state directory: who may read it, what lies under it, and whether its journal is sound."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from reconciler.checkup.check import Check, Level, or_ok
from reconciler.errors import StateError
from reconciler.journal.layout import StateDir, writer
from reconciler.journal.reader import JournalReader
from reconciler.spec.trust import writers

_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "afs", "fuse.sshfs", "fuse.glusterfs")
_SCARCE, _NONE_LEFT = 1 << 30, 64 << 20
"""Bytes left on the disk: logs and the journal grow by some MiB an hour; without any, nothing can be recorded, and
what cannot be recorded is not done."""
_PUNCH_HOLE = 1 | 2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_MOST_NAMED = 5


def check_state(state: StateDir) -> tuple[Check, ...]:
    """Every part of it. Changes nothing."""
    if not os.path.lexists(state.path):
        return (Check("state", "ok", f"{state.path} is not there yet; the first `run` or `apply` makes it"),)
    return or_ok(_state(state), "state", f"{state.path}: private, on a local disk, journal sound")


def _state(state: StateDir) -> Iterator[Check]:
    path = state.path
    try:
        info = path.lstat()
    except OSError as error:
        yield Check("state", "unknown", f"{path} cannot be seen: {error.strerror}", "run as the daemon's user")
        return
    if not stat.S_ISDIR(info.st_mode):
        hint = "name the directory itself with --state-dir"
        yield Check("state", "error", f"{path} is not a directory", hint)
        return
    if info.st_uid != os.geteuid():
        hint = "run `doctor` as the user who runs the daemon, or name another directory with --state-dir"
        yield Check("state", "error", f"{path} belongs to uid {info.st_uid}, not to you (uid {os.geteuid()})", hint)
        return
    yield from _parents(path)
    yield from _rights(path)
    yield from _disk(path)
    yield from _journal(state)


def _parents(path: Path) -> Iterator[Check]:
    """Who may write to a folder above can move what lies below away, and put something else there."""
    for folder in path.resolve().parents:
        info = folder.stat()
        by = f"belongs to uid {info.st_uid}" if info.st_uid not in (0, os.geteuid()) else None
        by = by or (None if info.st_mode & stat.S_ISVTX else writers(info, str(folder)))
        if by:
            level: Level = "error" if folder == path.parent and not by.startswith("belongs") else "warning"
            hint = f"chmod go-w {folder} (or +t), or name a state directory elsewhere with --state-dir"
            yield Check("state", level, f"{folder}, above {path}, {by}", hint)


def _rights(path: Path) -> Iterator[Check]:
    """Only its owner may read or write what lies here: environments and commands tell much of a person's work."""
    loose = [path] if path.stat().st_mode & 0o077 else []
    strange: list[Path] = []
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            one = Path(folder, name)
            try:
                info = one.lstat()
            except OSError:
                continue  # gone meanwhile
            if stat.S_ISLNK(info.st_mode) or info.st_uid != os.geteuid():
                strange.append(one)
            elif info.st_mode & 0o077 and not one.is_relative_to(path / "sim"):
                loose.append(one)
    if loose:
        yield Check("state", "warning", f"others may look into {_listed(loose)}", f"chmod -R go-rwx {path}")
    if strange:
        hint = "nothing of this program makes links or files of other users there: look at them, then remove them"
        yield Check("state", "warning", f"links or files of others: {_listed(strange)}", hint)


def _disk(path: Path) -> Iterator[Check]:
    room = os.statvfs(path)
    free = room.f_bavail * room.f_frsize
    if free < _SCARCE:
        level: Level = "error" if free < _NONE_LEFT else "warning"
        hint = "make room: what cannot be recorded is not done, and logs are cut off"
        yield Check("state", level, f"{free >> 20} MiB are left on the disk of {path}", hint)
    kind = file_system(path, Path("/proc/self/mountinfo").read_text())
    if kind in _NETWORK:
        hint = "name a folder on a local disk with --state-dir"
        yield Check(
            "state",
            "error",
            f"{path} lies on a network file system ({kind}): locks and the journal need a local one",
            hint,
        )
    try:
        file = os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)  # nameless: gone when closed
    except OSError:
        return  # a file system without nameless files: not found out
    try:
        os.write(file, b"\0" * (128 << 10))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(file, _PUNCH_HOLE, ctypes.c_int64(0), ctypes.c_int64(64 << 10)) != 0:
            problem = os.strerror(ctypes.get_errno())
            hint = "ext4, XFS, Btrfs, ZFS and tmpfs can; or let the engines write their own logs"
            message = f"logs are cut off whole at their bound on the file system of {path} ({problem})"
            yield Check("state", "warning", message, hint)
    except OSError as error:
        yield Check("state", "error", f"{path} cannot be written to: {error.strerror}", "make room, or mend the disk")
    finally:
        os.close(file)


def file_system(path: Path, mountinfo: str) -> str:
    """Type of the file system that `path` lies on, by proc_pid_mountinfo(5); empty: not told."""
    best = ("", "")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ") if len(left.split()) > 4 else ""
        if point and path.is_relative_to(point) and len(point) >= len(best[0]):  # the last mount of a point counts
            best = (point, right.split()[0])
    return best[1]


def _journal(state: StateDir) -> Iterator[Check]:
    try:
        with JournalReader.open_readonly(state.journal) as journal:
            journal.ledger()
            damage = journal.damage()
    except StateError as error:
        yield Check("state", "error", error.message, error.hint)
        return
    if damage is not None:
        hint = "the daemon puts a journal aside that it cannot use, and goes on; processes are adopted from run/"
        yield Check("state", "error", f"{state.journal} is damaged: {damage}", hint)
    try:
        held = writer(state)
    except StateError as error:
        yield Check("state", "unknown", error.message, error.hint)
        return
    if held is not None:
        yield Check("state", "ok", f"{state.path}: in use by the daemon with pid {held.pid or 'unknown'}")


def _listed(paths: list[Path]) -> str:
    named = ", ".join(str(path) for path in sorted(paths)[:_MOST_NAMED])
    more = len(paths) - _MOST_NAMED
    return f"{named} and {more} more" if more > 0 else named
