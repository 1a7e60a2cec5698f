"""`status`: how everything stands, once or for as long as somebody looks."""

from __future__ import annotations

from typing import Annotated

import typer

from reconciler.cli import wiring
from reconciler.cli.arguments import group
from reconciler.cli.face import Face
from reconciler.errors import ReconcilerError, UsageError

app = group()


@app.command()
def status(
    ctx: typer.Context,
    *,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep looking; Ctrl-C ends it.")] = False,
) -> None:
    """Show endpoints, GPUs, overlays, capabilities and incidents.

    Works with and without a daemon.

    Example: reconciler status --format json | jq '.data.endpoints[] | {name, state}'
    """
    face = Face.of(ctx)
    if watch:
        _watch(face)
    elif face.is_json:
        face.answer(wiring.status(face.options))
    else:
        from reconciler.cli.tables import status_view

        face.out.print(status_view(wiring.status(face.options)))


def _watch(face: Face) -> None:
    """Show anew at each change of the journal, and every second; trouble is shown and waited out."""
    from rich.console import RenderableType
    from rich.live import Live
    from rich.text import Text

    from reconciler.cli.tables import status_view
    from reconciler.cli.waiting import changes

    if face.is_json or not face.out.is_terminal:
        raise UsageError("--watch is for a terminal", hint="scripts follow `reconciler events -f --format json`")
    with Live(console=face.out, screen=True, auto_refresh=False) as live:
        for _ in changes(wiring.state_dir(face.options).path, ".sqlite-wal"):
            shown: RenderableType
            try:
                shown = status_view(wiring.status(face.options), everything=False)
            except ReconcilerError as error:
                shown = Text(str(error), "red")
            live.update(shown, refresh=True)
