"""The life of one overlay: which state the observed facts and the time put it in. Admission is not decided here."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal
from zoneinfo import ZoneInfo

from msgspec import Struct
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.plan.exits import exit_words
from reconciler.plan.ledger import LIVE, TERMINAL, OverlayRecord, OverlayState, Timings
from reconciler.plan.observed import Incarnation, Subject
from reconciler.plan.situation import Situation
from reconciler.spec.spec import Makespan, OverlaySpec

MEMORY_TIMEOUT_S = 60.0
"""Memory usually comes back within 1.5 s of the last process's end; what is still held after a minute is not coming."""
MEMORY_RETURN_S = 1.5
"""Predicted: memory usually comes back tens of ms to 1.5 s after the process is gone."""
MOST_UNSTARTED = 3
"""Starts of one run's work that may come to nothing: somebody is killed now and then, more is a box that cannot."""
WORKLOAD_STOP_S = 1.0
"""Predicted: work ends soon after its signal."""
RECORD_KEPT_S = 86400.0
"""How long the outcome of an overlay stays in view after its file is gone."""


def memory_return_s(times: Timings) -> float:
    """Predicted seconds from the end of an endpoint until its memory is seen free: learnt, else as it usually is."""
    return MEMORY_RETURN_S if times.memory_s is None else times.memory_s


class OverlayStep(Struct, frozen=True):
    """One overlay after the facts were taken in."""

    record: OverlayRecord
    spec: OverlaySpec | None
    """None: its file is gone."""
    workload: Incarnation | None
    """The incarnation of the present attempt: living, or ended and not yet archived."""
    wake: Instant | None

    @property
    def live(self) -> bool:
        """It holds leases or waits for its victims' return."""
        return self.record.state in LIVE

    @property
    def stop_workload(self) -> str | None:
        """Why what still runs of its work must end; None while it may run."""
        if self.record.state in ("completing", "restoring", *TERMINAL):
            return self.record.reason or "its overlay is over"
        return None


def next_window(makespan: Makespan, after: float) -> float:
    """Epoch seconds of the next start later than `after`; `after` itself where nothing says when."""
    if makespan.schedule is not None:
        return _next_of_schedule(makespan.schedule, makespan.timezone or "UTC", after)
    return makespan.start if makespan.start is not None else after


def _still_due(makespan: Makespan, now: float) -> float:
    """The last start of a schedule that its `starting_deadline` still allows at `now`, else the next; epoch seconds."""
    start = next_window(makespan, now - makespan.starting_deadline_s)
    while (following := next_window(makespan, start)) <= now:
        start = following
    return start


@lru_cache(maxsize=1024)  # windows to come are looked at anew by every decision
def _next_of_schedule(schedule: str, timezone: str, after: float) -> float:
    from cronsim import CronSim

    local = datetime.fromtimestamp(after, ZoneInfo(timezone))
    return next(CronSim(schedule, local)).astimezone(UTC).timestamp()


def predicted_end(record: OverlayRecord, makespan: Makespan, now: float, usual_s: float | None = None) -> float:
    """Epoch seconds at which the overlay is expected to end; never in the past.

    With `usual_s`, what its work usually takes: as usual, until that is past or its duration comes first. What is told
    is told so; what is decided, and what the agenda allows, goes by the duration that its file declares.
    """
    start = record.active_since.wall if record.active_since else max(now, record.window_start)
    if makespan.duration_s is not None:
        end = start + makespan.duration_s
        if usual_s is not None and start + usual_s > now:
            end = min(end, start + usual_s)
        return max(now, min(end, makespan.deadline) if makespan.deadline is not None else end)
    return max(now, makespan.deadline or now)


def enter(record: OverlayRecord, state: OverlayState, now: Instant, reason: str = "") -> OverlayRecord:
    """The record in its next state."""
    return replace(record, state=state, since=now, reason=reason)


def finish(
    record: OverlayRecord, outcome: Literal["done", "failed", "cancelled", "expired"] | None, now: Instant, reason: str
) -> OverlayRecord:
    """Begin the way back: workload gone, memory free, leases released, baseline restored. Outcome None: run again."""
    return replace(enter(record, "completing", now, reason), outcome=outcome)


def open_record(spec: OverlaySpec, now: Instant) -> OverlayRecord:
    """The first record of an overlay just seen, or of its next run."""
    return OverlayRecord(
        name=spec.name,
        state="pending",
        since=now,
        window_start=next_window(spec.makespan, now.wall),
        placement_hash=spec.placement_hash,
        priority=spec.priority,
        source=spec.source,
        seen=now,
    )


def advance(situation: Situation, name: str) -> OverlayStep | None:
    """Take in what happened to one overlay since the last tick; None: nothing is known of it any more."""
    spec = situation.spec.overlays.get(name)
    record = situation.ledger.overlays.get(name)
    now = situation.now
    runs = situation.incarnations(Subject("workload", name))
    workload = runs[-1] if runs else None
    withdrawn = name in situation.spec.withdrawn
    was_over = record is not None and (record.state in TERMINAL or record.outcome is not None)
    if record is None:
        if spec is None:
            return None
        record = open_record(spec, now) if workload is None else _adopted(spec, workload, now)
    elif spec is None and not withdrawn and record.state in TERMINAL and now.since(record.since) > RECORD_KEPT_S:
        return None
    elif spec is not None and record.state in TERMINAL and _asks_again(record, spec, now):
        seen = record.seen if spec.makespan.schedule is not None else None
        fresh = replace(open_record(spec, now), last_run=record.spans, seen=seen or now)
        if record.state == "expired" and spec.makespan.schedule is not None:
            fresh = replace(fresh, window_start=_still_due(spec.makespan, now.wall))
        record = fresh
    if spec is not None:
        record = replace(record, priority=spec.priority, source=spec.source)
    if spec is not None or name not in situation.rejected:
        record = _withdrawn(record, spec, now, "everything is to be stopped" if withdrawn else "its file was removed")
    if spec is None and name not in situation.rejected and not (withdrawn and was_over):
        record = replace(record, placement_hash="")  # a file that comes again under this name asks for a new run
    if spec is not None:
        record = _timed(record, spec, now, jumped=situation.observed.clock_jumped)
        record = _ran(record, spec, workload, situation)
    return OverlayStep(record, spec, workload, _wake(record, spec, now))


def _adopted(spec: OverlaySpec, workload: Incarnation, now: Instant) -> OverlayRecord:
    """The record of an overlay whose workload exists though no record does: the journal was lost, the work was not.

    Its leases are made anew from what the workload was given (`Draft.of`); it is not started a second time, and an edit
    since then, which nobody remembers either, does not end it.
    """
    record = replace(
        open_record(spec, now),
        window_start=workload.started.wall,
        gpus=workload.gpus,
        attempt=workload.attempt,
        active_since=workload.started,
    )
    return enter(record, "active", now, "adopted: its workload runs, and no record of it was left")


def _asks_again(record: OverlayRecord, spec: OverlaySpec, now: Instant) -> bool:
    """A finished overlay runs again when its file asks for other work, another start, or has a schedule."""
    if spec.makespan.schedule is not None:
        return True
    start = spec.makespan.start
    moved = start is not None and start != record.window_start and start > now.wall
    return spec.placement_hash != record.placement_hash or moved


def _withdrawn(record: OverlayRecord, spec: OverlaySpec | None, now: Instant, why: str) -> OverlayRecord:
    """The file is gone (or counts as that, which `why` says), or was replaced by other work."""
    if spec is None and record.state == "completing" and record.outcome is None:  # it was to run again
        return replace(record, outcome="cancelled", reason=why)
    if record.state in TERMINAL or record.state in ("completing", "restoring"):
        return record
    if spec is None:
        if record.state == "pending":
            return enter(record, "cancelled", now, f"{why} before it began")
        return finish(record, "cancelled", now, why)
    if record.placement_hash == spec.placement_hash:
        return record
    if record.state == "pending":
        return replace(open_record(spec, now), since=record.since, seen=record.seen)
    return finish(record, None, now, "its file was replaced by other work (on_edit: replace)")


def _timed(record: OverlayRecord, spec: OverlaySpec, now: Instant, *, jumped: bool) -> OverlayRecord:
    """What the time alone brings about. A jump of the wall clock is confirmed by one more look first."""
    makespan = spec.makespan
    past_deadline = makespan.deadline is not None and now.wall >= makespan.deadline and not jumped
    if record.state == "pending":
        if makespan.schedule is None and makespan.start is not None:
            record = replace(record, window_start=makespan.start)
        late = now.wall - record.window_start
        if past_deadline:
            return enter(record, "expired", now, "its deadline passed before it could begin")
        if makespan.schedule is not None and late > makespan.starting_deadline_s and not jumped:
            reason = f"could not begin within {makespan.starting_deadline_s:g} s of its window"
            return enter(record, "expired", now, reason)
        return record
    if record.state not in ("admitted", "evicting", "starting", "active", "overrun"):
        return record
    if past_deadline:
        done = spec.workload is None and record.active_since is not None
        return finish(record, "done" if done else "failed", now, "" if done else "its deadline passed")
    if record.active_since is None or makespan.duration_s is None:
        return record
    elapsed = now.since(record.active_since)
    if spec.workload is None:
        return finish(record, "done", now, "") if elapsed >= makespan.duration_s else record
    if elapsed < makespan.duration_s + makespan.grace_s:
        return enter(record, "active", now) if record.state == "overrun" else record
    if makespan.on_overrun == "stop":
        return finish(record, "failed", now, "it overran its makespan (on_overrun: stop)")
    if record.state == "overrun":
        return record
    return enter(record, "overrun", now, "past its duration and grace; the work that began completes")


def _ran(record: OverlayRecord, spec: OverlaySpec, workload: Incarnation | None, situation: Situation) -> OverlayRecord:
    """What the workload's process did."""
    now = situation.now
    begun = record.state in ("starting", "active", "overrun")
    if spec.workload is None or workload is None or not begun or workload.attempt != record.attempt:
        return record
    if workload.phase == "running" and record.active_since is None:
        return replace(enter(record, "active", now), active_since=workload.started)
    if workload.phase not in ("exited", "vanished") or workload.strays is None:
        return record
    if workload.phase == "vanished" and workload.pid is None and record.unstarted < MOST_UNSTARTED:
        again = replace(record, attempt=record.attempt + 1, unstarted=record.unstarted + 1, active_since=None)
        return enter(again, "starting", now, "its start was cut short before anything ran; it is made again")
    # Its leader ended. What it left running belongs to the job and is ended with it, in `completing`.
    record = replace(record, exit_code=workload.exit_code, active_since=record.active_since or workload.started)
    if workload.exit_code == 0:
        return finish(record, "done", now, "")
    how = exit_words(workload.exit_code, workload.failure)
    if record.failures < spec.workload.retries:
        again = replace(record, attempt=record.attempt + 1, active_since=None, exit_code=None)
        return enter(again, "starting", now, f"attempt {record.failures + 1} failed ({how})")
    return finish(record, "failed", now, f"the workload failed: {how}")


def _wake(record: OverlayRecord, spec: OverlaySpec | None, now: Instant) -> Instant | None:
    """When the time alone changes this overlay's state next."""
    if spec is None or record.state in TERMINAL:
        return None
    makespan, since = spec.makespan, record.since
    wakes: list[Instant] = []

    def at_wall(wall: float) -> None:
        wakes.append(since.plus(wall - since.wall))

    if record.state == "pending":
        at_wall(record.window_start)
        if makespan.schedule is not None:
            at_wall(record.window_start + makespan.starting_deadline_s)
    if makespan.deadline is not None:
        at_wall(makespan.deadline)
    if record.active_since is not None and makespan.duration_s is not None and record.state in ("active", "overrun"):
        grace = makespan.grace_s if spec.workload is not None else 0.0
        wakes.append(record.active_since.plus(makespan.duration_s + grace))
    return min((w for w in wakes if w.mono > now.mono), key=lambda w: w.mono, default=None)
