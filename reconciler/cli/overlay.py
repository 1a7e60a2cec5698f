"""`overlay submit`, `overlay list`, `overlay cancel`: the overlays folder, for people in a hurry."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from reconciler.cli import completion, wiring
from reconciler.cli.arguments import group
from reconciler.cli.face import Face
from reconciler.cli.local_time import LOCAL
from reconciler.cli.logs import write_raw
from reconciler.cli.output_files import Tail
from reconciler.cli.submission import DEFAULT_DURATION, Job, choose_name, overlay_text, write_overlay
from reconciler.cli.values import TIME_HELP, Bytes, Moment, Seconds
from reconciler.cli.waiting import changes
from reconciler.errors import ReconcilerError, StateError, UnknownName, UsageError
from reconciler.journal.layout import writer
from reconciler.plan.actions import Blocked
from reconciler.plan.ledger import TERMINAL, OverlayRecord
from reconciler.plan.observed import Subject
from reconciler.plan.render import blocked_data, in_zone
from reconciler.spec.cautions import cautions
from reconciler.spec.load import SourceText, Texts, read_texts

app = group()
overlay = group("""Submit, list and cancel overlays.

An overlay is a file in the overlays folder; these commands write, show and remove such files.""")
app.add_typer(overlay, name="overlay")


@overlay.command()
def submit(
    ctx: typer.Context,
    *,
    command: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="Program and arguments, no shell line.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Default: from the command, made unique.")] = None,
    gpus: Annotated[int, typer.Option(metavar="N", min=0, help="How many GPUs, all or none.")] = 1,
    duration: Annotated[
        Seconds | None,
        typer.Option(
            "--for",
            parser=Seconds.parse,
            metavar="D",
            help=f"How long it is expected to take. [default: {DEFAULT_DURATION}, or until the deadline]",
        ),
    ] = None,
    start: Annotated[
        Moment | None,
        typer.Option(parser=Moment.parse, metavar="TIME", help=f"When to begin, {TIME_HELP}. [default: at once]"),
    ] = None,
    deadline: Annotated[
        Moment | None,
        typer.Option(parser=Moment.parse, metavar="TIME", help="Hard end: whatever it does, it is stopped then."),
    ] = None,
    priority: Annotated[
        str | None, typer.Option(metavar="P", help="A number, or a name from the set points. [default: 100]")
    ] = None,
    evict: Annotated[bool, typer.Option("--evict", help="Endpoints of lower priority may be displaced.")] = False,
    memory: Annotated[
        Bytes | None,
        typer.Option(parser=Bytes.parse, metavar="S", help="On each GPU, such as 16GiB. [default: the whole GPU]"),
    ] = None,
    requires: Annotated[
        list[str] | None, typer.Option(metavar="CAPABILITY", help="Must be ready while it runs; may be repeated.")
    ] = None,
    retries: Annotated[int, typer.Option(metavar="N", min=0, help="Tries after a failure.")] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Show what it writes, and exit with its exit code.")] = False,
) -> int:
    """Write an overlay that runs a command on borrowed GPUs.

    It runs in this folder, with the few variables that every child gets. Prints the overlay's name, and what it waits
    for if it cannot begin now: a window that has the place, with the next free slot, consent, GPUs.

    Examples: reconciler overlay submit --gpus 1 --for 20m --priority 600 --evict --wait -- luxcoreconsole scene.cfg;
    reconciler overlay submit --gpus 2 --start 22:00 --deadline 06:00 --evict -- python train.py
    """
    for option, moment in (("--start", start), ("--deadline", deadline)):
        if moment is not None and moment.wall < time.time():
            raise UsageError(f"{option} {moment.text} has passed")
    face = Face.of(ctx)
    texts = read_texts(_watched(face))
    has_daemon = _has_daemon(face)
    if wait and not has_daemon:
        raise StateError("no daemon runs, so nothing would start this; nothing was written", hint="`reconciler run`")
    taken = {known.name: known for known in texts.overlays or ()}
    chosen = name or choose_name(command, taken)
    job = Job(
        command=tuple(command),
        cwd=os.getcwd(),  # noqa: PTH109 - as the shell names it
        gpus=gpus,
        duration=duration.text if duration else (None if deadline else DEFAULT_DURATION),
        start=start.text if start else None,
        deadline=deadline.text if deadline else None,
        priority=priority,
        evict=evict,
        memory=memory.text if memory else None,
        requires=tuple(requires or ()),
        retries=retries,
    )
    tail = Tail(wiring.state_dir(face.options), chosen, "workload")
    tail.skip()  # what runs before this one wrote; the new one may begin as soon as its file is there
    text = overlay_text(job)
    try:
        path = write_overlay(texts, chosen, text)
        if shutil.which(command[0]) is None:  # the daemon may look elsewhere, so it is no error
            face.note(
                f"warning: no program {command[0]!r} is found from here: if the daemon finds none either, it fails"
            )
        for caution in cautions(SourceText(str(path), text)):
            face.note(f"warning: {caution.message}\n  hint: {caution.hint}")
        waits = _outlook(face, chosen)
        if not face.is_json and waits is not None:
            face.note("\n".join(_tell_wait(chosen, waits)))
        if wait:
            return _wait(face, chosen, tail)
    except KeyboardInterrupt:  # from the moment at which its file is there it may run
        if (texts.overlays_folder / f"{chosen}.yaml").exists():
            face.note(f"\n{chosen} goes on; `reconciler overlay cancel {chosen}` ends it")
        raise
    if face.is_json:
        said = None if waits is None else blocked_data(waits)
        face.answer({"name": chosen, "file": str(path), "daemon": has_daemon, "waits": said})
    else:
        face.line(chosen)
        if not has_daemon:
            face.note(f"{path} is written; no daemon runs yet, it begins with `reconciler run`")
    return 0


@overlay.command("list")
def list_overlays(ctx: typer.Context) -> None:
    """List overlays: waiting, live, and lately finished.

    Example: reconciler overlay list
    """
    face = Face.of(ctx)
    data = wiring.status(face.options)
    found, wrong = data["overlays"], {problem["file"] for problem in data["spec"]["problems"]}
    if wrong:
        face.note(f"cannot be accepted: {', '.join(sorted(wrong))}; `reconciler validate` says why")
    if face.is_json:
        face.answer({"overlays": found})
    elif found:
        from reconciler.cli.tables import overlays_table

        face.out.print(overlays_table(found))
    else:
        face.note("no overlays")


@overlay.command()
def cancel(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=completion.overlays)],
) -> None:
    """Remove an overlay's file: what runs of it is ended, and the baseline comes back.

    Example: reconciler overlay cancel render
    """
    face = Face.of(ctx)
    texts = read_texts(_watched(face))
    files = _files(texts)
    if name not in files:
        raise UnknownName(f"there is no overlay {name!r} in {texts.overlays_folder}", name=name, known=files)
    path = texts.overlays_folder / files[name]
    with suppress(FileNotFoundError):  # somebody else was faster
        try:
            path.unlink()
        except PermissionError as error:
            raise ReconcilerError(f"{path}: cannot be removed: {error.strerror}") from error
    if face.is_json:
        face.answer({"name": name, "file": str(path)})
    else:
        record = _record(face, name)
        if record is not None and record.state in TERMINAL:
            face.line(f"{path} is removed; {name} was over ({record.state})")
        else:
            face.line(f"{name} is cancelled" if _has_daemon(face) else f"{path} is removed")


def _watched(face: Face) -> Path:
    """The set points beside whose overlays a file is written or removed.

    Raises:
        StateError: the daemon follows others, and would not see it.
    """
    path, followed = wiring.setpoints_path(face.options), wiring.followed_by_daemon(face.options)
    if followed is not None and not wiring.same_file(followed, path):
        message = f"the daemon follows {followed}, and not {path}: it would not see what is done to overlays here"
        raise StateError(message, hint=f"--setpoints {followed}, or another --state-dir")
    return path


def _files(texts: Texts) -> dict[str, str]:
    """Name → file name of every overlay in the folder, the unreadable ones included."""
    try:
        names = os.listdir(texts.overlays_folder)  # noqa: PTH208
    except OSError:
        return {}
    return {
        file.rpartition(".")[0]: file
        for file in sorted(names)
        if file.endswith((".yaml", ".yml")) and not file.startswith((".", "#"))
    }


def _outlook(face: Face, name: str) -> Blocked | None:
    """What keeps a new overlay waiting, as the planner sees it at once; None: nothing does, or it cannot be told."""
    try:
        seen = wiring.look(face.options)
    except ReconcilerError:  # no driver here, or files that are wrong elsewhere: the file is written all the same
        return None
    return next((b for b in seen.plan.blocked if b.subject == Subject("workload", name)), None)


def _tell_wait(name: str, blocked: Blocked) -> list[str]:
    lines = [f"{name} waits: {blocked.reason}: {in_zone(blocked.message, LOCAL)}"]
    lines += [f"  hint: {in_zone(hint, LOCAL)}" for hint in blocked.alternatives]
    if blocked.earliest_start is not None:
        moment = datetime.fromtimestamp(blocked.earliest_start, LOCAL)
        word = "it begins at" if blocked.reason == "NotYet" else "not before"
        lines.append(f"  {word} {moment:%Y-%m-%d %H:%M:%S}")
    return lines


def _has_daemon(face: Face) -> bool:
    state = wiring.state_dir(face.options)
    return state.path.is_dir() and writer(state) is not None


# ---------------------------------------------------------------- --wait


def _wait(face: Face, name: str, tail: Tail) -> int:
    """Show what the workload writes until its exit code is known.

    1. its end is decided             → its exit code (128 + the number of a signal)
    2. it ended before it began       → 1, and why
    3. the daemon went away meanwhile → 1; the job goes on, or will
    """
    state = wiring.state_dir(face.options)
    said = ""
    face.note(f"overlay {name}; Ctrl-C leaves it running")
    for _ in changes(state.path, ".sqlite-wal", patience_s=0.25):
        record = _record(face, name)
        write_raw(tail.new())
        if record is None:
            if not _has_daemon(face):
                raise StateError(f"the daemon is gone; {name} begins with the next one")
            continue
        words = record.state + (f": {record.reason}" if record.reason else "")
        if words != said:
            said = words
            face.note(f"overlay {name} is {words}")
        if record.state in TERMINAL or (record.outcome is not None and record.exit_code is not None):
            write_raw(tail.new())
            return _code(record)  # 1, 2
        if not _has_daemon(face):
            raise StateError(f"the daemon is gone; {name} is {record.state}", hint="`reconciler run`")  # 3
    raise AssertionError  # changes() never ends


def _code(record: OverlayRecord) -> int:
    if record.exit_code is None:
        return 0 if record.state == "done" else 1
    return record.exit_code if record.exit_code >= 0 else 128 - record.exit_code


def _record(face: Face, name: str) -> OverlayRecord | None:
    with wiring.journal_reader(face.options) as journal:
        return journal.ledger().overlays.get(name)
