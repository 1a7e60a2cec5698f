"""One thing that was looked at, and how it stands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

Area = Literal["versions", "kernel", "driver", "GPUs", "files", "programs", "ports", "state", "leftovers", "service"]
"""In the order of the answer."""

Level = Literal["ok", "warning", "error", "unknown"]
"""
ok:      as it should be; said so that one sees that it was looked at
warning: works today, and will surprise somebody
error:   something that the set points want cannot work like this
unknown: could not be seen, which is not the same as ok
"""


class Check(Struct, frozen=True):
    """What was found. `hint` says what to do next; a check that is not ok always has one, unless there is no way."""

    area: Area
    level: Level
    message: str
    hint: str | None = None


def or_ok(found: Iterable[Check], area: Area, message: str) -> tuple[Check, ...]:
    """What was found, or that all is well there."""
    return tuple(found) or (Check(area, "ok", message),)
