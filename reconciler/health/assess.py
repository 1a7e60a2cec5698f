"""The life of an incident: opened once, counted, recovering, resolved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import assert_never

from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.health.facts import Facts
from reconciler.health.incident import RANK, Incident, IncidentKind, Severity
from reconciler.health.rules import Finding, below_floor, find
from reconciler.plan.actions import Event

__all__ = ["Facts", "assess", "assess_blindness"]

STABLE_S = 300.0
"""An incident is resolved once its subject was well for this long: two restarts of a flapping endpoint, with their
back-off, lie closer together."""
ROOTS: tuple[IncidentKind, ...] = ("Hung", "RestoreDegraded")
"""Kinds that say more of the same subject than that it is away."""
REFRESH_S = 60.0
"""How often `last_seen` and the message of a lasting incident are renewed: it must not cost a write per tick."""


def assess(facts: Facts, incidents: Iterable[Incident], now: Instant) -> tuple[tuple[Incident, ...], tuple[Event, ...]]:
    """The incidents after this look at the box, and an event for each step in the life of one.

    Of `incidents` only the unresolved matter; resolved ones are dropped from the answer (the journal keeps them).

    For each finding:
        1. unheard of               opened
        2. recovering               open again, and counted
        3. open                     renewed; worse than before: escalated
    For each incident without a finding:
        4. its subject is not at rest, or not seen    as it is: nobody can tell yet
        5. open                                       recovering
        6. recovering for `STABLE_S`                  resolved
    """
    known = _unresolved(incidents)
    findings = [_as_known(finding, known) for finding in find(facts, now.wall)]
    troubled = {finding.subject for finding in findings}
    return _live_on(known, findings, now, is_well=lambda old: _at_rest(old, facts, troubled))


def assess_blindness(
    node: str, why: str, incidents: Iterable[Incident], now: Instant
) -> tuple[tuple[Incident, ...], tuple[Event, ...]]:
    """The same where no look could be taken: that is an incident of the node's, and all others are as they were."""
    finding = Finding(
        "Blind", node, "critical", f"the daemon cannot look at the box, and nothing is done meanwhile: {why}"
    )
    return _live_on(_unresolved(incidents), [finding], now, is_well=lambda _: False)


def _unresolved(incidents: Iterable[Incident]) -> dict[str, Incident]:
    return {incident.fingerprint: incident for incident in incidents if incident.state != "resolved"}


def _live_on(
    known: dict[str, Incident], findings: Iterable[Finding], now: Instant, *, is_well: Callable[[Incident], bool]
) -> tuple[tuple[Incident, ...], tuple[Event, ...]]:
    """The steps of `assess`, by its numbers."""
    after: list[Incident] = []
    events: list[Event] = []

    def step(what: str, incident: Incident) -> None:
        after.append(incident)
        events.append(Event(f"Incident{what}", incident.subject, incident.message, incident.fingerprint))

    for finding in findings:
        old = known.pop(f"{finding.kind}/{finding.subject}", None)
        if old is None:
            step("Opened", _open(finding, now))  # 1
            continue
        seen = replace(old, message=finding.message, last_seen=now.wall, severity=_worse(old, finding))
        if old.state == "recovering":
            step("Returned", replace(seen, state="open", since=now, count=old.count + 1))  # 2
        elif seen.severity != old.severity:
            step("Escalated", seen)  # 3
        else:
            after.append(seen if now.wall - old.last_seen >= REFRESH_S else old)  # 3
    for old in known.values():
        if not is_well(old):
            after.append(old)  # 4
        elif old.state == "open":
            step("Recovering", replace(old, state="recovering", since=now))  # 5
        elif _elapsed(old.since, now) >= STABLE_S:
            step("Resolved", replace(old, state="resolved", since=now, resolved_at=now.wall))  # 6
        else:
            after.append(old)
    return tuple(sorted(after, key=lambda incident: (incident.opened, incident.id))), tuple(events)


def _as_known(finding: Finding, known: Mapping[str, Incident]) -> Finding:
    """What a known trouble led to is that trouble: who hangs is restarted, and away for a while."""
    if finding.kind not in ("Unplanned", "WrongWay"):
        return finding
    roots = (kind for kind in ROOTS if f"{kind}/{finding.subject}" in known)
    return replace(finding, kind=next(roots, finding.kind))


def _open(finding: Finding, now: Instant) -> Incident:
    return Incident(
        id=f"{finding.kind}/{finding.subject}@{int(now.wall)}",
        kind=finding.kind,
        subject=finding.subject,
        severity=finding.severity,
        message=finding.message,
        state="open",
        since=now,
        opened=now.wall,
        last_seen=now.wall,
        overlay=finding.overlay,
    )


def _worse(old: Incident, finding: Finding) -> Severity:
    return max(old.severity, finding.severity, key=RANK.__getitem__)


def _elapsed(since: Instant, now: Instant) -> float:
    # the monotonic clock starts anew with each boot; across one only the wall clock tells
    return now.since(since) if now.mono >= since.mono else now.wall - since.wall


def _at_rest(incident: Incident, facts: Facts, troubled: set[str]) -> bool:
    """Whether the absence of a finding means that the subject is well."""
    match incident.kind:
        case (
            "Unplanned" | "WrongWay" | "Overdue" | "Hung" | "CrashLoop" | "RestoreDegraded"
            | "ForeignMemory" | "PortInUse"
        ):  # fmt: skip
            view = facts.endpoints.get(incident.subject)
            if view is None:
                return True
            there = view.state == "healthy" or (
                view.desired != "running" and view.state in ("stopped", "sleeping", "pending", "failed")
            )
            return there and incident.subject not in troubled
        case "GpuLost" | "GpuQuarantined":
            seen = facts.gpus is not None and all(
                gpu.state != "unknown" for gpu in facts.gpus if gpu.uuid == incident.subject
            )
            return seen and incident.subject not in troubled
        case "FloorBroken":
            return not below_floor(facts, incident.subject)
        case "WorkloadFailed" | "OverlayFailed" | "OverlayOverdue" | "SpecRejected" | "Blind":
            return True
        case _:
            assert_never(incident.kind)
