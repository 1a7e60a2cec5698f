"""`run`, `down`, `clean-start`, `reset`: the daemon, and what is asked of the box beyond the files."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any

import typer
from msgspec.structs import replace

from reconciler.cli import completion, converging, wiring
from reconciler.cli.arguments import group
from reconciler.cli.face import Face
from reconciler.cli.values import Seconds
from reconciler.errors import DaemonRunning
from reconciler.journal.layout import writer
from reconciler.units import counted

app = group()

_Endpoints = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[ENDPOINT]...", autocompletion=completion.endpoints, show_default=False, help="Default: all of them."
    ),
]
_Timeout = Annotated[
    Seconds | None, typer.Option(parser=Seconds.parse, metavar="D", help="Give up after this long, such as 5m.")
]


@app.command()
def run(ctx: typer.Context) -> int:
    """Converge for ever: the daemon.

    Edits of the files take effect by themselves. SIGTERM or Ctrl-C ends the daemon and leaves endpoints and workloads
    running; the next one adopts them.

    Example: reconciler --setpoints setpoints/setpoints.yaml run
    """
    face = Face.of(ctx)
    options = face.options
    path, state = wiring.setpoints_path(options), wiring.state_dir(options).path

    def say() -> None:
        face.note(f"reconciler: pid {os.getpid()}, set points {path}, state {state}")
        face.warn_of_root()

    code = wiring.run_daemon(options, begun=say)
    if sys.stderr.isatty():  # a person ended it, and may think that all has ended
        with suppress(OSError):
            face.note("\nreconciler: ended; what it started goes on running, and `reconciler down` ends it")
    return code


@app.command()
def down(ctx: typer.Context, *, endpoints: _Endpoints = None, timeout: _Timeout = None) -> int:
    """Stop endpoints; the set points stay.

    Refused while a daemon runs: it would bring them back. Without names, workloads of overlays are ended as well.

    Example: reconciler down coding
    """
    from reconciler.cli.plan import finish
    from reconciler.cli.progress import Progress  # spinners, which the daemon does without

    face = Face.of(ctx)
    _refuse_beside_a_daemon(face)
    with Progress(face) as progress:
        done = converging.converge(
            face.options,
            "down",
            endpoints=tuple(endpoints or ()),
            timeout_s=timeout.value if timeout else None,
            progress=progress.show,
        )
    if done.ok:
        what = ", ".join(endpoints) if endpoints else "everything"
        done = replace(done, message=f"stopped: {what}; `reconciler apply` or `reconciler run` brings it back")
    return finish(face, done)


@app.command("clean-start")
def clean_start(
    ctx: typer.Context,
    *,
    endpoints: _Endpoints = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be ended.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    timeout: _Timeout = None,
) -> int:
    """End stale processes of ours, wait for their memory, start afresh.

    Recovery after a mess: failures and back-off are forgotten as well. Foreign processes are listed and left alone.
    What else the set points want and does not run is started, too.
    Asks on a terminal unless --yes.

    Example: reconciler clean-start thinking --dry-run
    """
    from reconciler.cli.plan import finish
    from reconciler.cli.progress import Progress

    face = Face.of(ctx)
    names = tuple(endpoints or ())
    if dry_run or (face.asks and not yes):
        preview = converging.clean_start_preview(face.options, names)
        if dry_run and face.is_json:
            face.answer(preview)
            return 0
        _print_preview(face, preview)
        if dry_run:
            return 0
        face.confirm("End these and start afresh?", yes=yes)
    face.warn_of_root()
    with Progress(face) as progress:
        done = converging.converge(
            face.options,
            "clean_start",
            endpoints=names,
            timeout_s=timeout.value if timeout else None,
            progress=progress.show,
        )
    return finish(face, done)


@app.command()
def reset(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            autocompletion=completion.subjects,
            help="Endpoint, finished overlay, or GPU (UUID, or index).",
        ),
    ],
) -> None:
    """Clear what keeps an endpoint, overlay or GPU from being tried again.

    Failures, back-off and cool-down of an endpoint; the outcome of an overlay, which then runs again; a quarantine.

    Example: reconciler reset thinking
    """
    face = Face.of(ctx)
    message = wiring.reset(face.options, name)
    if face.is_json:
        face.answer({"message": message})
    else:
        face.line(message)


def _refuse_beside_a_daemon(face: Face) -> None:
    """Raises DaemonRunning when there is one."""
    state = wiring.state_dir(face.options)
    daemon = writer(state)
    if daemon is None:
        return
    from reconciler.cli.service import stop_command

    who = f"pid {daemon.pid}" if daemon.pid else "pid unknown"
    stop = stop_command(daemon.pid) if daemon.pid else "end it"
    raise DaemonRunning(
        f"a daemon runs on {state.path} ({who}) and would bring the endpoints back; nothing was stopped",
        pid=daemon.pid,
        hint=f"end it first ({stop}), or write `state: stopped` into the set points",
    )


def _print_preview(face: Face, preview: Mapping[str, Any]) -> None:
    from reconciler.cli.tables import gpu_list, memory  # as above

    ours, foreign = preview["ours"], preview["foreign"]
    face.line("Ours, to be ended:" if ours else "Nothing of ours runs.")
    for item in ours:
        strays = f", and {counted(len(item['strays']), 'more process', 'more processes')}" if item["strays"] else ""
        where = f" on GPU {gpu_list(item['gpus'])}" if item["gpus"] else ""
        face.line(f"  {item['subject']}: pid {item['pid'] or '-'}{strays}{where} ({item['phase']})")
    if foreign:
        face.line("Foreign, left alone:")
    for item in foreign:
        held = f" {memory(item['memory_mib'])}" if item["memory_mib"] is not None else ""
        face.line(f"  GPU {item['gpu']}: pid {item['pid']} {item['user'] or '?'}{held} {item['command'] or '?'}")
