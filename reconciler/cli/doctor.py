"""`doctor`: what is wrong with this box, and how to mend it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from reconciler.cli import wiring
from reconciler.cli.arguments import group
from reconciler.cli.eyes import prepare_node
from reconciler.cli.face import Face
from reconciler.cli.wiring import Options
from reconciler.clock import SystemClock
from reconciler.errors import ReconcilerError, SpecError, StateError
from reconciler.journal.layout import StateDir, writer
from reconciler.units import counted

if TYPE_CHECKING:
    from reconciler.checkup.check import Check, Level
    from reconciler.spec.spec import Spec

app = group()

_MARKS: Mapping[Level, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "error": ("ERROR", "red"),
    "unknown": ("?", "magenta"),
}


@app.command()
def doctor(ctx: typer.Context) -> int:
    """Say what is wrong with this box, and how to mend it.

    Looks at versions, kernel, driver, GPUs, set points, programs, ports, state directory, leftovers and the systemd
    unit; repairs nothing. Exit code 1 when something is wrong, 0 when there are warnings at most.

    Example: reconciler doctor --format json | jq '.data.checks[] | select(.level == "error")'
    """
    face = Face.of(ctx)
    checks = examine(face.options)
    wrong = any(check.level == "error" for check in checks)
    if face.is_json:
        listed = [{"area": c.area, "level": c.level, "message": c.message, "hint": c.hint} for c in checks]
        face.answer({"ok": not wrong, "checks": listed})
    else:
        _show(face, checks)
    return int(wrong)


def examine(options: Options) -> tuple[Check, ...]:
    """Every check, in the order of the areas; what keeps one from being made is told, and keeps no other.

    Raises:
        ReconcilerError: the description of the simulated node is wrong.
    """
    from reconciler.act.shm import left_behind
    from reconciler.checkup.gpus import check_driver, check_gpus
    from reconciler.checkup.service import check_service
    from reconciler.checkup.state import check_state
    from reconciler.checkup.subjects import check_leftovers, check_ports, check_programs, has_gangs
    from reconciler.checkup.system import check_groups, check_kernel, check_versions
    from reconciler.observe.gpus import NvmlReader
    from reconciler.observe.snapshot import all_endpoints
    from reconciler.spec.profiles import PROFILES

    state = wiring.state_dir(options)
    on_state = check_state(state)  # before anything here touches it
    environment = {**os.environ, **prepare_node(wiring.simulated_node(options), state)}
    nvml = NvmlReader(SystemClock())
    try:
        driver = check_driver(nvml)
    finally:
        nvml.close()
    files, spec = _files(options)
    seen = _look(options) if spec is not None and driver.level == "ok" else None
    found: list[Check] = [*check_versions(), *check_kernel(gangs=spec is not None and has_gangs(spec))]
    found += [check_groups(_daemon(state)), driver]
    if isinstance(seen, wiring.Look):
        own = {endpoint.profile.name: endpoint.profile for endpoint in all_endpoints(seen.spec)}
        found += check_gpus(seen.observed, seen.ledger, {**own, **PROFILES}.values())
    elif seen is not None:
        found.append(seen)
    found += files
    if spec is not None:
        found += check_programs(spec, environment)
    if isinstance(seen, wiring.Look):
        found += check_ports(seen.spec, seen.observed)
    found += on_state
    if isinstance(seen, wiring.Look):
        found += check_leftovers(seen.spec, seen.observed, left_behind(state) if state.path.is_dir() else ())
    return (*found, *check_service(os.environ, Path.home()))


def _daemon(state: StateDir) -> int | None:
    """Pid of the daemon that runs on this state directory, as far as can be told."""
    try:
        held = writer(state) if state.path.is_dir() else None
    except StateError:
        return None
    return held.pid if held is not None else None


def _files(options: Options) -> tuple[tuple[Check, ...], Spec | None]:
    """How the files stand, and what is in force; None: nothing can be."""
    from reconciler.checkup.check import Check
    from reconciler.checkup.subjects import check_files
    from reconciler.cli import checking

    try:
        found = checking.check_files(options, ())
        checks = check_files(found.files, found.problems, found.cautions)
        return checks, wiring.in_force(options, last_good=True).spec
    except SpecError:
        return checks, None  # told already
    except ReconcilerError as error:
        return (Check("files", "error", error.message, error.hint),), None


def _look(options: Options) -> wiring.Look | Check:
    from reconciler.checkup.check import Check

    try:
        return wiring.look(options, last_good=True)
    except ReconcilerError as error:
        return Check("GPUs", "unknown", error.message, error.hint)


def _show(face: Face, checks: tuple[Check, ...]) -> None:
    from rich.text import Text

    widest = max(len(check.area) for check in checks)
    for check in checks:
        mark, style = _MARKS[check.level]
        line = Text(f"{check.area:<{widest}}  ").append(f"{mark:<7}", style).append(f"  {check.message}")
        face.out.print(line, soft_wrap=True)
        if check.hint and check.level != "ok":
            face.out.print(Text(f"{'':<{widest}}           -> {check.hint}", "dim"), soft_wrap=True)
    numbers = Counter(check.level for check in checks)
    many: Mapping[Level, str] = {"error": "errors", "warning": "warnings", "unknown": "unknown"}
    told = [counted(numbers[level], level, words) for level, words in many.items() if numbers[level]]
    face.line("\n" + (", ".join(told) or "Nothing is wrong with this box."))
