"""Giving way by sleeping: who may, at which level, how far it has come, and when it wakes up again.

An endpoint that sleeps keeps its process, its port and a residue of GPU memory, and at level 1 its weights in host
memory. Every step is in its record before it is taken; a step that fails makes the sleep a stop, and the waking a
restart. What happens in which order is the graph's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.plan.actions import Action, Event
from reconciler.plan.board import Hold, Need, Tenant, endpoint_key
from reconciler.plan.ledger import EndpointRecord, Ledger, Nap
from reconciler.plan.observed import Incarnation, Probe
from reconciler.plan.overlays import MEMORY_TIMEOUT_S, predicted_end
from reconciler.plan.placement import place
from reconciler.plan.situation import Situation
from reconciler.spec.spec import EndpointSpec
from reconciler.units import format_duration, format_size

if TYPE_CHECKING:
    from reconciler.plan.draft import Draft, Leaving

LONGEST_PARKED_S = 2 * 3600.0
"""Weights are parked in host memory for makespans up to this: beyond it the half minute that level 1 saves over level 2
is less than half a percent of the time that the memory would be held."""
LOOK_AGAIN_S = 0.25
ANSWER_S = 30.0
"""How long after the engine's word its own `is it asleep` may take to say so."""


def says_asleep(nap: Nap | None, probe: Probe | None) -> bool:
    """Whether it sleeps, by its own word; an engine that cannot be asked is believed what its call answered."""
    if probe is not None and probe.sleeping is not None:
        return probe.sleeping
    return nap is not None and nap.slept is not None and nap.woken is None


def told_since(probe: Probe | None, moment: Instant) -> bool:
    """Whether what it last said of its sleep was asked at `moment` or later; of one that never says: any question."""
    return probe is not None and (probe.sleeping_at or probe.at).mono >= moment.mono


def serves(nap: Nap | None, probe: Probe | None) -> bool:
    """Whether requests are answered: not from the moment it is told to sleep until it is seen awake again."""
    told = nap is not None and nap.begun is not None and nap.failed is None
    return not told and not says_asleep(nap, probe)


def held_bytes(situation: Situation, incarnation: Incarnation, uuid: str) -> int | None:
    """The most that an incarnation can hold on one GPU, as NVML shows it; None: the GPU cannot be read.

    What NVML names its processes for, if it names a size; else everything on the GPU that nobody else is named for.
    """
    gpu = situation.gpus.get(uuid)
    if gpu is None or gpu.used_bytes is None or gpu.state != "ok":
        return None
    mine = [p.memory_bytes for p in gpu.processes or () if p.owner == incarnation.subject]
    sizes = [size for size in mine if size is not None]
    if mine and len(sizes) == len(mine):
        return sum(sizes)
    others = sum(p.memory_bytes or 0 for p in gpu.processes or () if p.owner != incarnation.subject)
    return max(0, gpu.used_bytes - others)


def rested(situation: Situation, endpoint: EndpointSpec, incarnation: Incarnation, nap: Nap) -> bool:
    """Whether it is asleep by its own word, and by NVML on every GPU it had, both seen after it was told to."""
    probe = situation.probe(incarnation)
    if nap.slept is None or nap.waking is not None or not says_asleep(nap, probe):
        return False
    if endpoint.profile.sleep_check and not told_since(probe, nap.slept):
        return False
    for uuid in incarnation.gpus:
        held, gpu = held_bytes(situation, incarnation, uuid), situation.gpus.get(uuid)
        if held is None or gpu is None or gpu.at.mono < nap.slept.mono:
            return False
        if held > endpoint.profile.residual_bytes:
            return False
    return True


# ---------------------------------------------------------------- how far it has come


def follow(
    situation: Situation, record: EndpointRecord, current: Incarnation | None, endpoint: EndpointSpec | None
) -> EndpointRecord:
    """The record after one more look.

    The first that holds:
        1. its incarnation is gone                               → there is no nap any more
        2. it failed before                                      → that stays
        3. it was woken, and answers and says so                 → over; ready since now
        4. it was told to sleep or to wake, and says otherwise   → failed
        5. it sleeps, and its memory has not come back in time   → failed
        6. it sleeps, and nobody here told it to                 → taken for a nap: it is woken when it is wanted
    """
    nap = record.nap
    if current is None or endpoint is None or (nap is not None and nap.incarnation != current.id):
        return replace(record, nap=None)  # 1
    probe, now = situation.probe(current), situation.now
    if nap is None:
        if probe is not None and probe.sleeping and endpoint.profile.sleeps:
            found = Nap(current.id, endpoint.evict.level, now, begun=now, slept=probe.at)  # 6
            return replace(record, nap=found)
        return record
    if nap.failed is not None:  # 2
        return record
    if nap.woken is not None:
        if told_since(probe, nap.woken) and probe is not None and probe.ready and not probe.sleeping:
            return replace(record, nap=None, ready_since=now)  # 3
        if now.mono >= nap.woken.plus(ANSWER_S).mono:
            return replace(record, nap=replace(nap, failed="it was woken up and is not ready"))  # 4
    elif nap.slept is not None and nap.waking is None:
        if told_since(probe, nap.slept) and probe is not None and probe.sleeping is False:
            return replace(record, nap=replace(nap, failed="it was told to sleep and is awake"))  # 4
        late = now.mono >= nap.slept.plus(MEMORY_TIMEOUT_S).mono and situation.sees(current.gpus)
        if late and not rested(situation, endpoint, current, nap):
            return replace(record, nap=replace(nap, failed="it sleeps and its memory did not come back"))  # 5
    return record


def begin(draft: Draft, actions: Iterable[Action]) -> None:
    """Note the calls that this decision gives out: one that may be under way blocks its GPUs until it is over."""
    for nap in draft.naps.values():
        if nap.woken is not None:
            draft.wakes.append(
                draft.now.plus(LOOK_AGAIN_S)
            )  # who was seen awake before its call returned tells no news
        elif nap.slept is not None and nap.waking is None:
            draft.wakes.append(nap.slept.plus(MEMORY_TIMEOUT_S))
    for action in actions:
        told = draft.naps.get(action.subject.name) if action.subject.kind == "endpoint" else None
        if told is None or not action.ready or action.incarnation != told.incarnation:
            continue
        if action.op == "sleep" and told.begun is None:
            draft.naps[action.subject.name] = replace(told, begun=draft.now)
        elif action.op == "wake" and told.waking is None:
            draft.naps[action.subject.name] = replace(told, waking=draft.now)


def called(ledger: Ledger, action: Action, problem: str | None, now: Instant) -> tuple[Ledger, tuple[Event, ...]]:
    """The ledger after an engine was told to sleep or to wake up: it said that it has, or it failed."""
    record = ledger.endpoints.get(action.subject.name)
    nap = record.nap if record is not None else None
    if record is None or nap is None or nap.incarnation != action.incarnation:
        return ledger, ()
    if problem is not None:
        after, kind = replace(nap, failed=f"it could not {action.op}: {problem}"), "failed"
    elif action.op == "sleep":
        after, kind = replace(nap, slept=now), "slept"
    else:
        after, kind = replace(nap, woken=now), "woken"
    endpoints = {**ledger.endpoints, record.name: replace(record, nap=after)}
    message = after.failed or f"its engine answered {action.op} at level {nap.level}"
    return replace(ledger, endpoints=endpoints), (Event(f"nap.{kind}", record.name, message, str(action.cause)),)


# ---------------------------------------------------------------- who sleeps


def asleep_for(holders: Iterable[str], nap: Nap) -> str:
    """Whom one that sleeps gives way to, and why it sleeps as it does, in words."""
    why = f" ({nap.why})" if nap.why else ""
    return f"gives way to {', '.join(holders)}, asleep at level {nap.level}{why}"


def lie_down(draft: Draft, endpoint: EndpointSpec, current: Incarnation, leaving: Leaving | None) -> str | None:
    """Keep a nap that is under way, and begin one for an endpoint that has to give way and may.

    None: it sleeps, or is about to; else why it does not, in words, empty where nobody asked for it.

    1. it failed, or the files want another process → no nap: it stops
    2. it has to leave for another reason than giving way → no nap
    3. told to sleep and asleep or not yet, and it has to give way no more → the nap stays until `rise`
    4. it waits to be told, and has to give way no more → no nap, nothing was done to it
    5. it has to give way while it wakes up, or broke before it was told to sleep → no nap: it stops
    6. it has to give way, and what is leased beside it fits with its residue → the nap goes on, or begins
    7. otherwise it stops
    """
    record, situation = draft.records[endpoint.name], draft.situation
    nap = record.nap
    failed = nap.failed if nap is not None else (record.ending if current.stop is not None else None)
    if failed is not None:
        return f"it stops: {failed}" if leaving is not None and leaving.cause.kind == "evict" else ""  # 1
    if current.process_hash != endpoint.process_hash or (leaving is not None and leaving.cause.kind != "evict"):
        return ""  # 1, 2
    if leaving is None:
        if nap is None or nap.begun is None:
            return ""  # 4
        draft.naps[endpoint.name] = nap  # 3
    else:
        if nap is not None and nap.waking is not None:
            return "it stops: it is waking up"  # 5
        if nap is not None and nap.begun is None and draft.standings[endpoint.name].state == "unhealthy":
            return f"it stops: {draft.standings[endpoint.name].reason}"  # 5
        if nap is None:
            level, why = _way(draft, endpoint, current)
            nap = Nap(current.id, level, situation.now, why=why) if level is not None else None
            if nap is None:
                return f"it stops: {why}" if why else ""  # 7
        lack = _lack_beside(draft, endpoint, current)
        if lack is not None:
            return f"it stops: {lack}"  # 7
        draft.naps[endpoint.name] = nap  # 6
    draft.board.add(_residue(endpoint, current))
    return None


def rise(draft: Draft) -> list[Need]:
    """Seat those that sleep and have to give way no more with all that they held; returns what has no room."""
    short: list[Need] = []
    for name in sorted(draft.naps):
        nap, endpoint = draft.naps[name], draft.wanted[name]
        current = draft.standings[name].current
        held = set().union(*draft.evicted_from(name).values())
        if current is None or held & set(current.gpus):
            continue
        if draft.leased(current.subject):  # seated with its overlay
            continue
        sizes = dict(zip(current.gpus, current.memory_bytes, strict=True))
        need = Need(current.subject, current.gpus, len(sizes), sizes, current.exclusive, current.gpus)
        board = draft.board.without(frozenset({endpoint_key(name)}))
        if nap.waking is None and place([need], board) is None:
            short.append(need)
            continue
        holds = {gpu: Hold(size, current.exclusive) for gpu, size in sizes.items()}
        draft.board.add(Tenant(endpoint_key(name), endpoint.priority, holds))
    return short


def wakes(draft: Draft, name: str) -> bool:
    """Whether one that sleeps has its place again, and so is to wake up."""
    tenant, current = draft.board.tenants.get(endpoint_key(name)), draft.standings[name].current
    if current is None or name not in draft.naps:
        return False
    if draft.leased(current.subject):
        return True
    return tenant is not None and [h.memory_bytes for h in tenant.holds.values()] == list(current.memory_bytes)


def restless(draft: Draft, gpus: set[str]) -> list[Incarnation]:
    """Those on these GPUs that are to sleep, and are not seen to yet."""
    found = []
    for name, nap in draft.naps.items():
        current, endpoint = draft.standings[name].current, draft.wanted[name]
        if current is not None and gpus & set(current.gpus) and not rested(draft.situation, endpoint, current, nap):
            found.append(current)
    return found


def drained(draft: Draft, endpoint: EndpointSpec, current: Incarnation, nap: Nap) -> Instant | None:
    """Until when its requests in flight are given time before it is told to sleep; None: there is none to wait for."""
    if nap.begun is not None or endpoint.stop.drain_s <= 0 or not endpoint.profile.busy_metrics:
        return None
    until, probe = nap.since.plus(endpoint.stop.drain_s), draft.situation.probe(current)
    if draft.now.mono >= until.mono:
        return None
    if probe is None or probe.at.mono <= nap.since.mono:
        draft.wakes.append(draft.now.plus(LOOK_AGAIN_S))  # whoever asks has to be told first that requests count
        return until
    return until if probe.busy else None


def _way(draft: Draft, endpoint: EndpointSpec, current: Incarnation) -> tuple[int | None, str]:
    """The level to sleep at, and why; None: it stops, and why (empty: as its set points say).

    1. it is not asked for
    2. the engine cannot, or it is not ready
    3. level 1, if it is allowed, the makespans are not too long for it, and host memory has room for the weights
    4. level 2, if the engine has it
    Of 3 and 4 only one that is predicted to cost less time than to stop and to load.
    """
    profile, levels = endpoint.profile, endpoint.profile.sleep_levels
    if endpoint.evict.method != "sleep" or current.stop is not None:
        return None, ""  # 1
    if not profile.sleeps or current.port is None:
        return None, "its engine cannot sleep"  # 2
    if draft.standings[endpoint.name].state not in ("healthy", "sleeping"):
        return None, "it is not ready"  # 2
    lacks: list[str] = []
    for number in sorted(n for n in levels if n >= endpoint.evict.level):
        parks = levels[number].keeps_weights
        lack = (_lack_on_host(draft, endpoint, current) if parks else None) or _slower(draft, endpoint, number)
        if lack is None and parks:
            size, free = format_size(_weights(endpoint, current)), draft.situation.observed.host_available_bytes or 0
            return number, f"{size} of weights in host memory, {format_size(free)} available"  # 3
        if lack is None:
            return number, "; ".join(("weights dropped", *lacks))  # 4
        lacks.append(lack)
    return None, "; ".join(lacks) or f"its engine has no level {endpoint.evict.level}"


def _slower(draft: Draft, endpoint: EndpointSpec, level: int) -> str | None:
    """Why sleeping does not pay; None: it does."""
    times = draft.situation.timings(endpoint)
    asleep, stopped = sum(draft.situation.nap_s(endpoint, level)), times.stop_s + times.load_s
    if asleep < stopped:
        return None
    took, instead = format_duration(round(asleep, 1)), format_duration(round(stopped, 1))
    return f"level {level} takes {took} there and back, a stop and a load {instead}"


def _makespan_left(draft: Draft, name: str) -> float:
    ends = [
        predicted_end(step.record, step.spec.makespan, draft.now.wall)
        for overlay in draft.evicted_from(name)
        if (step := draft.steps[overlay]).spec is not None
    ]
    return max(ends, default=draft.now.wall) - draft.now.wall


def _lack_on_host(draft: Draft, endpoint: EndpointSpec, current: Incarnation) -> str | None:
    """Why its weights may not be parked in host memory; None: they may.

    Beside them have to fit those that others are about to park, and what is left for everybody else.
    """
    if _makespan_left(draft, endpoint.name) > LONGEST_PARKED_S:
        return f"host memory holds no weights for longer than {format_duration(LONGEST_PARKED_S)}"
    available = draft.situation.observed.host_available_bytes
    if available is None:
        return "how much host memory is available cannot be read"
    coming = 0
    for name, nap in draft.naps.items():
        other, known = draft.standings[name].current, draft.wanted[name]
        parks = known.profile.sleep_levels[nap.level].keeps_weights
        if other is not None and nap.slept is None and parks:
            coming += _weights(known, other)
    weights, reserve = _weights(endpoint, current), draft.situation.spec.node.host_reserve_bytes
    if available - coming - weights >= reserve:
        return None
    spoken_for = f", {format_size(coming)} of it for others" if coming else ""
    return (
        f"{format_size(weights)} of weights and {format_size(reserve)} for everybody else do not fit in the "
        f"{format_size(available)} of host memory available{spoken_for}"
    )


def _weights(endpoint: EndpointSpec, current: Incarnation) -> int:
    return sum(current.memory_bytes) if endpoint.evict.weights_bytes is None else endpoint.evict.weights_bytes


def _lack_beside(draft: Draft, endpoint: EndpointSpec, current: Incarnation) -> str | None:
    """Why what overlays lease on its GPUs does not fit beside what it keeps while it sleeps; None: it does."""
    kept = endpoint.profile.residual_bytes
    for uuid in current.gpus:
        leases = [x for x in draft.leases if x.gpu == uuid]
        residues = [
            draft.wanted[n].profile.residual_bytes
            for n in draft.naps
            if n != endpoint.name and (c := draft.standings[n].current) is not None and uuid in c.gpus
        ]
        leased = sum(x.memory_bytes for x in leases)
        room = draft.situation.rooms.get(uuid)
        if room is None:
            return "one of its GPUs cannot be seen"
        if any(x.exclusive for x in leases):
            return f"a whole GPU is asked for, and asleep it keeps {format_size(kept)} of it"
        # a stranger who came meanwhile is no reason to end who sleeps already
        asleep = draft.records[endpoint.name].nap is not None
        limit = room.capacity_bytes + sum(draft.guests.get(uuid, {}).values())  # which is leased, too
        if asleep:
            limit = room.gpu.total_bytes - draft.situation.spec.node.reserve_bytes
        if leased + sum(residues) + kept > limit:
            return (
                f"{format_size(leased)} is asked for, and asleep it keeps {format_size(kept)} of {format_size(limit)}"
            )
    return None


def _residue(endpoint: EndpointSpec, current: Incarnation) -> Tenant:
    hold = Hold(endpoint.profile.residual_bytes, exclusive=False)
    return Tenant(endpoint_key(endpoint.name), endpoint.priority, dict.fromkeys(current.gpus, hold))
