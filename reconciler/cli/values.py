"""Values on the command line that carry a unit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Self

import typer

from reconciler.units import parse_duration, parse_size


@dataclass(frozen=True, slots=True)
class Seconds:
    """A duration as people write it: 30s, 5m, 1d12h."""

    value: float
    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """For typer.

        Raises:
            BadParameter: not a duration, or not longer than zero.
        """
        try:
            seconds = parse_duration(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        if seconds <= 0:
            raise typer.BadParameter(f"{text!r} is not longer than zero")
        return cls(seconds, text)


TIME_HELP = "as 22:00 (the next one), +90m (from now), or 2026-11-24T22:00:00+01:00; without an offset it is local"


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time as people write it: the next 22:00, +90m, or ISO 8601; local where no offset is given."""

    wall: float
    """Epoch seconds."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """For typer.

        Raises:
            BadParameter: not a time.
        """
        now = datetime.now().astimezone()
        try:
            if text.startswith("+"):
                return cls(now.timestamp() + parse_duration(text[1:]))
            if re.fullmatch(r"\d\d?:\d\d(:\d\d)?", text):
                at = time.fromisoformat(text.zfill(5 if text.count(":") == 1 else 8))
                today = datetime.combine(now.date(), at).astimezone()
                later = today if today > now else datetime.combine(now.date() + timedelta(days=1), at).astimezone()
                return cls(later.timestamp())
            return cls(datetime.fromisoformat(text).astimezone().timestamp())
        except (ValueError, OverflowError, OSError) as error:
            raise typer.BadParameter(f"{text!r} is not a time; write it {TIME_HELP}") from error

    @property
    def text(self) -> str:
        """As files have it: ISO 8601 with the local offset, to the second."""
        return datetime.fromtimestamp(round(self.wall)).astimezone().isoformat()


@dataclass(frozen=True, slots=True)
class Bytes:
    """An amount of memory as people write it: 20GiB."""

    value: int
    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """For typer.

        Raises:
            BadParameter: not a size.
        """
        try:
            return cls(parse_size(text), text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
