"""Who has a place: leases first, then those that run, then those that are wanted and do not run yet.

Seating never displaces anybody. What comes out is the board that admission decides on, who has to leave, who is to be
started where, and who is wanted and finds no place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain
from typing import Literal

from reconciler.clock import Instant
from reconciler.plan.actions import Blocked, Cause
from reconciler.plan.board import Board, Hold, Need, Tenant
from reconciler.plan.draft import Arriving, Draft, Leaving
from reconciler.plan.endpoints import Standing, earliest_restart
from reconciler.plan.naps import lie_down, rise
from reconciler.plan.observed import Incarnation, Subject
from reconciler.plan.overlays import MEMORY_RETURN_S, predicted_end
from reconciler.plan.placement import place
from reconciler.plan.preemption import lacking
from reconciler.plan.search import solve
from reconciler.plan.situation import Situation
from reconciler.plan.windows import spared
from reconciler.plan.wishes import MOST_TOGETHER, Wish
from reconciler.spec.spec import EndpointSpec, GpuClaim, GpuCount, GpuPins, MemoryClaim, WholeGpu


def need_of(
    situation: Situation, subject: Subject, gpus: GpuClaim, memory: MemoryClaim, prefer: tuple[str, ...] = ()
) -> Need | None:
    """A claim as a need on this node's GPUs; None when a pin names a GPU that does not exist here."""
    match gpus:
        case GpuPins():
            pinned = situation.resolve_pins(gpus)
            if pinned is None:
                return None
            candidates, count = pinned, len(pinned)
        case GpuCount(count):
            candidates = tuple(u for u in situation.gpus if u in situation.managed)
    sizes = {uuid: situation.claim_bytes(memory, situation.gpus[uuid]) for uuid in candidates}
    return Need(subject, candidates, count, sizes, isinstance(memory, WholeGpu), prefer)


def seat(draft: Draft) -> None:
    """Make board, leaving, arriving and blocked anew from the leases and records as they are now."""
    asking = _seat_one_by_one(draft)
    places = _places_together(draft, asking)
    if places:
        draft.places |= places
        _seat_one_by_one(draft)


def _seat_one_by_one(draft: Draft) -> list[list[EndpointSpec]]:
    """Seat everybody; returns those who looked for a place, who comes first in front, in classes."""
    situation = draft.situation
    rooms = situation.rooms
    usable = {u: r.capacity_bytes for u, r in rooms.items() if r.unusable is None and u not in draft.quarantines}
    draft.board = Board(usable, {u: r.gpu.numa_node for u, r in rooms.items()})
    draft.leaving, draft.arriving, draft.blocked, draft.naps = {}, {}, {}, {}
    _seat_leases(draft)
    homeless: list[EndpointSpec] = []
    edited: list[EndpointSpec] = []
    for name, standing in draft.standings.items():
        endpoint = draft.wanted.get(name)
        fate = _keep(draft, name, endpoint, standing)
        if endpoint is None or fate == "stays":
            continue
        if fate == "edited":
            edited.append(endpoint)
        elif draft.records[name].failed is None:
            homeless.append(endpoint)
    rise(draft)
    moved = _carry_out_edits(draft, sorted(edited, key=_by_priority), homeless)
    pins: Counter[str] = Counter()
    for endpoint in (*homeless, *moved):
        if isinstance(endpoint.gpus, GpuPins):
            pins.update(situation.resolve_pins(endpoint.gpus) or ())
    for step in draft.steps.values():
        if step.spec is not None and step.record.state == "pending" and isinstance(step.spec.gpus, GpuPins):
            pins.update(situation.resolve_pins(step.spec.gpus) or ())
    draft.board.contested = pins
    # Who ran up to now keeps its place before one that had none: nothing was stopped in vain.
    ran = [e for e in homeless if situation.incarnations(Subject("endpoint", e.name))]
    new = [e for e in homeless if e not in ran]
    asking = [sorted(ran, key=_by_priority), list(moved), sorted(new, key=_by_priority)]
    for endpoint in sorted(chain.from_iterable(asking), key=lambda e: draft.places.get(e.name) == ()):
        _settle(draft, endpoint, draft.standings[endpoint.name])
    return asking


def _places_together(draft: Draft, asking: list[list[EndpointSpec]]) -> dict[str, tuple[str, ...]]:
    """The least places for all who look for one, where each by itself left one out or had one move.

    Who is left out has none. Empty: as good as it is.
    """
    rank = {e.name: (-i, e.priority) for i, group in enumerate(asking) for e in group}
    needs: dict[str, Need] = {}
    worse = False
    for endpoint in chain.from_iterable(asking):
        subject, need = Subject("endpoint", endpoint.name), need_elsewhere(draft, endpoint)
        blocked, arriving = draft.blocked.get(subject), draft.arriving.get(subject)
        if need is None or draft.leased(subject) or (blocked is not None and blocked.reason == "Held"):
            continue
        needs[endpoint.name] = need
        worse |= arriving is None and _key(endpoint.name) not in draft.board.tenants
        worse |= arriving is not None and bool(need.prefer) and not set(arriving.gpus) <= set(need.prefer)
    if not worse or not 1 < len(needs) <= MOST_TOGETHER or all(n.count == len(n.candidates) for n in needs.values()):
        return {}
    order = {r: i for i, r in enumerate(sorted(set(rank.values())))}
    wishes = [Wish(_key(n), ((need,),), rank=order[rank[n]]) for n, need in needs.items()]
    choice = solve(wishes, draft.board.without(frozenset(map(_key, needs))))
    return {} if choice is None else {n: choice.gpus.get(Subject("endpoint", n), ()) for n in needs}


def _by_priority(endpoint: EndpointSpec) -> tuple[int, str]:
    return -endpoint.priority, endpoint.name


def _seat_leases(draft: Draft) -> None:
    for name in sorted({x.overlay for x in draft.leases}):
        holds: dict[str, Hold] = {}
        for lease in draft.leases:
            if lease.overlay == name:
                before = holds.get(lease.gpu, Hold(0, exclusive=False))
                size = before.memory_bytes + lease.memory_bytes
                holds[lease.gpu] = Hold(size, before.exclusive or lease.exclusive)
        draft.board.add(Tenant(f"overlay/{name}", draft.steps[name].record.priority, holds))


def _keep(
    draft: Draft, name: str, endpoint: EndpointSpec | None, standing: Standing
) -> Literal["stays", "leaves", "edited"]:
    """Decide on what runs of one endpoint.

    It stays where it is, it leaves (or nothing runs), or the files want another process in its stead.
    """
    situation, subject = draft.situation, Subject("endpoint", name)
    for extra in situation.living(subject)[1:]:  # two at once: the older one counts, the other has no place
        if standing.state != "unknown" and extra.phase != "unknown":
            draft.leaving[extra.id] = Leaving(extra, "a second incarnation", Cause("cleanup"))
    current = standing.current
    if current is None:
        return "leaves"
    leaving = _must_leave(draft, name, endpoint, standing, current)
    same = endpoint is None or (
        current.process_hash == endpoint.process_hash and _placed_as_wanted(draft, endpoint, current)
    )
    if leaving is None and not same and standing.state != "unknown" and situation.sees(current.gpus):
        return "edited"
    if leaving is not None and not situation.sees(current.gpus):
        message = "its GPUs cannot be read at the moment; nothing is done to it"
        draft.block(Blocked(subject, "GpuUnknown", message, transient=True))
        leaving = None
    if endpoint is not None and lie_down(draft, endpoint, current, leaving):
        return "stays"
    if leaving is None:
        _seat_incarnation(draft, name, current, endpoint)
        return "stays"
    draft.leaving[current.id] = leaving
    return "leaves"


def _must_leave(
    draft: Draft, name: str, endpoint: EndpointSpec | None, standing: Standing, current: Incarnation
) -> Leaving | None:
    """Why a running incarnation has to go, if it has to.

    The first that holds:

    1. unknown: it stays, whatever the files say
    2. an overlay displaced it
    3. nobody wants it (any more)
    4. it does not serve: its leader is gone, unhealthy for too long, or never ready
    5. a stop is under way already: it is seen through; or its engine failed to sleep or to wake up
    6. a clean start was asked for
    """
    situation = draft.situation
    if standing.state == "unknown":
        return None  # 1
    for overlay, gpus in draft.evicted_from(name).items():
        if gpus & set(current.gpus):
            step = draft.steps[overlay]
            cause = Cause("evict", step.record.source, overlay)
            return Leaving(current, f"gives way to {overlay}", cause, overlay)  # 2
    owner = draft.owners.get(name)
    if endpoint is None:  # 3
        if owner is not None:
            return Leaving(
                current, f"set aside by {owner}", Cause("overlay", draft.steps[owner].record.source, owner), owner
            )
        known = situation.spec.endpoints.get(name)
        if known is None:
            return Leaving(current, "no longer in the set points", Cause("removed"))
        return Leaving(current, f"its set point is {known.state}", Cause("setpoint", known.source))
    if current.phase in ("exited", "vanished"):
        return Leaving(current, standing.reason, Cause("drift", endpoint.source, detail="leftovers"))  # 4
    if standing.must_restart is not None:
        return Leaving(current, standing.must_restart, Cause("drift", endpoint.source, detail="unhealthy"))  # 4
    if current.stop is not None:
        return Leaving(current, "a stop is under way", Cause("cleanup", endpoint.source))  # 5
    nap = draft.records[name].nap
    if nap is not None and nap.failed is not None:
        return Leaving(current, nap.failed, Cause("drift", endpoint.source, detail="sleep"))  # 5
    renew = draft.records[name].renew_before
    if renew is not None and current.started.mono < renew.mono:
        return Leaving(current, "a clean start was asked for", Cause("request", endpoint.source))  # 6
    return None


def _placed_as_wanted(draft: Draft, endpoint: EndpointSpec, current: Incarnation) -> bool:
    leases = draft.leased(current.subject)
    if leases:
        return sorted(x.gpu for x in leases) == sorted(current.gpus)
    return draft.situation.satisfies(endpoint.gpus, current.gpus)


def _carry_out_edits(
    draft: Draft, edited: list[EndpointSpec], homeless: list[EndpointSpec]
) -> tuple[EndpointSpec, ...]:
    """Have those leave whose new version has a place; the others stay as they are, and their edit waits.

    All edits together, so that endpoints may change places; where that does not fit, one after the other. Places are
    sought in the order in which they are given out afterwards: nobody is stopped for a place that is not there.
    """
    board = draft.board.without(frozenset())
    for endpoint in homeless:  # who restarts holds its place
        current = draft.standings[endpoint.name].current
        if current is not None:
            board.add(_tenant(draft, endpoint.name, current, endpoint))
    together = board.without(frozenset())
    if all(_fit_anew(draft, endpoint, together) for endpoint in edited):
        going = edited
    else:
        going = []
        for endpoint in edited:
            current = draft.standings[endpoint.name].current
            if current is not None and not draft.leased(current.subject):
                board.add(_tenant(draft, endpoint.name, current, endpoint))
        going = [endpoint for endpoint in edited if _fit_anew(draft, endpoint, board)]
    for endpoint in edited:
        current = draft.standings[endpoint.name].current
        if current is None:
            continue
        if endpoint in going:
            reason, cause = _why_edited(draft, endpoint)
            draft.leaving[current.id] = Leaving(current, reason, cause, draft.owners.get(endpoint.name))
        else:
            _seat_incarnation(draft, endpoint.name, current, endpoint)
            message = "its edit waits: the new version has no place yet, so the running one stays"
            draft.block(Blocked(current.subject, "EditWaits", message, transient=True))
    return tuple(going)


def _why_edited(draft: Draft, endpoint: EndpointSpec) -> tuple[str, Cause]:
    owner, evicted_by = draft.owners.get(endpoint.name), draft.records[endpoint.name].evicted_by
    if owner is not None:
        return f"overlay {owner} sets it differently", Cause("overlay", endpoint.source, owner)
    if evicted_by is not None:
        return f"{evicted_by} no longer needs its place", Cause("restore", endpoint.source, evicted_by)
    return "its set points were edited", Cause("edit", endpoint.source)


def _fit_anew(draft: Draft, endpoint: EndpointSpec, board: Board) -> bool:
    """Whether the new version has a place on the board, which it then takes."""
    subject, current = Subject("endpoint", endpoint.name), draft.standings[endpoint.name].current
    if draft.leased(subject):
        return True
    prefer = current.gpus if current is not None else ()
    need = need_of(draft.situation, subject, endpoint.gpus, endpoint.memory, prefer)
    without = board.without(frozenset({_key(endpoint.name)}))
    placement = place([need], without) if need else None
    if need is None or placement is None:
        return False
    holds = {g: Hold(need.memory_bytes[g], need.exclusive) for g in placement.gpus[subject]}
    board.add(Tenant(_key(endpoint.name), endpoint.priority, holds))
    return True


def _key(name: str) -> str:
    return f"endpoint/{name}"


def _tenant(draft: Draft, name: str, incarnation: Incarnation, endpoint: EndpointSpec | None) -> Tenant:
    holds = {
        gpu: Hold(size, incarnation.exclusive)
        for gpu, size in zip(incarnation.gpus, incarnation.memory_bytes, strict=True)
    }
    if endpoint is None:
        return Tenant(_key(name), 0, holds)
    times, lost_s = draft.situation.timings(endpoint), 0.0
    if draft.standings[name].state == "healthy":
        lost_s = (times.load_s + times.drain_s + times.stop_s) * max(1, len(endpoint.capabilities))
    departure_s = times.drain_s + times.stop_s + MEMORY_RETURN_S
    return Tenant(
        _key(name), endpoint.priority, holds, round(lost_s * 1000), round(departure_s * 1000), endpoint.capabilities
    )


def _seat_incarnation(draft: Draft, name: str, current: Incarnation, endpoint: EndpointSpec | None) -> None:
    if not draft.leased(current.subject):
        draft.board.add(_tenant(draft, name, current, endpoint))


def _settle(draft: Draft, endpoint: EndpointSpec, standing: Standing) -> None:
    """Find a place for a wanted endpoint that has none, and arrange its start."""
    subject = Subject("endpoint", endpoint.name)
    record = draft.records[endpoint.name]
    leases = draft.leased(subject)
    if leases:
        gpus = tuple(x.gpu for x in leases)
        sizes, exclusive = tuple(x.memory_bytes for x in leases), leases[0].exclusive
    else:
        need = need_elsewhere(draft, endpoint)
        if need is None:
            message = "it is pinned to a GPU that this node does not have"
            draft.block(Blocked(subject, "NoSuchGpu", message, ("correct gpus:",)))
            return
        chosen = draft.places.get(endpoint.name, ())
        kept = replace(need, candidates=tuple(g for g in need.candidates if g in chosen))
        placement = (place([kept], draft.board) if chosen else None) or place([need], draft.board)
        if placement is None:
            draft.block(_no_place(draft, endpoint))
            return
        held = spared(draft, endpoint, need) if standing.current is None else None
        if held is not None:
            draft.block(held)
            return
        gpus = placement.gpus[subject]
        sizes, exclusive = tuple(need.memory_bytes[g] for g in gpus), need.exclusive
        holds = {g: Hold(size, exclusive) for g, size in zip(gpus, sizes, strict=True)}
        draft.board.add(Tenant(_key(endpoint.name), endpoint.priority, holds))
    if _port_blocked(draft, endpoint):
        return
    reason, cause = _why_started(draft, endpoint, standing)
    not_before = earliest_restart(record, endpoint.restart)
    if not_before is not None and not_before.mono <= draft.now.mono:
        not_before = None
    if not_before is not None:
        draft.wakes.append(not_before)
        wait = not_before.since(draft.now)
        message = f"it ended {record.streak} times in a row; the next start is in {wait:.1f} s"
        last = record.exits[-1].failure if record.exits else None
        message += f" ({last})" if last else ""
        draft.block(
            Blocked(
                subject,
                "CoolDown",
                message,
                ("reconciler reset " + endpoint.name,),
                _wall(draft, not_before),
                transient=True,
            )
        )
    draft.arriving[subject] = Arriving(
        subject, gpus, sizes, exclusive, endpoint.process_hash, reason, cause,
        draft.owners.get(endpoint.name), not_before,
    )  # fmt: skip


def _why_started(draft: Draft, endpoint: EndpointSpec, standing: Standing) -> tuple[str, Cause]:
    """Why an endpoint is to be started, for people; the first that holds."""
    record, owner = draft.records[endpoint.name], draft.owners.get(endpoint.name)
    if owner is not None:
        return f"overlay {owner} asks for it", Cause("overlay", draft.steps[owner].record.source, owner)
    for overlay in sorted(o for o, held in draft.evicted_from(endpoint.name).items() if held):
        return f"{overlay} took its place; it moves", Cause("evict", draft.steps[overlay].record.source, overlay)
    if record.evicted_by is not None:
        overlay = record.evicted_by
        return f"{overlay} no longer needs its place", Cause("restore", endpoint.source, overlay)
    if standing.current is not None and draft.leaving[standing.current.id].cause.kind in ("edit", "request", "drift"):
        leaving = draft.leaving[standing.current.id]
        return leaving.reason, leaving.cause
    if record.exits and not record.exits[-1].planned:
        told = record.exits[-1].failure
        reason = f"it should run and does not: {told}" if told else "it should run and does not"
        return reason, Cause("drift", endpoint.source, detail="it ended by itself")
    return "its set point is running", Cause("setpoint", endpoint.source)


def _wall(draft: Draft, instant: Instant) -> float:
    return draft.now.wall + instant.since(draft.now)


def _port_blocked(draft: Draft, endpoint: EndpointSpec) -> bool:
    subject = Subject("endpoint", endpoint.name)
    holder = draft.situation.observed.ports.get(endpoint.port) if endpoint.port is not None else None
    if holder is not None:
        who = f"pid {holder.pid} ({holder.command})" if holder.pid is not None else "a process that cannot be seen"
        message = f"port {endpoint.port} is in use by {who}"
        draft.block(
            Blocked(subject, "PortInUse", message, ("end that process, or choose another port",), transient=True)
        )
        return True
    for other in draft.situation.observed.incarnations:
        ours = other.alive and other.port == endpoint.port and other.subject != subject and endpoint.port is not None
        if ours and other.id not in draft.leaving:
            message = f"port {endpoint.port} is in use by {other.subject} (pid {other.pid})"
            draft.block(Blocked(subject, "PortInUse", message, ("choose another port",), transient=True))
            return True
    return False


def need_elsewhere(draft: Draft, endpoint: EndpointSpec) -> Need | None:
    """What a wanted endpoint needs, on GPUs that nobody holds against it; None: a pin does not exist."""
    need = _need(draft, endpoint)
    if need is None:
        return None
    leased = set().union(*draft.evicted_from(endpoint.name).values())
    return replace(need, candidates=tuple(c for c in need.candidates if c not in leased))


def _need(draft: Draft, endpoint: EndpointSpec) -> Need | None:
    current = draft.standings[endpoint.name].current
    prefer = current.gpus if current is not None else draft.records[endpoint.name].last_gpus
    return need_of(draft.situation, Subject("endpoint", endpoint.name), endpoint.gpus, endpoint.memory, prefer)


def _no_place(draft: Draft, endpoint: EndpointSpec) -> Blocked:
    """Why a wanted endpoint has no place: an overlay holds it, something stranger does, or the box lacks it."""
    need = _need(draft, endpoint)
    assert need is not None  # noqa: S101 - its pins exist, or it would not have come so far
    overlays = frozenset(k for k in draft.board.tenants if k.startswith("overlay/"))
    if place([need], draft.board.without(overlays)) is not None:
        steps = [draft.steps[k.partition("/")[2]] for k in sorted(overlays)]
        here = [s for s in steps if {x.gpu for x in draft.leases if x.overlay == s.record.name} & set(need.candidates)]
        names = ", ".join(s.record.name for s in here)
        ends = [predicted_end(s.record, s.spec.makespan, draft.now.wall) for s in here if s.spec]
        back = max(ends, default=None)
        return Blocked(need.subject, "EvictedBy", f"its place is held by {names}", (), back, transient=True)
    lack = lacking(draft.situation, [need])
    if lack.transient and lack.reason == "InsufficientGpus":
        rivals = sorted({t.key.partition("/")[2] for g in need.candidates for t in draft.board.on(g)})
        message = f"its GPUs are held by {', '.join(rivals)}; endpoints do not displace each other"
        return Blocked(need.subject, "InsufficientGpus", message, ("free a GPU, or lower its claim",), transient=False)
    return Blocked(need.subject, lack.reason, lack.message, lack.alternatives, transient=lack.transient)
