"""The state directory: which file lies where, who may read it, and who is its one writer."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from msgspec import Struct
from msgspec.structs import force_setattr

from reconciler.clock import SystemClock
from reconciler.errors import DaemonRunning, StateError
from reconciler.spec.trust import writers

_FOLDERS = ("locks", "run", "ended", "logs", "sim")
_PRIVATE_DIR = 0o700
_PRIVATE_FILE = 0o600

_LOCK_TRIES = 5
_LOCK_PAUSE_S = 0.01
"""How often, and how far apart, a writer-to-be tries again."""


class StateDir(Struct, frozen=True):
    """Where everything durable lies. `path` is made absolute."""

    path: Path

    def __post_init__(self) -> None:
        force_setattr(self, "path", Path(os.path.abspath(self.path)))  # noqa: PTH100 - resolve() would follow links

    @property
    def journal(self) -> Path:
        """The SQLite database."""
        return self.path / "journal.sqlite"

    @property
    def daemon_lock(self) -> Path:
        """Held by the one writer."""
        return self.path / "daemon.lock"

    @property
    def control_socket(self) -> Path:
        """Where a running daemon takes requests."""
        return self.path / "control.sock"

    @property
    def locks(self) -> Path:
        """One lock file per subject, held by the shim of its incarnation."""
        return self.path / "locks"

    @property
    def run(self) -> Path:
        """One folder per incarnation that may live."""
        return self.path / "run"

    @property
    def ended(self) -> Path:
        """Folders of past incarnations."""
        return self.path / "ended"

    @property
    def logs(self) -> Path:
        """What leaders wrote to stdout and stderr."""
        return self.path / "logs"

    @property
    def sim(self) -> Path:
        """The simulated node's memory ledger."""
        return self.path / "sim"

    def ensure(self) -> None:
        """Create what is missing, 0700 whatever the umask.

        A directory that was there before and holds other things is used as it is, if nobody else may write to it.

        Raises:
            StateError: it cannot be used; the message says which path and why.
        """
        self.ensure_root()
        _use_root(self.path)
        for name in _FOLDERS:
            _ensure_private(self.path / name)

    def ensure_folder(self, folder: Path) -> None:
        """Have one of its folders of which nothing is lost with what was in it: somebody may have removed it.

        Nothing is written through a link that stands there by now.

        Raises:
            StateError: as for `ensure`.
        """
        if folder.is_symlink() or not folder.is_dir():
            _ensure_private(folder)

    def ensure_root(self) -> None:
        """Create the directory itself, and those above it, if they are missing.

        Raises:
            StateError: they cannot be made, or others could put another directory in its place.
        """
        missing = [folder for folder in (self.path, *self.path.parents) if not os.path.lexists(folder)]
        for folder in reversed(missing):
            _make(folder)
        _check_parent(self.path.parent)


def _check_parent(path: Path) -> None:
    """Whoever may write to the parent can move the state away: the next daemon would start everything once more."""
    try:
        info = path.stat()
    except OSError as error:
        raise _unusable(path, error) from error
    if not info.st_mode & stat.S_ISVTX and (problem := writers(info, str(path))):
        who = "g-w" if "group" in problem else "o-w"
        hint = f"chmod {who} {path} (or +t, as /tmp has it), or name another state directory with --state-dir"
        raise StateError(f"{path}: {problem}, and the state directory lies in it", hint=hint)


def _use_root(path: Path) -> None:
    """The state directory itself, which a person may have made, perhaps for more than this."""
    info = _inspect(path)
    try:
        names = set(os.listdir(path))  # noqa: PTH208
    except OSError as error:
        raise _unusable(path, error) from error
    if not names or "run" in names:
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            _refuse_planted(path)
        _tighten(path, info)
    elif info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StateError(
            f"{path}: others may write to the state directory (mode {stat.S_IMODE(info.st_mode):04o})",
            hint=f"chmod 700 {path}, or name another with --state-dir",
        )
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        raise StateError(f"{path}: the state directory is not writable", hint="name another with --state-dir")


def _refuse_planted(path: Path) -> None:
    """Others could write to it until now: a link that they left would be written through, a file of theirs believed.

    Raises:
        StateError: something in it is a link, or another's, or known elsewhere by another name.
    """
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            planted = Path(folder, name)
            info = planted.lstat()
            is_link = stat.S_ISLNK(info.st_mode) or (stat.S_ISREG(info.st_mode) and info.st_nlink > 1)
            if is_link or info.st_uid != os.geteuid():
                raise StateError(
                    f"{planted} is a link or another user's, in a state directory that others could write to",
                    hint=f"look at it, remove it, then chmod 700 {path}",
                )


def _ensure_private(path: Path) -> None:
    if not _make(path):
        _tighten(path, _inspect(path))


def _make(path: Path) -> bool:
    """Create one private directory; False when something is there already."""
    try:
        path.mkdir(mode=_PRIVATE_DIR)
        path.chmod(_PRIVATE_DIR)  # a umask can only take bits away; it may have taken ours
    except FileExistsError:
        return False
    except OSError as error:
        raise _unusable(path, error) from error
    return True


def _inspect(path: Path) -> os.stat_result:
    """What lies at `path`, which must be a real directory of this user."""
    try:
        info = path.lstat()
    except OSError as error:
        raise _unusable(path, error) from error
    if stat.S_ISLNK(info.st_mode):
        raise StateError(
            f"{path} is a symbolic link where a directory is expected",
            hint="name the directory itself with --state-dir",
        )
    if not stat.S_ISDIR(info.st_mode):
        raise StateError(f"{path} is not a directory", hint="move it away, or name another with --state-dir")
    if info.st_uid != os.geteuid():
        raise StateError(
            f"{path} belongs to uid {info.st_uid}, this program runs as uid {os.geteuid()}",
            hint="run as that user, or name another directory with --state-dir",
        )
    return info


def _tighten(path: Path, info: os.stat_result) -> None:
    if stat.S_IMODE(info.st_mode) != _PRIVATE_DIR:
        try:
            path.chmod(_PRIVATE_DIR)
        except OSError as error:
            raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> StateError:
    return StateError(
        f"{path}: cannot be used as state directory: {error.strerror or error}",
        hint="name another with --state-dir or RECONCILER_STATE_DIR",
    )


def refuse_link(folder: Path) -> None:
    """See to it that no link has taken the place of a folder of the state directory, as nothing is done through one.

    Raises:
        NotADirectoryError: one has.
    """
    if folder.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "a symbolic link where a folder is expected", str(folder))


# ---------------------------------------------------------------- locks


def take_lock(path: Path) -> int | None:
    """Take `path` exclusively (flock); the descriptor that holds it, or None when someone else does.

    The lock lasts until every copy of the descriptor is closed. It is not inherited unless passed on by name. Readers
    test a lock by taking it, shared, for microseconds: None may mean no more than that, so callers try again.

    Raises:
        OSError: the lock file cannot be opened.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, _PRIVATE_FILE)
    try:
        _refuse_shared(fd)
        os.fchmod(fd, _PRIVATE_FILE)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_shared(fd: int) -> None:
    """The writer says in its lock who it is: a file that has another name as well would be overwritten there too."""
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
        raise OSError(errno.EPERM, "is no file of its own")


def is_locked(path: Path) -> bool:
    """Whether someone holds `path` exclusively; a missing file is held by nobody.

    Raises:
        OSError: unknown.
    """
    with _opened(path) as fd:
        return fd is not None and _is_held(fd)


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _is_held(fd: int) -> bool:
    """Tested with a shared lock: any number of readers test at once, and an owner never notices."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _is_folder_held(path: Path) -> bool:
    """Whether somebody holds the state directory whose lock file was removed, or is no longer the one that is held."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return _is_held(fd)
    except OSError:  # a file system that locks no folders
        return False
    finally:
        os.close(fd)


# ---------------------------------------------------------------- the one writer


class WriterInfo(Struct, frozen=True):
    """The daemon that holds a state directory."""

    pid: int | None
    """None: it holds the lock but has not said who it is."""
    since: float | None
    """Epoch seconds."""


class WriterLock:
    """The right to act and to write, until released or until this process ends.

    It is held twice: by the lock file, which says who holds it, and by the state directory itself, which nobody removes
    by hand while something is in it. The latter only where the file system can (NFS cannot).
    """

    def __init__(self, state: StateDir, fd: int, folder: int | None) -> None:
        self._state = state
        self._fd: int | None = fd
        self._folder = folder

    def keep(self) -> None:
        """See to it that the lock file is there and is this one's: it may have been removed.

        Raises:
            StateError: another daemon took the state directory meanwhile.
        """
        path, held = self._state.daemon_lock, self._fd
        if held is None:
            return
        try:
            if os.path.samestat(path.lstat(), os.fstat(held)):
                return
        except FileNotFoundError:
            if not self._state.path.is_dir():  # unmounted, or moved away for a moment
                return
        except OSError:
            return  # not to be told now
        try:
            fd = _take_patiently(path)
        except OSError:
            return  # read-only or full by now: the directory itself is held
        if fd is None:
            message = f"{path}: another daemon took this state directory while this one ran on it"
            raise StateError(message, hint="the lock file was removed by hand, or the directory exchanged")
        with suppress(OSError):
            _write_who(fd)
        os.close(held)
        self._fd = fd

    def release(self) -> None:
        """Give the state directory back; doing it twice does no harm."""
        if self._fd is not None:
            with suppress(OSError):
                os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = None
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def acquire_writer(state: StateDir) -> WriterLock:
    """Become the one writer of `state`.

    Raises:
        DaemonRunning: another process is.
        StateError: the lock file cannot be used.
    """
    with ExitStack() as undo:
        fd: int | None = None
        try:
            folder = _lock_folder(state.path)
            if folder is not None:
                undo.callback(os.close, folder)
                fd = _take_patiently(state.daemon_lock)
            if fd is not None:
                undo.callback(os.close, fd)
                _write_who(fd)
        except OSError as error:
            raise _unusable(state.daemon_lock, error) from error
        if fd is None:
            raise _running(state)
        undo.pop_all()
        return WriterLock(state, fd, folder)


def _running(state: StateDir) -> DaemonRunning:
    info = writer(state)
    pid = info.pid if info else None
    return DaemonRunning(
        f"{state.path}: a daemon already runs on this state directory" + (f" (pid {pid})" if pid else ""),
        pid=pid,
        hint="`reconciler status` shows what it does; stop it first, or name another --state-dir",
    )


def _take_patiently(path: Path) -> int | None:
    """As `take_lock`, past readers that test it."""
    fd = take_lock(path)
    for _ in range(_LOCK_TRIES):
        if fd is not None:
            break
        time.sleep(_LOCK_PAUSE_S)
        fd = take_lock(path)
    return fd


def _lock_folder(path: Path) -> int | None:
    """A descriptor of the folder that holds it exclusively, where the file system can; None: somebody else does."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        except OSError:
            return fd
        else:
            return fd
    os.close(fd)
    return None


def _write_who(fd: int) -> None:
    """Say in the lock who holds it."""
    text = json.dumps({"pid": os.getpid(), "since": SystemClock().now().wall}) + "\n"
    os.ftruncate(fd, 0)
    os.pwrite(fd, text.encode(), 0)


def writer(state: StateDir) -> WriterInfo | None:
    """The daemon that holds `state` now; None when nobody does.

    Raises:
        StateError: the lock file cannot be read; unknown.
    """
    try:
        with _opened(state.daemon_lock) as fd:
            if fd is None or not _is_held(fd):
                return WriterInfo(None, None) if _is_folder_held(state.path) else None
            text = os.pread(fd, 4096, 0)
    except OSError as error:
        raise _unusable(state.daemon_lock, error) from error
    with suppress(ValueError, TypeError, KeyError):
        content = json.loads(text)
        return WriterInfo(int(content["pid"]), float(content["since"]))
    return WriterInfo(None, None)
