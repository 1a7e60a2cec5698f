"""Which process is it: (pid, start ticks, boot id), and who descends from it. Linux only, standard library only.

A pid alone is a number that the kernel hands out again. Everything that signals or attributes goes through here.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from msgspec import Struct

from reconciler import boottime

_STAT_BYTES = 4096
"""/proc/PID/stat is one line of some 300; the kernel gives all of it to one read that has room for it."""


class ProcStat(Struct, frozen=True):
    """The parts of /proc/PID/stat that identity needs (proc_pid_stat(5), fields 3, 4, 5, 6 and 22)."""

    pid: int
    state: str
    """One letter; `Z` (zombie) and `X` (dead) count as gone."""
    parent_pid: int
    group_id: int
    session_id: int
    start_ticks: int
    """Clock ticks after boot at which the process started, in whatever time namespace it is looked at."""

    @property
    def gone(self) -> bool:
        """It runs no more: only its exit status is left."""
        return self.state in "ZX"


@cache
def boot_id() -> str:
    """The random id of this boot of the kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def read_stat(pid: int) -> ProcStat | None:
    """The stat line of `pid`; None when there is no such process.

    Raises:
        OSError: it could not be read for another reason; the answer is unknown, not absent.
    """
    try:
        fd = os.open(
            f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC
        )  # per pid per tick: a file object costs twice that
        try:
            line = os.read(fd, _STAT_BYTES)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the command stands in parentheses and may itself hold ") ": fields are counted after the last one
    fields = line[line.rindex(b")") + 2 :].split()
    started = boottime.ticks_after_boot(int(fields[19]))
    return ProcStat(pid, fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), started)


def is_alive(pid: int, start_ticks: int) -> bool:
    """Whether exactly this process still runs (a zombie does not).

    Raises:
        OSError: unknown.
    """
    stat = read_stat(pid)
    return stat is not None and stat.start_ticks == start_ticks and not stat.gone


def open_pidfd(pid: int, start_ticks: int) -> int | None:
    """A pidfd of exactly this process; None when it is gone. The caller closes it.

    The descriptor is opened first and compared after: between a comparison and an open the pid could change hands.
    A number may live on as that of a session whose others still run, or be a thread's: Linux says EINVAL, later ones
    ENOENT, and there is no process of that number.

    Raises:
        OSError: unknown.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT) and pid > 0:
            return None
        raise
    try:
        if is_alive(pid, start_ticks):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def send_signal(pid: int, start_ticks: int, number: signal.Signals) -> bool:
    """Signal exactly this process; False when it was gone already.

    Raises:
        OSError: the identity could not be verified, or permission was denied; nothing was signalled.
    """
    fd = open_pidfd(pid, start_ticks)
    if fd is None:
        return False
    try:
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def children(pid: int) -> tuple[int, ...]:
    """Pids of the children of every thread of `pid` (CONFIG_PROC_CHILDREN); empty when it is gone."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - as above
            listing = f"/proc/{pid}/task/{task}/children"
            with suppress(FileNotFoundError, ProcessLookupError), open(listing, "rb") as file:  # noqa: PTH123
                found.extend(int(child) for child in file.read().split())
    return tuple(found)


def descendants(pid: int) -> Iterator[ProcStat]:
    """Living descendants of `pid`, parents before children; zombies are left out, their children are not."""
    seen = {pid}
    queue = list(children(pid))
    while queue:
        child = queue.pop(0)
        if child in seen:
            continue
        seen.add(child)
        stat = read_stat(child)
        if stat is not None and not stat.gone:
            yield stat
        queue.extend(children(child))


def read_marker(pid: int, variable: str) -> str | None:
    """The value of one variable in the environment `pid` was started with; None when absent or unreadable.

    Secondary evidence only: engines that rename themselves wipe it unless SPT_NOENV=1 is set.
    """
    prefix = variable.encode() + b"="
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:  # noqa: PTH123
            for item in file.read().split(b"\0"):
                if item.startswith(prefix):
                    return item[len(prefix) :].decode(errors="replace")
    except OSError:
        return None
    return None
