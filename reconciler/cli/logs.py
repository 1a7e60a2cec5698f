"""`logs`: what an endpoint or a workload wrote."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated

import typer

from reconciler.cli import completion, wiring
from reconciler.cli.arguments import group
from reconciler.cli.face import Face
from reconciler.cli.output_files import Tail, last_lines, names_with_output, outputs_of
from reconciler.cli.waiting import changes, while_read
from reconciler.errors import UnknownName

SHOWN = 200

app = group()


@app.command()
def logs(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", autocompletion=completion.subjects, help="Endpoint or overlay.")
    ],
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is written, over restarts; Ctrl-C ends it.")
    ] = False,
    count: Annotated[int, typer.Option("--lines", "-n", metavar="N", min=0, help="At most this many lines.")] = SHOWN,
) -> None:
    """Show what an endpoint or workload wrote.

    Its latest start; earlier ones lie in the state directory's `logs` folder. With --format json: the lines as data.

    Example: reconciler logs thinking -f
    """
    face = Face.of(ctx)
    state = wiring.state_dir(face.options)
    found = outputs_of(state, name)
    if not found:
        raise UnknownName(f"nothing was ever started for {name!r}", name=name, known=names_with_output(state))
    tail = Tail(state, name)
    tail.skip()
    text = last_lines(found[-1].path, count, tail.seen(found[-1]))
    if face.is_json and not follow:
        latest = found[-1]
        lines = text.decode(errors="replace").splitlines()
        face.answer({"name": name, "incarnation": latest.incarnation, "file": str(latest.path), "lines": lines})
        return
    if not found[-1].path.exists():
        face.note(f"{found[-1].path} is not there: removed by hand, or nothing was run")
    write_raw([text])
    if follow:
        for _ in while_read(changes(state.logs, ".log"), sys.stdout.fileno()):
            write_raw(tail.new())


def write_raw(blocks: Iterable[bytes]) -> None:
    """Bytes to stdout as they are, at once."""
    for block in blocks:
        sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()
