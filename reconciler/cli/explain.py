"""`explain`: in words, why something is as it is, and what happens next."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from reconciler.cli import completion, wiring
from reconciler.cli.arguments import group
from reconciler.cli.face import Face
from reconciler.cli.history import event_data, event_line
from reconciler.cli.local_time import LOCAL
from reconciler.cli.tables import clock
from reconciler.errors import Problem, SpecError, UnknownName, UsageError
from reconciler.health.assess import STABLE_S
from reconciler.journal.reader import JournalEvent
from reconciler.plan.actions import Action
from reconciler.plan.draft import HOLDING
from reconciler.plan.endpoints import describe_exit
from reconciler.plan.exits import exit_words
from reconciler.plan.ledger import TERMINAL, OverlayRecord
from reconciler.plan.overlays import predicted_end
from reconciler.plan.render import in_zone
from reconciler.plan.status import agenda_data, incident_data, iso, status_data
from reconciler.spec.spec import OverlaySpec
from reconciler.units import counted, format_duration

EVENTS_SHOWN = 8

app = group()


@app.command()
def explain(
    ctx: typer.Context,
    *,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            autocompletion=completion.subjects,
            show_default=False,
            help="Endpoint, overlay, GPU by index, capability, or incident by id.",
        ),
    ] = None,
    decision: Annotated[
        str | None,
        typer.Option(
            "--replay", metavar="N", help="Make decision N again, or the `last` one (of NAME): is it the same plan?"
        ),
    ] = None,
) -> int:
    """Say why something is as it is, and what comes next.

    Its set point, the decision and its reason, who displaced whom, what happens when, and what was last heard of it. Of
    an incident: what it is, what led there, and when it is over.

    Every decision is kept with all that went into it. With --replay it is made again from that, and shown as `plan`
    shows it; exit 1 if another plan comes out.

    Example: reconciler explain coding
    """
    face = Face.of(ctx)
    if decision is not None:
        from reconciler.cli.replay import replay

        return replay(face, decision, name)
    if name is None:
        raise UsageError("explain whom?", hint="`reconciler explain NAME`, or `reconciler explain --replay last`")
    seen = wiring.look(face.options)
    data = status_data(seen.spec, seen.observed, seen.plan, seen.incidents, seen.daemon, seen.spec.problems)
    with wiring.journal_reader(face.options) as journal:
        known = [incident_data(i) for i in journal.incidents(include_resolved=True)]
        kind, item = _find(data, known, name, seen.problems)
        subject = {"gpu": item.get("uuid"), "incident": item.get("subject")}.get(kind) or name
        past = journal.events(subject=subject, limit=EVENTS_SHOWN, newest=True)
    face.tell_beside(seen)  # not of whom is asked about: that is the answer
    steps = [action for action in seen.plan.actions if _concerns(action, kind, subject, item)]
    trouble = [i for i in map(incident_data, seen.incidents) if i["subject"] == subject and i["id"] != item.get("id")]
    if face.is_json:
        face.answer(
            {
                "kind": kind,
                kind: item,
                "next": [_step_data(action) for action in steps],
                "agenda": [agenda_data(e) for e in seen.plan.agenda if subject in (e.endpoint, e.overlay)],
                "incidents": trouble,
                "events": [event_data(event) for event in past],
            }
        )
        return 0
    tell = {
        "endpoint": _tell_endpoint, "overlay": _tell_overlay, "gpu": _tell_gpu, "capability": _tell_capability,
        "incident": _tell_incident,
    }[kind]  # fmt: skip
    lines = [*tell(seen, item), *_tell_next(seen, steps, item), *_tell_trouble(trouble), *_tell_past(past)]
    for line in lines:
        face.line(in_zone(line, LOCAL))
    return 0


def _find(
    data: dict[str, Any], incidents: list[dict[str, Any]], name: str, problems: Collection[Problem]
) -> tuple[str, dict[str, Any]]:
    """What has this name, and what it is; of incidents with one fingerprint the last.

    Raises:
        SpecError: there is an overlay file of this name, which could never be accepted.
        UnknownName: nothing has it.
    """
    for item in data["gpus"]:
        if name in (str(item["index"]), item["uuid"]):
            return "gpu", item
    for kind, key in (("endpoint", "endpoints"), ("overlay", "overlays"), ("capability", "capabilities")):
        for item in data[key]:
            if item["name"] == name:
                return kind, item
    for item in reversed(incidents):
        if name in (item["id"], f"{item['kind']}/{item['subject']}"):
            return "incident", item
    if wrong := [problem for problem in problems if Path(problem.file).stem == name]:
        raise SpecError(tuple(wrong))
    known = [item["name"] for key in ("endpoints", "overlays", "capabilities") for item in data[key]]
    raise UnknownName(f"nothing is named {name!r}", name=name, known=known)


def _concerns(action: Action, kind: str, subject: str, item: dict[str, Any]) -> bool:
    if kind == "gpu" or subject in action.gpus:
        return subject in action.gpus
    if kind == "capability":
        return action.subject.name in item["endpoints"]
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
    if holders := list(_tell_holders(seen, name)):
        yield " ".join([*holders, *(["It comes back after that."] if spec and spec.state == "running" else [])])
    elif item["desired"] != (spec.state if spec else None):
        yield f"At this moment it should be {item['desired']}."
    if item["pid"] is not None:
        yield f"It runs as pid {item['pid']} on {_place(seen, item)}, port {item['port'] or '-'}."
    for told in (f"{condition['type']}: {condition['reason']}" for condition in item["conditions"]):
        if told != item["reason"]:
            yield f"  {told}"
    if item["scheduled"] is not None:
        plan = item["scheduled"]
        states = ", ".join(plan["expected_states"])
        yield f"Planned until {clock(plan['until'])}: {plan['reason']} (expected: {states}). No incident meanwhile."
    if record is not None and record.exits:
        last = record.exits[-1]
        how = ("" if last.ended_for else ", as planned") if last.planned else ", unplanned"  # or the box went down
        ended = clock(iso(last.at.wall))
        yield f"It last ended at {ended}{how}, with {describe_exit(last)}."
        yield f"{counted(item['restarts'], 'unplanned end is', 'unplanned ends are')} remembered."


def _tell_holders(seen: wiring.Look, name: str) -> Iterator[str]:
    """To which overlays an endpoint gives way, since when, and when each is expected to end."""
    ledger, now = seen.plan.ledger, seen.plan.now.wall
    entry = next((e for e in ledger.agenda if e.endpoint == name), None)
    for record in ledger.overlays.values():
        if name not in record.evicted or record.state not in HOLDING:
            continue
        spec = seen.spec.overlays.get(record.name)
        since = f" since {clock(iso(entry.start))}" if entry is not None and entry.overlay == record.name else ""
        yield f"It gives way to {record.name}{since}, which is {_foreseen(record, spec, now)}."


def _foreseen(record: OverlayRecord, spec: OverlaySpec | None, now: float) -> str:
    """How far an overlay is that keeps somebody away, and when it is expected to end."""
    if record.state == "completing":
        return "over and gives its place back"
    end = None if spec is None else predicted_end(record, spec.makespan, now)
    if end is None:
        return f"{record.state}; when it ends is not known without its file"
    if end <= now:
        return f"{record.state} and should have ended"
    return f"{record.state} and expected to end at {clock(iso(end))}"


def _tell_overlay(seen: wiring.Look, item: dict[str, Any]) -> Iterator[str]:
    name = item["name"]
    record = seen.plan.ledger.overlays[name]
    since = clock(iso(record.since.wall))
    yield f"Overlay {name} is {item['state']} since {since}" + (f": {item['reason']}" if item["reason"] else "") + "."
    spec = seen.spec.overlays.get(name)
    if spec is None:
        yield "Its file is gone."
    else:
        own = "no endpoint but those under its `set`" if spec.endpoints else "no endpoint"
        whom = "endpoints of lower priority" if spec.allow_baseline_eviction else own
        yield f"It was asked for in [{spec.source}]; priority {spec.priority}; it may displace {whom}."
    if item["gpus"]:
        yield (
            f"It holds GPU {', '.join(map(str, item['gpus']))}."
            if record.state not in TERMINAL
            else (f"It had GPU {', '.join(map(str, item['gpus']))}.")
        )
    leavers = [f"It displaced {', '.join(item['evicted'])}."] if item["evicted"] else []
    leavers += [f"It had {', '.join(item['moved'])} moved."] if item["moved"] else []
    if leavers:
        yield " ".join([*leavers, *([record.why] if record.why else [])])
    if record.state == "pending":
        yield from _tell_victims_to_be(seen, name)
    yield from _tell_makespan("This run: ", item["makespan"])
    yield from _tell_makespan("The run before: ", item["last_run"])
    if item["exit_code"] is not None:
        yield f"Its workload ended with {exit_words(item['exit_code'], asked_for=record.outcome != 'failed')}."
    word = "It ended" if record.state in TERMINAL else "It is expected to end"
    if item["end"] is not None:
        yield f"{word} at {clock(item['end'])}."
    for blocked in seen.plan.blocked:
        if blocked.subject.kind == "workload" and blocked.subject.name == name:
            for hint in blocked.alternatives:
                yield f"  what would help: {hint}"
            if blocked.earliest_start is not None:
                word = "it begins at" if blocked.reason == "NotYet" else "not before"
                yield f"  {word} {clock(iso(blocked.earliest_start))}"


def _place(seen: wiring.Look, item: dict[str, Any]) -> str:
    """On which GPUs an endpoint runs: one that cannot be read has no index to be named by."""
    unseen = len(seen.plan.endpoints[item["name"]].gpus) - len(item["gpus"])
    told = [f"GPU {', '.join(map(str, item['gpus']))}"] if item["gpus"] else []
    told += [f"{counted(unseen, 'GPU')} that cannot be read now"] if unseen else []
    return " and ".join(told) or "no GPU"


def _tell_victims_to_be(seen: wiring.Look, name: str) -> Iterator[str]:
    """Who will give way to an overlay that is to begin, at each of its windows that are looked at."""
    windows: dict[float, list[str]] = {}
    for entry in seen.plan.agenda:
        if entry.overlay == name and entry.start > seen.plan.now.wall:
            windows.setdefault(entry.start, []).append(entry.endpoint)
    for start, endpoints in sorted(windows.items()):
        yield f"From {clock(iso(start))} on, {', '.join(sorted(endpoints))} will give way to it."


def _tell_makespan(which: str, spans: list[dict[str, Any]]) -> Iterator[str]:
    """Predicted against actual, part by part."""
    told = []
    for span in spans:
        lasted = format_duration(span["actual_seconds"])
        predicted = span["predicted_seconds"]
        against = "" if predicted is None else f" (predicted {format_duration(predicted)})"
        told.append(f"{span['part']} {lasted}{'' if span['over'] else ' so far'}{against}")
    if told:
        yield f"{which}{', '.join(told)}."


def _tell_capability(seen: wiring.Look, item: dict[str, Any]) -> Iterator[str]:
    ready = [name for name in item["endpoints"] if seen.plan.endpoints[name].state == "healthy"]
    floor = f", and the floor is {item['min_available']}" if item["min_available"] else ", and there is no floor"
    yield f"Capability {item['name']} is offered by {', '.join(item['endpoints']) or 'nobody'}{floor}."
    yield f"Ready: {', '.join(ready) or 'nobody'}."
    for name in item["endpoints"]:
        view = seen.plan.endpoints[name]
        if view.state != "healthy":
            yield f"  {name} is {view.state}" + (f": {view.reason}" if view.reason else "")
    users = [o.name for o in seen.spec.overlays.values() if item["name"] in o.requires]
    if users:
        yield f"Required by {', '.join(sorted(users))}."


def _tell_incident(seen: wiring.Look, item: dict[str, Any]) -> Iterator[str]:
    times = "once" if item["count"] == 1 else f"{item['count']} times"
    yield f"{item['kind']} of {item['subject']} ({item['severity']}): {item['message']}."
    yield f"It was opened at {clock(item['opened'])}, came {times}, and was last seen at {clock(item['last_seen'])}."
    if item["overlay"]:
        yield f"It came in or after what overlay {item['overlay']} planned."
    view = seen.plan.endpoints.get(item["subject"])
    if view is not None:
        yield f"{view.name} is {view.state} now" + (f": {view.reason}" if view.reason else "") + "."
    well = format_duration(STABLE_S)
    match item["state"]:
        case "resolved":
            yield f"It was resolved at {clock(item['resolved_at'])}."
        case "recovering":
            yield f"Its subject is well again; it is resolved once that has lasted for {well}."
        case _ if item["kind"] in ("WorkloadFailed", "OverlayFailed"):
            name = item["subject"]
            way = f"the overlay has run well, its file is removed, or `reconciler reset {name}` has it run again"
            yield f"It is open. It is resolved {well} after {way}."
        case _:
            yield f"It is open. It is resolved once its subject has been well for {well}."


def _tell_gpu(seen: wiring.Look, item: dict[str, Any]) -> Iterator[str]:
    yield (
        f"GPU {item['index']} ({item['name']}) is {item['state']}"
        + (f": {item['detail']}" if item["detail"] else "")
        + "."
    )
    if item["memory_used_mib"] is None:
        yield "How much of its memory is used cannot be read now."
    else:
        used = f"{item['memory_used_mib']} of {item['memory_total_mib']} MiB"
        yield f"Used {used}; {item['memory_planned_mib']} MiB are promised."
    for process in item["processes"]:
        owner = process["owner"] or "foreign, never signalled"
        yield f"  pid {process['pid']}: {owner}; {process['user'] or '?'}; {process['command'] or '?'}"
    for lease in seen.plan.ledger.leases:
        if lease.gpu == item["uuid"]:
            yield f"  leased to overlay {lease.overlay} since {clock(iso(lease.since.wall))}"


def _waits(seen: wiring.Look, item: dict[str, Any]) -> bool:
    """Whether it was told already for what it waits: then something is planned for it, if only to look again."""
    return any(b.subject.name == item.get("name") for b in seen.plan.blocked)


def _tell_next(seen: wiring.Look, steps: list[Action], item: dict[str, Any]) -> Iterator[str]:
    if not steps:
        if not _waits(seen, item):
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
        how = incident["severity"] if incident["state"] == "open" else f"{incident['severity']}, {incident['state']}"
        yield f"Incident {incident['kind']} ({how}) since {since}: {incident['message']}"


def _tell_past(events: tuple[JournalEvent, ...]) -> Iterator[str]:
    if events:
        yield "Last events:"
    for event in events:
        number = event.data.get("decision")
        yield f"  {event_line(event)}" + ("" if number is None else f"  (decision {number})")
