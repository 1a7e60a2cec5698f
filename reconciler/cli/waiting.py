"""Waiting for the state directory to change, instead of asking it again and again."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from reconciler.inotify import WRITES, Notes

SETTLE_S = 0.05
"""Changes this close together are one: the journal commits several times in a tick."""


def changes(folder: Path, *suffixes: str, patience_s: float = 1.0) -> Iterator[None]:
    """Now, and then whenever a file of `folder` that ends so was written; at the latest after `patience_s`.

    inotify does not see what reaches a file through a mapping or another machine, so patience is bounded. A folder that
    is not there yet is looked for.

    Where the user's inotify instances are used up there is patience alone.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    yield
    try:
        notes = Notes(WRITES)
    except OSError:
        while True:
            time.sleep(patience_s)
            yield
    with closing(notes):
        while True:
            notes.follow([folder])
            until = time.monotonic() + patience_s
            while (left_s := until - time.monotonic()) > 0:
                if select.select([notes], [], [], left_s)[0] and any(n.endswith(suffixes) for n in notes.read()):
                    time.sleep(SETTLE_S)
                    notes.read()
                    break
            yield
