"""The memory ledger: one file per process and GPU, holding a decimal number of bytes.

`<sim_dir>/gpus/<index>/<pid>-<start ticks>`; any program may write there. An entry of a process that is gone stays for
the node's release delay, counted from the first reader that saw it dead, because real memory comes back tens of
milliseconds to 1.5 s after its process. The engine, which must not import this package, follows the same protocol.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import Struct

from reconciler import boottime, identity
from reconciler.errors import ActError
from reconciler.units import format_size

_NAME = re.compile(r"(\d{1,10})-(\d{1,20})", re.ASCII)


class Allocation(Struct, frozen=True, order=True):
    """Memory that one process holds, or held a moment ago, on one GPU."""

    pid: int
    start_ticks: int
    memory_bytes: int
    alive: bool
    """False: the process is gone and the memory is on its way back."""


class Ledger(Struct, frozen=True):
    """Who holds how much of which simulated GPU."""

    sim_dir: Path
    release_delay_s: float

    def indices(self) -> tuple[int, ...]:
        """The GPUs that have a folder, ascending."""
        with suppress(FileNotFoundError):
            return tuple(sorted(int(name) for name in os.listdir(self.sim_dir / "gpus") if name.isdecimal()))  # noqa: PTH208
        return ()

    def allocations(self, index: int) -> tuple[Allocation, ...]:
        """What is held on GPU `index`, by pid; entries whose release delay has passed are removed on the way.

        Names and contents that are no entries are passed over. A process that cannot be looked at counts as alive:
        unknown is not absent.
        """
        folder = f"{self.sim_dir}/gpus/{index}"  # no Path: a look at a node asks some ten times
        try:
            names = os.listdir(folder)  # noqa: PTH208 - as above
        except FileNotFoundError:
            return ()
        found = []
        for name in names:
            match = _NAME.fullmatch(name)
            size = _read_size(f"{folder}/{name}") if match else None
            if match is None or size is None:
                continue
            pid, ticks = int(match[1]), int(match[2])
            alive = _is_alive(pid, ticks)
            if alive or not self._released(index, name):
                found.append(Allocation(pid, ticks, size, alive))
        return tuple(sorted(found))

    def used_bytes(self, index: int) -> int:
        """The sum of what is held on GPU `index`, the dying included."""
        return sum(allocation.memory_bytes for allocation in self.allocations(index))

    def claim(self, index: int, memory_bytes: int, *, limit_bytes: int) -> Allocation:
        """Enter `memory_bytes` on GPU `index` for this process, in place of what it held there.

        Raises:
            ActError: with it, more than `limit_bytes` would be held there.
        """
        with self._exclusive(index):
            me = self._own()
            others = sum(a.memory_bytes for a in self.allocations(index) if (a.pid, a.start_ticks) != me)
            if others + memory_bytes > limit_bytes:
                free = format_size(max(0, limit_bytes - others))
                raise ActError(f"GPU {index} has {free} free, {format_size(memory_bytes)} wanted")
            self.write(index, me[0], me[1], memory_bytes)
        return Allocation(me[0], me[1], memory_bytes, alive=True)

    def write(self, index: int, pid: int, start_ticks: int, memory_bytes: int) -> None:
        """Enter `memory_bytes` for a process, whether it fits or not."""
        folder = self._folder(index)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = folder / f".{pid}-{start_ticks}.{os.getpid()}"
        draft.write_text(f"{memory_bytes}\n", "ascii")
        draft.replace(folder / f"{pid}-{start_ticks}")

    def remove(self, index: int, pid: int, start_ticks: int) -> None:
        """Take a process's entry out at once, without a delay; nothing happens when there is none."""
        for folder in (self._folder(index), self._dying(index)):
            (folder / f"{pid}-{start_ticks}").unlink(missing_ok=True)

    def _folder(self, index: int) -> Path:
        return self.sim_dir / "gpus" / str(index)

    def _dying(self, index: int) -> Path:
        return self.sim_dir / "dying" / str(index)

    def _released(self, index: int, name: str) -> bool:
        """Note that a dead process's entry was seen; True once the delay since the first such note is over."""
        note = self._dying(index) / name
        try:
            # the note's own modification time is the time noted: one atomic step, so no reader can see half a note
            with suppress(FileExistsError):
                try:
                    _create(note)
                except FileNotFoundError:
                    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    _create(note)
            # abs: a wall clock set back must not hold the memory for as long as it was set back
            if abs(time.time() - note.stat().st_mtime) < self.release_delay_s:
                return False
        except FileNotFoundError:
            return True  # another reader is just removing it
        (self._folder(index) / name).unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        return True

    @contextmanager
    def _exclusive(self, index: int) -> Iterator[None]:
        """Between looking for room and taking it, nobody else takes it. The lock is on the GPU's folder itself."""
        fd = os.open(self._folder(index), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _own(self) -> tuple[int, int]:
        stat = identity.read_stat(os.getpid())
        if stat is None:  # pragma: no cover - the process that asks is there
            raise ActError("/proc does not show this process")
        return stat.pid, stat.start_ticks + boottime.offset_ticks()


def _create(note: Path) -> None:
    os.close(os.open(note, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def _read_size(path: str) -> int | None:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - as above
            text = file.read(64).strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _is_alive(pid: int, start_ticks: int) -> bool:
    """`start_ticks` as /proc tells them: any program may have written them."""
    try:
        return identity.is_alive(pid, start_ticks - boottime.offset_ticks())
    except (OSError, ValueError):
        return True
