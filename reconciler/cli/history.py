"""`events`, `incidents`, `agenda`: what was, what is wrong, what is to come."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any

import typer

from reconciler.cli import completion, wiring
from reconciler.cli.arguments import group
from reconciler.cli.face import Face
from reconciler.cli.waiting import changes, while_read
from reconciler.journal.reader import JournalEvent
from reconciler.plan.status import agenda_data, incident_data, iso

SHOWN = 50

app = group()


@app.command()
def events(
    ctx: typer.Context,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new ones; Ctrl-C ends it.")] = False,
    subject: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", autocompletion=completion.subjects, help="Only those of this endpoint, overlay or GPU."
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--lines", "-n", metavar="N", min=0, help="At most this many old ones.")
    ] = SHOWN,
) -> None:
    """Show what was decided, done and seen.

    With -f and --format json: one JSON object on each line.

    Example: reconciler events -f --subject thinking
    """
    face = Face.of(ctx)
    past = _past(face, subject, count)
    if face.is_json and not follow:
        face.answer({"events": [event_data(event) for event in past]})
        return
    for event in past:
        _print_event(face, event)
    if follow:
        for event in _new(face, subject, past[-1].id if past else None):
            _print_event(face, event)


@app.command()
def incidents(
    ctx: typer.Context,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Those that are over as well.")] = False,
) -> None:
    """Show what neither the set points nor the agenda explain.

    Example: reconciler incidents --all
    """
    face = Face.of(ctx)
    with wiring.journal_reader(face.options) as journal:
        found = [incident_data(incident) for incident in journal.incidents(include_resolved=everything)]
    if face.is_json:
        face.answer({"incidents": found})
    elif found:
        from reconciler.cli.tables import incidents_table

        face.out.print(incidents_table(found))
    else:
        face.note("no incidents" if everything else "no open incidents")


@app.command()
def agenda(ctx: typer.Context) -> None:
    """List planned transitions, in force and to come.

    Inside an entry, and only in the states that it expects, nothing of that endpoint is an incident.

    Example: reconciler agenda --format json | jq '.data.agenda[].until'
    """
    face = Face.of(ctx)
    seen = wiring.look(face.options)
    now = seen.plan.now.wall
    entries = sorted(seen.plan.agenda, key=lambda entry: (entry.start, entry.endpoint))
    found = [{**agenda_data(entry), "in_force": entry.start <= now < entry.until} for entry in entries]
    if face.is_json:
        face.answer({"agenda": found})
    elif found:
        from reconciler.cli.tables import agenda_table

        face.out.print(agenda_table(found))
    else:
        face.note("nothing is planned")


def event_data(event: JournalEvent) -> dict[str, Any]:
    """One event."""
    return {
        "id": event.id,
        "time": iso(event.wall),
        "kind": event.kind,
        "subject": event.subject,
        "message": event.message,
        "cause": event.cause,
        "data": dict(event.data),
    }


def event_line(event: JournalEvent) -> str:
    """One event on one line, in local time."""
    moment = datetime.fromtimestamp(round(event.wall)).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    cause = f"  [{event.cause}]" if event.cause else ""
    return f"{moment}  {event.kind:<18} {event.subject:<16} {event.message}{cause}"


def _past(face: Face, subject: str | None, count: int) -> tuple[JournalEvent, ...]:
    if not count:
        return ()
    with wiring.journal_reader(face.options) as journal:
        return journal.events(subject=subject, limit=count, newest=True)


def _new(face: Face, subject: str | None, after: int | None) -> Iterator[JournalEvent]:
    """Events as they come; from the newest on when `after` is None."""
    for _ in while_read(changes(wiring.state_dir(face.options).path, ".sqlite-wal"), sys.stdout.fileno()):
        with wiring.journal_reader(face.options) as journal:
            if after is None:
                after = journal.last_event_id()
            # a journal that was put aside begins to count anew
            after = min(after, journal.last_event_id())
            found = journal.events(after_id=after, subject=subject)
        yield from found
        after = found[-1].id if found else after


def _print_event(face: Face, event: JournalEvent) -> None:
    if face.is_json:
        import json

        face.line(json.dumps(event_data(event)))
    else:
        face.line(event_line(event))
