"""The journal's file: private, migrated, never silently dropped, and readable whatever the writer does."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from forked import as_a_plain_user

from reconciler.clock import Instant, SystemClock
from reconciler.errors import StateError
from reconciler.journal import database
from reconciler.journal.journal import Journal
from reconciler.plan.actions import Event
from reconciler.plan.ledger import Ledger

NOW = Instant(1_764_000_000.0, 1000.0)
EVENT = Event("healthy", "thinking", "thinking is ready", "setpoint")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda mask: (os.umask(mask), None)[1]
    os.umask(before)


def open_journal(path: Path) -> Journal:
    return Journal.open(path, SystemClock())


def written(path: Path, boot_id: str = "boot") -> None:
    """A journal with a ledger and an event in it, closed."""
    with open_journal(path) as journal:
        journal.commit(Ledger(boot_id=boot_id), [EVENT], NOW)


def modes(directory: Path) -> set[int]:
    return {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()}


def names(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


# ---------------------------------------------------------------- settings and permissions


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_the_file_and_its_companions_are_private_whatever_the_umask(
    path: Path, umask: Callable[[int], None], mask: int
) -> None:
    umask(mask)
    with open_journal(path) as journal:
        journal.commit(Ledger(boot_id="x"), [], NOW)
        assert names(path.parent) == {path.name, path.name + "-wal", path.name + "-shm"}
        assert modes(path.parent) == {0o600}


def test_a_file_that_became_readable_to_others_is_made_private_again(path: Path) -> None:
    written(path)
    path.chmod(0o644)
    with open_journal(path):
        assert modes(path.parent) == {0o600}


def test_the_writer_uses_wal_with_normal_sync_and_waits_for_others(path: Path) -> None:
    with open_journal(path) as journal:
        ask = lambda name: journal._connection.execute(f"PRAGMA {name}").fetchone()[0]  # noqa: E731
        assert ask("journal_mode") == "wal"
        assert ask("synchronous") == 1
        assert ask("foreign_keys") == 1
        assert ask("busy_timeout") == 5000
        assert ask("user_version") == database.SCHEMA


def test_a_draft_left_by_a_killed_creation_is_no_hindrance(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (path.parent / f"{path.name}.new{suffix}").write_bytes(b"half")
    with open_journal(path) as journal:
        assert journal.notice is None
    assert names(path.parent) == {path.name}


# ---------------------------------------------------------------- migration


def v1_file(path: Path) -> None:
    """A journal exactly as version 1 made it: its SQL, a ledger row, events."""
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.execute("PRAGMA journal_mode = WAL")
        for statement in database.MIGRATIONS[0]:
            old.execute(statement)
        old.execute("PRAGMA user_version = 1")
        old.execute("INSERT INTO meta VALUES ('boot_id', 'old-boot'), ('generation', '7')")
        old.execute("INSERT INTO records VALUES ('quarantine', 'GPU-1', ?)", (QUARANTINE,))
        old.executemany(
            "INSERT INTO events (wall, kind, subject, message, cause) VALUES (?, 'k', ?, 'm', 'c')",
            [(float(n), f"s{n % 2}") for n in range(10)],
        )


QUARANTINE = '{"gpu":"GPU-1","reason":"r","since":{"mono":1.0,"wall":2.0}}'


def test_a_journal_of_schema_1_is_migrated_with_everything_in_it(path: Path) -> None:
    v1_file(path)
    with open_journal(path) as journal:
        assert journal.notice is None
        assert journal.ledger().boot_id == "old-boot"
        assert journal.ledger().quarantines["GPU-1"].since == Instant(2.0, 1.0)
        assert journal.generation() == 8
        assert [e.wall for e in journal.events(subject="s1")] == [1.0, 3.0, 5.0, 7.0, 9.0]
        how = journal._connection.execute("EXPLAIN QUERY PLAN SELECT * FROM events WHERE subject = 's1' ORDER BY id")
        assert "events_by_subject" in str(how.fetchall())


def test_a_reader_answers_from_schema_1_without_changing_it(path: Path) -> None:
    v1_file(path)
    with Journal.open_readonly(path) as reader:
        assert reader.ledger().boot_id == "old-boot"
        assert len(reader.events(subject="s0")) == 5
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (1,)


def test_a_migration_that_fails_leaves_the_old_schema_and_all_it_held(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    v1_file(path)
    broken = (database.MIGRATIONS[0], ("CREATE TABLE half (x)", "INSERT INTO nowhere VALUES (1)"))
    monkeypatch.setattr(database, "MIGRATIONS", broken)
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        with pytest.raises(sqlite3.OperationalError):
            database._migrate(raw, 1)
        assert raw.execute("PRAGMA user_version").fetchone() == (1,)
        assert raw.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)
        assert raw.execute("SELECT count(*) FROM events").fetchone() == (10,)


# ---------------------------------------------------------------- damage


def scribbled_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"not a database at all, just some text")


def scribbled_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (path.stat().st_size - 4096))


def torn(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 - 100)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def replaced_by_another_program(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE cookies (x)")
        other.commit()


def claims_to_be_a_journal(path: Path) -> None:
    replaced_by_another_program(path)
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 2")


def unreadable_record(path: Path) -> None:
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("INSERT INTO records VALUES ('overlay', 'render', '{\"name\":\"render\"}')")
        raw.commit()


def missing_index_rows(path: Path) -> None:
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA writable_schema = ON")
        raw.execute("UPDATE sqlite_master SET rootpage = 99999 WHERE name = 'events'")
        raw.commit()


DAMAGES = [
    scribbled_header,
    scribbled_page,
    torn,
    emptied,
    replaced_by_another_program,
    claims_to_be_a_journal,
    unreadable_record,
    missing_index_rows,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_journal_is_kept_beside_a_fresh_one_and_told_of(path: Path, damage: Callable[[Path], None]) -> None:
    written(path)
    damage(path)
    kept = path.read_bytes()
    with open_journal(path) as journal:
        assert journal.ledger() == Ledger()
        assert journal.notice is not None
        assert journal.notice.reason == "corrupt"
        assert journal.notice.kept_as == path.with_name("journal.sqlite.corrupt-1")
        assert journal.notice.kept_as.read_bytes() == kept
        (event,) = journal.events()
        assert (event.kind, event.message) == ("JournalReplaced", journal.notice.message)
        assert "corrupt-1" in event.message
    with open_journal(path) as again:
        assert again.notice is None
        assert again.generation() == 2


def test_each_damaged_journal_is_kept_under_a_number_of_its_own(path: Path) -> None:
    for number in (1, 2, 3):
        path.write_bytes(b"x" * number)
        with open_journal(path) as journal:
            assert journal.notice is not None
            assert journal.notice.kept_as.name == f"journal.sqlite.corrupt-{number}"
    assert [len((path.parent / f"journal.sqlite.corrupt-{n}").read_bytes()) for n in (1, 2, 3)] == [1, 2, 3]


def killed_with_a_log(path: Path) -> None:
    """A writer dies at once after a commit: its write-ahead log is not folded in."""
    code = """
        import os, sys
        from pathlib import Path
        from reconciler.clock import Instant, SystemClock
        from reconciler.journal.journal import Journal
        from reconciler.plan.ledger import Ledger
        journal = Journal.open(Path(sys.argv[1]), SystemClock())
        journal.commit(Ledger(boot_id="in the log"), [], Instant(1.0, 1.0))
        os._exit(0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], check=True, timeout=60)
    assert path.with_name(path.name + "-wal").stat().st_size > 0


def kept_bytes(directory: Path) -> bytes:
    return b"".join(file.read_bytes() for file in directory.iterdir() if ".corrupt-1" in file.name)


@pytest.mark.parametrize("damage", [scribbled_header, emptied, torn], ids=lambda f: f.__name__)
def test_what_a_damaged_journal_had_in_its_log_is_kept_with_it(path: Path, damage: Callable[[Path], None]) -> None:
    killed_with_a_log(path)
    damage(path)
    with open_journal(path) as journal:
        assert journal.ledger() == Ledger()
        assert journal.notice is not None
    assert b"in the log" in kept_bytes(path.parent)


def test_a_log_left_without_its_file_is_kept_and_not_replayed(path: Path) -> None:
    killed_with_a_log(path)
    path.unlink()
    with open_journal(path) as journal:
        assert journal.ledger() == Ledger()
        assert journal.notice is not None
        assert "only its write-ahead log is left" in journal.notice.message
    assert "journal.sqlite.corrupt-1-wal" in names(path.parent)


def test_what_a_killed_writer_committed_is_read_from_its_log(path: Path) -> None:
    killed_with_a_log(path)
    with Journal.open_readonly(path) as reader:
        assert reader.ledger().boot_id == "in the log"
    with open_journal(path) as journal:
        assert journal.notice is None
        assert journal.ledger().boot_id == "in the log"


def test_a_newer_journal_is_kept_for_the_newer_program(path: Path) -> None:
    written(path)
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA user_version = 42")
    with pytest.raises(StateError, match=f"journal of schema 42, this program knows 1 to {database.SCHEMA}"):
        Journal.open_readonly(path)
    assert not [name for name in names(path.parent) if "newer" in name], "a reader puts nothing aside"
    with open_journal(path) as journal:
        assert journal.notice is not None
        assert journal.notice.reason == "newer"
        assert journal.notice.kept_as.name == "journal.sqlite.newer-1"
        assert f"schema 42, of a newer reconciler; this one knows up to schema {database.SCHEMA}" in (
            journal.notice.message
        )
    with closing(sqlite3.connect(path.with_name("journal.sqlite.newer-1"))) as kept:
        assert kept.execute("SELECT value FROM meta WHERE key = 'boot_id'").fetchone() == ("boot",)


# ---------------------------------------------------------------- reading


def test_a_missing_journal_reads_as_an_empty_one_and_is_not_made(path: Path) -> None:
    with Journal.open_readonly(path) as reader:
        assert reader.ledger() == Ledger()
        assert reader.events() == ()
        assert reader.last_event_id() == 0
        assert reader.incidents() == ()
        assert reader.texts() is None
        assert reader.timings() == {}
        assert reader.generation() == 0
    assert names(path.parent) == set()


def test_a_reader_cannot_write(path: Path) -> None:
    written(path)
    for where in (path, path.with_name("absent.sqlite")):
        with Journal.open_readonly(where) as reader, pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader._connection.execute("INSERT INTO meta VALUES ('a', 'b')")


def test_a_reader_sees_each_commit_of_a_writer_at_work_and_never_half_of_one(path: Path) -> None:
    with open_journal(path) as journal, Journal.open_readonly(path) as reader:
        for number in range(20):
            journal.commit(Ledger(boot_id=str(number)), [EVENT], NOW)
            assert reader.ledger().boot_id == str(number)
            assert reader.last_event_id() == number + 1
        journal._connection.execute("BEGIN IMMEDIATE")
        journal._connection.execute("UPDATE meta SET value = 'half' WHERE key = 'boot_id'")
        assert reader.ledger().boot_id == "19"
        journal._connection.execute("ROLLBACK")


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter (pytest's own is private)."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    directory.chmod(0o755)
    shutil.rmtree(directory)


def as_stranger(directory: Path, look: Callable[[], str], *, file_mode: int = 0o444) -> str:
    """What `look` says when run as somebody who may enter `directory` and not write to it."""
    for file in directory.iterdir():
        file.chmod(file_mode)
    directory.chmod(0o555)
    return as_a_plain_user(look)


def read_boot_id(path: Path) -> str:
    with Journal.open_readonly(path) as reader:
        return reader.ledger().boot_id


@pytest.mark.parametrize("left", ["closed", "killed", "at work"])
def test_a_reader_that_may_not_write_the_directory_reads_nevertheless(open_directory: Path, left: str) -> None:
    path = open_directory / "journal.sqlite"
    if left == "closed":
        written(path, "in the log")
    elif left == "killed":
        killed_with_a_log(path)
    else:
        journal = open_journal(path)
        journal.commit(Ledger(boot_id="in the log"), [], NOW)
    assert as_stranger(open_directory, lambda: read_boot_id(path)) == "in the log"
    if left == "at work":
        journal.close()


@pytest.mark.parametrize("left", ["closed", "killed"])
def test_a_journal_that_may_not_be_read_says_so(open_directory: Path, left: str) -> None:
    path = open_directory / "journal.sqlite"
    written(path) if left == "closed" else killed_with_a_log(path)
    answer = as_stranger(open_directory, lambda: read_boot_id(path), file_mode=0o000)
    assert answer.startswith(f"StateError: {path}: cannot read the journal")
    assert "hint: the state directory must exist and belong to the user" in answer


@pytest.mark.parametrize("damage", [scribbled_header, torn], ids=lambda f: f.__name__)
def test_a_reader_of_a_damaged_journal_says_what_to_do_and_moves_nothing(
    path: Path, damage: Callable[[Path], None]
) -> None:
    written(path)
    damage(path)
    with pytest.raises(StateError) as caught:
        read_boot_id(path)
    assert str(path) in caught.value.message
    assert caught.value.hint is not None
    assert "puts a damaged journal aside" in caught.value.hint
    assert names(path.parent) <= {path.name, f"{path.name}-wal", f"{path.name}-shm"}


def test_a_reader_of_a_record_it_cannot_understand_names_the_record(path: Path) -> None:
    written(path)
    unreadable_record(path)
    with Journal.open_readonly(path) as reader, pytest.raises(StateError, match=r"overlay render: .*without"):
        reader.ledger()


# ---------------------------------------------------------------- where it cannot be


def test_a_missing_state_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError) as caught:
        open_journal(tmp_path / "absent" / "journal.sqlite")
    assert "absent/journal.sqlite: cannot open the journal: No such file" in str(caught.value)
    assert "hint: the state directory must exist" in str(caught.value)


def test_a_directory_that_may_not_be_written_is_named(open_directory: Path) -> None:
    path = open_directory / "journal.sqlite"
    answer = as_stranger(open_directory, lambda: str(open_journal(path).notice))
    assert answer.startswith(f"StateError: {path}: cannot open the journal: {os.strerror(errno.EACCES)}")


def test_a_sound_journal_that_may_not_be_written_is_refused_and_stays(open_directory: Path) -> None:
    path = open_directory / "journal.sqlite"
    written(path)
    answer = as_stranger(open_directory, lambda: str(open_journal(path).notice))
    assert answer.startswith(f"StateError: {path}: cannot open the journal")
    assert names(open_directory) == {path.name}


def test_a_reader_of_a_file_that_is_no_journal_yet_names_the_way_to_one_and_leaves_it_as_it_is(path: Path) -> None:
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE other (x)")
    before = path.read_bytes()
    with pytest.raises(StateError, match="journal of schema 0, this program knows 1 to") as caught:
        Journal.open_readonly(path)
    assert "start the daemon once" in (caught.value.hint or "")
    assert path.read_bytes() == before
    assert names(path.parent) == {path.name}


def test_a_journal_that_another_program_has_to_itself_is_not_taken_for_damaged(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup tool, or a shell that somebody left open."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    written(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as alone:
        alone.execute("PRAGMA locking_mode = EXCLUSIVE")
        alone.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StateError, match="cannot open the journal") as caught:
            open_journal(path)
        assert "another process writes to it" in (caught.value.hint or "")
        alone.execute("ROLLBACK")
    open_journal(path).close()
    assert names(path.parent) == {path.name}


def test_a_second_writer_is_told_after_its_patience(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    with open_journal(path) as first:
        first._connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(StateError, match="another process writes to it"):
            open_journal(path)
        first._connection.execute("ROLLBACK")
    assert not [name for name in names(path.parent) if "corrupt" in name]
