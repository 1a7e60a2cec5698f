"""Predicted against actual: how long the parts of an overlay's run were to take, and took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.plan.actions import Action, Blocked
from reconciler.plan.ledger import OverlayRecord, OverlayState, Span
from reconciler.plan.observed import Subject
from reconciler.plan.overlays import OverlayStep

PARTS: Mapping[OverlayState, Literal["wait", "evict", "run", "restore"]] = {
    "pending": "wait", "admitted": "wait", "evicting": "evict", "starting": "evict",
    "active": "run", "overrun": "run", "completing": "restore", "restoring": "restore",
}  # fmt: skip


def account(
    step: OverlayStep, actions: Iterable[Action], blocked: Mapping[Subject, Blocked], now: Instant
) -> OverlayRecord:
    """The record with its parts brought up to this decision.

    A part is predicted once, by the plan of the decision that begins it; a wait as soon as anything tells its end. Work
    begins and ends with its process, the other parts with the decisions that saw them begin and end.
    """
    record, spans = step.record, step.record.spans
    part = PARTS.get(record.state)
    if record.failures and part == "evict":
        part = "run"  # another attempt at the same work
    last = spans[-1] if spans else None
    if part is not None and last is not None and last.part == part and last.actual_s is None:
        if part != "wait" or last.predicted_s is not None:
            return record
        end = _end("wait", step, actions, blocked)
        predicted = None if end is None else max(0.0, end - last.began.wall)
        return (
            record if predicted is None else replace(record, spans=(*spans[:-1], replace(last, predicted_s=predicted)))
        )
    turn = _turn(step, part, last, now)
    if last is not None and last.actual_s is None:
        spans = (*spans[:-1], replace(last, actual_s=max(0.0, turn.since(last.began))))
    if part is not None:
        end = _end(part, step, actions, blocked)
        spans = (*spans, Span(part, turn, None if end is None else max(0.0, end - turn.wall)))
    return record if spans == record.spans else replace(record, spans=spans)


def _turn(step: OverlayStep, part: str | None, last: Span | None, now: Instant) -> Instant:
    """When the part before ended and this one began."""
    if part == "run" and step.record.active_since is not None:
        return step.record.active_since
    if last is not None and last.part == "run" and step.workload is not None and step.workload.exited is not None:
        return step.workload.exited
    return now


def _end(part: str, step: OverlayStep, actions: Iterable[Action], blocked: Mapping[Subject, Blocked]) -> float | None:
    """Epoch seconds at which a part is predicted to be over; None: nothing tells."""
    subject = Subject("workload", step.record.name)
    if part == "wait":
        return blocked[subject].earliest_start if subject in blocked else None
    if part == "restore":
        back = [
            a.expected[1] for a in actions if a.subject.kind == "endpoint" and a.subject.name in step.record.evicted
        ]
        return max(back, default=None)
    holds = next((a for a in actions if a.op == "wait_end" and a.subject == subject), None)
    return None if holds is None else holds.expected[0 if part == "evict" else 1]
