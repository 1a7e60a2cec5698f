"""What engines leave in /dev/shm when they are killed: which files are theirs, and removing them once nobody has them.

vLLM leaves `psm_*`, `sem.mp-*` and `vllm_offload_*.mmap` (8 GiB each) after SIGKILL; that memory is gone until somebody
unlinks it. A name proves nothing: a stranger's file has the same. So it is recorded, while an incarnation lives, which
files its own processes have mapped or open; what is removed afterwards is proven to be

1. of a kind that nobody means to keep, by its name;
2. created after the incarnation began, and the file of its user, by the file system;
3. held by a member of it, and then by nobody else who could be seen;
4. the same file still, by device, inode and time of birth; and
5. mapped and open by nobody, by the kernel: it grants a write lease on a file only then (fcntl(2), F_SETLEASE). A scan
   of /proc cannot say so: in a container, or without root, there are processes that cannot be looked into.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import signal
import stat
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from reconciler.act.target import Target, examine
from reconciler.errors import ReconcilerError
from reconciler.identity import boot_id
from reconciler.journal import incarnations
from reconciler.journal.incarnations import Intent, SharedFile
from reconciler.journal.layout import StateDir
from reconciler.plan.observed import Subject
from reconciler.units import counted, format_size

SHM = Path("/dev/shm")  # noqa: S108 - it is what this module is about
LEAKS = re.compile(r"psm_[0-9a-f]{8}|sem\.mp-\w+|vllm_offload_.+\.mmap|torch_\d+_\d+_\d+|nccl-\w{6}")
"""Names that libraries make up for one run. Others, such as a cache of weights, may be meant to stay."""
_AT_FDCWD, _NOFOLLOW, _BTIME = -100, 0x100, 0x800  # AT_SYMLINK_NOFOLLOW, STATX_BTIME (statx(2))
_BTIME_AT = 80  # offset of stx_btime in struct statx
_NAMED = 4
_ANOTHERS = "another process had it, too"


class Left(Struct, frozen=True):
    """A file that an ended incarnation left."""

    incarnation: str
    subject: Subject
    file: SharedFile
    size_bytes: int
    why: str | None
    """Why it stays; None: it is removed, or nothing speaks against it."""


def note(state: StateDir, incarnation: str, *, shm: Path = SHM) -> None:
    """Record what a living incarnation has in /dev/shm, beside what was recorded of it before.

    Costs one listing of the folder as long as nothing new of such a name is there.

    Raises:
        OSError: it could not be recorded, or /proc not be read.
    """
    folder = state.run / incarnation
    known = {file.name: file for file in incarnations.read_shared(folder)}
    fresh = {name: file for name, file in _candidates(shm) if not same_file(file, known.get(name))}
    intent = incarnations.read(folder).intent if fresh else None
    if not isinstance(intent, Intent):
        return
    fresh = {n: f for n, f in fresh.items() if f.born is not None and f.born >= intent.started.wall}
    try:
        target = examine(state, boot_id(), incarnation) if fresh else None
        if target is None:
            return
        members = _members(target)
        inside = holders(fresh, members)
        held = {n: f for n, f in fresh.items() if any(_uid(pid) == f.uid for pid in inside[n])}
        if not held:
            return
        everybody = holders(held, _processes())
        members |= _members(target)  # it may have forked meanwhile
    except ReconcilerError:
        return  # who belongs to it cannot be told, so neither can what is its own
    for name, file in held.items():
        known[name] = replace(file, sole=everybody[name] <= members)
    incarnations.write_shared(folder, tuple(known[name] for name in sorted(known)))


def _members(target: Target) -> set[int]:
    return {member.pid for member in target.members()}


def sweep(state: StateDir, among: Collection[str] | None = None, *, shm: Path = SHM) -> list[Left]:
    """Remove what ended incarnations left and nobody has any more; what was removed, and what stays and why.

    Args:
        state: where their records are.
        among: ids; None: all.
        shm: where the files are.

    Raises:
        OSError: the records could not be read or written.
    """
    done: list[Left] = []
    for folder, intent, files in _recorded(state, among):
        kept: list[SharedFile] = []
        for file in files:
            size = _size(file, shm) if intent.boot_id == boot_id() else None
            if size is None:
                continue  # it is there no more
            why = _remove(file, shm) if file.sole else _ANOTHERS
            done.append(Left(intent.id, intent.subject, file, size, why))
            if why is not None:
                kept.append(file)
        if len(kept) != len(files):
            incarnations.write_shared(folder, tuple(kept))
    return done


def left_behind(state: StateDir, *, shm: Path = SHM) -> list[Left]:
    """What ended incarnations left, and why it stays as far as can be seen. Changes nothing."""
    found: list[Left] = []
    for _, intent, files in _recorded(state, None):
        sizes = {f.name: (f, _size(f, shm)) for f in files if intent.boot_id == boot_id()}
        still = {name: file for name, (file, size) in sizes.items() if size is not None}
        having = holders(still, _processes()) if still else {}
        for name, file in still.items():
            why = _in_hands_of(having[name]) if having[name] else None if file.sole else _ANOTHERS
            found.append(Left(intent.id, intent.subject, file, sizes[name][1] or 0, why))
    return found


def _remove(file: SharedFile, shm: Path) -> str | None:
    """Unlink a file that nobody has; why it stays, or None. Whoever opens it meanwhile waits until that is done."""
    path = shm / file.name
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return f"it cannot be opened: {error.strerror}"
    try:
        if (info := os.fstat(fd)) and (info.st_dev, info.st_ino) != (file.device, file.inode):
            return "its name stands for another file now"
        # who opens it while the lease is held has a signal sent here: unless told otherwise SIGIO, which ends a process
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return _in_hands_of(holders({file.name: file}, _processes())[file.name] - {os.getpid()})
        return f"it cannot be removed, or who has it cannot be told: {error.strerror}"
    finally:
        os.close(fd)
    return None


def _in_hands_of(pids: frozenset[int]) -> str:
    return f"pid {', '.join(map(str, sorted(pids)))} has it" if pids else "a process that cannot be seen has it"


def told(left: Collection[Left]) -> str:
    """Some of an incarnation's files, for people: how many, how much memory, and which."""
    names = ", ".join(sorted(one.file.name for one in left)[:_NAMED])
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    size = format_size(sum(one.size_bytes for one in left))
    return f"{counted(len(left), 'file')} in /dev/shm ({size}: {names}{more})"


def holders(files: Mapping[str, SharedFile], pids: Collection[int]) -> dict[str, frozenset[int]]:
    """File → which of these processes have it mapped or open; processes that cannot be looked into are left out.

    Told by device and inode, whatever the process calls the file; descriptors by the file's own name first, since
    asking for the status of every descriptor may hang on a dead network file system.
    """
    lines = {
        name: f" {os.major(file.device):02x}:{os.minor(file.device):02x} {file.inode} ".encode()
        for name, file in files.items()
    }
    found: dict[str, set[int]] = {name: set() for name in files}
    for pid in pids:
        with suppress(OSError):
            with open(f"/proc/{pid}/maps", "rb") as file:  # noqa: PTH123 - of every process of the box
                maps = file.read()
            for name in (*(name for name, line in lines.items() if line in maps), *_open(pid, files)):
                found[name].add(pid)
    return {name: frozenset(by) for name, by in found.items()}


def _open(pid: int, files: Mapping[str, SharedFile]) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    for fd in os.listdir(folder):  # noqa: PTH208
        try:
            name = os.path.basename(os.readlink(f"{folder}/{fd}")).removesuffix(" (deleted)")  # noqa: PTH115, PTH119
            if name in files:
                info = os.stat(f"{folder}/{fd}")  # noqa: PTH116
                if (info.st_dev, info.st_ino) == (files[name].device, files[name].inode):
                    yield name
        except FileNotFoundError:
            continue  # closed meanwhile


def _recorded(state: StateDir, among: Collection[str] | None) -> Iterator[tuple[Path, Intent, tuple[SharedFile, ...]]]:
    """Ended incarnations of which something is recorded."""
    for name in incarnations.list_ended(state) if among is None else sorted(among):
        folder = state.ended / name
        files = incarnations.read_shared(folder)
        intent = incarnations.read(folder).intent if files else None
        if isinstance(intent, Intent):
            yield folder, intent, files


def _candidates(shm: Path) -> Iterator[tuple[str, SharedFile]]:
    """Files of a name that libraries make up."""
    try:
        entries = os.scandir(shm)
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            if LEAKS.fullmatch(entry.name) is None:
                continue
            file = _look(shm / entry.name)
            if file is not None:
                yield entry.name, file


def _look(path: Path) -> SharedFile | None:
    """A regular file with one name; None: it is gone, or something else."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
        return None
    return SharedFile(path.name, info.st_dev, info.st_ino, born(path), info.st_uid, sole=False)


def same_file(one: SharedFile, other: SharedFile | None) -> bool:
    """Whether a name stands for what it stood for: inodes are given out again, and begin anew with each boot."""
    return other is not None and (one.device, one.inode, one.born) == (other.device, other.inode, other.born)


def _size(file: SharedFile, shm: Path) -> int | None:
    """Bytes of memory that a file takes; None: it is there no more, or another one has its name."""
    found = _look(shm / file.name)
    if found is None or not same_file(found, file):
        return None
    with suppress(FileNotFoundError):
        return (shm / file.name).stat().st_blocks * 512
    return None


def born(path: Path) -> float | None:
    """Epoch seconds at which a file was created (statx(2)); None: its file system does not say (tmpfs: Linux 5.19)."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "statx") or libc.statx(_AT_FDCWD, os.fsencode(path), _NOFOLLOW, _BTIME, buffer) != 0:
        return None
    (told_of,) = struct.unpack_from("=I", buffer)
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, _BTIME_AT)
    return float(seconds + nanoseconds / 1e9) if told_of & _BTIME else None


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208


def _uid(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116
    except OSError:
        return None
