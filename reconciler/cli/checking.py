"""`validate`: which files are meant, and what is wrong, or doubtful, with each of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from msgspec import Struct
from msgspec.structs import replace

from reconciler.cli import wiring
from reconciler.cli.wiring import Options
from reconciler.errors import Problem, SpecError
from reconciler.plan import solver
from reconciler.spec.cautions import cautions
from reconciler.spec.load import read_texts, resolve_texts
from reconciler.spec.spec import Spec
from reconciler.spec.texts import read_source

_OVERLAY_KEYS = frozenset({"makespan", "workload", "requires", "allow_baseline_eviction", "set", "on_edit"})
"""Keys that only an overlay has at its top."""


class Checked(Struct, frozen=True):
    """What a check found, in file order."""

    files: tuple[Path, ...]
    problems: tuple[Problem, ...]
    """What keeps a file from being accepted."""
    cautions: tuple[Problem, ...] = ()
    """What had better not stand there, and is accepted all the same."""


def check_files(options: Options, files: tuple[Path, ...]) -> Checked:
    """Check the named files, or else the set points with all their overlays.

    Raises:
        UsageError: no file is named and there are no set points.
    """
    if not files:
        return _check_setpoints(wiring.setpoints_path(options))
    found = [_check_overlay(options, file) if _is_overlay(file) else _check_setpoints(file) for file in files]
    return Checked(
        tuple(dict.fromkeys(file for one in found for file in one.files)),
        _in_file_order(problem for one in found for problem in one.problems),
        _in_file_order(caution for one in found for caution in one.cautions),
    )


def _in_file_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(dict.fromkeys(problems), key=lambda p: (p.file, p.line, p.column)))


def _check_setpoints(path: Path) -> Checked:
    try:
        texts = read_texts(path)
    except SpecError as error:
        return Checked((path,), error.problems)
    overlays = texts.overlays or ()
    doubtful = [caution for source in (texts.setpoints, *overlays) for caution in cautions(source)]
    try:
        spec = resolve_texts(texts.setpoints, overlays)
        problems = spec.problems
        doubtful += _never_moved(spec)
    except SpecError as error:
        problems = error.problems
    unread = [problem for problem in texts.problems if problem not in problems]
    return Checked((path, *(Path(overlay.path) for overlay in overlays)), (*problems, *unread), tuple(doubtful))


def _never_moved(spec: Spec) -> Iterator[Problem]:
    """Endpoints that may be moved, where nothing is installed that could tell whom to move."""
    for name, endpoint in sorted(spec.endpoints.items()):
        if endpoint.movable and not (solver.is_available() and solver.can_be_imported()):
            at, message = endpoint.source, f'`movable: true` of endpoint "{name}" has no effect without the solver'
            yield Problem(at.file, at.line, at.column, message, f"{solver.INSTALL}, where reconciler is installed")


def _check_overlay(options: Options, file: Path) -> Checked:
    """An overlay by itself, against its set points; what is wrong with those is told as well."""
    try:
        overlay = read_source(file)
        setpoints = read_texts(_setpoints_of(options, file)).setpoints
        return Checked((file,), resolve_texts(setpoints, (overlay,)).problems, cautions(overlay))
    except SpecError as error:
        return Checked((file,), error.problems)


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
