"""A place for a wanted endpoint that has none: what it needs, its start, or why it has to wait."""

from __future__ import annotations

from collections.abc import Collection
from math import inf

from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.plan.actions import Blocked, Cause
from reconciler.plan.board import Board, Hold, Need, Tenant, endpoint_key
from reconciler.plan.draft import OVERRIDING, Arriving, Draft
from reconciler.plan.endpoints import Standing, earliest_restart
from reconciler.plan.guests import guests_gone
from reconciler.plan.lacks import lacking, no_such_gpu
from reconciler.plan.moving import in_words, under_way
from reconciler.plan.observed import Subject
from reconciler.plan.overlays import OverlayStep, predicted_end
from reconciler.plan.placement import place
from reconciler.plan.situation import Situation
from reconciler.plan.windows import held_back, keeping_off, not_to_settle_on, opening_soon, still_owed, to_be_back
from reconciler.spec.spec import EndpointSpec, GpuClaim, GpuCount, GpuPins, MemoryClaim, WholeGpu

MOST_NAMED = 12
"""So many of those who have a place are named to one that has none."""


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
            candidates = situation.placeable
    return Need(subject, candidates, count, situation.sizes(memory, candidates), isinstance(memory, WholeGpu), prefer)


def settle(draft: Draft, endpoint: EndpointSpec, standing: Standing) -> None:
    """Find a place for a wanted endpoint that has none, and arrange its start."""
    subject = Subject("endpoint", endpoint.name)
    record = draft.records[endpoint.name]
    leases = draft.leased(subject) if endpoint.name in draft.owners else ()
    if leases:
        gpus = tuple(x.gpu for x in leases)
        sizes, exclusive = tuple(x.memory_bytes for x in leases), leases[0].exclusive
    else:
        need = need_elsewhere(draft, endpoint)
        if need is None:
            message, hint = no_such_gpu(draft.situation, endpoint.gpus)
            draft.block(Blocked(subject, "NoSuchGpu", message, (hint,)))
            return
        move = under_way(draft, endpoint.name)
        chosen = draft.places.get(endpoint.name, move.gpus if move is not None else ())
        soon = opening_soon(draft, endpoint) if standing.current is None else []
        spared = keeping_off(soon)(need)
        kept = replace(spared, candidates=tuple(g for g in spared.candidates if g in chosen))
        placement = (place([kept], draft.board) if chosen else None) or place([spared], draft.board)
        if placement is None:
            if soon and place([need], draft.board) is not None:
                draft.kept_off[endpoint.name] = max(soon, key=lambda w: w.end).name
                draft.block(held_back(subject, soon))
            else:
                draft.block(_kept_for(draft, endpoint, need) or _no_place(draft, endpoint))
            return
        gpus = placement.gpus[subject]
        sizes, exclusive = tuple(need.memory_bytes[g] for g in gpus), need.exclusive
        holds = {g: Hold(size, exclusive) for g, size in zip(gpus, sizes, strict=True)}
        draft.board.add(Tenant(endpoint_key(endpoint.name), endpoint.priority, holds))
        beginning = _beginning(draft, endpoint, gpus)
        if beginning:
            message = f"{', '.join(beginning)} begins beside it; it loads after that"
            draft.block(Blocked(subject, "WaitingForBegin", message, transient=True))
            return
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
        last = next((end for end in reversed(record.exits) if not end.planned), None)
        told = last and (last.ended_for or last.failure)
        message += f" ({told})" if told else ""
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


def _beginning(draft: Draft, endpoint: EndpointSpec, gpus: tuple[str, ...]) -> list[str]:
    """More important windows whose work begins on one of these GPUs before an engine had loaded there: it would wait.

    Those that require what the endpoint offers are none: they wait for it. Nor are those whose time has come and that
    wait for something else: nobody knows how long.
    """
    now, loaded = draft.now.wall, draft.now.wall + draft.situation.timings(endpoint).load_s
    near = [w for w in draft.windows if now < w.start < loaded and w.priority > endpoint.priority]
    offered = set(endpoint.capabilities)
    found = [w.name for w in near if w.beside.keys() & set(gpus) and not offered & set(w.requires)]
    for name, step in draft.steps.items():
        overlay, record = step.spec, step.record
        begins = record.state in ("evicting", "starting") and record.attempt == 0 and step.workload is None
        reserved = record.seen is not None and record.window_start > record.seen.wall
        if overlay is None or overlay.workload is None or not begins or not reserved:
            continue
        if overlay.priority <= endpoint.priority:
            continue
        if not set(overlay.requires) & set(endpoint.capabilities) and any(
            x.overlay == name and x.gpu in gpus for x in draft.leases
        ):
            found.append(name)
    return sorted(set(found))


def _why_started(draft: Draft, endpoint: EndpointSpec, standing: Standing) -> tuple[str, Cause]:
    """Why an endpoint is to be started, for people; the first that holds."""
    record, owner = draft.records[endpoint.name], draft.owners.get(endpoint.name)
    if owner is not None:
        return f"overlay {owner} asks for it", Cause("overlay", draft.steps[owner].record.source, owner)
    for overlay in sorted(o for o, held in draft.evicted_from(endpoint.name).items() if held):
        return f"{overlay} took its place; it moves", Cause("evict", draft.steps[overlay].record.source, overlay)
    move = under_way(draft, endpoint.name)
    if move is not None:
        return in_words(draft, move)
    if record.evicted_by is not None:
        overlay = record.evicted_by
        return f"{overlay} no longer needs its place", Cause("restore", endpoint.source, overlay)
    if standing.current is not None and draft.leaving[standing.current.id].cause.kind in ("edit", "request", "drift"):
        leaving = draft.leaving[standing.current.id]
        return leaving.reason, leaving.cause
    last = record.exits[-1] if record.exits else None
    if last is not None and last.ended_for is not None:
        return f"it was ended because {last.ended_for}", Cause("drift", endpoint.source, detail="it was ended")
    if last is not None and not last.planned:
        reason = f"it should run and does not: {last.failure}" if last.failure else "it should run and does not"
        return reason, Cause("drift", endpoint.source, detail="it ended by itself")
    return "its set point is running", Cause("setpoint", endpoint.source)


def _wall(draft: Draft, instant: Instant) -> float:
    return draft.now.wall + instant.since(draft.now)


def _port_blocked(draft: Draft, endpoint: EndpointSpec) -> bool:
    taken = port_taken(draft, endpoint)
    if taken is not None:
        draft.block(taken)
    return taken is not None


def port_taken(draft: Draft, endpoint: EndpointSpec) -> Blocked | None:
    """Who has the port of an endpoint and is not about to leave it; None: nobody."""
    if endpoint.port is None:
        return None
    subject, holder = Subject("endpoint", endpoint.name), draft.situation.observed.ports.get(endpoint.port)
    if holder is not None:
        who = f"pid {holder.pid} ({holder.command})" if holder.pid is not None else "a process that cannot be seen"
        message, hint = f"port {endpoint.port} is in use by {who}", "end that process, or choose another port"
        return Blocked(subject, "PortInUse", message, (hint,), transient=True)
    for other in draft.situation.on_port.get(endpoint.port, ()):
        if other.alive and other.subject != subject and other.id not in draft.leaving:
            message = f"port {endpoint.port} is in use by {other.subject} (pid {other.pid})"
            return Blocked(subject, "PortInUse", message, ("choose another port",), transient=True)
    return None


def need_elsewhere(draft: Draft, endpoint: EndpointSpec) -> Need | None:
    """What a wanted endpoint needs, on GPUs that nobody holds against it; None: a pin does not exist.

    Who gave way to an overlay has its place again before anybody else: where it would not fit beside the endpoint, that
    one does not go, unless it is its own place. One that is away from its own goes to none, either, where a window to
    come could not displace it.
    """
    need = _need_unleased(draft, endpoint)
    if need is not None and draft.windows and draft.evicted_from(endpoint.name):
        elsewhere = keeping_off(not_to_settle_on(draft, endpoint))(need).candidates
        need = replace(need, candidates=tuple(g for g in need.candidates if g in elsewhere or g in need.prefer))
    owed = set().union(*draft.owed.values())
    return (
        None if need is None else _without(need, {c for c in need.candidates if c in owed and _owed_to(draft, need, c)})
    )


def _need_unleased(draft: Draft, endpoint: EndpointSpec) -> Need | None:
    need = own_need(draft, endpoint)
    return None if need is None else _without(need, set().union(*draft.evicted_from(endpoint.name).values()))


def _without(need: Need, gpus: Collection[str]) -> Need:
    return replace(need, candidates=tuple([c for c in need.candidates if c not in gpus])) if gpus else need


def _owed_to(draft: Draft, need: Need, gpu: str) -> list[str]:
    """Who is to have a GPU again and would not fit beside this need there; its own place is nobody else's."""
    name = need.subject.name
    came_from = draft.records[name].evicted_by is not None or bool(draft.situation.incarnations(need.subject))
    move = under_way(draft, name)
    if (came_from and gpu in need.prefer) or (move is not None and gpu in move.gpus):
        return []
    here = {n: sizes[gpu] for n, sizes in draft.owed.items() if gpu in sizes and n != name}
    owed = {n: left for n, size in here.items() if (left := still_owed(draft, n, gpu, size))}
    if not owed or gpu not in draft.board.capacity:
        return []
    backs = [e for n in owed if (e := to_be_back(draft, n)) is not None]
    alone = need.exclusive or any(isinstance(e.memory, WholeGpu) for e in backs)
    own = endpoint_key(name)
    stay = [t for t in draft.board.on(gpu) if t.key != own and not t.key.startswith("overlay/")]
    taken = sum(t.holds[gpu].memory_bytes for t in stay) + sum(owed.values()) + need.memory_bytes[gpu]
    return sorted(owed) if alone or taken > draft.board.capacity[gpu] else []


def _kept_for(draft: Draft, endpoint: EndpointSpec, need: Need) -> Blocked | None:
    """That an endpoint has no place but that of others who gave way to an overlay; None: it has none in any case."""
    anywhere = _need_unleased(draft, endpoint)
    if anywhere is None or place([anywhere], draft.board) is None:
        return None
    names = {n for gpu in set(anywhere.candidates) - set(need.candidates) for n in _owed_to(draft, anywhere, gpu)}
    if not names:
        return None
    message = f"it would have the place of {', '.join(sorted(names))}, kept for its return"
    return Blocked(need.subject, "Held", message, ("wait for that return",), transient=True)


def own_need(draft: Draft, endpoint: EndpointSpec) -> Need | None:
    """What an endpoint needs, where it ran preferred; None: a pin does not exist."""
    current = draft.standings[endpoint.name].current
    prefer = current.gpus if current is not None else draft.records[endpoint.name].last_gpus
    return need_of(draft.situation, Subject("endpoint", endpoint.name), endpoint.gpus, endpoint.memory, prefer)


def _no_place(draft: Draft, endpoint: EndpointSpec) -> Blocked:
    """Why a wanted endpoint has no place: an overlay holds it, something stranger does, or the box lacks it."""
    need = own_need(draft, endpoint)
    assert need is not None  # noqa: S101 - its pins exist, or it would not have come so far
    held = held_by_overlays(draft, need)
    if held is not None:
        return held
    lack = lacking(draft.situation, [need])
    if lack.transient and lack.reason == "InsufficientGpus":
        holders = _holders(draft, need)
        if not holders and (shut := [gpu for gpu in need.candidates if gpu in draft.quarantines]):  # just now
            index, reason = draft.situation.gpus[shut[0]].index, draft.quarantines[shut[0]].reason
            message = f"GPU {index} cannot be used: {reason}"
            return Blocked(need.subject, "Quarantined", message, (f"reconciler reset {index}",), transient=False)
        message = f"its GPUs are held by {holders}; endpoints do not displace each other"
        return Blocked(need.subject, "InsufficientGpus", message, ("free a GPU, or lower its claim",), transient=False)
    return Blocked(need.subject, lack.reason, lack.message, lack.alternatives, transient=lack.transient)


def held_by_overlays(draft: Draft, need: Need) -> Blocked | None:
    """That an endpoint would have its place without overlays and guests, and which hold it; None: it would not."""
    overlays = frozenset(k for k in draft.board.tenants.came if k.startswith("overlay/"))  # no resident
    board = draft.board.without({endpoint_key(need.subject.name)})  # what it keeps while it sleeps is a part of it
    if place([need], guests_gone(draft, board.without(overlays))) is None:
        return None
    steps = [draft.steps[k.partition("/")[2]] for k in sorted(overlays)]
    here = [s for s in steps if {x.gpu for x in draft.leases if x.overlay == s.record.name} & set(need.candidates)]
    names = ", ".join(s.record.name for s in here)
    last, end = _back(draft, need, here, board)
    if last is not None:
        draft.kept_off[need.subject.name] = last
    return Blocked(need.subject, "EvictedBy", f"its place is held by {names}", (), end, transient=True)


def _holders(draft: Draft, need: Need) -> str:
    """Who is on the GPUs that a need may be met with; of many the first."""
    found: set[str] = set()
    for gpu in need.candidates:
        found.update(t.key.partition("/")[2] for t in draft.board.on(gpu))
        if len(found) > MOST_NAMED:
            return ", ".join([*sorted(found)[:MOST_NAMED], "and others"])
    return ", ".join(sorted(found))


def _back(draft: Draft, need: Need, holders: list[OverlayStep], board: Board) -> tuple[str | None, float | None]:
    """The overlay with whose end so many of these are over that there is a place, and that predicted end, epoch s."""
    ends = {s.record.name: _over_at(draft, s) for s in holders}
    for name in sorted(ends, key=lambda n: (ends[n], n)):
        board = board.without(frozenset({f"overlay/{name}"}))
        if place([need], board) is not None:
            return name, ends[name] if ends[name] < inf else None
    return None, None


def _over_at(draft: Draft, step: OverlayStep) -> float:
    """Epoch seconds at which a live overlay is predicted to be over; infinite: its file cannot be read."""
    if step.spec is not None:
        return predicted_end(step.record, step.spec.makespan, draft.now.wall)
    return inf if step.record.state in OVERRIDING else draft.now.wall
