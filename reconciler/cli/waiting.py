"""Waiting for the state directory to change, instead of asking it again and again."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from pathlib import Path

from watchfiles import Change, watch

SETTLE_MS = 50
"""Changes this close together are one: the journal commits several times in a tick."""
_MISSING_S = 0.5


def while_read(waits: Iterator[None], fd: int) -> Iterator[None]:
    """The same, for as long as somebody reads `fd`: who has nothing to write would not hear that his reader has gone.

    Raises:
        BrokenPipeError: nobody does.
    """
    reader = select.poll()
    reader.register(fd, 0)  # nothing is asked for: that the other end is closed is told in any case (poll(2))
    for _ in waits:
        if reader.poll(0):
            raise BrokenPipeError
        yield


def changes(folder: Path, *suffixes: str, patience_s: float = 1.0) -> Iterator[None]:
    """Now, and then whenever a file of `folder` that ends so was written; at the latest after `patience_s`.

    inotify does not see what reaches a file through a mapping or another machine, so patience is bounded; where this
    user can have no more of it, patience is all there is. A folder that is not there yet is looked for.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """

    def counts(_: Change, path: str) -> bool:
        return path.endswith(suffixes)

    yield
    while True:
        if folder.is_dir():
            try:
                for _ in watch(
                    folder,
                    watch_filter=counts,
                    debounce=SETTLE_MS,
                    step=SETTLE_MS,
                    rust_timeout=round(patience_s * 1000),
                    yield_on_timeout=True,
                    recursive=False,
                ):
                    yield
            except FileNotFoundError:
                continue  # it vanished while it was watched, and is looked for again
            except (OSError, RuntimeError):  # the latter: the user's inotify instances are used up
                time.sleep(patience_s)
                yield
        else:
            time.sleep(_MISSING_S)
            yield
