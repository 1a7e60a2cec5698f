"""The time since boot is the same in every time namespace, or it is said that it cannot be told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from reconciler import boottime, identity
from reconciler.act import shim

SAID = """
import sys
from reconciler import boottime, identity
from reconciler.act import shim
pid, ticks = map(int, sys.argv[1:])
print(boottime.now_s(), identity.read_stat(pid).start_ticks, shim.start_ticks(pid), identity.is_alive(pid, ticks))
"""


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What was worked out of this process's namespace is worked out anew, before and after."""
    boottime.offset_ticks.cache_clear()
    yield
    boottime.offset_ticks.cache_clear()


@pytest.mark.parametrize("offset_s", [86_400, -1])
def test_a_process_started_when_it_did_for_whoever_looks_from_another_time_namespace(offset_s: int) -> None:
    words = ("unshare", "--time", "--boottime", str(offset_s))
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no time namespace may be made here")
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        mine = identity.read_stat(sleeper.pid)
        assert mine is not None
        said = [sys.executable, "-c", SAID, str(mine.pid), str(mine.start_ticks)]
        before = boottime.now_s()
        there = subprocess.run([*words, *said], capture_output=True, text=True, check=True).stdout.split()
        assert before <= float(there[0]) <= boottime.now_s()
        assert [int(n) for n in there[1:3]] == [mine.start_ticks] * 2
        assert there[3] == "True"
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.usefixtures("forgetful")
def test_where_the_offset_is_a_part_of_a_tick_no_start_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boottime, "_offset_ns", lambda: 5_000_000_001)
    monkeypatch.setattr(shim, "boottime_offset", lambda: 5_000_000_001)
    for look in (identity.read_stat, shim.start_ticks):
        with pytest.raises(OSError, match="no whole number of clock ticks"):
            look(1)
    with pytest.raises(OSError, match="no whole number"):
        identity.open_pidfd(1, 0)


def test_who_started_before_the_clock_of_the_namespace_began_is_unknown() -> None:
    shown = ((1 << 64) - 750_000_000) // (1_000_000_000 // os.sysconf("SC_CLK_TCK"))
    with pytest.raises(OSError, match="before the clock"):
        boottime.ticks_after_boot(shown)


@pytest.mark.usefixtures("forgetful")
def test_who_made_a_namespace_and_is_not_in_it_is_not_told_its_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of offsets is about its children."""
    numbers = {"/proc/self/ns/time": boottime._FIRST_NAMESPACE, "/proc/self/ns/time_for_children": 7}
    monkeypatch.setattr(boottime.os, "stat", lambda path: os.stat_result((0, numbers[path], *[0] * 8)))
    boottime._offset_ns.cache_clear()
    assert boottime.offset_ticks() == 0
    boottime.offset_ticks.cache_clear()
    boottime._offset_ns.cache_clear()
    numbers["/proc/self/ns/time"] = 8
    with pytest.raises(OSError, match="is not told"):
        boottime.offset_ticks()
    monkeypatch.undo()
    boottime._offset_ns.cache_clear()
