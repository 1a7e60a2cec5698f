"""What people read of numbers of things."""

from __future__ import annotations

from reconciler.units import counted


def test_one_thing_is_told_otherwise_than_several() -> None:
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert [counted(n, "process", "processes") for n in (0, 1, 2)] == ["0 processes", "1 process", "2 processes"]
