"""The `data` of `status`: one decision, told subject by subject in values that JSON can hold.

States are in lower case, GPUs are indices, memory is in MiB, times are ISO 8601 in UTC. None: unknown, or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from msgspec import Struct, field

from reconciler.clock import Instant
from reconciler.errors import Problem
from reconciler.plan.actions import EndpointView, Plan
from reconciler.plan.agenda import AgendaTracker
from reconciler.plan.ledger import LIVE, TERMINAL, AgendaEntry, OverlayRecord, Span
from reconciler.plan.moving import for_whom
from reconciler.plan.observed import Gpu, Incarnation, Observed, Subject
from reconciler.plan.overlays import predicted_end
from reconciler.spec.engines import endpoint_url
from reconciler.spec.spec import EndpointSpec, OverlaySpec, Spec
from reconciler.units import to_mib


class DaemonInfo(Struct, frozen=True):
    """Who converges this box."""

    running: bool
    pid: int | None
    since: float | None
    """Epoch seconds."""
    generation: int | None
    """How many daemons this state directory has had."""
    failing: Mapping[str, str] = field(default_factory=dict)
    """Kind and name of who something does not get done for → what that is, and when it is tried again."""


class Trouble(Protocol):
    """What is shown of an incident; the type itself stands on the floor above."""

    @property
    def id(self) -> str: ...  # noqa: D102 - fields as in `health.incident`
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def subject(self) -> str: ...  # noqa: D102
    @property
    def severity(self) -> str: ...  # noqa: D102
    @property
    def message(self) -> str: ...  # noqa: D102
    @property
    def state(self) -> str: ...  # noqa: D102
    @property
    def opened(self) -> float: ...  # noqa: D102
    @property
    def last_seen(self) -> float: ...  # noqa: D102
    @property
    def count(self) -> int: ...  # noqa: D102
    @property
    def resolved_at(self) -> float | None: ...  # noqa: D102
    @property
    def overlay(self) -> str | None: ...  # noqa: D102


def status_data(
    spec: Spec,
    observed: Observed,
    plan: Plan,
    incidents: Iterable[Trouble],
    daemon: DaemonInfo | None,
    problems: tuple[Problem, ...] = (),
    *,
    now: Instant | None = None,
) -> dict[str, Any]:
    """How everything stands, as seen at the moment of `plan`.

    Args:
        spec: the spec in force
        observed: what `plan` was decided on
        plan: the decision; its ledger is the one shown
        incidents: those to show
        daemon: the daemon that holds the state directory; None: no daemon runs
        problems: what is wrong with the files as they are now; a daemon keeps the last good version of those
        now: when it is told, which a daemon may do seconds later: until then lasts what was seen; None: at that moment

    Returns:
        `endpoints`, `gpus`, `overlays`, `capabilities`, `incidents`, `daemon`, `spec`, `node`.
    """
    info = daemon or DaemonInfo(running=False, pid=None, since=None, generation=None)
    view = _View(spec, observed, plan, now or plan.now, info.failing)
    return {
        "endpoints": [view.endpoint(plan.endpoints[name]) for name in sorted(plan.endpoints)],
        "gpus": [view.gpu(gpu) for gpu in observed.gpus],
        "overlays": [view.overlay(plan.ledger.overlays[name]) for name in sorted(plan.ledger.overlays)],
        "capabilities": view.capabilities(),
        "incidents": [incident_data(incident) for incident in incidents],
        "daemon": {
            "running": info.running,
            "pid": info.pid,
            "since": iso(info.since),
            "generation": info.generation,
        },
        "spec": {
            "digest": spec.digest,
            "in_force": "last good" if problems and info.running else "current",
            "problems": [problem_data(problem) for problem in problems],
        },
        "node": {
            "name": spec.node.name,
            "at": iso(plan.now.wall),
            "converged": plan.converged,
            "gpus_known": observed.gpus_known,
            "gpus_detail": observed.gpus_detail,
        },
    }


def iso(wall: float | None) -> str | None:
    """Epoch seconds as ISO 8601 in UTC, to the second."""
    return None if wall is None else datetime.fromtimestamp(round(wall), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def problem_data(problem: Problem) -> dict[str, Any]:
    """One problem of a file."""
    return {
        "file": problem.file,
        "line": problem.line,
        "column": problem.column,
        "message": problem.message,
        "hint": problem.hint,
    }


def incident_data(incident: Trouble) -> dict[str, Any]:
    """One incident."""
    return {
        "id": incident.id,
        "kind": incident.kind,
        "subject": incident.subject,
        "severity": incident.severity,
        "message": incident.message,
        "state": incident.state,
        "opened": iso(incident.opened),
        "last_seen": iso(incident.last_seen),
        "resolved_at": iso(incident.resolved_at),
        "count": incident.count,
        "overlay": incident.overlay,
    }


def agenda_data(entry: AgendaEntry) -> dict[str, Any]:
    """One planned transition."""
    return {
        "endpoint": entry.endpoint,
        "expected_states": list(entry.expected_states),
        "from": iso(entry.start),
        "until": iso(entry.until),
        "reason": entry.reason,
        "overlay": entry.overlay,
    }


class _View:
    """Indexed inputs of one answer."""

    def __init__(self, spec: Spec, observed: Observed, plan: Plan, now: Instant, failing: Mapping[str, str]) -> None:
        self.spec, self.observed, self.plan, self.now, self.failing = spec, observed, plan, now, failing
        self.indices = {gpu.uuid: gpu.index for gpu in observed.gpus}
        self.by_id = {incarnation.id: incarnation for incarnation in observed.incarnations}
        self.agenda = AgendaTracker(plan.ledger.agenda, now.wall)
        self.blocked = {item.subject: item for item in plan.blocked}

    def gpus_of(self, uuids: Iterable[str]) -> list[int]:
        """Indices, ascending; a GPU that the node no longer names has none."""
        return sorted(self.indices[uuid] for uuid in uuids if uuid in self.indices)

    def described(self, name: str) -> EndpointSpec | None:
        """The version of an endpoint in force: that of the live overlay that sets it, else the baseline's."""
        for overlay in sorted(self.spec.overlays.values(), key=lambda o: (-o.priority, o.name)):
            record = self.plan.ledger.overlays.get(overlay.name)
            if name in overlay.endpoints and record is not None and record.state in LIVE:
                return overlay.endpoints[name]
        return self.spec.endpoints.get(name) or next(
            (o.endpoints[name] for _, o in sorted(self.spec.overlays.items()) if name in o.endpoints), None
        )

    # ------------------------------------------------------------ endpoints

    def endpoint(self, view: EndpointView) -> dict[str, Any]:
        spec = self.described(view.name)
        run = self.by_id.get(view.incarnation) if view.incarnation else None
        record = self.plan.ledger.endpoints.get(view.name)
        port = run.port if run is not None else (spec.port if spec else None)
        entry = self.agenda.entry(view.name)
        return {
            "name": view.name,
            "state": view.state,
            "gpus": self.gpus_of(view.gpus),
            "pid": run.pid if run is not None and run.phase == "running" else None,
            "port": port,
            "model": spec.model if spec else None,
            "uptime_seconds": self._uptime(run),
            "desired": view.desired,
            "priority": spec.priority if spec else None,
            "capabilities": list(spec.capabilities) if spec else [],
            "url": endpoint_url(port) if port is not None else None,
            "memory_mib": self._memory(Subject("endpoint", view.name)) if run is not None else None,
            "restarts": sum(not end.planned for end in record.exits) if record else 0,
            "reason": self.failing.get(f"endpoint/{view.name}", view.reason),
            "scheduled": _scheduled(entry) if entry else None,
            "conditions": self._conditions(view, run, spec),
        }

    def _uptime(self, run: Incarnation | None) -> float | None:
        if run is None or run.phase != "running":
            return None
        return round(max(0.0, self.now.since(run.started)), 1)

    def _memory(self, subject: Subject) -> int | None:
        """The sum over its processes on all GPUs; None as soon as one part of it could not be seen."""
        total = 0
        for gpu in self.observed.gpus:
            for process in gpu.processes or ():
                if process.owner == subject:
                    if process.memory_bytes is None:
                        return None
                    total += process.memory_bytes
        unseen = any(gpu.processes is None for gpu in self.observed.gpus)
        return None if unseen or not self.observed.gpus_known else to_mib(total)

    def _conditions(
        self, view: EndpointView, run: Incarnation | None, spec: EndpointSpec | None
    ) -> list[dict[str, Any]]:
        record = self.plan.ledger.endpoints.get(view.name)
        found: list[dict[str, Any]] = []
        if record is not None and record.evicted_by:
            found.append(_condition("EvictedBy", record.evicted_by))
        if record is not None and record.move is not None:
            found.append(_condition("Moving", f"it makes room for {for_whom(record.move)}"))
        if record is not None and record.failed:
            found.append(_condition("Failed", record.failed))
        if run is not None and run.alive and spec is not None and run.process_hash != spec.process_hash:
            found.append(_condition("SpecChangePending", "it still runs as its set point was before"))
        if record is not None and record.renew_before is not None:
            found.append(_condition("CleanStart", "it is being ended and started afresh"))
        if run is not None and run.stop is not None:
            found.append(_condition("Stopping", "signalled" if run.stop.signalled else "draining"))
        if failing := self.failing.get(f"endpoint/{view.name}"):
            found.append(_condition("ActionFailed", failing))
        if run is not None and run.phase == "unknown":
            found.append(
                _condition("IdentityUnknown", "its process could not be verified; it is left alone", "unknown")
            )
        blocked = self.blocked.get(Subject("endpoint", view.name))
        if blocked is not None:
            found.append(_condition(blocked.reason, blocked.message))
        return found

    # ------------------------------------------------------------ GPUs

    def gpu(self, gpu: Gpu) -> dict[str, Any]:
        quarantine = self.plan.ledger.quarantines.get(gpu.uuid)
        detail = gpu.detail or ("" if gpu.healthy else "unhealthy")
        return {
            "index": gpu.index,
            "uuid": gpu.uuid,
            "name": gpu.name,
            "state": "quarantined" if quarantine and gpu.state == "ok" else gpu.state,
            "memory_total_mib": to_mib(gpu.total_bytes),
            "memory_used_mib": None if gpu.used_bytes is None else to_mib(gpu.used_bytes),
            "memory_planned_mib": to_mib(self._planned(gpu.uuid)),
            "processes": [
                {
                    "pid": process.pid,
                    "owner": process.owner.name if process.owner else None,
                    "user": process.user,
                    "command": process.command,
                    "memory_mib": None if process.memory_bytes is None else to_mib(process.memory_bytes),
                }
                for process in gpu.processes or ()
            ],
            "detail": quarantine.reason if quarantine else detail,
        }

    def _planned(self, uuid: str) -> int:
        """Bytes promised to who stays and who has a lease; whoever is on the way out no longer counts."""
        promised: dict[Subject, int] = {}
        for run in self.observed.incarnations:
            if run.alive and run.stop is None and uuid in run.gpus:
                promised[run.subject] = run.memory_bytes[run.gpus.index(uuid)]
        for lease in self.plan.ledger.leases:
            if lease.gpu == uuid:
                promised[lease.subject] = max(lease.memory_bytes, promised.get(lease.subject, 0))
        return sum(promised.values())

    # ------------------------------------------------------------ overlays and capabilities

    def overlay(self, record: OverlayRecord) -> dict[str, Any]:
        spec = self.spec.overlays.get(record.name)
        run = max(
            (i for i in self.observed.incarnations if i.subject == Subject("workload", record.name)),
            key=lambda i: i.attempt,
            default=None,
        )
        started = record.active_since.wall if record.active_since else record.window_start
        return {
            "name": record.name,
            "state": record.state,
            "priority": record.priority,
            "gpus": self.gpus_of(record.gpus or {x.gpu for x in self.plan.ledger.leases if x.overlay == record.name}),
            "start": iso(started),
            "end": iso(self._end(record, spec)),
            "deadline": iso(spec.makespan.deadline) if spec else None,
            "evicted": list(record.evicted),
            "moved": list(record.moved),
            "pid": run.pid if run is not None and run.phase == "running" else None,
            "exit_code": record.exit_code,
            "reason": self.failing.get(f"workload/{record.name}") or record.reason or self._waits_for(record.name),
            "seized": list(record.seized),
            "attempt": record.attempt,
            "makespan": [self._span(span) for span in record.spans],
            "last_run": [self._span(span) for span in record.last_run],
            "conditions": [_condition("SpecChangePending", "its edit waits for the end of the present run")]
            if spec is not None and spec.change_pending
            else [],
        }

    def _end(self, record: OverlayRecord, spec: OverlaySpec | None) -> float | None:
        """When it ended, or is expected to; None: nobody knows, as of one that waits and is told no beginning."""
        if record.state in TERMINAL:
            return record.since.wall
        usual, begin = self.plan.ledger.runs.get(record.name), self.now.wall
        blocked = self.blocked.get(Subject("workload", record.name))
        if record.state == "pending" and blocked is not None:
            if blocked.earliest_start is None:
                return None
            begin = max(begin, blocked.earliest_start)
        return predicted_end(record, spec.makespan, begin, usual) if spec else None

    def _span(self, span: Span) -> dict[str, Any]:
        """One part of its run; one that is not over has lasted so long."""
        lasted = span.actual_s if span.actual_s is not None else max(0.0, self.now.since(span.began))
        return {
            "part": span.part,
            "since": iso(span.began.wall),
            "predicted_seconds": None if span.predicted_s is None else round(span.predicted_s, 1),
            "actual_seconds": round(lasted, 1),
            "over": span.actual_s is not None,
        }

    def _waits_for(self, name: str) -> str:
        blocked = self.blocked.get(Subject("workload", name))
        return f"{blocked.reason}: {blocked.message}" if blocked else ""

    def capabilities(self) -> list[dict[str, Any]]:
        providers: dict[str, list[str]] = {name: [] for name in self.spec.floors}
        for name in sorted(self.plan.endpoints):
            spec = self.described(name)
            for capability in spec.capabilities if spec else ():
                providers.setdefault(capability, []).append(name)
        return [
            {
                "name": capability,
                "ready": sum(self.plan.endpoints[name].state == "healthy" for name in names),
                "min_available": self.spec.floors.get(capability, 0),
                "endpoints": names,
            }
            for capability, names in sorted(providers.items())
        ]


def _scheduled(entry: AgendaEntry) -> dict[str, Any]:
    return {
        "expected_states": list(entry.expected_states),
        "until": iso(entry.until),
        "reason": entry.reason,
        "overlay": entry.overlay,
    }


def _condition(kind: str, reason: str, status: Literal["true", "unknown"] = "true") -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason}
