"""Predictions from the journal's own history: how long endpoints took to load, drain and stop, and work to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reconciler.journal.timings import Measure, p95
from reconciler.plan.ledger import Ledger, Timings
from reconciler.plan.observed import Observed
from reconciler.spec.spec import Spec

if TYPE_CHECKING:
    from reconciler.journal.journal import Journal  # the writer's part, which a command that reads does without


@dataclass(slots=True)
class _Learnt:
    load_s: float | None = None
    drain_s: float | None = None
    stop_s: float | None = None


def predicted(measured: Mapping[tuple[str, Measure], Sequence[float]], spec: Spec) -> Mapping[str, Timings]:
    """p95 of what was measured, per endpoint that was measured at all; the engine's defaults for the rest of it.

    Args:
        measured: seconds by (endpoint, measure), as the journal has them
        spec: bounds what was not measured, and how long a drain may take now
    """
    learnt: dict[str, _Learnt] = {}
    for (subject, what), seconds in measured.items():
        entry = learnt.setdefault(subject, _Learnt())
        match what:
            case "load":
                entry.load_s = p95(seconds)
            case "drain":
                entry.drain_s = p95(seconds)
            case "stop":
                entry.stop_s = p95(seconds)
            case _:
                continue
    answer: dict[str, Timings] = {}
    for name, entry in sorted(learnt.items()):
        endpoint = spec.endpoints.get(name)
        if endpoint is None:
            continue
        default = endpoint.profile
        answer[name] = Timings(
            load_s=min(default.load_s, endpoint.health.startup_s) if entry.load_s is None else entry.load_s,
            drain_s=min(default.drain_s if entry.drain_s is None else entry.drain_s, endpoint.stop.drain_s),
            stop_s=min(default.stop_s, endpoint.stop.grace_s) if entry.stop_s is None else entry.stop_s,
        )
    return answer


def usual_runs(measured: Mapping[tuple[str, Measure], Sequence[float]]) -> Mapping[str, float]:
    """Seconds that the work of each overlay usually takes: p95 of its runs that went well."""
    found = {subject: p95(seconds) for (subject, what), seconds in sorted(measured.items()) if what == "run"}
    return {subject: seconds for subject, seconds in found.items() if seconds is not None}


def learn(ledger: Ledger, measured: Mapping[tuple[str, Measure], Sequence[float]], spec: Spec) -> Ledger:
    """The ledger with what `measured` teaches."""
    return replace(ledger, timings=predicted(measured, spec), runs=usual_runs(measured))


def record_durations(journal: Journal, before: Ledger, after: Ledger, observed: Observed) -> None:
    """Measure what this decision saw come to its end: a load, a stop, or work that went well."""
    incarnations = {i.id: i for i in observed.incarnations}
    for name, record in after.endpoints.items():
        old = before.endpoints.get(name)
        ready = record.ready_incarnation
        if ready is not None and record.ready_since is not None and (old is None or old.ready_incarnation != ready):
            started = incarnations[ready].started if ready in incarnations else None
            if started is not None:
                journal.record_timing(name, "load", record.ready_since.since(started))
        counted = {e.incarnation for e in old.exits} if old else set()
        for end in record.exits:
            ended = incarnations.get(end.incarnation)
            if end.incarnation in counted or ended is None or ended.stop is None or ended.stop.signalled is None:
                continue
            journal.record_timing(name, "drain", ended.stop.signalled.since(ended.stop.requested))
            journal.record_timing(name, "stop", max(0.0, end.at.since(ended.stop.signalled)))
    for name, overlay in after.overlays.items():
        was = before.overlays.get(name)
        if overlay.outcome != "done" or overlay.exit_code != 0 or was is None or was.outcome == "done":
            continue
        ran = next((span.actual_s for span in reversed(overlay.spans) if span.part == "run"), None)
        if ran is not None:
            journal.record_timing(name, "run", ran)
