"""The records of all incarnations, read again only when they changed."""

from __future__ import annotations

import os
import time

from msgspec import Struct

from reconciler.errors import StateError
from reconciler.journal.incarnations import Records, list_ids, read
from reconciler.journal.layout import StateDir

_RACY_NS = 1_000_000_000
"""A folder that changed less than this before it was read may have changed again within one tick of the file system's
clock, and would show the same time: it is read once more."""


class _Cached(Struct, frozen=True):
    """The records of one folder, as of the time that it shows."""

    records: Records
    changed_ns: int
    settled: bool


class RecordCache:
    """What `run/` holds. Every record appears by a rename, which shows in its folder's time: one stat per folder."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._cached: dict[str, _Cached] = {}

    def current(self) -> tuple[Records, ...]:
        """The records of every incarnation in `run/`, by id.

        A `run/` that is there no more (an unmounted disk, a folder that was moved, a link in its place) says nothing:
        those of the last look are still current, and what becomes of their processes is seen in /proc.

        Raises:
            StateError: `run/` cannot be listed; who runs is unknown.
        """
        try:
            ids = list_ids(self._state)
        except OSError as error:
            raise StateError(f"{self._state.run}: cannot be read: {error.strerror or error}") from error
        if not ids and self._cached and (self._state.run.is_symlink() or not self._state.run.exists()):
            return tuple(cached.records for cached in self._cached.values())
        self._cached = {i: self._look(i, self._cached.get(i)) for i in ids}
        return tuple(cached.records for cached in self._cached.values())

    def again(self, incarnation: str) -> Records:
        """The records of one, read now: for decisions that hang on a record written a moment ago."""
        return read(self._state.run / incarnation)

    def _look(self, incarnation: str, cached: _Cached | None) -> _Cached:
        path = self._state.run / incarnation
        try:
            changed_ns = os.stat(path).st_mtime_ns  # noqa: PTH116 - per incarnation per tick; Path costs more than the call
        except OSError:
            changed_ns = -1  # whatever it is, reading tells it better
        if cached is not None and cached.settled and cached.changed_ns == changed_ns:
            return cached
        now_ns = time.time_ns()  # compared with file times, which no injected clock writes
        records = read(path)
        settled = changed_ns >= 0 and now_ns - changed_ns > _RACY_NS and not records.unreadable
        return _Cached(records, changed_ns, settled)
