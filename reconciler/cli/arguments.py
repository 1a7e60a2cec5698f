"""The options that every command shares, accepted before and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import typer
from msgspec import Struct

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it (128 + SIGINT)."""

WITH_VALUE = ("--setpoints", "--state-dir", "--simulate", "--format")
FLAGS = ("--no-color",)


class Format(StrEnum):
    """What stdout carries."""

    text = "text"
    json = "json"


class Globals(Struct, frozen=True):
    """The shared options as given; None: the environment or a default decides."""

    setpoints: Path | None = None
    state_dir: Path | None = None
    simulate: str | None = None
    format: Format = Format.text
    no_color: bool = False
    inherited: Mapping[str, str] | None = None
    """The environment that this program was given, if it has changed its own since."""


def hoist(argv: Sequence[str]) -> list[str]:
    """The shared options first, wherever they stood; everything from `--` on stays as it is.

    `status --format json` and `--format json status` become the same; of a repeated option the last one counts.
    """
    end = list(argv).index("--") if "--" in argv else len(argv)
    shared: list[str] = []
    rest: list[str] = []
    words = iter(argv[:end])
    for word in words:
        name, assigned, _ = word.partition("=")
        if word in FLAGS or (assigned and name in WITH_VALUE):
            shared.append(word)
        elif word in WITH_VALUE:
            value = next(words, None)
            shared += [word] if value is None else [word, value]
        else:
            rest.append(word)
    return [*shared, *rest, *argv[end:]]


def wants_json(argv: Sequence[str]) -> bool:
    """Whether hoisted arguments ask for JSON: an error in the others has to be told in that format, too."""
    answer = False
    words = iter(argv)
    for word in words:
        if word == "--":
            break
        if word == "--format":
            answer = next(words, "") == Format.json
        elif word.startswith("--format="):
            answer = word.removeprefix("--format=") == Format.json
        elif word in WITH_VALUE:
            next(words, None)
    return answer


def group(help_text: str | None = None) -> typer.Typer:
    """A set of commands with this program's manners: plain help, real tracebacks only for real bugs."""
    return typer.Typer(
        help=help_text,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
