"""`Journal`: the one writer's hold on what must survive. Reading is `reader`'s part, which this extends."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from msgspec.structs import replace

from reconciler.clock import Clock, Instant
from reconciler.errors import StateError
from reconciler.health.incident import Incident
from reconciler.journal import database
from reconciler.journal.codec import DecodeError, encode, encode_data
from reconciler.journal.database import Notice
from reconciler.journal.decisions import (
    DECISIONS_KEPT,
    PRUNE_DECISIONS_EVERY,
    Made,
    deeds,
    digest,
    maker,
    packed_rest,
    packed_spec,
)
from reconciler.journal.reader import JournalReader, Texts, storable, told_key
from reconciler.journal.timings import KEPT_PER_KEY, Measure
from reconciler.plan.actions import Event
from reconciler.plan.ledger import Ledger
from reconciler.spec.spec import Spec

EVENTS_KEPT = 100_000
"""About 20 MiB; a busy box writes some thousand a day, so this is weeks."""
PRUNE_EVERY = 1_000
"""Events between two prunings: the excess stays at one percent, and 999 of 1000 commits delete nothing."""
UNKEPT = 5
"""Decisions that a killed writer may lose the replay of; on a busy box they come some ms apart, and each is a look."""
RESOLVED_KEPT = 1_000
"""Resolved incidents kept for `incidents --all`."""

_Key = tuple[str, str]
"""Kind and name of a record."""


class Journal(JournalReader):
    """The journal in the hands of its one writer, on the thread that opened it."""

    def __init__(
        self, connection: sqlite3.Connection, path: Path, clock: Clock, ledger: Ledger, notice: Notice | None
    ) -> None:
        super().__init__(connection, path)
        self._clock = clock
        self._ledger = ledger
        self._unpruned = PRUNE_EVERY  # the first append prunes: an earlier daemon may have been killed before it did
        self._texts: Texts | None = None
        """What was last given to be kept, and is."""
        self._spec: tuple[Spec, str] | None = None
        """The spec of the last decision that was kept, and its key."""
        self._deeds: object = None
        """What the last decision that was kept had done."""
        self._measured: Mapping[tuple[str, Measure], tuple[float, ...]] | None = None
        self._unresolved: Mapping[str, Incident] | None = None
        self._unkept: list[tuple[int, Made]] = []
        """The last decisions, with their numbers, until `keep` is called."""
        self.notice = notice
        """Set when the journal that was found had to be put aside; it also is an event of kind `JournalReplaced`."""

    @classmethod
    def open(cls, path: Path, clock: Clock) -> Self:
        """Open as the writer and begin a new generation. The caller holds the writer's lock.

        A file that is damaged, newer, or holds records that cannot be read is put aside; `notice` then says so.

        Raises:
            StateError: the directory or file cannot be written, is full, or is held by another writer.
        """
        connection, notice = database.open_writer(path)
        try:
            reader = JournalReader(connection, path)
            try:
                ledger = reader.ledger()
                reader.incidents(include_resolved=True)
            except StateError as error:
                if not isinstance(error.__cause__, DecodeError):
                    raise
                connection.close()
                connection, notice = database.replace(path, error.message)
                ledger = Ledger()
            journal = cls(connection, path, clock, ledger, notice)
            journal._begin()
        except BaseException:
            connection.close()
            raise
        return journal

    def ledger(self) -> Ledger:
        """The last committed ledger, its `timings` and `runs` empty. Read from the file once, at opening."""
        return self._ledger

    def timings(self) -> Mapping[tuple[str, Measure], tuple[float, ...]]:
        """What was measured; the same object until something more is."""
        if self._measured is None:
            self._measured = super().timings()
        return self._measured

    def incidents(self, *, include_resolved: bool = False) -> tuple[Incident, ...]:
        """As `JournalReader.incidents`; the unresolved ones, for which each look asks, are read from the file once."""
        if include_resolved:
            return super().incidents(include_resolved=True)
        if self._unresolved is None:
            self._unresolved = {incident.id: incident for incident in super().incidents()}
        return tuple(sorted(self._unresolved.values(), key=lambda incident: (incident.opened, incident.id)))

    def commit(self, ledger: Ledger, events: Sequence[Event], now: Instant, made: Made | None = None) -> None:
        """Make a decision durable: the ledger and the events that tell of it, together or not at all.

        Only records that differ from the last commit are written; nothing new writes nothing. `ledger.timings` and
        `ledger.runs` are left out: they are predicted from measurements, not decided. With `made`, the decision gets a
        number, which its events bear, unless it changed nothing and has nothing done but what the last one had; what
        went into it is written by `keep`, for which no act has to wait. A decision about overlays outlives a power cut,
        too: work that began must not begin again.

        Raises:
            StateError: it could not be written; the journal and `ledger()` are as before.
        """
        ledger = replace(ledger, timings={}, runs={})
        before, after = _rows(self._ledger), _rows(ledger)
        written = [(*key, value) for key, value in after.items() if key not in before or before[key] != value]
        deleted = before.keys() - after.keys()
        unchanged = not (written or deleted or events) and ledger.boot_id == self._ledger.boot_id
        if unchanged and (made is None or deeds(made.plan) == self._deeds):
            return
        rows = [(kind, name, encode(value)) for kind, name, value in written]
        durable = any(kind == "overlay" for kind, *_ in (*rows, *deleted))
        with database.transaction(self._connection, self.path, durable=durable) as connection:
            connection.executemany("DELETE FROM records WHERE kind = ? AND name = ?", sorted(deleted))
            connection.executemany("INSERT OR REPLACE INTO records (kind, name, body) VALUES (?, ?, ?)", rows)
            if ledger.boot_id != self._ledger.boot_id:
                self._set_meta("boot_id", ledger.boot_id)
            number = None if made is None else self._next_decision()
            self._insert_events(events, now.wall, {} if number is None else {"decision": number})
        self._ledger = ledger  # what is not committed is not there
        self._deeds = None if made is None else deeds(made.plan)
        if made is not None and number is not None:
            self._unkept.append((number, made))

    def keep(self, least: int = 1) -> None:
        """Write what went into the last decisions, if there are so many: a killed writer loses it, and nothing else.

        Raises:
            StateError: it could not be written; it is not tried again.
        """
        if len(self._unkept) < max(1, least):
            return
        unkept, self._unkept = self._unkept, []
        before = self._spec
        try:
            with database.transaction(self._connection, self.path):
                for number, made in unkept:
                    self._spec = self._insert_decision(number, made)
        except BaseException:
            self._spec = before
            raise

    def append(self, events: Sequence[Event], now: Instant, *, data: Mapping[str, object] | None = None) -> None:
        """Record what was done or seen, apart from a decision; `data` (JSON values) goes with each of the events.

        Raises:
            StateError: it could not be written.
        """
        if events:
            with database.transaction(self._connection, self.path):
                self._insert_events(events, now.wall, data or {})

    def save_incidents(self, incidents: Iterable[Incident]) -> None:
        """Store incidents by id. Those not named stay as they are; the oldest resolved ones beyond a bound go.

        Raises:
            StateError: it could not be written.
        """
        known = {incident.id: incident for incident in self.incidents()}
        changed = {incident.id: incident for incident in incidents if known.get(incident.id) != incident}
        if not changed:
            return
        rows = [(name, incident.resolved_at, encode(incident)) for name, incident in changed.items()]
        with database.transaction(self._connection, self.path) as connection:
            connection.executemany("INSERT OR REPLACE INTO incidents (id, resolved_at, body) VALUES (?, ?, ?)", rows)
            connection.execute(
                "DELETE FROM incidents WHERE resolved_at IS NOT NULL AND id NOT IN"
                " (SELECT id FROM incidents WHERE resolved_at IS NOT NULL ORDER BY resolved_at DESC, id LIMIT ?)",
                (RESOLVED_KEPT,),
            )
        self._unresolved = {i: one for i, one in {**known, **changed}.items() if one.resolved_at is None}

    def save_told(self, notifier: str, told: Mapping[str, Incident]) -> None:
        """Store what a notifier has been told of and not yet told to be resolved, in the place of what was stored.

        Raises:
            StateError: it could not be written.
        """
        bodies = [encode(incident) for _, incident in sorted(told.items())]
        with database.transaction(self._connection, self.path):
            self._set_meta(told_key(notifier), json.dumps(bodies))

    def save_texts(self, files: Mapping[str, str], digest: str) -> None:
        """Keep the texts of an accepted spec (path → text) and its digest, in the place of the last ones.

        Raises:
            StateError: it could not be written.
        """
        if self._texts == Texts(files, digest):  # asked at every look, with the same texts
            return
        stored = {storable(path): storable(text) for path, text in files.items()}
        if self.texts() != Texts(stored, digest):
            with database.transaction(self._connection, self.path) as connection:
                connection.execute("DELETE FROM texts")
                connection.executemany("INSERT INTO texts (path, body) VALUES (?, ?)", sorted(stored.items()))
                self._set_meta("texts_digest", digest)
        self._texts = Texts(dict(files), digest)

    def record_timing(self, subject: str, what: Measure, seconds: float) -> None:
        """Remember that `what` took `subject` (an endpoint or workload) this long.

        Raises:
            StateError: it could not be written.
        """
        with database.transaction(self._connection, self.path) as connection:
            connection.execute(
                "INSERT INTO timings (subject, what, seconds) VALUES (?, ?, ?)", (subject, what, seconds)
            )
            connection.execute(
                "DELETE FROM timings WHERE subject = :subject AND what = :what AND id NOT IN (SELECT id FROM timings"
                " WHERE subject = :subject AND what = :what ORDER BY id DESC LIMIT :kept)",
                {"subject": subject, "what": what, "kept": KEPT_PER_KEY},
            )
        self._measured = None

    def _begin(self) -> None:
        generation = self.generation() + 1
        with database.transaction(self._connection, self.path):
            self._set_meta("generation", str(generation))
            if self.notice is not None:
                event = Event("JournalReplaced", "journal", self.notice.message, self.notice.reason)
                self._insert_events([event], self._clock.now().wall, {"kept_as": str(self.notice.kept_as)})

    def _insert_events(self, events: Sequence[Event], wall: float, data: Mapping[str, object]) -> None:
        text = encode_data(data) if data else None
        self._connection.executemany(
            "INSERT INTO events (wall, kind, subject, message, cause, data) VALUES (?, ?, ?, ?, ?, ?)",
            [(wall, e.kind, storable(e.subject), storable(e.message), storable(e.cause), text) for e in events],
        )
        self._unpruned += len(events)
        if self._unpruned >= PRUNE_EVERY:
            self._connection.execute("DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", (EVENTS_KEPT,))
            self._unpruned = 0

    def _next_decision(self) -> int:
        """A number for a decision, never used before, also if what went into one was not kept."""
        found = self._select(
            "SELECT coalesce(max(number), 0) FROM (SELECT max(id) AS number FROM decisions UNION ALL"
            " SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'decision')"
        )
        number = int(next(found)[0]) + 1
        self._set_meta("decision", str(number))
        return number

    def _insert_decision(self, number: int, made: Made) -> tuple[Spec, str] | None:
        """Keep what went into a decision: its spec with the key. One that has no text is told of instead."""
        inputs, wall = made.inputs, made.inputs.now.wall
        key = self._spec[1] if self._spec is not None and self._spec[0] is inputs.spec else None
        try:
            body = b""
            if key is None:
                key, body = packed_spec(inputs.spec)
            rest, outcome = packed_rest(inputs), digest(made.plan)
        except (TypeError, ValueError) as error:
            self._insert_events([Event("decision.unkept", "journal", str(error), "")], wall, {"decision": number})
            return self._spec
        if body:
            self._connection.execute("INSERT OR IGNORE INTO specs (digest, body) VALUES (?, ?)", (key, body))
        self._connection.execute(
            "INSERT INTO decisions (id, wall, version, spec, observed, ledger, now, outcome)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (number, wall, maker(made.plan), key, *rest, outcome),
        )
        if number % PRUNE_DECISIONS_EVERY == 0:
            self._connection.execute("DELETE FROM decisions WHERE id <= ?", (number - DECISIONS_KEPT,))
            self._connection.execute("DELETE FROM specs WHERE digest NOT IN (SELECT spec FROM decisions)")
        return inputs.spec, key

    def _set_meta(self, key: str, value: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))


def _rows(ledger: Ledger) -> dict[_Key, object]:
    """The records of a ledger. What is ordered is named by its place, zero-padded, so that names sort in order."""
    return {(kind, name): value for kind, values in _tables(ledger) for name, value in values}


def _tables(ledger: Ledger) -> Iterator[tuple[str, Iterable[tuple[str, object]]]]:
    yield "overlay", ((storable(name), record) for name, record in ledger.overlays.items())
    yield "endpoint", ((storable(name), record) for name, record in ledger.endpoints.items())
    yield "quarantine", ((storable(uuid), quarantine) for uuid, quarantine in ledger.quarantines.items())
    yield "lease", ((f"{place:06d}", lease) for place, lease in enumerate(ledger.leases))
    yield "agenda", ((f"{place:06d}", entry) for place, entry in enumerate(ledger.agenda))
