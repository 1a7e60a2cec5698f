"""Values on the command line that carry a unit."""

from __future__ import annotations

from dataclasses import dataclass
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
