"""What is trouble: ordered rows of (predicate, kind, severity, message), the first that holds wins.

A row without a kind says that the case is explained. A new case is a new row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Generic, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from reconciler.health.facts import Facts
from reconciler.health.incident import IncidentKind, Severity
from reconciler.plan.actions import EndpointView
from reconciler.plan.endpoints import describe_exit
from reconciler.plan.exits import exit_words
from reconciler.plan.ledger import TERMINAL, AgendaEntry, EndpointRecord, Exit, Ledger, OverlayRecord
from reconciler.plan.observed import Gpu, Subject
from reconciler.units import format_duration

T = TypeVar("T")

LASTING_S = 60.0
"""What passes by itself has passed by then: a record being written, a process that the kernel clears away."""
ESCALATE_AFTER_S = 300.0
"""Overdue for this long is critical: an entry's end already has the slack of twice the predicted time."""


class Finding(Struct, frozen=True):
    """One thing that is wrong at this moment."""

    kind: IncidentKind
    subject: str
    severity: Severity
    message: str
    overlay: str | None = None


class Case(Struct, frozen=True):
    """One endpoint at one moment, with what could explain it."""

    view: EndpointView
    record: EndpointRecord
    entry: AgendaEntry | None
    """Its agenda entry in force, else the last one that ended."""
    now: float
    """Epoch seconds."""
    returning: bool = False
    """An overlay that displaced it is over, and it was not ready since."""
    undying_s: float = 0.0
    """Seconds since SIGKILL was sent to one that lives on and holds no GPU: else the GPU's own incident tells of it."""
    unasked: bool = False
    """It runs, and this daemon has not asked it anything yet: that it is not ready is no more than unknown."""

    @property
    def lasts_s(self) -> float:
        """Seconds for which it has been in its state."""
        since = self.record.state_since
        return 0.0 if since is None or self.record.state != self.view.state else max(0.0, self.now - since.wall)

    @property
    def covered(self) -> bool:
        """Its entry is in force at this moment."""
        return self.entry is not None and self.now < self.entry.until

    @property
    def overdue_s(self) -> float:
        """Seconds since its entry ended; 0 without one."""
        return 0.0 if self.entry is None else max(0.0, self.now - self.entry.until)

    @property
    def crash(self) -> Exit | None:
        """The end that nobody asked for, if it is the last thing that happened to it: it was not ready since."""
        last = self.record.exits[-1] if self.record.exits else None
        if last is None or last.planned:
            return None
        ready = self.record.ready_since
        return None if ready is not None and ready.wall > last.at.wall else last


class _Rule(Struct, Generic[T], frozen=True):
    """One row of a table: the first that holds names the incident, or explains why there is none."""

    holds: Callable[[T], bool]
    kind: IncidentKind | None
    """None: explained."""
    severity: Severity
    message: Callable[[T], str]


def _explained(holds: Callable[[T], bool]) -> _Rule[T]:
    return _Rule(holds, None, "info", lambda _: "")


def _overdue(case: Case) -> str:
    until = datetime.fromtimestamp(_entry(case).until, UTC).isoformat(timespec="seconds")
    return f"{_name(case)} ({_entry(case).reason}) was to be done by {until} and is {case.view.state}{_because(case)}"


ENDPOINT_RULES: tuple[_Rule[Case], ...] = (
    _Rule(
        lambda c: c.view.state == "unknown" and c.lasts_s >= LASTING_S,
        "Unplanned",
        "warning",
        lambda c: (
            f"{_name(c)} is left alone, {format_duration(c.lasts_s)} by now{_because(c)}; look at its records in run/,"
            " and whether its shim is stopped (then `kill -CONT` it)"
        ),
    ),
    _explained(lambda c: c.view.state == "unknown"),  # not seen is not wrong
    _Rule(
        lambda c: c.undying_s >= LASTING_S,
        "Unplanned",
        "warning",
        lambda c: f"{_name(c)} was killed {format_duration(c.undying_s)} ago and does not end{_because(c)}",
    ),
    _explained(lambda c: _unwanted(c) and (c.overdue_s == 0 or c.view.state in ("stopped", "sleeping", "failed"))),
    _Rule(
        lambda c: c.returning and c.view.state == "failed",
        "RestoreDegraded",
        "critical",
        lambda c: f"{_name(c)} did not come back after {c.record.evicted_by}: {c.record.failed or c.view.reason}",
    ),
    _Rule(
        lambda c: c.view.state == "failed",
        "CrashLoop",
        "critical",
        lambda c: f"{_name(c)} has failed and is not started again: {c.record.failed or c.view.reason}",
    ),
    _explained(lambda c: c.view.state == "healthy" and not _unwanted(c)),
    _explained(lambda c: c.covered and c.view.state in _entry(c).expected_states),
    _Rule(
        lambda c: c.view.state == "unhealthy" and _waits_for(c) == "Hung",
        "Hung",
        "warning",
        lambda c: f"{_name(c)} does not get on: {c.view.reason.partition(': ')[2] or c.view.reason}",
    ),
    _Rule(
        lambda c: c.returning and c.view.state == "unhealthy",
        "RestoreDegraded",
        "warning",
        lambda c: f"{_name(c)} came back after {c.record.evicted_by} and is unhealthy{_because(c)}",
    ),
    _Rule(
        lambda c: c.covered,
        "WrongWay",
        "warning",
        lambda c: f"{_name(c)} is {c.view.state}, expected {_expected(c)} ({_entry(c).reason}){_because(c)}",
    ),
    _explained(lambda c: c.unasked),  # what was to be done while no daemon looked may be done
    _Rule(lambda c: c.overdue_s > ESCALATE_AFTER_S, "Overdue", "critical", _overdue),
    _Rule(lambda c: c.entry is not None, "Overdue", "warning", _overdue),
    _explained(lambda c: c.view.desired == "displaced"),  # an overlay in force holds its place
    _Rule(
        lambda c: c.view.state == "pending" and _waits_for(c) == "GpuOccupied",
        "ForeignMemory",
        "warning",
        lambda c: f"{_name(c)} cannot start: {c.view.reason}",
    ),
    _Rule(
        lambda c: c.view.state == "pending" and _waits_for(c) == "PortInUse",
        "PortInUse",
        "warning",
        lambda c: f"{_name(c)} cannot start: {c.view.reason}",
    ),
    _Rule(
        lambda c: c.crash is not None,
        "Unplanned",
        "warning",
        lambda c: f"{_name(c)} {_crash(c)} and is {c.view.state}",
    ),
    _Rule(
        lambda c: c.view.state in ("unhealthy", "sleeping"),
        "Unplanned",
        "warning",
        lambda c: f"{_name(c)} is {c.view.state} and nobody planned it{_because(c)}",
    ),
    # what is left is on its way for the first time, or after an end that was asked for
)


def _failed(overlay: OverlayRecord) -> bool:
    if not overlay.placement_hash:  # its file is gone: somebody has seen to it
        return False
    return overlay.state == "failed" or (overlay.outcome == "failed" and overlay.state in ("completing", "restoring"))


OVERLAY_RULES: tuple[_Rule[OverlayRecord], ...] = (
    _Rule(
        lambda o: _failed(o) and o.exit_code not in (None, 0),
        "WorkloadFailed",
        "warning",
        lambda o: (
            f"overlay {o.name}: {o.reason or exit_words(o.exit_code)}; `reconciler logs {o.name}` shows what it wrote"
        ),
    ),
    _Rule(_failed, "OverlayFailed", "warning", lambda o: f"overlay {o.name} failed: {o.reason or 'reason unknown'}"),
    _Rule(
        lambda o: o.state == "overrun",
        "OverlayOverdue",
        "warning",
        lambda o: f"overlay {o.name} runs past its duration and grace",
    ),
)


def find(facts: Facts, now: float) -> tuple[Finding, ...]:
    """Everything that is wrong at `now` (epoch seconds), endpoints first."""
    entries = _latest_entries(facts.ledger.agenda, now)
    records = facts.ledger.endpoints
    undying = _undying(facts, now)
    cases = {
        name: Case(
            view,
            record,
            entries.get(name),
            now,
            returning=_is_returning(facts.ledger, record),
            undying_s=undying.get(name, 0.0),
            unasked=view.state == "starting" and view.incarnation not in (None, *facts.observed.probes),
        )
        for name, view in sorted(facts.endpoints.items())
        for record in (records.get(name) or EndpointRecord(name),)
    }
    wrong: dict[str, Finding] = {}
    for name, case in cases.items():
        overlay = case.entry.overlay if case.entry else case.record.evicted_by
        finding = _first(ENDPOINT_RULES, case, name, overlay)
        if finding is not None:
            wrong[name] = finding
    floors = _floors(facts, cases, wrong)
    overlays = (_first(OVERLAY_RULES, o, name, name) for name, o in sorted(facts.ledger.overlays.items()))
    return (*wrong.values(), *floors, *filter(None, overlays), *_gpus(facts), *_files(facts))


def _undying(facts: Facts, now: float) -> dict[str, float]:
    """Endpoints without GPUs that SIGKILL did not end, and for how long."""
    return {
        incarnation.subject.name: now - incarnation.undying_since.wall
        for incarnation in facts.observed.incarnations
        if incarnation.undying_since is not None and incarnation.alive and not incarnation.gpus
        if incarnation.subject.kind == "endpoint"
    }


def below_floor(facts: Facts, capability: str) -> bool:
    """Whether fewer providers are ready than `min_available` asks; one that could not be seen counts as ready."""
    return facts.ready(capability) < facts.spec.floors.get(capability, 0)


def _latest_entries(agenda: Iterable[AgendaEntry], now: float) -> dict[str, AgendaEntry]:
    """Per endpoint the entry that has begun and ends last; entries to come explain nothing yet."""
    begun = (entry for entry in agenda if entry.start <= now)
    return {entry.endpoint: entry for entry in sorted(begun, key=lambda entry: (entry.until, entry.start))}


def _is_returning(ledger: Ledger, record: EndpointRecord) -> bool:
    """Whether the overlay that displaced it is over; a record of that overlay may be gone already."""
    if record.evicted_by is None:
        return False
    overlay = ledger.overlays.get(record.evicted_by)
    return overlay is None or overlay.state in ("completing", "restoring", *TERMINAL)


def _first(rules: tuple[_Rule[T], ...], case: T, subject: str, overlay: str | None) -> Finding | None:
    rule = next((rule for rule in rules if rule.holds(case)), None)
    if rule is None or rule.kind is None:
        return None
    return Finding(rule.kind, subject, rule.severity, rule.message(case), overlay)


def _floors(facts: Facts, cases: dict[str, Case], wrong: dict[str, Finding]) -> tuple[Finding, ...]:
    """Broken floors, and `wrong` made critical where it is what breaks one.

    For a capability with too few ready providers, the first that holds:
        1. a provider has an incident of its own    that one is critical and names the floor: one trouble, one incident
        2. an agenda entry covers a provider        planned
        3. enough are on their way                  bounded by their start-up deadline, past which 1 holds
        4. otherwise                                the floor is broken
    """
    broken = []
    for capability, least in sorted(facts.spec.floors.items()):
        if not below_floor(facts, capability):
            continue
        providers = [cases[name] for name in facts.providers(capability) if name in cases]
        troubled = [case.view.name for case in providers if case.view.name in wrong]
        ready = facts.ready(capability)
        note = f"capability {capability} has {ready} of {least} ready"
        if troubled:  # 1
            for name in troubled:
                wrong[name] = replace(wrong[name], severity="critical", message=f"{wrong[name].message}; {note}")
        elif any(case.covered for case in providers):  # 2
            continue
        elif ready + sum(_coming(facts, case) for case in providers) < least:  # 4
            broken.append(Finding("FloorBroken", capability, "critical", note))
    return tuple(broken)


def _coming(facts: Facts, case: Case) -> bool:
    """On its way to ready: moving, or waiting for something that passes without a person."""
    stuck = any(b.subject == Subject("endpoint", case.view.name) and not b.transient for b in facts.blocked)
    moving = case.view.state in ("starting", "stopping") or (case.view.state == "pending" and not stuck)
    return case.view.desired == "running" and moving


def _gpus(facts: Facts) -> tuple[Finding, ...]:
    known: dict[str, Gpu] = {gpu.uuid: gpu for gpu in facts.gpus or ()}
    lost = [gpu for gpu in known.values() if gpu.state == "lost"]
    findings = [
        Finding("GpuLost", g.uuid, "critical", f"GPU {g.index} ({g.name}) is lost: {g.detail or 'no detail'}")
        for g in lost
    ]
    for uuid, quarantine in sorted(facts.ledger.quarantines.items()):
        if uuid not in {gpu.uuid for gpu in lost}:  # the greater trouble speaks for both
            name = f"GPU {known[uuid].index}" if uuid in known else uuid
            findings.append(Finding("GpuQuarantined", uuid, "warning", f"{name} is not used: {quarantine.reason}"))
    return tuple(findings)


def _files(facts: Facts) -> tuple[Finding, ...]:
    """One finding per file, its first problem in words."""
    by_file: dict[str, list[str]] = {}
    for problem in sorted({*facts.problems, *facts.spec.problems}, key=lambda p: (p.file, p.line, p.column, p.message)):
        by_file.setdefault(problem.file, []).append(str(problem))
    return tuple(
        Finding("SpecRejected", file, "warning", texts[0] + (f" (and {len(texts) - 1} more)" if texts[1:] else ""))
        for file, texts in by_file.items()
    )


# ---------------------------------------------------------------- words


def _name(case: Case) -> str:
    return case.view.name


def _entry(case: Case) -> AgendaEntry:
    assert case.entry is not None  # noqa: S101 - asked only by rows that hold with an entry
    return case.entry


def _expected(case: Case) -> str:
    return ", ".join(_entry(case).expected_states)


def _because(case: Case) -> str:
    return f": {case.view.reason}" if case.view.reason else ""


def _unwanted(case: Case) -> bool:
    return case.view.desired in ("stopped", "standby")


def _waits_for(case: Case) -> str:
    """The code of what keeps it: the planner's reasons begin with it."""
    return case.view.reason.partition(":")[0]


def _crash(case: Case) -> str:
    assert case.crash is not None  # noqa: S101 - asked only by the row that holds with one
    if case.crash.ended_for is not None:
        return f"was ended because {case.crash.ended_for}"
    return f"ended by itself with {describe_exit(case.crash)}"
