"""How one endpoint stands: its state, and what its latest ends and answers add to its record."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from msgspec import Struct
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.plan.board import Hold, Tenant, endpoint_key
from reconciler.plan.exits import exit_words
from reconciler.plan.ledger import EndpointRecord, EndpointState, Exit
from reconciler.plan.naps import follow, serves
from reconciler.plan.observed import Incarnation, Subject
from reconciler.plan.overlays import memory_return_s
from reconciler.plan.situation import Situation
from reconciler.spec.spec import EndpointSpec, Health, Restart
from reconciler.units import counted, format_duration

KEPT_EXITS = 20
EVICTION_WINDOW_S = 3600.0
IN_THE_BACKGROUND = "its processes lived on: one that puts itself in the background has to stay in the foreground"
BOX_WENT_DOWN = "the box went down"
NO_JITTER_BELOW_S = 1.0
JITTER = 0.1
"""Part of a back-off by which it is spread, so that endpoints that died together do not return together."""


class Standing(Struct, frozen=True):
    """One endpoint as observed, before anything is decided about it."""

    name: str
    state: EndpointState
    reason: str
    current: Incarnation | None
    """The incarnation that counts: the living one (the oldest, should there be several), else None."""
    record: EndpointRecord
    must_restart: str | None
    """It runs, but not well enough to be left running: why."""
    wake: Instant | None
    """When this judgement changes by the passing of time alone."""


def stand(situation: Situation, name: str, endpoint: EndpointSpec | None) -> Standing:
    """Judge one endpoint.

    The state is the first that holds of:
        1. unknown    an incarnation whose identity could not be verified
        2. stopping   a stop is under way, or only strays of it are left
        3. sleeping   its engine says so, or is being told to sleep or to wake up
        4. healthy    it answers, or answered before and has not missed often enough yet
        5. starting   not ready yet, within its start-up deadline
        6. unhealthy  past that deadline, too many misses in a row, or its engine hangs
        7. failed     given up until the spec changes or `reset`
        8. stopped    nothing runs; whether that is `pending` is decided by who wants it
    """
    living = situation.living(Subject("endpoint", name))
    current = living[0] if living else None
    health = endpoint.health if endpoint else Health()
    record = _absorb_exits(situation, situation.record(name), endpoint)
    if current is not None:
        record = _absorb_answer(situation, record, current, endpoint.restart if endpoint else Restart())
    record = follow(situation, record, current, endpoint)
    state, reason, must_restart, wake = _judge(situation, record, current, health)
    if state == "unhealthy":
        record = replace(record, unhealthy_since=record.unhealthy_since or situation.now)
    elif state in ("healthy", "sleeping"):
        record = replace(record, unhealthy_since=None, ending=None)
    if state == "unhealthy" and must_restart is None and record.unhealthy_since is not None:
        due = record.unhealthy_since.plus(health.unhealthy_for_s)
        if situation.now.mono >= due.mono:
            must_restart = f"unhealthy for {health.unhealthy_for_s:g} s: {reason}"
        else:
            wake = due
    return Standing(name, state, reason, current, record, must_restart, wake)


def _judge(
    situation: Situation, record: EndpointRecord, current: Incarnation | None, health: Health
) -> tuple[EndpointState, str, str | None, Instant | None]:
    if current is None:
        return ("failed", record.failed, None, None) if record.failed else ("stopped", "", None, None)
    if current.phase == "unknown" or current.strays is None:
        return "unknown", "its process could not be verified", None, None  # 1
    if current.undying_since is not None:
        return "stopping", "it was killed and does not end: the kernel waits for something", None, None  # 2
    if current.stop is not None:
        return "stopping", "", None, None  # 2
    if current.phase in ("exited", "vanished"):
        return "stopping", "its leader is gone; processes it left behind still run", None, None  # 2
    probe = situation.probe(current)
    if not serves(record.nap, probe) and (probe is None or probe.misses < health.failures):
        return "sleeping", "", None, None  # 3
    if record.ready_incarnation == current.id:
        if probe is not None and probe.frozen_s >= health.hung_s:
            message = f"Hung: requests run and no token was made for {probe.frozen_s:.0f} s, though it answers"
            return "unhealthy", message, None, None  # 6
        if probe is None or probe.misses < health.failures:
            return "healthy", "", None, None  # 4
        return "unhealthy", probe.detail, None, None  # 6
    deadline = current.started.plus(health.startup_s)
    if situation.now.mono < deadline.mono:
        return "starting", probe.detail if probe else "", None, deadline  # 5
    return "unhealthy", "not ready", f"not ready within {health.startup_s:g} s", None  # 6


def as_tenant(
    situation: Situation, incarnation: Incarnation, endpoint: EndpointSpec, *, ready: bool, calm: bool = False
) -> Tenant:
    """One that runs, with what it holds and what it costs that it leaves: only one that is ready loses readiness."""
    times = situation.timings(endpoint)
    lost_s = (times.load_s + times.drain_s + times.stop_s) * (len(endpoint.capabilities) or 1) if ready else 0.0
    departure_s = situation.leaving_s(endpoint, times) + memory_return_s(times)
    return Tenant(
        endpoint_key(endpoint.name),
        endpoint.priority,
        holds_of(incarnation),
        round(lost_s * 1000),
        round(departure_s * 1000),
        endpoint.capabilities,
        0,
        endpoint.preemptible if calm else None,
    )


def holds_of(incarnation: Incarnation) -> dict[str, Hold]:
    """What an incarnation holds of each of its GPUs."""
    gpus, sizes, exclusive = incarnation.gpus, incarnation.memory_bytes, incarnation.exclusive
    if len(gpus) == len(sizes) == 1:  # as most often
        return {gpus[0]: _hold(sizes[0], exclusive)}
    return {gpu: _hold(size, exclusive) for gpu, size in zip(gpus, sizes, strict=True)}


@lru_cache(maxsize=1024)  # many hold the same
def _hold(memory_bytes: int, exclusive: bool) -> Hold:  # noqa: FBT001 - the fields of a Hold
    return Hold(memory_bytes, exclusive)


def _absorb_answer(
    situation: Situation, record: EndpointRecord, current: Incarnation, restart: Restart
) -> EndpointRecord:
    """Remember the first readiness of this incarnation, and forgive the past once it lasted.

    Where an overlay's version of it runs is not its place: that is where it ran as the baseline describes it.
    """
    base = situation.spec.endpoints.get(record.name)
    as_described = base is None or base.process_hash == current.process_hash or not record.last_gpus
    probe = situation.probe(current)
    portless = current.port is None and current.phase == "running"
    if record.ready_incarnation != current.id and (portless or (probe is not None and probe.ready)):
        record = replace(
            record,
            ready_incarnation=current.id,
            ready_since=situation.now,
            last_gpus=current.gpus if as_described else record.last_gpus,
        )
    calm = record.ready_incarnation == current.id and record.ready_since is not None and record.unhealthy_since is None
    if record.streak and calm and situation.now.since(record.ready_since or situation.now) >= restart.reset_after_s:
        record = replace(record, streak=0)
    return record


def _absorb_exits(situation: Situation, record: EndpointRecord, endpoint: EndpointSpec | None) -> EndpointRecord:
    """Count every end not counted before, once; forget a failure that an edit or a calm time has outdated."""
    restart = endpoint.restart if endpoint else Restart()
    known = {e.incarnation for e in record.exits}
    for ended in situation.incarnations(Subject("endpoint", record.name)):
        if ended.phase not in ("exited", "vanished") or ended.id in known:
            continue
        at = ended.exited or situation.now
        calm = record.ready_incarnation == ended.id and (
            record.ready_since is not None and at.since(record.ready_since) >= restart.reset_after_s
        )
        fell = fell_with_the_box(ended)
        planned = fell or (ended.stop is not None and record.unhealthy_since is None)
        streak = record.streak if planned else (1 if calm else record.streak + 1)
        ended_for = BOX_WENT_DOWN if fell else (record.ending if ended.stop is not None else None)
        failure = ended.failure
        if failure is None and ended.exit_code == 0 and ended.strays and record.ready_incarnation != ended.id:
            failure = IN_THE_BACKGROUND
        end = Exit(ended.id, at, ended.exit_code, planned, None if planned else failure, ended_for)
        record = replace(record, exits=(*record.exits, end)[-KEPT_EXITS:], streak=streak)
        record = replace(record, ready_since=None, unhealthy_since=None, ending=None)
        recent = [e for e in record.exits if not e.planned and at.since(e.at) <= restart.window_s]
        if not planned and len(recent) > restart.max_restarts:
            ends = counted(len(recent), "end")
            record = replace(
                record,
                failed=f"{ends} within {restart.window_s:g} s; the last with {describe_exit(end)}",
                failed_hash=endpoint.process_hash if endpoint else None,
            )
    if record.failed and endpoint is not None and endpoint.process_hash != record.failed_hash:
        record = forgiven(record)
    recent_evictions = tuple(t for t in record.evictions if situation.now.wall - t < EVICTION_WINDOW_S)
    return replace(record, evictions=recent_evictions) if recent_evictions != record.evictions else record


def fell_with_the_box(ended: Incarnation) -> bool:
    """Whether it ended as the box went down, or before that by itself and unseen: which of the two, nobody can tell.

    It did not fail, for all that is known. One that had been asked to stop ended as it was to.
    """
    return ended.bygone and ended.stop is None


def forgiven(record: EndpointRecord) -> EndpointRecord:
    """The record with its failures forgotten; its ends are kept, so that none is counted again."""
    ends = tuple(replace(end, planned=True, ended_for=None) for end in record.exits)
    return replace(record, failed=None, failed_hash=None, streak=0, exits=ends)


def describe_exit(end: Exit) -> str:
    """An exit in words, with why it was ended, or what the log said of it."""
    said = f"ended because {end.ended_for}" if end.ended_for else end.failure
    return exit_words(end.exit_code, said, asked_for=end.planned)


def earliest_restart(record: EndpointRecord, restart: Restart) -> Instant | None:
    """When an endpoint that ended by itself may be started again; None: at once.

    The first restart is immediate; while failures repeat the wait doubles from `initial` to `max`, spread by
    a jitter that depends on the ended incarnation alone, so that the same input gives the same plan.
    """
    unplanned = [e for e in record.exits if not e.planned]
    if record.streak < 2 or not unplanned:
        return None
    last = unplanned[-1]
    delay = min(restart.max_s, restart.initial_s * 2.0 ** min(record.streak - 2, 30))
    spread = int.from_bytes(hashlib.sha256(last.incarnation.encode()).digest()[:4]) / 2**32
    return last.at.plus(delay * (1.0 + JITTER * (2 * spread - 1)))


def cooling_down(
    record: EndpointRecord, now: Instant, *, max_evictions_per_hour: int, min_ready_s: float
) -> str | None:
    """What is true of this endpoint that must not be evicted right now: it was too often, or too lately; else None."""
    recent = sum(now.wall - moment < EVICTION_WINDOW_S for moment in record.evictions)
    if recent >= max_evictions_per_hour:
        return f"was evicted {counted(recent, 'time')} within the hour (at most {max_evictions_per_hour})"
    if record.evictions and record.evicted_by is None:
        ready_for = now.since(record.ready_since) if record.ready_since else 0.0
        if ready_for < min_ready_s:
            return f"has been ready for less than {format_duration(min_ready_s)} since it was last evicted"
    return None


def cool_again(
    record: EndpointRecord, now: Instant, *, max_evictions_per_hour: int, min_ready_s: float
) -> Instant | None:
    """When the passing of time alone lets this endpoint be evicted again; None if it cannot tell, or may be now."""
    ends: list[Instant] = []
    if len(record.evictions) >= max_evictions_per_hour:
        free_again = sorted(record.evictions)[len(record.evictions) - max_evictions_per_hour]
        ends.append(now.plus(free_again + EVICTION_WINDOW_S - now.wall))
    if record.evictions and record.evicted_by is None and record.ready_since is not None:
        ends.append(record.ready_since.plus(min_ready_s))
    return max((end for end in ends if end.mono > now.mono), key=lambda end: end.mono, default=None)
