"""The records of each incarnation: small JSON files that outlive every daemon and every crash.

    run/<id>/intent.json   by the daemon, before anything is spawned
    run/<id>/run.json      by the shim, before the leader's program runs; taken back if that never does
    run/<id>/exit.json     by the shim, when the leader ends
    run/<id>/over          by the shim, empty: no descendant is left
    run/<id>/stop.json     by the daemon, before the signal
    run/<id>/undying.json  by the daemon, when SIGKILL has not ended all of it at once
    run/<id>/shared.json   by the daemon: its files in /dev/shm; this one and `stop.json` are written again

Each is replaced whole (temporary file, rename), `over` apart, and outlives the death of any process from then on. So
intent without run and with the lock free means *never started*, exactly. The shim (`act/shim.py`) writes its own
without importing this.

A power cut ends every process, and may empty or take what was not brought to the disk (fsync). That matters only of
work, which must not begin twice: its intent and its exit are durable. Whatever else an earlier boot left says nothing
that somebody could live by, readable or not; which boot that was the id tells as well (docs/decisions/0032).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote
from uuid import uuid4

from msgspec import Struct

from reconciler.clock import Instant
from reconciler.journal.codec import DecodeError, decode, encode
from reconciler.journal.layout import StateDir, is_locked, refuse_link
from reconciler.plan.observed import Subject, SubjectKind
from reconciler.spec.spec import Questions, Stop
from reconciler.units import counted

__all__ = [
    "Exit", "Intent", "Records", "Run", "SharedFile", "StopRecord", "Undying", "Unreadable",
    "is_locked", "is_over", "is_recorded", "list_ended", "list_ids", "lock_path", "log_path", "new_id",
    "read", "read_intent", "read_shared", "remove_drafts", "remove_intent",
    "write_exit", "write_intent", "write_shared", "write_stop", "write_undying",
]  # fmt: skip

T = TypeVar("T")
_DRAFT = ".new"
_LARGEST_RECORD = 1 << 20
_LARGEST_PID = 1 << 22
"""PID_MAX_LIMIT of 64-bit kernels (proc_sys_kernel(5))."""
_BOOT_DIGITS = 12
_ID = re.compile(r"[0-9a-f]{12}8[0-9a-f]{3}[89ab][0-9a-f]{15}")
"""A UUID of version 8, which says nothing of the boot if it is not ours; ids of other forms do not either."""
_LONGEST_NAME = 150
"""Bytes of a subject's name in a file name; the file systems' limit is 255."""


class Intent(Struct, frozen=True):
    """What was about to be started; the decision, before the deed."""

    id: str
    kind: SubjectKind
    name: str
    process_hash: str
    gpus: tuple[str, ...]
    """UUIDs."""
    memory_bytes: tuple[int, ...]
    """On each of `gpus`, in the same order."""
    exclusive: bool
    port: int | None
    attempt: int
    argv: tuple[str, ...]
    """For people, with what looks like a secret left out; the environment is never recorded."""
    log: str
    """Absolute path of the leader's output."""
    started: Instant
    boot_id: str
    group: str | None = None
    """Absolute path of its control group, which is made after this record and joined before its program runs; None:
    none could be had. That it is there says nothing, nor that it is not."""
    stop_settings: Stop | None = None
    """How its file had it stopped, for when that is gone; None: not recorded."""
    questions: Questions | None = None
    """What its server is asked, in the same way; None: it is none."""

    @property
    def subject(self) -> Subject:
        """Whom it belongs to."""
        return Subject(self.kind, self.name)


class Run(Struct, frozen=True):
    """Who the leader and its shim are; ticks are clock ticks after boot."""

    pid: int
    start_ticks: int
    boot_id: str
    session_id: int
    shim_pid: int
    shim_start_ticks: int
    pid_namespace: int
    """Inode of the namespace in which the pids mean something."""
    at: Instant


class Exit(Struct, frozen=True):
    """How the leader ended."""

    exit_code: int
    """0..255, or -signal; 127 or 126 with `error` when its program could not be run."""
    at: Instant
    error: str | None = None


class StopRecord(Struct, frozen=True):
    """How far its stop has come."""

    requested: Instant
    drained: bool
    signalled: Instant | None
    """When the one stop signal was decided (recorded just before it was sent)."""


class Undying(Struct, frozen=True):
    """It was killed and goes on living, as a process does that the kernel waits for (state D)."""

    since: Instant
    """When SIGKILL was first sent to all of it."""


class SharedFile(Struct, frozen=True):
    """A file in /dev/shm that a process of an incarnation had mapped or open."""

    name: str
    device: int
    inode: int
    born: float | None
    """Epoch seconds; None: the file system does not say, and nothing is done to such a file."""
    uid: int
    sole: bool
    """Nobody but the incarnation had it when it was seen."""


class SharedFiles(Struct, frozen=True):
    """All of one incarnation, as far as they were seen."""

    files: tuple[SharedFile, ...]


class Unreadable(Struct, frozen=True):
    """A record that is there, but torn, alien or not readable: unknown, never absent."""

    reason: str


class Records(Struct, frozen=True):
    """Everything recorded of one incarnation; None: no such record."""

    id: str
    path: Path
    intent: Intent | Unreadable | None
    run: Run | Unreadable | None
    exit: Exit | Unreadable | None
    stop: StopRecord | Unreadable | None
    undying: Undying | None
    """None also if it cannot be read: it says nothing that the process table does not."""

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Why parts of it are unknown; empty when all could be read."""
        parts = (self.intent, self.run, self.exit, self.stop)
        return tuple(part.reason for part in parts if isinstance(part, Unreadable))

    def of_another_boot(self, boot_id: str) -> bool:
        """Whether it was started in another boot than this, so that nothing of it lives; by its id if need be."""
        if isinstance(self.intent, Intent):
            return self.intent.boot_id != boot_id
        return _ID.fullmatch(self.id) is not None and self.id[:_BOOT_DIGITS] != _boot_digits(boot_id)


def new_id(boot_id: str) -> str:
    """An id for an incarnation of this boot: a UUID of version 8 (RFC 9562) that begins with 48 bits of the boot's.

    The name of a folder is never torn: which boot it is of can be told even where a power cut left nothing readable.
    """
    return f"{_boot_digits(boot_id)}8{uuid4().hex[13:]}"


def _boot_digits(boot_id: str) -> str:
    return boot_id.replace("-", "")[:_BOOT_DIGITS]


# ---------------------------------------------------------------- paths


def lock_path(state: StateDir, kind: SubjectKind, name: str) -> Path:
    """The lock that the one incarnation of this subject holds, through its shim, until its last descendant ended."""
    return state.locks / f"{_file_name(kind, name)}.lock"


def log_path(state: StateDir, kind: SubjectKind, name: str, incarnation: str) -> Path:
    """Where the output of this incarnation's leader goes."""
    return state.logs / f"{_file_name(kind, name)}.{incarnation}.log"


def _file_name(kind: SubjectKind, name: str) -> str:
    """An injective file name: names are the users', file names are ours."""
    quoted = quote(name, safe="")  # the prefix keeps "." and ".." harmless
    if len(quoted) > _LONGEST_NAME:
        quoted = quoted[:_LONGEST_NAME] + "~" + sha256(name.encode()).hexdigest()[:16]
    return f"{kind}-{quoted}"


def list_ids(state: StateDir) -> tuple[str, ...]:
    """Incarnations with records in `run/`, sorted; a link in its place says as little as if nothing were there.

    Raises:
        OSError: the folder is there but cannot be read; unknown.
    """
    return () if state.run.is_symlink() else _folders(state.run)


def list_ended(state: StateDir) -> tuple[str, ...]:
    """Incarnations put away in `ended/`, sorted.

    Raises:
        OSError: the folder is there but cannot be read; unknown.
    """
    return _folders(state.ended)


def _folders(path: Path) -> tuple[str, ...]:
    try:
        with os.scandir(path) as entries:
            names = [e.name for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return ()
    return tuple(sorted(names))


# ---------------------------------------------------------------- writing


def write_intent(state: StateDir, intent: Intent) -> Path:
    """Record what is about to be started, durably if it is work; the new folder.

    Raises:
        FileExistsError: this id has records already.
        OSError: it could not be recorded; nothing must be started.
    """
    refuse_link(state.run)
    target = state.run / intent.id
    if target.exists():
        raise FileExistsError(f"{target} exists")
    # the folder appears with its intent in it, or not at all; a daemon that died in between left a draft
    staging = state.run / f".{intent.id}{_DRAFT}"
    staging.mkdir(mode=0o700)
    try:
        staging.chmod(0o700)
        durable = intent.kind == "workload"
        _create(staging / "intent.json", encode(intent), durable=durable)
        if durable:
            _sync(staging)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if durable:
        _sync(state.run)
    return target


def remove_intent(state: StateDir, incarnation: str) -> None:
    """Take back the intent of a start that was handed to nobody: as if it had never been decided.

    Needs no descriptor. What cannot be removed is a draft, or says that it was never started.
    """
    draft = state.run / f".{incarnation}{_DRAFT}"
    with suppress(OSError):
        (state.run / incarnation).rename(draft)
        (draft / "intent.json").unlink()
        draft.rmdir()


def remove_drafts(state: StateDir) -> None:
    """Clear away what daemons left that died as they recorded an intent: nothing was ever started for it.

    Raises:
        OSError: `run/` is none.
    """
    refuse_link(state.run)
    with os.scandir(state.run) as entries:
        drafts = [entry.path for entry in entries if entry.name.startswith(".") and entry.name.endswith(_DRAFT)]
    for draft in drafts:
        shutil.rmtree(draft, ignore_errors=True)  # what is no folder is nobody's draft


def write_stop(state: StateDir, incarnation: str, record: StopRecord) -> None:
    """Record how far the stop has come; replaces an earlier one.

    Raises:
        OSError: it is not recorded; nothing must be signalled.
    """
    _write(state.run / incarnation, "stop.json", encode(record), durable=False)


def write_undying(state: StateDir, incarnation: str, record: Undying) -> None:
    """Record that SIGKILL has not ended it; the first such record stands.

    Raises:
        OSError: it is not recorded.
    """
    if not (state.run / incarnation / "undying.json").exists():
        _write(state.run / incarnation, "undying.json", encode(record), durable=False)


def write_exit(state: StateDir, incarnation: str, record: Exit) -> None:
    """Record an end, durably, that no shim can record, because there was none.

    Raises:
        FileExistsError: its end is recorded already.
        OSError: it is not durable.
    """
    if (state.run / incarnation / "exit.json").exists():
        raise FileExistsError(f"exit of {incarnation} is recorded already")
    _write(state.run / incarnation, "exit.json", encode(record), durable=True)


def write_shared(folder: Path, files: tuple[SharedFile, ...]) -> None:
    """Record these in `run/<id>` or `ended/<id>`, instead of what was recorded before.

    Raises:
        OSError: it is not recorded.
    """
    _write(folder, "shared.json", encode(SharedFiles(files)), durable=False)


def is_recorded(folder: Path) -> bool:
    """Whether its start came to something: it ran, or could not be run. True also if that cannot be read."""
    return (folder / "run.json").exists() or (folder / "exit.json").exists()


def is_over(folder: Path) -> bool:
    """Whether the shim of the records in `folder` saw its last descendant end; False: it did not, or was killed."""
    return (folder / "over").exists()


def _write(folder: Path, name: str, text: str, *, durable: bool) -> None:
    temporary = folder / f".{name}.tmp"
    with suppress(FileNotFoundError):
        temporary.unlink()
    _create(temporary, text, durable=durable)
    temporary.rename(folder / name)
    if durable:
        _sync(folder)


def _create(path: Path, text: str, *, durable: bool) -> None:
    line = f"{text}\n".encode()
    if len(line) > _LARGEST_RECORD:
        raise OSError(errno.EFBIG, f"{len(line)} bytes are more than a record may have ({_LARGEST_RECORD})")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
        if os.write(fd, line) < len(line):
            raise OSError(errno.ENOSPC, "the disk is full")
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---------------------------------------------------------------- reading


def read(path: Path) -> Records:
    """The records in `path` (`run/<id>` or `ended/<id>`). Never raises: what cannot be read is `Unreadable`."""
    return Records(
        id=path.name,
        path=path,
        intent=read_intent(path),
        run=_read_run(path),
        exit=_read(path / "exit.json", Exit),
        stop=_read(path / "stop.json", StopRecord),
        undying=undying if isinstance(undying := _read(path / "undying.json", Undying), Undying) else None,
    )


def _read_run(folder: Path) -> Run | Unreadable | None:
    """The run record, if its numbers can be pids (0 and -1 would mean whole groups to kill(2)).

    A leader begins as the leader of its session, and can never leave that.
    """
    run = _read(folder / "run.json", Run)
    if isinstance(run, Run):
        numbers = (run.pid, run.shim_pid, run.session_id)
        if not all(1 < number <= _LARGEST_PID for number in numbers) or run.session_id != run.pid:
            return Unreadable(f"{folder / 'run.json'}: pid {run.pid}, shim {run.shim_pid}, session {run.session_id}")
    return run


def read_intent(folder: Path) -> Intent | Unreadable | None:
    """The intent, if it is this folder's own."""
    intent = _read(folder / "intent.json", Intent)
    if isinstance(intent, Intent):
        if intent.id != folder.name:
            return Unreadable(f"{folder}: its intent is that of {intent.id}")
        if len(intent.gpus) != len(intent.memory_bytes):
            gpus, amounts = counted(len(intent.gpus), "GPU"), counted(len(intent.memory_bytes), "amount")
            return Unreadable(f"{folder}: {gpus} but {amounts} of memory")
    return intent


def _read(path: Path, kind: type[T]) -> T | Unreadable | None:
    try:
        return decode(kind, _read_own(path))
    except FileNotFoundError:
        return None
    except (DecodeError, OSError) as error:
        return Unreadable(f"{path}: {error}")


def _read_own(path: Path) -> bytes:
    """The content of a regular file of this user (or of root): nobody else can put a record in our mouth."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:  # without a file object, which costs four times as much: some ten are read on the way of a restart
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid not in (os.geteuid(), 0):
            raise PermissionError(f"not a file of ours (mode {info.st_mode:o}, uid {info.st_uid})")
        return os.read(fd, min(info.st_size, _LARGEST_RECORD))  # replaced whole, never written to: this is all of it
    finally:
        os.close(fd)


def read_shared(folder: Path) -> tuple[SharedFile, ...]:
    """What is recorded of an incarnation's files in /dev/shm; empty also where it cannot be read."""
    found = _read(folder / "shared.json", SharedFiles)
    return found.files if isinstance(found, SharedFiles) else ()
