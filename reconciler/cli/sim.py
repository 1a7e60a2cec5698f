"""`sim`: the simulated node, from outside the reconciler: who holds what, foreign tenants, faults, other programs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from msgspec import to_builtins

from reconciler.cli import wiring
from reconciler.cli.arguments import group
from reconciler.cli.face import Face
from reconciler.cli.tables import bar
from reconciler.cli.values import Bytes, Seconds
from reconciler.errors import UsageError
from reconciler.sim import exec as execution
from reconciler.sim import faults, tenant
from reconciler.sim.description import parse_node
from reconciler.sim.node import load, prepare
from reconciler.sim.report import NodeReport, report
from reconciler.units import format_size, to_mib

NO_DRIVER = "no-driver"
MEND = "mend"

app = group()
sim = group("""Look at, fill, break and use the simulated node.

The node that --simulate names, or else the one that was set up last in this state directory.""")
app.add_typer(sim, name="sim")


@sim.command()
def status(ctx: typer.Context) -> None:
    """Show who holds how much of which simulated GPU, and what is broken.

    Example: reconciler --simulate 4x80GiB sim status
    """
    face = Face.of(ctx)
    seen = report(_folder(face))
    if face.is_json:
        face.answer(to_builtins(seen))
    else:
        _print_report(face, seen)


@sim.command()
def node(ctx: typer.Context) -> None:
    """Print the node's description, as programs read it.

    Example: reconciler sim node --simulate 8xH100
    """
    face = Face.of(ctx)
    folder = _folder(face)
    load(folder)
    document = json.loads((folder / "node.json").read_text("utf-8"))
    if face.is_json:
        face.answer(document)
    else:
        face.line(json.dumps(document, indent=1, sort_keys=True))


@sim.command()
def hold(
    ctx: typer.Context,
    *,
    gpu: Annotated[int, typer.Option(metavar="N", min=0, help="GPU by index.")],
    memory: Annotated[Bytes, typer.Option(parser=Bytes.parse, metavar="S", help="How much, such as 20GiB.")],
    duration: Annotated[
        Seconds | None, typer.Option("--for", parser=Seconds.parse, metavar="D", help="Default: until Ctrl-C.")
    ] = None,
) -> None:
    """Be a foreign tenant: hold memory of a simulated GPU.

    Example: reconciler sim hold --gpu 1 --memory 20GiB --for 30s
    """
    face = Face.of(ctx)

    def held(_: object) -> None:
        if face.is_json:
            face.answer({"pid": os.getpid(), "gpu": gpu, "memory_mib": to_mib(memory.value)})
        else:
            face.line(f"pid {os.getpid()} holds {format_size(memory.value)} on GPU {gpu}")

    tenant.hold(_folder(face), gpu, memory.value, duration.value if duration else None, held=held)


@sim.command()
def fault(
    ctx: typer.Context,
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"{', '.join(faults.KINDS)}, {NO_DRIVER}, or {MEND}.")],
    *,
    gpu: Annotated[int | None, typer.Option(metavar="N", min=0, help="GPU by index; mend: default all.")] = None,
    duration: Annotated[
        Seconds | None,
        typer.Option("--for", parser=Seconds.parse, metavar="D", help="How long each call hangs (hang)."),
    ] = None,
) -> None:
    """Break the simulated node, or mend it.

    Example: reconciler sim fault lost --gpu 2; reconciler sim fault hang --gpu 0 --for 5s; reconciler sim fault mend
    """
    face = Face.of(ctx)
    folder = _folder(face)
    count = len(load(folder).gpus)
    if gpu is not None and gpu >= count:
        raise UsageError(f"the simulated node has no GPU {gpu}", hint=f"GPUs are 0 to {count - 1}")
    if kind == MEND:
        faults.mend(folder, gpu)
    elif kind == NO_DRIVER:
        faults.unload_driver(folder)
    elif gpu is None:
        raise UsageError(f"which GPU is {kind}?", hint=f"reconciler sim fault {kind} --gpu 0")
    else:
        faults.break_gpu(folder, gpu, kind.replace("-", "_"), seconds=duration.value if duration else 0.0)
    if face.is_json:
        face.answer(to_builtins(report(folder)))
    else:
        _print_report(face, report(folder))


@sim.command("exec")
def execute(
    ctx: typer.Context,
    command: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="Program and arguments.")],
) -> int:
    """Run any program as if it stood on the simulated node.

    Example: reconciler --simulate 8xH100 sim exec -- python -m nvitop --once
    """
    face = Face.of(ctx)
    code = execution.run(_folder(face), command, face.shared.inherited)
    return code if code >= 0 else 128 - code


def _folder(face: Face) -> Path:
    """The simulated node's folder; set up if --simulate says what it is."""
    state = wiring.state_dir(face.options)
    wanted = face.shared.simulate or os.environ.get("RECONCILER_SIMULATE")
    if wanted:
        state.ensure()
        prepare(state.sim, parse_node(wanted))
    return state.sim


def _print_report(face: Face, seen: NodeReport) -> None:
    from rich.table import Table
    from rich.text import Text

    loaded = "" if seen.driver_loaded else "  DRIVER NOT LOADED"
    face.out.print(f"{seen.sim_dir}  driver {seen.driver_version}  time x {seen.time_scale:g}{loaded}")
    table = Table("gpu", "name", "used", "", "held by", "faults", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for item in seen.gpus:
        holders = ", ".join(
            f"{h.pid} {format_size(h.memory_bytes)}" + ("" if h.alive else " (on its way back)") for h in item.holdings
        )
        table.add_row(
            str(item.index),
            item.name,
            bar(to_mib(item.used_bytes), to_mib(item.total_bytes)),
            f"{format_size(item.used_bytes)} / {format_size(item.total_bytes)}",
            holders or "-",
            Text(", ".join(item.faults) or "-", "red" if item.faults else ""),
        )
    face.out.print(table)
    if seen.faults_problem is not None:
        face.out.print(Text(seen.faults_problem, "red"))
