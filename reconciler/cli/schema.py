"""`schema`: the JSON Schema of a file format, for editors and checkers."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from reconciler.cli.arguments import group
from reconciler.cli.face import Face
from reconciler.spec.schema import schema as schema_of

app = group()


@app.command()
def schema(
    ctx: typer.Context,
    which: Annotated[Literal["setpoints", "overlay"], typer.Argument(metavar="setpoints|overlay")],
) -> None:
    """Print the JSON Schema of a file format.

    The schema itself, in text and in JSON format alike, so that it can be saved as it is.

    Example: reconciler schema overlay > overlay.schema.json
    """
    Face.of(ctx).line(json.dumps(schema_of(which), indent=2))
