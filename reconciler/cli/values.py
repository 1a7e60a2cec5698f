"""Values on the command line that carry a unit."""

from __future__ import annotations

import re
from datetime import datetime, time, timedelta
from typing import Self

import typer
from msgspec import Struct

from reconciler.cli.local_time import LOCAL
from reconciler.units import FIRST_YEAR, LAST_YEAR, parse_duration, parse_size


class Seconds(Struct, frozen=True):
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


class Moment(Struct, frozen=True):
    """A point in time as people write it: the next 22:00, +90m, or ISO 8601; local where no offset is given."""

    wall: float
    """Epoch seconds."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """For typer.

        Raises:
            BadParameter: not a time, none to plan for, or one that clocks here are set forward over.
        """
        now = datetime.now().astimezone()
        try:
            if text.startswith("+"):
                moment = now + timedelta(seconds=parse_duration(text[1:]))
            elif re.fullmatch(r"\d\d?:\d\d(:\d\d)?", text):
                at = time.fromisoformat(text.zfill(5 if text.count(":") == 1 else 8))
                moment = datetime.combine(now.date(), at)
                if moment.astimezone() <= now:
                    moment += timedelta(days=1)
            else:
                moment = datetime.fromisoformat(text)
        except (ValueError, OverflowError, OSError) as error:
            raise typer.BadParameter(f"{text!r} is not a time; write it {TIME_HELP}") from error
        if not FIRST_YEAR <= moment.year <= LAST_YEAR:
            raise typer.BadParameter(f"{text!r} is not a time to plan for")
        wall = moment.timestamp()
        if moment.tzinfo is None and datetime.fromtimestamp(wall, LOCAL).replace(tzinfo=None) != moment:
            raise typer.BadParameter(f"{text!r} does not exist here: clocks are set forward over it")
        return cls(wall)

    @property
    def text(self) -> str:
        """As files have it: ISO 8601 with the local offset, to the second."""
        return datetime.fromtimestamp(round(self.wall)).astimezone().isoformat()


class Bytes(Struct, frozen=True):
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
