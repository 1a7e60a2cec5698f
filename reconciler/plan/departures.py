"""How somebody leaves: how they want to be stopped, until when they are given time to finish, what is kept of them."""

from __future__ import annotations

from reconciler.clock import Instant
from reconciler.plan.draft import Draft
from reconciler.plan.observed import Incarnation, Subject
from reconciler.spec.spec import EndpointSpec, Logs, Spec, Stop, Workload


def stop_for(spec: Spec, subject: Subject, incarnation: Incarnation | None) -> Stop:
    """How a subject wants to be stopped, as its file says now; when that is gone, as it said when this was started."""
    found = _described(spec, subject)
    if found is not None:
        return found.stop
    return (incarnation.stop_settings if incarnation is not None else None) or Stop()


def kept_for(spec: Spec, subject: Subject) -> int:
    """How many past starts of a subject are kept, as its file says now; the default when its file is gone."""
    found = _described(spec, subject)
    return (found.logs if found is not None else Logs()).keep


def _described(spec: Spec, subject: Subject) -> EndpointSpec | Workload | None:
    """What the files say of it: of an endpoint the baseline's version, else that of the first overlay which has one."""
    if subject.kind == "workload":
        overlay = spec.overlays.get(subject.name)
        return overlay.workload if overlay is not None else None
    if subject.name in spec.endpoints:
        return spec.endpoints[subject.name]
    overlays = (overlay for _, overlay in sorted(spec.overlays.items()))
    return next((o.endpoints[subject.name] for o in overlays if subject.name in o.endpoints), None)


def draining(draft: Draft, incarnation: Incarnation, stop: Stop) -> Instant | None:
    """Until when this incarnation is given time to finish its requests; None when there is nothing to wait for.

    Draining is over when its time is up, when the engine reports no request in flight since the stop was asked for,
    or when it cannot report any (not ready, no metric): waiting for an answer that cannot come helps nobody. So it is
    when its engine hangs or sleeps: what is in flight cannot finish. One whose counter moves again does not hang.
    """
    if incarnation.subject.kind == "workload" or stop.drain_s <= 0:
        return None
    progress, probe = incarnation.stop, draft.situation.probe(incarnation)
    if progress is not None and (progress.drained or progress.signalled is not None):
        return None
    record = draft.records[incarnation.subject.name]
    known = draft.wanted.get(record.name) or draft.situation.spec.endpoints.get(record.name)
    asked = known.questions if known is not None else incarnation.questions
    if asked is None or not asked.busy_metrics or record.ready_incarnation != incarnation.id:
        return None
    if probe is not None and (probe.sleeping or probe.frozen_s >= asked.hung_s):
        return None
    since = progress.requested if progress else draft.now
    until = since.plus(stop.drain_s)
    if progress is not None:
        answered = probe is not None and probe.at.mono > progress.requested.mono
        if draft.now.mono >= until.mono or (answered and probe is not None and not probe.busy):
            return None
    return until
