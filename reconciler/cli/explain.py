"""`explain`: in words, why an endpoint, an overlay or a GPU is as it is, and what happens next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from reconciler.cli import wiring
from reconciler.cli.arguments import group
from reconciler.cli.face import Face
from reconciler.cli.history import event_data, event_line
from reconciler.cli.tables import clock
from reconciler.errors import UnknownName
from reconciler.journal.reader import JournalEvent
from reconciler.plan.actions import Action
from reconciler.plan.ledger import TERMINAL
from reconciler.plan.status import agenda_data, incident_data, iso, status_data
from reconciler.units import format_duration

EVENTS_SHOWN = 8

app = group()


@app.command()
def explain(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Endpoint, overlay, or GPU by index.")],
) -> None:
    """Say why an endpoint or overlay is as it is, and what comes next.

    Its set point, the decision and its reason, who displaced whom, what happens when, and what was last heard of it.

    Example: reconciler explain coding
    """
    face = Face.of(ctx)
    seen = wiring.look(face.options)
    data = status_data(seen.spec, seen.observed, seen.plan, seen.incidents, seen.daemon, seen.spec.problems)
    kind, item = _find(data, name)
    subject = item["uuid"] if kind == "gpu" else name
    with wiring.journal_reader(face.options) as journal:
        past = journal.events(subject=subject, limit=EVENTS_SHOWN, newest=True)
    steps = [action for action in seen.plan.actions if _concerns(action, kind, subject)]
    trouble = [incident_data(i) for i in seen.incidents if i.subject == subject]
    if face.is_json:
        face.answer(
            {
                "kind": kind,
                kind: item,
                "next": [_step_data(action) for action in steps],
                "agenda": [agenda_data(e) for e in seen.plan.agenda if name in (e.endpoint, e.overlay)],
                "incidents": trouble,
                "events": [event_data(event) for event in past],
            }
        )
        return
    tell = {"endpoint": _tell_endpoint, "overlay": _tell_overlay, "gpu": _tell_gpu}[kind]
    lines = [*tell(seen, item), *_tell_next(seen, steps), *_tell_trouble(trouble), *_tell_past(past)]
    for line in lines:
        face.line(line)


def _find(data: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    for kind, key in (("endpoint", "endpoints"), ("overlay", "overlays")):
        for item in data[key]:
            if item["name"] == name:
                return kind, item
    for item in data["gpus"]:
        if name in (str(item["index"]), item["uuid"]):
            return "gpu", item
    known = [item["name"] for key in ("endpoints", "overlays") for item in data[key]]
    raise UnknownName(f"nothing is named {name!r}", name=name, known=known)


def _concerns(action: Action, kind: str, subject: str) -> bool:
    if kind == "gpu":
        return subject in action.gpus
    return action.subject.name == subject or (kind == "overlay" and subject in (action.overlay, action.cause.overlay))


def _step_data(action: Action) -> dict[str, Any]:
    return {
        "op": action.op,
        "subject": action.subject.name,
        "reason": action.reason,
        "cause": str(action.cause),
        "expected": [iso(moment) for moment in action.expected],
        "ready": action.ready,
    }


def _tell_endpoint(seen: wiring.Look, item: dict[str, Any]) -> Iterator[str]:
    name = item["name"]
    record = seen.plan.ledger.endpoints.get(name)
    since = ""
    if record is not None and record.state_since is not None and record.state == item["state"]:
        since = f" since {clock(iso(record.state_since.wall))}"
    yield f"{name} is {item['state']}{since}" + (f": {item['reason']}" if item["reason"] else "") + "."
    spec = seen.spec.endpoints.get(name)
    if spec is not None:
        consent = "may be displaced by overlays of higher priority" if spec.preemptible else "is never displaced"
        yield f"Its set point is {spec.state} [{spec.source}]; priority {spec.priority}; it {consent}."
    else:
        yield "The set points do not name it: it belongs to an overlay, or was removed and is on its way out."
    if item["desired"] != (spec.state if spec else None):
        yield f"At this moment it should be {item['desired']}."
    if item["pid"] is not None:
        gpus = ", ".join(map(str, item["gpus"])) or "none"
        yield f"It runs as pid {item['pid']} on GPU {gpus}, port {item['port'] or '-'}."
    for condition in item["conditions"]:
        yield f"  {condition['type']}: {condition['reason']}"
    if item["scheduled"] is not None:
        plan = item["scheduled"]
        states = ", ".join(plan["expected_states"])
        yield f"Planned until {clock(plan['until'])}: {plan['reason']} (expected: {states}). No incident meanwhile."
    if record is not None and record.exits:
        last = record.exits[-1]
        code = "an unknown exit code" if last.exit_code is None else f"exit code {last.exit_code}"
        how = "as planned" if last.planned else "unplanned"
        ended = clock(iso(last.at.wall))
        yield f"It last ended at {ended} with {code}, {how}; {item['restarts']} unplanned ends are remembered."


def _tell_overlay(seen: wiring.Look, item: dict[str, Any]) -> Iterator[str]:
    name = item["name"]
    record = seen.plan.ledger.overlays[name]
    since = clock(iso(record.since.wall))
    yield f"Overlay {name} is {item['state']} since {since}" + (f": {item['reason']}" if item["reason"] else "") + "."
    spec = seen.spec.overlays.get(name)
    if spec is None:
        yield "Its file is gone."
    else:
        consent = (
            "may displace endpoints of lower priority" if spec.allow_baseline_eviction else "displaces no endpoint"
        )
        yield f"It was asked for in [{spec.source}]; priority {spec.priority}; it {consent}."
    if item["gpus"]:
        yield (
            f"It holds GPU {', '.join(map(str, item['gpus']))}."
            if record.state not in TERMINAL
            else (f"It had GPU {', '.join(map(str, item['gpus']))}.")
        )
    if item["evicted"]:
        yield f"It displaced {', '.join(item['evicted'])}." + (f" {record.why}" if record.why else "")
    if item["exit_code"] is not None:
        yield f"Its workload ended with exit code {item['exit_code']}."
    word = "It ended" if record.state in TERMINAL else "It is expected to end"
    if item["end"] is not None:
        yield f"{word} at {clock(item['end'])}."
    for blocked in seen.plan.blocked:
        if blocked.subject.kind == "workload" and blocked.subject.name == name:
            for hint in blocked.alternatives:
                yield f"  what would help: {hint}"
            if blocked.earliest_start is not None:
                yield f"  not before {clock(iso(blocked.earliest_start))}"


def _tell_gpu(seen: wiring.Look, item: dict[str, Any]) -> Iterator[str]:
    yield (
        f"GPU {item['index']} ({item['name']}) is {item['state']}"
        + (f": {item['detail']}" if item["detail"] else "")
        + "."
    )
    used = "unknown" if item["memory_used_mib"] is None else f"{item['memory_used_mib']} MiB"
    yield f"Used {used} of {item['memory_total_mib']} MiB; {item['memory_planned_mib']} MiB are promised."
    for process in item["processes"]:
        owner = process["owner"] or "foreign, never signalled"
        yield f"  pid {process['pid']}: {owner}; {process['user'] or '?'}; {process['command'] or '?'}"
    for lease in seen.plan.ledger.leases:
        if lease.gpu == item["uuid"]:
            yield f"  leased to overlay {lease.overlay} since {clock(iso(lease.since.wall))}"


def _tell_next(seen: wiring.Look, steps: list[Action]) -> Iterator[str]:
    if not steps:
        yield "Nothing further is planned for it."
        return
    yield "What happens next:"
    for action in steps:
        begin, end = (format_duration(max(0.0, round(moment - seen.plan.now.wall))) for moment in action.expected)
        when = "now" if action.ready else f"in about {begin}"
        yield f"  {when}: {action.op.replace('_', ' ')} {action.subject}, done in about {end}  [{action.cause}]"


def _tell_trouble(incidents: list[dict[str, Any]]) -> Iterator[str]:
    for incident in incidents:
        since = clock(incident["opened"])
        yield f"Incident {incident['kind']} ({incident['severity']}) since {since}: {incident['message']}"


def _tell_past(events: tuple[JournalEvent, ...]) -> Iterator[str]:
    if events:
        yield "Last events:"
    for event in events:
        yield "  " + event_line(event)
