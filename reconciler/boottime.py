"""The time since the boot of this kernel, whatever time namespace this process is in. Standard library only.

CLOCK_BOOTTIME, and the start of a process in /proc, are told with the offset of the reader's namespace
(time_namespaces(7)). Records outlive their writer, and the next reader may be in another namespace: what is recorded
and compared is without it.
"""

from __future__ import annotations

import errno
import os
import time
from functools import cache

_NS_PER_S = 1_000_000_000
_FIRST_NAMESPACE = 0xEFFFFFFA
"""Its inode on every kernel that has more than one (PROC_TIME_INIT_INO): there the clocks are as they are."""
_LARGEST = (1 << 63) // _NS_PER_S * os.sysconf("SC_CLK_TCK")
"""Ticks: half of what a count of nanoseconds holds, 292 years."""


def now_s() -> float:
    """Seconds since boot, the time in which the box was suspended included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - _offset_ns() / _NS_PER_S


def ticks_after_boot(shown: int) -> int:
    """Clock ticks after boot at which a process started, from what /proc shows here (proc_pid_stat(5), field 22).

    Raises:
        OSError: it cannot be told: it started before the clock of this namespace began, or that is off by a part of a
            tick, or by nobody knows how much.
    """
    if shown > _LARGEST:  # less than nothing, as the kernel writes that
        raise OSError(errno.ERANGE, "it started before the clock of this time namespace began")
    return shown - offset_ticks()


@cache
def offset_ticks() -> int:
    """By how many clock ticks /proc shows a process to have started too late.

    Raises:
        OSError: it cannot be told, or is no whole number.
    """
    ticks, rest = divmod(_offset_ns(), _NS_PER_S // os.sysconf("SC_CLK_TCK"))
    if rest:
        raise OSError(errno.ERANGE, "the offset of this time namespace is no whole number of clock ticks")
    return ticks


@cache
def _offset_ns() -> int:
    """Of CLOCK_BOOTTIME in this process's time namespace; 0 where the kernel has no such namespaces.

    The kernel tells the offsets of the namespace that children will be in, which is another one for who made it and has
    not been forked since (on older kernels also once it has executed another program).
    """
    try:
        own, of_children = (os.stat(f"/proc/self/ns/{name}").st_ino for name in ("time", "time_for_children"))  # noqa: PTH116
        if own == _FIRST_NAMESPACE:
            return 0
        if own != of_children:
            raise OSError(errno.ERANGE, "the offset of this time namespace is not told")
        with open("/proc/self/timens_offsets", "rb") as file:  # noqa: PTH123
            lines = [line.split() for line in file]
    except FileNotFoundError:
        return 0
    found = next((fields for fields in lines if fields[0] in (b"boottime", b"7")), None)
    return int(found[1]) * _NS_PER_S + int(found[2]) if found is not None else 0
