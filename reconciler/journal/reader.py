"""Reading the journal: what every face may do, with or without a daemon at work."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from msgspec import Struct

from reconciler.errors import StateError
from reconciler.health.incident import Incident
from reconciler.journal import database
from reconciler.journal.codec import DecodeError, decode
from reconciler.journal.timings import Measure
from reconciler.plan.ledger import AgendaEntry, EndpointRecord, Lease, Ledger, OverlayRecord, Quarantine

if TYPE_CHECKING:
    from reconciler.journal.decisions import Decision

T = TypeVar("T")


class JournalEvent(Struct, frozen=True):
    """One thing that was decided, done or seen, as the journal keeps it."""

    id: int
    """Grows by one or more with each event; never used twice."""
    wall: float
    """Epoch seconds."""
    kind: str
    subject: str
    message: str
    cause: str
    data: Mapping[str, object]


class Texts(Struct, frozen=True):
    """The last accepted files, so that a broken edit does not outlive a restart of the daemon."""

    files: Mapping[str, str]
    """Path → text."""
    digest: str
    """The digest of the spec that they meant."""


class JournalReader:
    """The journal as it stands. Every answer is one consistent state, a writer at work or not."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self.path = path

    @staticmethod
    def open_readonly(path: Path) -> JournalReader:
        """Open for reading alone; a missing journal reads as an empty one.

        What was missing stays missing to this reader: who watches opens anew for each look (under a millisecond).

        Raises:
            StateError: not readable by this user, damaged, or of an unknown schema.
        """
        return JournalReader(database.open_reader(path), path)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ledger(self) -> Ledger:
        """The last committed ledger, its `timings` and `runs` empty: they are predicted from `timings()` by the caller.

        Raises:
            StateError: a record that this program cannot read.
        """
        with database.snapshot(self._connection, self.path):
            return Ledger(
                boot_id=self._meta("boot_id", ""),
                overlays={record.name: record for record in self._records("overlay", OverlayRecord)},
                leases=tuple(self._records("lease", Lease)),
                endpoints={record.name: record for record in self._records("endpoint", EndpointRecord)},
                quarantines={quarantine.gpu: quarantine for quarantine in self._records("quarantine", Quarantine)},
                agenda=tuple(self._records("agenda", AgendaEntry)),
            )

    def agenda(self) -> tuple[AgendaEntry, ...]:
        """The agenda of the last committed ledger.

        Raises:
            StateError: a record that this program cannot read.
        """
        with database.snapshot(self._connection, self.path):
            return tuple(self._records("agenda", AgendaEntry))

    def events(
        self,
        *,
        after_id: int = 0,
        subject: str | None = None,
        kind: str | None = None,
        limit: int | None = None,
        newest: bool = False,
    ) -> tuple[JournalEvent, ...]:
        """Events in the order in which they happened: the first `limit` after `after_id`, or with `newest` the last."""
        wanted = ["id > :after_id"]
        if subject is not None:
            wanted.append("subject = :subject")
        if kind is not None:
            wanted.append("kind = :kind")
        query = (
            "SELECT id, wall, kind, subject, message, cause, data FROM events"  # noqa: S608 - of the two literals above
            f" WHERE {' AND '.join(wanted)} ORDER BY id {'DESC' if newest else 'ASC'} LIMIT :limit"
        )
        values = {
            "after_id": after_id,
            "subject": subject and storable(subject),
            "kind": kind,
            "limit": -1 if limit is None else limit,
        }
        found = [
            JournalEvent(number, wall, kind_, subject_, message, cause, json.loads(data or "{}"))
            for number, wall, kind_, subject_, message, cause, data in self._select(query, values)
        ]
        return tuple(reversed(found) if newest else found)

    def decision(self, number: int | None = None) -> Decision | None:
        """All that went into one decision, or into the newest; None: it is not kept.

        Raises:
            StateError: it was written by a program whose values looked otherwise, or is damaged.
        """
        from reconciler.journal.decisions import Decision, unpacked  # a replay alone asks

        if not list(self._select("SELECT 1 FROM sqlite_master WHERE name = 'decisions'")):
            return None  # an older journal, which no daemon of this version has opened yet
        which = "ORDER BY id DESC LIMIT 1" if number is None else "WHERE id = :number"
        query = (
            "SELECT id, wall, version, body, observed, ledger, now, outcome"  # noqa: S608 - of the two literals above
            f" FROM decisions JOIN specs ON digest = spec {which}"
        )
        for found, wall, version, *inputs, outcome in self._select(query, {"number": number}):
            try:
                return Decision(found, wall, version, unpacked(*inputs), outcome)
            except (DecodeError, zlib.error) as error:
                raise StateError(
                    f"{self.path}: decision {found} cannot be read: {error}",
                    hint=f"it was made by version {version}: ask that one",
                ) from error
        return None

    def last_event_id(self) -> int:
        """The id of the newest event; 0 before the first."""
        return int(next(self._select("SELECT coalesce(max(id), 0) FROM events"))[0])

    def incidents(self, *, include_resolved: bool = False) -> tuple[Incident, ...]:
        """Unresolved incidents, or all that are kept, by the time of opening.

        Raises:
            StateError: a record that this program cannot read.
        """
        which = "" if include_resolved else " WHERE resolved_at IS NULL"
        rows = self._select(f"SELECT id, body FROM incidents{which}")  # noqa: S608 - of the literals above
        found = [self._decode(Incident, f"incident {name}", body) for name, body in rows]
        return tuple(sorted(found, key=lambda incident: (incident.opened, incident.id)))

    def told(self, notifier: str) -> Mapping[str, Incident]:
        """The incidents that a notifier was last told of and not yet told to be resolved, by id.

        What cannot be read counts as not told: telling twice does less harm than never.
        """
        with database.errors_explained(self.path, "read"):
            bodies = json.loads(self._meta(told_key(notifier), "[]"))
        try:
            found = [decode(Incident, body) for body in bodies]
        except DecodeError:
            return {}
        return {incident.id: incident for incident in found}

    def texts(self) -> Texts | None:
        """The texts in force; None before the first were accepted."""
        with database.snapshot(self._connection, self.path):
            digest = self._meta("texts_digest", "")
            files = dict(self._connection.execute("SELECT path, body FROM texts ORDER BY path"))
        return Texts(files, digest) if digest else None

    def timings(self) -> Mapping[tuple[str, Measure], tuple[float, ...]]:
        """Measured seconds by (endpoint or workload, measure), oldest first, at most the last 50 of each."""
        found: dict[tuple[str, Measure], list[float]] = {}
        for subject, what, seconds in self._select("SELECT subject, what, seconds FROM timings ORDER BY id"):
            found.setdefault((subject, cast("Measure", what)), []).append(seconds)
        return {key: tuple(samples) for key, samples in found.items()}

    def generation(self) -> int:
        """How many daemons have opened this journal; 0 before the first."""
        with database.errors_explained(self.path, "read"):
            return int(self._meta("generation", "0"))

    def damage(self) -> str | None:
        """What SQLite finds wrong with the file (PRAGMA quick_check); None: nothing."""
        with database.errors_explained(self.path, "read"):
            verdict = str(next(self._select("PRAGMA quick_check(1)"))[0])
        return None if verdict == "ok" else verdict

    def _records(self, kind: str, of: type[T]) -> Iterator[T]:
        for name, body in self._connection.execute(
            "SELECT name, body FROM records WHERE kind = ? ORDER BY name", (kind,)
        ):
            yield self._decode(of, f"{kind} {name}", body)

    def _decode(self, of: type[T], what: str, body: str) -> T:
        try:
            return decode(of, body)
        except DecodeError as error:
            raise StateError(
                f"{self.path}: {what}: {error}",
                hint="start the daemon: it puts a journal that it cannot read aside and begins a fresh one",
            ) from error

    def _meta(self, key: str, default: str) -> str:
        row = self._connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return default if row is None else str(row[0])

    def _select(self, query: str, values: Mapping[str, object] | None = None) -> Iterator[tuple[Any, ...]]:
        with database.errors_explained(self.path, "read"):
            return iter(self._connection.execute(query, values or {}).fetchall())


def told_key(notifier: str) -> str:
    """Under which what a notifier was told is kept."""
    return f"told:{notifier}"


def read_agenda(path: Path) -> tuple[AgendaEntry, ...]:
    """The agenda in the journal at `path`, in milliseconds: what a tracker asks that has no daemon to ask.

    Raises:
        StateError: as `JournalReader.open_readonly`.
    """
    with JournalReader.open_readonly(path) as reader:
        return reader.agenda()


def storable(text: str) -> str:
    """Text that SQLite can hold: bytes that were no UTF-8 (a foreign command line) become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
