"""`status` in tables, from the same data that its JSON carries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from reconciler.cli.local_time import LOCAL
from reconciler.cli.rows import Rows
from reconciler.units import MIB, counted, format_duration, format_size

STATE_STYLES = {
    "healthy": "green", "starting": "yellow", "pending": "yellow", "unhealthy": "red", "failed": "bold red",
    "stopping": "yellow", "stopped": "dim", "sleeping": "cyan", "unknown": "magenta",
    "admitted": "cyan", "evicting": "yellow", "active": "green", "overrun": "bold yellow", "completing": "cyan",
    "restoring": "cyan", "done": "dim green", "cancelled": "dim", "expired": "red",
    "ok": "green", "lost": "bold red", "quarantined": "bold magenta",
    "info": "cyan", "warning": "yellow", "critical": "bold red",
}  # fmt: skip

BAR = 16
"""Cells of a memory bar."""

_WRAPPING = {"processes": 14, "endpoints": 10, "name": 9}
"""Columns whose text may take several lines, and the width they keep."""


def status_view(data: Mapping[str, Any], *, everything: bool = True) -> RenderableType:
    """All tables that have something to show; without `everything`, finished overlays are left out."""
    overlays = [o for o in data["overlays"] if everything or o["state"] not in ("done", "cancelled", "expired")]
    parts: list[RenderableType] = [header(data), endpoints_table(data["endpoints"]), gpus_table(data["gpus"])]
    if not data["node"]["gpus_known"]:
        parts.append(Text(f"GPUs: unknown: {data['node']['gpus_detail']}", "bold magenta"))
    if overlays:
        parts.append(overlays_table(overlays))
    if data["capabilities"]:
        parts.append(capabilities_table(data["capabilities"]))
    if data["incidents"]:
        parts.append(incidents_table(data["incidents"]))
    told: list[Text] = []
    for problem in data["spec"]["problems"]:
        where = f"{problem['file']}:{problem['line']}:{problem['column']}" if problem["line"] else problem["file"]
        told.append(Text(f"{where}: {problem['message']}", "red"))
        if problem["hint"]:
            told.append(Text(f"  hint: {problem['hint']}", "dim"))
    if data["spec"]["in_force"] != "current":
        told.append(Text("The last good version of these files, where there is one, stays in force.", "yellow"))
    if told:
        parts.append(Group(*told))
    return Group(*(line for part in parts for line in (part, Text(""))))


def header(data: Mapping[str, Any]) -> Text:
    """One line: the node, the daemon, whether there is anything left to do."""
    daemon, node = data["daemon"], data["node"]
    text = Text(node["name"], "bold")
    if daemon["running"]:
        text.append(f"   daemon {daemon['pid']} since {clock(daemon['since'])}", "green")
    else:
        text.append("   no daemon", "yellow")
    text.append("   converged" if node["converged"] else "   converging" if daemon["running"] else "   not converged")
    return text


def endpoints_table(endpoints: Sequence[Mapping[str, Any]]) -> Rows:
    """One row for each endpoint."""
    columns = ("endpoint", "state", "gpus", "pid", "port", "prio", "up", "memory")
    rows = Rows(*columns, words="why", title="Endpoints", spare=("prio", "memory", "port", "up"))
    for e in endpoints:
        away = e["desired"] != "running" and e["state"] in ("stopped", "sleeping")
        restarts = f" ({counted(e['restarts'], 'restart')})" if e["restarts"] else ""
        rows.add(
            Text(e["name"], "bold"),
            _state(e["state"], dim=away),
            gpu_list(e["gpus"]),
            _or_dash(e["pid"]),
            _or_dash(e["port"]),
            _or_dash(e["priority"]),
            "-" if e["uptime_seconds"] is None else format_duration(e["uptime_seconds"]) + restarts,
            "-" if e["pid"] is None else memory(e["memory_mib"]),
            words=Text(local(why(e)), "dim"),
        )
    return rows


def why(endpoint: Mapping[str, Any]) -> str:
    """Why an endpoint is as it is, and until when, in a few words."""
    reason = endpoint["reason"] or (endpoint["desired"] if endpoint["desired"] != "running" else "")
    scheduled = endpoint["scheduled"]
    if scheduled is None:
        return reason
    planned = f"planned until {clock(scheduled['until'])}"
    if scheduled["reason"] != reason:  # not the same twice
        planned = f"{planned}: {scheduled['reason']}"
    return f"{reason}; {planned}" if reason else planned


def gpus_table(gpus: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each GPU, with a bar of what is used and who uses it."""
    table = _table("gpu", "name", "state", "used", "", "planned", "processes", title="GPUs")
    for g in gpus:
        owners = [
            f"{p['owner']} {p['pid']}"
            if p["owner"]
            else f"foreign {p['pid']} {p['user'] or '?'} {_short(p['command'])}"
            for p in g["processes"]
        ]
        total = f"{memory(g['memory_used_mib'])} / {memory(g['memory_total_mib'] or None)}"
        planned = memory(g["memory_planned_mib"]) if g["memory_planned_mib"] else "-"
        listed = ", ".join(owners) + (f" [{g['detail']}]" if g.get("detail") else "")
        table.add_row(
            str(g["index"]),
            g["name"],
            _state(g["state"]),
            bar(g["memory_used_mib"], g["memory_total_mib"]),
            total,
            planned,
            Text(listed or "-", "dim"),
        )
    return table


def bar(used: int | None, total: int) -> Text:
    """Used memory as a bar; question marks when it could not be seen."""
    if used is None or total <= 0:
        return Text("?" * BAR, "magenta")
    part = min(1.0, used / total)
    full = round(part * BAR)
    style = "red" if part > 0.97 else "yellow" if part > 0.85 else "green"
    return Text("█" * full, style).append("░" * (BAR - full), "dim")


def overlays_table(overlays: Sequence[Mapping[str, Any]]) -> Rows:
    """One row for each overlay."""
    columns = ("overlay", "state", "gpus", "prio", "start", "end", "ran", "displaces", "exit")
    rows = Rows(*columns, words="why", title="Overlays", spare=("prio", "ran", "start", "exit", "displaces", "end"))
    for o in overlays:
        rows.add(
            Text(o["name"], "bold"),
            _state(o["state"]),
            gpu_list(o["gpus"]),
            str(o["priority"]),
            clock(o["start"]),
            clock(o["end"]),
            ran(o["makespan"]),
            ", ".join(o["evicted"]) or "-",
            _or_dash(o["exit_code"]),
            words=Text(local(o["reason"]), "dim"),
        )
    return rows


def ran(spans: Sequence[Mapping[str, Any]]) -> str:
    """How long its work runs, or ran, of how long it was predicted to."""
    run = next((s for s in reversed(spans) if s["part"] == "run"), None)
    if run is None:
        return "-"
    predicted = "" if run["predicted_seconds"] is None else f"/{format_duration(round(run['predicted_seconds']))}"
    return f"{format_duration(round(run['actual_seconds']))}{predicted}"


def capabilities_table(capabilities: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each capability."""
    table = _table("capability", "ready", "at least", "endpoints", title="Capabilities")
    for c in capabilities:
        short = c["ready"] < c["min_available"]
        ready = Text(str(c["ready"]), "bold red" if short else "green" if c["ready"] else "dim")
        table.add_row(c["name"], ready, str(c["min_available"]), ", ".join(c["endpoints"]) or "-")
    return table


def incidents_table(incidents: Sequence[Mapping[str, Any]]) -> Rows:
    """One row for each incident."""
    columns = ("incident", "subject", "severity", "state", "since", "times")
    rows = Rows(*columns, words="what", title="Incidents", spare=("times", "since", "state"))
    for i in incidents:
        rows.add(
            Text(i["kind"], "bold"),
            i["subject"],
            _state(i["severity"]),
            i["state"],
            clock(i["opened"]),
            str(i["count"]),
            words=Text(i["message"]),
        )
    return rows


def agenda_table(entries: Sequence[Mapping[str, Any]]) -> Rows:
    """One row for each planned transition."""
    columns = ("endpoint", "expected", "from", "until", "overlay")
    rows = Rows(*columns, words="why", title="Agenda", spare=("from",))
    for entry in entries:
        rows.add(
            Text(entry["endpoint"], "bold"),
            " → ".join(entry["expected_states"]),
            clock(entry["from"]),
            clock(entry["until"]),
            _or_dash(entry["overlay"]),
            words=Text(entry["reason"], "dim"),
        )
    return rows


def local(text: str) -> str:
    """A text with the moments in it in local time, as those beside it are."""
    if "Z" not in text:
        return text
    from reconciler.plan.render import in_zone  # few texts have one, and `status` is to be quick

    return in_zone(text, LOCAL)


def clock(moment: str | None) -> str:
    """A moment of the JSON in local time; with the date when it is not today."""
    if moment is None:
        return "-"
    local = datetime.fromisoformat(moment).astimezone()
    return local.strftime("%H:%M:%S" if local.date() == datetime.now().astimezone().date() else "%Y-%m-%d %H:%M:%S")


def gpu_list(indices: Iterable[int]) -> str:
    """`0-3,5`: runs of three and more are drawn together."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    words = [w for run in runs for w in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    return ",".join(words) or "-"


def memory(mib: int | None) -> str:
    """MiB as people read them; `?` when unknown."""
    return "?" if mib is None else format_size(mib * MIB)


def _table(*columns: str, title: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim"
    )
    for column in columns:
        # on a narrow terminal what may wrap gives way, but never to nothing
        wraps = _WRAPPING.get(column)
        table.add_column(column, overflow="fold", no_wrap=wraps is None, min_width=wraps)
    return table


def _state(state: str, *, dim: bool = False) -> Text:
    return Text(state, "dim" if dim else STATE_STYLES.get(state, ""))


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _short(command: str | None) -> str:
    text = command or "?"
    return text if len(text) <= 40 else text[:39] + "…"
