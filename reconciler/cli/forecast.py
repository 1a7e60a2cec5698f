"""`forecast`: what will run where over the next hours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from reconciler.cli import wiring
from reconciler.cli.arguments import group
from reconciler.cli.face import PIPE_WIDTH, Face
from reconciler.cli.local_time import LOCAL
from reconciler.cli.values import Seconds
from reconciler.errors import ReconcilerError

DEFAULT_SPAN = "24h"
LEAST_COLUMNS, MOST_COLUMNS = 24, 72
"""Of the picture in text, beside the eight that name the GPU: as many as the terminal has."""

app = group()


@app.command()
def forecast(
    ctx: typer.Context,
    *,
    span: Annotated[
        Seconds | None,
        typer.Option("--for", parser=Seconds.parse, metavar="D", help=f"How far ahead. [default: {DEFAULT_SPAN}]"),
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw it, into this file.")] = None,
) -> None:
    """Show what will run where, and who will be away for how long.

    The planner decides on a box where everything takes as long as it usually does: the files as they are now, nobody
    edits them, nothing breaks, no stranger comes or goes.

    Example: reconciler forecast --for 24h --svg tonight.svg
    """
    from reconciler.plan.forecast import forecast as foresee
    from reconciler.plan.timeline import draw_forecast, forecast_data, render_forecast

    face = Face.of(ctx)
    seen = wiring.look(face.options)
    face.tell_beside(seen)
    seconds = (span or Seconds.parse(DEFAULT_SPAN)).value
    found = foresee(seen.spec, seen.observed, seen.ledger, seen.plan.now, seconds)
    if svg is not None:
        try:
            svg.write_text(draw_forecast(found, LOCAL), encoding="utf-8")
        except OSError as error:
            raise ReconcilerError(f"{svg}: cannot be written: {error.strerror}") from error
    if face.is_json:
        face.answer(forecast_data(found))
    else:
        columns = min(MOST_COLUMNS, max(LEAST_COLUMNS, shutil.get_terminal_size((PIPE_WIDTH, 24)).columns - 8))
        face.line(render_forecast(found, LOCAL, width=columns))
        if svg is not None:
            face.note(f"drawn into {svg}")
