"""The files that endpoints and workloads write their output to: which is whose, and reading them as they grow."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from reconciler.journal.incarnations import Intent, list_ended, list_ids, read
from reconciler.journal.layout import StateDir
from reconciler.plan.observed import SubjectKind

_BLOCK = 64 << 10


class OutputFile(Struct, frozen=True):
    """Where one incarnation's output goes."""

    incarnation: str
    kind: SubjectKind
    started: float
    """Epoch seconds."""
    path: Path


def outputs_of(state: StateDir, name: str, kind: SubjectKind | None = None) -> list[OutputFile]:
    """The output files of every incarnation of `name` that is remembered, oldest first.

    Raises:
        OSError: the records cannot be listed.
    """
    found: dict[str, OutputFile] = {}
    # run first: a record that is put away between the two listings is then found in the second
    for folder, names in ((state.run, list_ids(state)), (state.ended, list_ended(state))):
        for identity in names:
            intent = read(folder / identity).intent
            if isinstance(intent, Intent) and intent.name == name and kind in (None, intent.kind):
                found[identity] = OutputFile(identity, intent.kind, intent.started.wall, Path(intent.log))
    return sorted(found.values(), key=lambda output: (output.started, output.incarnation))


def names_with_output(state: StateDir) -> set[str]:
    """Every endpoint and overlay that something was started for."""
    places = [state.run / i for i in list_ids(state)] + [state.ended / i for i in list_ended(state)]
    intents = (read(place).intent for place in places)
    return {intent.name for intent in intents if isinstance(intent, Intent)}


class Tail:
    """What was written to one subject's output since the last look, from one incarnation to the next."""

    def __init__(self, state: StateDir, name: str, kind: SubjectKind | None = None) -> None:
        self._state, self._name, self._kind = state, name, kind
        self._offsets: dict[str, int] = {}

    def skip(self) -> None:
        """Count everything there is as seen."""
        for output in outputs_of(self._state, self._name, self._kind):
            self._offsets[output.incarnation] = _size(output.path)

    def new(self) -> Iterator[bytes]:
        """What is new, in order. What was given back to the disk before it was seen is passed over, in whole lines."""
        for output in outputs_of(self._state, self._name, self._kind):
            for end, block in _read_from(output.path, self.seen(output)):
                self._offsets[output.incarnation] = end
                if text := block.replace(b"\0", b""):
                    yield text

    def seen(self, output: OutputFile) -> int:
        """Up to which byte that file was seen."""
        return self._offsets.get(output.incarnation, 0)


def last_lines(path: Path, count: int, end: int | None = None) -> bytes:
    """The last `count` lines before byte `end` of a file that may be large; empty when it is not there."""
    if count <= 0:
        return b""
    try:
        with path.open("rb") as file:
            first = _first_kept(file.fileno(), 0)
            position = file.seek(0, os.SEEK_END) if end is None else end
            blocks: list[bytes] = []
            newlines = 0
            while position > first and newlines <= count:  # one more than lines: where the first of them begins
                step = min(_BLOCK, position - first)
                position -= step
                file.seek(position)
                blocks.append(file.read(step))
                newlines += blocks[-1].count(b"\n")
            text = b"".join(reversed(blocks))
            if position <= first and first > 0:
                text = text.partition(b"\n")[2]  # the beginning of that line is gone
    except FileNotFoundError:
        return b""
    return b"".join(text.replace(b"\0", b"").splitlines(keepends=True)[-count:])


def _read_from(path: Path, offset: int) -> Iterator[tuple[int, bytes]]:
    """Blocks from `offset` on, each with the offset behind it; all of a file that was cut off meanwhile."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < offset:
                offset = 0
            first = _first_kept(file.fileno(), offset)
            file.seek(first)
            if first > offset:
                file.readline()  # the beginning of that line is gone
            while block := file.read(_BLOCK):
                yield file.tell(), block
    except FileNotFoundError:
        return


def _first_kept(fd: int, offset: int) -> int:
    """Where, from `offset` on, the file's content begins: what lay before was given back to the disk by the shim."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing lies behind it
            return offset
        raise


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
