"""What a command says, and where: data to stdout, everything else to stderr, in the format that was asked for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import typer

from reconciler.cli.arguments import Format, Globals
from reconciler.cli.wiring import Options

if TYPE_CHECKING:
    from rich.console import Console

    from reconciler.cli.wiring import Look

PIPE_WIDTH = 200
"""Columns of tables that no terminal shows: wide enough that nothing a script or a log needs is cut."""


class Face:
    """One command's way to the person, or the script, that called it."""

    def __init__(self, shared: Globals) -> None:
        self.shared = shared

    @classmethod
    def of(cls, ctx: typer.Context) -> Face:
        """The face for one call."""
        return cls(ctx.find_object(Globals) or Globals())

    @property
    def options(self) -> Options:
        """Where things are."""
        return Options(self.shared.setpoints, self.shared.state_dir, self.shared.simulate)

    @property
    def is_json(self) -> bool:
        """Whether stdout carries JSON."""
        return self.shared.format is Format.json

    @property
    def is_plain(self) -> bool:
        """Whether stdout takes text as it is: no terminal shows it, and nobody asked for colour all the same."""
        return not sys.stdout.isatty() and not os.environ.get("FORCE_COLOR")

    @property
    def asks(self) -> bool:
        """Whether a person is there to answer a question."""
        return sys.stdin.isatty() and sys.stderr.isatty() and not self.is_json

    @cached_property
    def out(self) -> Console:
        """stdout, for text."""
        return self._console(stderr=False)

    @cached_property
    def err(self) -> Console:
        """stderr: progress, questions, notes."""
        return self._console(stderr=True)

    def answer(self, data: Mapping[str, Any], **beside: object) -> None:
        """The JSON answer; `beside` stands next to `data`."""
        json.dump({"format_version": "1", **beside, "data": data}, sys.stdout)
        sys.stdout.write("\n")
        sys.stdout.flush()

    def line(self, text: str) -> None:
        """One line of text to stdout, as it is."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """One line to stderr, as it is."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def tell_beside(self, seen: Look) -> None:
        """What a look has to say beside its answer: each file that is wrong, once, and the notes."""
        for problem in dict.fromkeys((*seen.spec.problems, *seen.problems)):
            self.note(f"{problem}\n  (this file changes nothing until it is mended)")
        for note in seen.notes:
            self.note(note)

    def warn_of_root(self) -> None:
        """Where this process is root's, say whose everything will be that it starts."""
        if os.geteuid() == 0:
            self.note("warning: running as root: so does every endpoint and workload that has no `user:`")

    def confirm(self, question: str, *, yes: bool) -> None:
        """Go on only with a yes; without a terminal there is nobody to ask, and the command itself was the yes.

        Raises:
            typer.Exit: the answer was no.
        """
        if yes or not self.asks:
            return
        if not typer.confirm(question, err=True):
            self.note("nothing was done")
            raise typer.Exit(1)

    def _console(self, *, stderr: bool) -> Console:
        from rich.console import Console  # JSON answers do without it

        stream = sys.stderr if stderr else sys.stdout
        return Console(
            file=stream,
            no_color=self.shared.no_color or None,
            highlight=False,
            markup=False,
            emoji=False,
            width=None if stream.isatty() else PIPE_WIDTH,
        )
