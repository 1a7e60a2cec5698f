"""An overlay written by the command line: a name, a file that is valid before it appears."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct
from msgspec.structs import replace

from reconciler.cli.whole_file import write_whole
from reconciler.errors import ReconcilerError, SpecError, UsageError
from reconciler.spec.load import SourceText, Texts, resolve_texts
from reconciler.spec.values import NAME, NAME_HELP

DEFAULT_DURATION = "1h"
"""What a job is expected to take when nobody says; past it, it goes on, and an incident says that it is overdue."""

_LONGEST_STEM = 40


class Job(Struct, frozen=True):
    """What `overlay submit` was asked for; units as people write them."""

    command: tuple[str, ...]
    cwd: str
    gpus: int = 1
    duration: str | None = DEFAULT_DURATION
    """None: until the deadline."""
    start: str | None = None
    """ISO 8601 with an offset; None: at once."""
    deadline: str | None = None
    """ISO 8601 with an offset; None: no hard end."""
    priority: str | None = None
    """A number, or a name from the set points' `priorities`; None: the format's default."""
    evict: bool = False
    memory: str | None = None
    requires: tuple[str, ...] = ()
    retries: int = 0


def overlay_text(job: Job) -> str:
    """The overlay file that asks for `job`."""
    document: dict[str, Any] = {"version": 1}
    if job.priority is not None:
        document["priority"] = int(job.priority) if job.priority.lstrip("-").isdecimal() else job.priority
    if job.evict:
        document["allow_baseline_eviction"] = True
    makespan = {"start": job.start, "duration": job.duration, "deadline": job.deadline}
    document["makespan"] = {key: value for key, value in makespan.items() if value is not None}
    document["gpus"] = job.gpus
    if job.memory is not None:
        document["memory"] = job.memory
    if job.requires:
        document["requires"] = list(job.requires)
    workload: dict[str, Any] = {"command": list(job.command), "cwd": job.cwd}
    if job.retries:
        workload["retries"] = job.retries
    document["workload"] = workload
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def choose_name(command: Sequence[str], taken: Mapping[str, object]) -> str:
    """A name that says what runs, and that nothing has yet: `luxcoreconsole-3fa9`."""
    stem = re.sub(r"[^a-z0-9]+", "-", Path(command[0]).name.lower()).strip("-")[:_LONGEST_STEM] or "job"
    while True:
        name = f"{stem}-{secrets.token_hex(2)}"
        if name not in taken:
            return name


def write_overlay(texts: Texts, name: str, text: str) -> Path:
    """Put the overlay into the folder, whole or not at all, once it is known to be acceptable.

    Raises:
        SpecError: it would not be accepted; nothing was written.
        UsageError: the name is not one, or is taken.
        ReconcilerError: the folder cannot be written.
    """
    folder = texts.overlays_folder
    if not NAME.fullmatch(name):  # first of all: below, it becomes part of a path
        raise UsageError(f"{name!r} is not a name", hint=NAME_HELP)
    if any(overlay.name == name for overlay in texts.overlays or ()):
        raise UsageError(f"there is an overlay {name!r} already", hint=f"reconciler overlay cancel {name}")
    path = folder / f"{name}.yaml"
    others = tuple(texts.overlays or ())
    spec = resolve_texts(texts.setpoints, (*others, SourceText(str(path), text)))
    problems = tuple(
        # the lines are of a file that nobody sees
        replace(problem, file=f"overlay {name}", line=0, column=0)
        for problem in spec.problems
        if problem.file == str(path)
    )
    if problems:
        raise SpecError(problems)
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)  # whatever the umask: what others may write is not read
        # a folder that others may read has a daemon of another user behind it, perhaps
        mode = 0o644 if folder.stat().st_mode & 0o004 else 0o600
        write_whole(path, text, mode)
    except OSError as error:
        raise ReconcilerError(f"{folder}: the overlay cannot be written: {error.strerror or error}") from error
    return path
