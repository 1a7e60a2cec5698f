"""`validate`, `plan`, `apply`: from files to a decision to the deed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from msgspec.structs import replace

from reconciler.cli import wiring
from reconciler.cli.arguments import INTERRUPTED, group
from reconciler.cli.face import Face
from reconciler.cli.local_time import LOCAL
from reconciler.cli.values import TIME_HELP, Moment, Seconds
from reconciler.plan.render import gpu_indices, plan_data, render_plan
from reconciler.units import counted

if TYPE_CHECKING:
    from reconciler.cli.converging import Outcome
    from reconciler.plan.actions import Plan

CHANGES_PENDING = 2

_STYLES = {"+": "green", "-": "red", "!": "bold red", "<": "cyan", "~": "yellow", "?": "magenta", "x": "bold magenta"}

app = group()


@app.command()
def validate(
    ctx: typer.Context,
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", show_default=False, help="Default: the set points and their overlays."),
    ] = None,
) -> int:
    """Check set-point and overlay files; every error, not the first alone.

    An overlay file is checked against the set points it belongs to. Warns of secrets in command lines, and
    of misspelt placeholders. Exit 0 or 1.

    Example: reconciler validate overlays/render.yaml
    """
    from reconciler.cli.checking import check_files
    from reconciler.plan.status import problem_data

    face = Face.of(ctx)
    found = check_files(face.options, tuple(files or ()))
    problems, warnings = found.problems, found.cautions
    if face.is_json:
        names = [str(path) for path in found.files]
        listed = {"problems": [problem_data(p) for p in problems], "warnings": [problem_data(p) for p in warnings]}
        face.answer({"valid": not problems, "files": names, **listed})
    else:
        for problem in problems:
            face.line(str(problem))
        for warning in warnings:
            face.line(str(replace(warning, message=f"warning: {warning.message}")))
        wrong = len({problem.file for problem in problems})
        also = f", {counted(len(warnings), 'warning')}" if warnings else ""
        if problems:
            face.note(f"{counted(len(problems), 'problem')} in {counted(wrong, 'file')}{also}")
        else:
            face.note(f"{counted(len(found.files), 'file')} checked, no problems{also}")
    return 1 if problems else 0


@app.command()
def plan(
    ctx: typer.Context,
    *,
    at: Annotated[
        Moment | None,
        typer.Option(parser=Moment.parse, metavar="TIME", help=f"As if it were this time, {TIME_HELP}."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the plan, for `reconciler apply FILE`.")
    ] = None,
    detailed_exitcode: Annotated[
        bool,
        typer.Option(
            "--detailed-exitcode", help="Exit 2 when changes are pending: something to do, or due and blocked."
        ),
    ] = False,
) -> int:
    """Show what would be done, in which order and why; changes nothing.

    Example: reconciler plan --at 2026-11-24T22:00:00+01:00
    """
    face = Face.of(ctx)
    if at is not None and at.wall < time.time():
        face.note(f"note: {at.text} has passed; what was decided then is told by `reconciler explain --replay`")
    seen = wiring.look(face.options, at=None if at is None else at.wall)
    face.tell_beside(seen)
    if out is not None:
        from reconciler.cli.saved_plan import save

        save(out, seen.plan, seen.observed)
    if face.is_json:
        face.answer(plan_data(seen.plan, seen.observed))
    else:
        _print_plan(face, seen)
        if out is not None:
            face.note(f"saved as {out}; `reconciler apply {out}` carries it out as long as nothing has moved")
    due = any(blocked.reason != "NotYet" for blocked in seen.plan.blocked)
    return CHANGES_PENDING if detailed_exitcode and (due or _pending(seen.plan)) else 0


@app.command()
def apply(
    ctx: typer.Context,
    *,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", show_default=False, help="A plan saved with `plan --out`.")
    ] = None,
    timeout: Annotated[
        Seconds | None, typer.Option(parser=Seconds.parse, metavar="D", help="Give up after this long, such as 5m.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> int:
    """Converge once, with live progress.

    With a saved plan: refuses (exit 4) if the set points, the box or what is to be done now have moved
    since. Asks on a terminal unless --yes.

    Example: reconciler apply --yes --timeout 10m
    """
    from reconciler.cli.converging import converge
    from reconciler.cli.progress import Progress
    from reconciler.cli.saved_plan import read_saved, refuse_if_stale

    face = Face.of(ctx)
    if file is not None or (face.asks and not yes):
        seen = wiring.look(face.options)
        face.tell_beside(seen)
        if file is not None:
            refuse_if_stale(read_saved(file), seen.plan, seen.observed, file)
        if face.asks and not yes:
            _print_plan(face, seen)
            if _pending(seen.plan):
                face.confirm("Carry this out?", yes=yes)
    face.warn_of_root()
    with Progress(face) as progress:
        done = converge(face.options, "apply", timeout_s=timeout.value if timeout else None, progress=progress.show)
    return finish(face, done)


def finish(face: Face, done: Outcome) -> int:
    """Tell how a convergence ended; its exit code."""
    if face.is_json:
        face.answer({"ok": done.ok, "message": done.message, "plan": plan_data(done.plan, done.observed)})
    elif done.ok:
        face.line(done.message)
    else:
        face.note(f"error: {done.message}")
    if done.interrupted:
        return INTERRUPTED
    return 0 if done.ok else 1


def _pending(decided: Plan) -> bool:
    """Something is to be done, or wanted and cannot be done."""
    return not decided.converged or bool(decided.drift)


def _print_plan(face: Face, seen: wiring.Look) -> None:
    text = render_plan(seen.plan, gpu_indices(seen.observed), LOCAL)
    if face.is_plain:
        face.line(text)
        return
    from rich.text import Text  # a sixth of the time of the command

    for line in text.splitlines():
        style = _STYLES.get(line[:1], "") if line[1:2] == " " else ""
        face.out.print(Text(line, style), soft_wrap=True)
