"""`validate`: which files are meant, and what is wrong with each of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import yaml

from reconciler.cli import wiring
from reconciler.cli.wiring import Options
from reconciler.errors import Problem, SpecError
from reconciler.spec.load import SourceText, read_texts, resolve_texts

_OVERLAY_KEYS = frozenset({"makespan", "workload", "requires", "allow_baseline_eviction", "set", "on_edit"})
"""Keys that only an overlay has at its top."""


def check_files(options: Options, files: tuple[Path, ...]) -> tuple[tuple[Path, ...], tuple[Problem, ...]]:
    """Check the named files, or else the set points with all their overlays.

    Returns:
        The files that were checked, and everything that is wrong with them, in file order.

    Raises:
        UsageError: no file is named and there are no set points.
    """
    if not files:
        path = wiring.setpoints_path(options)
        checked, problems = _check_setpoints(path)
        return checked, problems
    all_checked: dict[Path, None] = {}
    all_problems: dict[Problem, None] = {}
    for file in files:
        checked, problems = _check_overlay(options, file) if _is_overlay(file) else _check_setpoints(file)
        all_checked.update(dict.fromkeys(checked))
        all_problems.update(dict.fromkeys(problems))
    return tuple(all_checked), tuple(sorted(all_problems, key=lambda p: (p.file, p.line, p.column)))


def _check_setpoints(path: Path) -> tuple[tuple[Path, ...], tuple[Problem, ...]]:
    try:
        texts = read_texts(path)
    except SpecError as error:
        return (path,), error.problems
    checked = (path, *(Path(overlay.path) for overlay in texts.overlays or ()))
    try:
        problems = resolve_texts(texts.setpoints, texts.overlays or ()).problems
    except SpecError as error:
        problems = error.problems
    unread = [problem for problem in texts.problems if problem not in problems]
    return checked, (*problems, *unread)


def _check_overlay(options: Options, file: Path) -> tuple[tuple[Path, ...], tuple[Problem, ...]]:
    """An overlay by itself, against its set points; what is wrong with those is told as well."""
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        return (file,), (Problem(str(file), 0, 0, error.strerror or "cannot be read"),)
    except UnicodeDecodeError:
        return (file,), (Problem(str(file), 0, 0, "is not UTF-8"),)
    try:
        setpoints = read_texts(_setpoints_of(options, file)).setpoints
        return (file,), resolve_texts(setpoints, (SourceText(str(file), text),)).problems
    except SpecError as error:
        return (file,), error.problems


def _setpoints_of(options: Options, file: Path) -> Path:
    """Those named; else the ones in whose overlays folder the file lies; else the default."""
    named = options.setpoints is not None or os.environ.get("RECONCILER_SETPOINTS")
    beside = file.absolute().parent.parent / "setpoints.yaml"
    if not named and beside.is_file():
        options = replace(options, setpoints=beside)
    return wiring.setpoints_path(options)


def _is_overlay(file: Path) -> bool:
    """By its keys. Only a peek: what cannot be read or parsed is told by the check that follows."""
    try:
        with file.open(encoding="utf-8") as text:
            root = yaml.compose(text.read(1 << 20), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return file.absolute().parent.name == "overlays"
    if not isinstance(root, yaml.MappingNode):
        return file.absolute().parent.name == "overlays"
    return any(key.value in _OVERLAY_KEYS for key, _ in root.value if isinstance(key, yaml.ScalarNode))
