"""The program's entry: the table of commands, the shared options, and how errors leave.

Nothing but typer is imported before a command is known, so that `--help` and completion answer at once.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from msgspec import Struct
from typer.core import TyperGroup

from reconciler.cli.arguments import INTERRUPTED, Format, Globals, hoist, wants_json
from reconciler.errors import ReconcilerError, SpecError, UsageError

PROGRAM = "reconciler"
GC_THRESHOLD = (100_000, 20, 20)
"""Loading modules allocates tens of thousands of objects that stay; the usual 700 would look through them often."""
WITHOUT_PLUGINS = ("PYDANTIC_DISABLE_PLUGINS", "__all__")
"""For this program alone: else every installed package would be searched for plugins of pydantic."""


class Entry(Struct, frozen=True):
    """One command: where it lives, and what `--help` says of it."""

    module: str
    summary: str


COMMANDS: Mapping[str, Entry] = {
    "validate": Entry("plan", "Check set-point and overlay files; every error, not the first alone."),
    "plan": Entry("plan", "Show what would be done, in which order and why; changes nothing."),
    "apply": Entry("plan", "Converge once, with live progress."),
    "run": Entry("daemon", "Converge for ever: the daemon."),
    "status": Entry("status", "Show endpoints, GPUs, overlays, capabilities and incidents."),
    "explain": Entry("explain", "Say why something is as it is, and what comes next."),
    "agenda": Entry("history", "List planned transitions, in force and to come."),
    "forecast": Entry("forecast", "Show what will run where, and who will be away for how long."),
    "overlay": Entry("overlay", "Submit, list and cancel overlays."),
    "clean-start": Entry("daemon", "End stale processes of ours, wait for their memory, start afresh."),
    "down": Entry("daemon", "Stop endpoints; the set points stay."),
    "reset": Entry("daemon", "Clear what keeps an endpoint, overlay or GPU from being tried again."),
    "logs": Entry("logs", "Show what an endpoint or workload wrote."),
    "events": Entry("history", "Show what was decided, done and seen."),
    "incidents": Entry("history", "Show what neither the set points nor the agenda explain."),
    "doctor": Entry("doctor", "Say what is wrong with this box, and how to mend it."),
    "schema": Entry("schema", "Print the JSON Schema of a file format."),
    "demo": Entry("demo", "See it work on a simulated node, in under a minute."),
    "sim": Entry("sim", "Look at, fill, break and use the simulated node."),
}
"""In the order of `--help`. A command's own docstring begins with its summary; a test compares them."""

HELP = """Keep model servers on a GPU box at their set points, and lend GPUs to jobs for a while.

Examples: reconciler demo; reconciler --simulate 4x80GiB plan; reconciler status --format json | jq '.data.endpoints[]'

The options below stand before or after the command, anywhere up to `--`."""

EXIT_CODES = "Exit codes: 0 done; 1 error; 2 changes pending (plan --detailed-exitcode); 4 stale saved plan; 64 usage."


class LazyGroup(TyperGroup):
    """Commands by the table above; a module is imported when one of its commands is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature, whose types are private
        """Every name, in order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """The command of this name; None when there is none."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module = import_module(f"reconciler.cli.{entry.module}")
        return typer.main.get_group(module.app).commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` begin with.

        Raises:
            UsageError: there is none of that name.
        """
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean `{PROGRAM} {near[0]}`?" if near else f"`{PROGRAM} --help` lists all"
            raise UsageError(f"there is no command {name!r}", hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """The list of commands, without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:  # noqa: FBT001 - typer calls it so
    if value:
        from importlib.metadata import version  # slower than all of the rest of a start

        typer.echo(f"{PROGRAM} {version('reconciler')}")
        raise typer.Exit


@app.callback(help=HELP, epilog=EXIT_CODES)
def shared(
    ctx: typer.Context,
    *,
    setpoints: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Set-point file [env: RECONCILER_SETPOINTS; default: ./setpoints/setpoints.yaml, then "
            "~/.config/reconciler/, then /etc/reconciler/]",
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="State directory [env: RECONCILER_STATE_DIR; default: the XDG state folder]"),
    ] = None,
    simulate: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Simulated node instead of a driver: 4x80GiB, 8xH100, or a YAML file [env: RECONCILER_SIMULATE]",
        ),
    ] = None,
    format_: Annotated[Format, typer.Option("--format", help="What stdout carries")] = Format.text,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colour; NO_COLOR does the same")] = False,
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit")
    ] = False,
) -> None:
    """Take in the shared options."""
    ctx.obj = Globals(setpoints, state_dir, simulate, format_, no_color, ctx.obj)


def run(argv: Sequence[str], inherited: Mapping[str, str] | None = None) -> int:
    """Carry out one command line; its exit code. `inherited` is for the programs of others (`Globals`).

    1. the command's own code, 0 when it has none    2. an error of ours: told on stderr, or on stdout as JSON
    3. wrong usage: 64                               4. Ctrl-C: 130    5. nobody reads stdout any more: quietly 1
    """
    words = hoist(argv) or ["--help"]
    as_json = wants_json(words)
    try:
        code = typer.main.get_command(app).main(words, prog_name=PROGRAM, standalone_mode=False, obj=inherited)
        sys.stdout.flush()
    except ReconcilerError as error:
        return _tell(error, as_json=as_json)  # 2
    except typer.TyperException as error:
        said = error.format_message().replace("Value error, ", "")  # how typer begins what it says of a choice
        return _tell(UsageError(said, hint=_usage_hint(error)), as_json=as_json)  # 3
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED  # 4
    except BrokenPipeError:
        # what is still buffered would raise once more when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # 5
    return code if isinstance(code, int) else 0  # 1


def _usage_hint(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else PROGRAM
    return f"`{path} --help` shows how it is used"


def _tell(error: ReconcilerError, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"format_version": "1", **error_data(error)}))  # noqa: T201 - the answer
        return error.exit_code
    lines = str(error)
    if isinstance(error, SpecError) and len(error.problems) > 1:
        lines += f"\n{len(error.problems)} problems"
    print(lines if isinstance(error, SpecError) else f"error: {lines}", file=sys.stderr)  # noqa: T201
    return error.exit_code


def error_data(error: ReconcilerError) -> dict[str, Any]:
    """An error as the `error` of a JSON answer; of a wrong file the first problem, and `problems` with all."""
    problems = error.problems if isinstance(error, SpecError) else ()
    listed = [
        {"file": p.file, "line": p.line, "column": p.column, "message": p.message, "hint": p.hint} for p in problems
    ]
    nowhere = {"file": None, "line": None, "column": None, "message": error.message, "hint": error.hint}
    answer: dict[str, Any] = {"error": {"code": error.code, **(listed[0] if listed else nowhere)}}
    return answer | ({"problems": listed} if listed else {})


def main() -> NoReturn:
    """Entry of the console script.

    A quarter of a short command's time would go into collecting garbage while modules load, and into taking the
    interpreter apart at the end. Nothing here needs either: what must survive is durable before a command returns.
    """
    gc.set_threshold(*GC_THRESHOLD)
    inherited = dict(os.environ)
    os.environ.setdefault(*WITHOUT_PLUGINS)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    code = run(sys.argv[1:], inherited)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
