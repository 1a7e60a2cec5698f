"""The SQLite file: how it is opened, created, migrated, and put aside when it cannot be used.

A fresh journal appears complete, by rename. So a file that is empty, or has no schema number, is never one that is
still being made: it is damaged, and is put aside like any other that cannot be read.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Literal

from msgspec import Struct

from reconciler.errors import StateError

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (  # 1: the tables
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE records (kind TEXT, name TEXT, body TEXT NOT NULL, PRIMARY KEY (kind, name)) WITHOUT ROWID",
        """CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, wall REAL NOT NULL, kind TEXT NOT NULL,
        subject TEXT NOT NULL, message TEXT NOT NULL, cause TEXT NOT NULL, data TEXT)""",
        "CREATE TABLE incidents (id TEXT PRIMARY KEY, resolved_at REAL, body TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE texts (path TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE timings (id INTEGER PRIMARY KEY AUTOINCREMENT, subject TEXT NOT NULL, what TEXT NOT NULL,
        seconds REAL NOT NULL)""",
    ),
    (  # 2: `explain` asks for one subject's events among 100 000; pruning asks for one key's measurements
        "CREATE INDEX events_by_subject ON events (subject, id)",
        "CREATE INDEX timings_by_key ON timings (subject, what, id)",
    ),
    (  # 3: what went into each decision, so that it can be made again
        "CREATE TABLE specs (digest TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID",
        """CREATE TABLE decisions (id INTEGER PRIMARY KEY AUTOINCREMENT, wall REAL NOT NULL, version TEXT NOT NULL,
        spec TEXT NOT NULL, observed BLOB NOT NULL, ledger BLOB NOT NULL, now BLOB NOT NULL, outcome TEXT NOT NULL)""",
    ),
)
"""Entry n takes a file from schema n to n + 1, in one transaction. Never edited, only added to."""

_TABLES = ("meta", "records", "events", "incidents", "texts", "timings")

SCHEMA = len(MIGRATIONS)
OLDEST_READABLE = 1
"""The oldest schema that a reader, who must not migrate, can still answer from."""

BUSY_TIMEOUT_S = 5.0
"""Readers never block in WAL mode; only a checkpoint's last step, or another writer, makes anyone wait."""

_SYNC = "NORMAL"
"""In WAL mode this syncs at checkpoints, not at commits. A killed process loses nothing by it: its commits are in the
page cache. A power cut may take the last commits, whole ones, and ends every process that they speak of too."""

_MODE = 0o600
_COMPANIONS = ("-wal", "-shm")
_DAMAGE = frozenset({"SQLITE_NOTADB", "SQLITE_CORRUPT"})


class Notice(Struct, frozen=True):
    """A journal could not be used: it was put aside and a fresh one started. To be told, as event and in `status`."""

    reason: Literal["corrupt", "newer"]
    message: str
    kept_as: Path


class _UnusableError(Exception):
    """The file is no journal that this program can use; it has to make room."""

    def __init__(self, reason: Literal["corrupt", "newer"], detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def open_writer(path: Path) -> tuple[sqlite3.Connection, Notice | None]:
    """Open, migrate or create the journal at `path`, for its one writer (the caller holds the writer's lock).

    1. No file → a fresh one.
    2. A sound file of this schema or an older one → migrated and opened.
    3. A damaged one, or one of a newer schema → put aside beside it, a fresh one started, and a notice of it.

    Raises:
        StateError: the directory or file cannot be written, is full, or is held by another writer.
    """
    with errors_explained(path, "open"):
        _refuse_odd_files(path)
        if not path.exists():
            notice = None  # 1
            log = _companion(path, "-wal")
            if log.exists() and log.stat().st_size:
                # left there it would be replayed into the fresh file: nothing ties a log to its own file
                notice = _put_aside(path, _UnusableError("corrupt", "only its write-ahead log is left"))
            _create(path)
            return _open_sound(path), notice
        try:
            return _open_sound(path), None  # 2
        except _UnusableError as unusable:
            notice = _put_aside(path, unusable)  # 3
            _create(path)
            return _open_sound(path), notice


def replace(path: Path, problem: str) -> tuple[sqlite3.Connection, Notice]:
    """Put aside a file that SQLite can read and the program cannot (`problem`), and start a fresh one.

    Raises:
        StateError: as `open_writer`.
    """
    with errors_explained(path, "replace"):
        notice = _put_aside(path, _UnusableError("corrupt", problem))
        _create(path)
        return _open_sound(path), notice


def open_reader(path: Path) -> sqlite3.Connection:
    """Open the journal for reading, with or without a writer at work; a missing one reads as an empty one.

    Nothing is created, migrated or put aside. Works in a directory that the caller may not write to.

    Raises:
        StateError: not readable by this user, damaged, or of a schema that this program does not know.
    """
    with errors_explained(path, "read"):
        _refuse_odd_files(path)
        try:
            path.stat()
        except FileNotFoundError:
            return _empty()
        uri = f"{path.absolute().as_uri()}?mode=ro"
        try:
            connection, schema = _connect_reader(uri)
        except sqlite3.OperationalError as error:
            # a WAL reader wants the -shm file; nobody has the journal open, and here it may not be made
            lacks_shm = _name(error) in ("SQLITE_READONLY_DIRECTORY", "SQLITE_CANTOPEN")
            if not lacks_shm or _companion(path, "-wal").exists():
                raise
            connection, schema = _connect_reader(f"{uri}&immutable=1")
    if OLDEST_READABLE <= schema <= SCHEMA:
        return connection
    connection.close()
    known = f"this program knows {OLDEST_READABLE} to {SCHEMA}"
    raise StateError(f"{path}: journal of schema {schema}, {known}", hint=_schema_hint(schema))


@contextmanager
def transaction(connection: sqlite3.Connection, path: Path, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
    """Everything inside, or nothing of it; with `durable` it has reached the disk on return, all earlier ones with it.

    Raises:
        StateError: the disk is full or failing, or the file is locked or read-only; nothing was changed.
    """
    with errors_explained(path, "write"):
        if durable:
            connection.execute("PRAGMA synchronous = FULL")
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # on a full disk SQLite has rolled back by itself
                    connection.execute("ROLLBACK")
                raise
        finally:
            if durable:
                connection.execute(f"PRAGMA synchronous = {_SYNC}")


@contextmanager
def snapshot(connection: sqlite3.Connection, path: Path) -> Iterator[sqlite3.Connection]:
    """Reads inside see one state of the journal, whatever a writer does meanwhile.

    Raises:
        StateError: the journal could not be read.
    """
    with errors_explained(path, "read"):
        connection.execute("BEGIN")
        try:
            yield connection
        finally:
            with suppress(sqlite3.Error):
                connection.execute("COMMIT")


@contextmanager
def errors_explained(path: Path, doing: str) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into `StateError`: where, what, what next."""
    try:
        yield
    except sqlite3.Error as error:
        name = _name(error)
        hint = next((hint for prefix, hint in _HINTS if name.startswith(prefix)), None)
        raise StateError(f"{path}: cannot {doing} the journal: {error}", hint=hint) from error
    except OSError as error:
        raise StateError(
            f"{path}: cannot {doing} the journal: {error.strerror or error}",
            hint="the state directory must exist and belong to the user that runs this",
        ) from error


_HINTS = (
    ("SQLITE_FULL", "free space on that file system, then try again; nothing was half written"),
    ("SQLITE_READONLY", "the state directory and the files in it must be writable by the user that runs this"),
    ("SQLITE_CANTOPEN", "the state directory must exist and belong to the user that runs this"),
    ("SQLITE_PERM", "the state directory must exist and belong to the user that runs this"),
    ("SQLITE_BUSY", "another process writes to it; wait for it to end, or end it"),
    ("SQLITE_IOERR", "the file system failed: is it full, over quota, or gone? nothing was half written"),
    ("SQLITE_CORRUPT", "start the daemon: it puts a damaged journal aside and begins a fresh one"),
    ("SQLITE_NOTADB", "start the daemon: it puts a damaged journal aside and begins a fresh one"),
)


def _name(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", "")  # absent on errors that the module raises by itself


def _companion(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _schema_hint(schema: int) -> str:
    if schema > SCHEMA:
        return "it was written by a newer reconciler: use that version, or move the file away"
    return "start the daemon once: it brings the journal up to date"


# ---------------------------------------------------------------- opening


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S
    )
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA synchronous = {_SYNC}")
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_reader(uri: str) -> tuple[sqlite3.Connection, int]:
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    try:
        return connection, _schema(connection)
    except BaseException:
        connection.close()
        raise


def _open_sound(path: Path) -> sqlite3.Connection:
    """Open an existing file, prove it sound, and migrate it.

    Raises:
        _UnusableError: it is damaged or newer.
    """
    _make_private(path)
    if path.stat().st_size == 0:
        raise _UnusableError(
            "corrupt", "it is empty"
        )  # before SQLite sees it: it would delete the log of an empty file
    with _damage_recognised():
        connection = _connect(path)
        try:
            _prove_sound(connection)
            _migrate(connection, _schema(connection))
            connection.execute("PRAGMA journal_mode = WAL")  # a copy restored by hand may have lost it
        except BaseException:
            connection.close()
            raise
    return connection


def _prove_sound(connection: sqlite3.Connection) -> None:
    """See that this is a journal and whole, and change nothing before that is seen.

    Raises:
        _UnusableError: it is not.
        sqlite3.DatabaseError: SQLite cannot read it.
    """
    schema = _schema(connection)
    if schema == 0:
        raise _UnusableError("corrupt", "it holds no journal")
    if schema > SCHEMA:
        detail = f"it has schema {schema}, of a newer reconciler; this one knows up to schema {SCHEMA}"
        raise _UnusableError("newer", detail)
    verdict = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    if verdict != "ok":
        raise _UnusableError("corrupt", verdict)
    for table in _TABLES:
        connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone()  # noqa: S608 - our own names


@contextmanager
def _damage_recognised() -> Iterator[None]:
    """Tell a file that is no journal (which makes room) from a box that does not let us (which is an error)."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        name = _name(error)
        if name in _DAMAGE or name.startswith("SQLITE_CORRUPT_"):
            raise _UnusableError("corrupt", str(error)) from error
        if name == "SQLITE_ERROR":  # our own statements are sound: it is the tables that are not ours
            raise _UnusableError("corrupt", f"its tables are not a journal's: {error}") from error
        raise


def _empty() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    _migrate(connection, 0)
    connection.execute("PRAGMA query_only = ON")
    return connection


def _schema(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _migrate(connection: sqlite3.Connection, schema: int) -> None:
    for number, statements in enumerate(MIGRATIONS[schema:], schema + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number:d}")  # part of the transaction, unlike most pragmas
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise


# ---------------------------------------------------------------- files


def _create(path: Path) -> None:
    """Make a complete, empty journal at `path`, private whatever the umask."""
    draft = path.with_name(f"{path.name}.new")
    for leftover in (draft, *(_companion(draft, suffix) for suffix in _COMPANIONS)):
        leftover.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, _MODE)
    try:
        os.fchmod(descriptor, _MODE)  # SQLite gives -wal and -shm the mode of the file
    finally:
        os.close(descriptor)
    with closing(_connect(draft)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        _migrate(connection, 0)
    draft.replace(path)  # closing it has folded its log in and removed it
    _sync_directory(path.parent)


def _refuse_odd_files(path: Path) -> None:
    """SQLite follows a link in the place of its file, and would write to where it leads."""
    for file in (path, *(_companion(path, suffix) for suffix in _COMPANIONS)):
        with suppress(FileNotFoundError):
            mode = file.lstat().st_mode
            if not stat.S_ISREG(mode):
                what = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
                raise OSError(errno.EINVAL, f"{file.name} is {what}")


def _make_private(path: Path) -> None:
    # by path, never by opening the file: closing any descriptor of it would drop SQLite's POSIX locks in this process
    for file in (path, *(_companion(path, suffix) for suffix in _COMPANIONS)):
        with suppress(FileNotFoundError):
            if stat.S_IMODE(file.stat().st_mode) != _MODE:
                file.chmod(_MODE)


def _put_aside(path: Path, unusable: _UnusableError) -> Notice:
    taken = {entry.name for entry in path.parent.iterdir()}
    number = 1
    while any(f"{path.name}.{unusable.reason}-{number}{suffix}" in taken for suffix in ("", *_COMPANIONS)):
        number += 1
    kept = path.with_name(f"{path.name}.{unusable.reason}-{number}")
    # the file before its log: stopped in between, the log is found orphaned and kept; the other way round the file
    # would be found sound and its last commits silently gone
    for suffix in ("", *_COMPANIONS):
        with suppress(FileNotFoundError):
            _companion(path, suffix).rename(_companion(kept, suffix))
    _sync_directory(path.parent)
    what = "of a newer version" if unusable.reason == "newer" else "damaged"
    message = f"{path}: the journal is {what} ({unusable.detail}); kept as {kept.name}, a fresh one was started"
    return Notice(unusable.reason, message, kept)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
