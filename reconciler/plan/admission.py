"""Which waiting overlays begin now, where, and in whose place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

from reconciler.plan.actions import Blocked, Cause
from reconciler.plan.draft import OVERRIDING, Draft
from reconciler.plan.endpoints import cool_again
from reconciler.plan.ledger import Lease
from reconciler.plan.observed import Subject
from reconciler.plan.overlays import OverlayStep, enter, finish, predicted_end
from reconciler.plan.placement import Board, Need, Placement
from reconciler.plan.preemption import Consents, Refusal
from reconciler.plan.reservations import Seek, next_slot, reserve, window_taken
from reconciler.plan.seating import need_of, seat
from reconciler.plan.windows import ahead_of, keeping_off
from reconciler.spec.spec import EndpointSpec, OverlaySpec

LOOK_AGAIN_S = 1.0


def admit_all(draft: Draft) -> None:
    """Admit every waiting overlay that fits, the most important first; say of the others why they wait.

    After each admission everybody is seated anew: leases taken here bind those that come after.
    """
    draft.windows = ()
    seat(draft)

    def seek(overlay: OverlaySpec, board: Board, off: Callable[[Need], Need]) -> _Answer:
        due = draft.steps[overlay.name].record.window_start <= draft.now.wall
        waive: frozenset[str] = frozenset() if due else frozenset({"CoolDown", "NoProvider"})  # may be over by then
        return _seek(draft, overlay, board, off, waive=waive)

    draft.windows = reserve(draft, seek)
    if draft.windows:
        told = [b for b in draft.blocked.values() if b.subject.kind == "workload"]
        seat(draft)
        for blocked in told:
            draft.block(blocked)
    opens = {w.name: w.opens for w in draft.windows}
    waiting = [s for s in draft.steps.values() if s.record.state == "pending" and s.spec is not None]
    for step in sorted(waiting, key=lambda s: (-s.record.priority, s.record.window_start, s.record.name)):
        assert step.spec is not None  # noqa: S101 - narrowed by the filter above
        if draft.situation.incarnations(Subject("workload", step.record.name)):
            # Its end would be taken for the end of the run that begins.
            subject = Subject("workload", step.record.name)
            draft.block(Blocked(subject, "LastRun", "its last run is not put away yet", transient=True))
            draft.wakes.append(draft.now.plus(LOOK_AGAIN_S))
        elif draft.now.wall < opens.get(step.record.name, step.record.window_start):
            subject, begin = Subject("workload", step.record.name), step.record.window_start
            draft.block(Blocked(subject, "NotYet", "its window has not begun", (), begin, transient=True))
        elif not draft.situation.observed.clock_jumped or step.record.window_start <= step.record.since.wall:
            _admit(draft, step, step.spec, seek)


_Answer = tuple[Placement, list[Need]] | Refusal | None


def _seek(
    draft: Draft,
    overlay: OverlaySpec,
    board: Board,
    off: Callable[[Need], Need],
    *,
    waive: frozenset[str] = frozenset(),
) -> _Answer:
    """The least lawful choice of providers, places and victims; why there is none; None: nothing provides.

    Args:
        draft: the decision so far
        overlay: who asks
        board: who has a place
        off: takes from a need the GPUs that it is kept off
        waive: rules that do not count
    """
    own = _own_needs(draft, overlay)
    if own is None:
        return None
    board = board.without(frozenset(f"endpoint/{n}" for n in overlay.endpoints))
    consents = _consents(draft, overlay)
    best: tuple[Placement, list[Need]] | None = None
    refusal: Refusal | None = None
    placeless = "NoProvider" in waive
    for providers in _provider_choices(draft, overlay, placeless=placeless):
        needs = [off(need) for need in (*own, *providers)]
        placement = consents.seek(needs, board, waive=waive)
        if placement is None:
            refusal = refusal or consents.explain(needs, board)
        elif best is None or placement.cost < best[0].cost:
            best = placement, needs
    return best or refusal


def _consents(draft: Draft, overlay: OverlaySpec) -> Consents:
    stopping = frozenset(n for n in overlay.endpoints if _would_stop(draft, overlay, n))
    live = {n: s.spec for n, s in draft.steps.items() if s.spec is not None and s.record.state in OVERRIDING}
    leaving = frozenset(x.incarnation.subject.name for x in draft.leaving.values())
    displaced = {n: s.record.evicted for n, s in draft.steps.items()}
    placed = frozenset(n for n in draft.wanted if draft.has_place(n))
    return Consents(draft.situation, overlay, draft.wanted, draft.standings, live, displaced, stopping, leaving, placed)


def _admit(draft: Draft, step: OverlayStep, overlay: OverlaySpec, later: Seek) -> None:
    """Admit one overlay, or block it with the reason.

    The outcomes:
        1. a pin names a GPU that this node does not have            → NoSuchGpu
        2. it sets aside an endpoint that is not preemptible         → NotPreemptible, or GpuUnknown
           or cannot be stopped now
        3. another overlay has its own version of an endpoint it sets → SetByAnother
        4. nothing that has a place, or finds one, can provide what   → NoProvider
           it requires
        5. a port that its endpoints need is not free for them       → PortInUse
        6. it would spare victims to wait for a lease being returned → WaitingForLease
           or another begins beside its victims at this moment       → WaitingForBegin
        7. some choice of providers, places and victims is lawful    → leases, the least choice
        8. only windows to come stand in the way                     → WindowTaken, and the next free slot
        9. none is                                                   → the rule or the lack that stands in the way
    """
    subject = Subject("workload", overlay.name)
    own = _own_needs(draft, overlay)
    if own is None:
        message = "it is pinned to a GPU that this node does not have"
        draft.block(Blocked(subject, "NoSuchGpu", message, ("correct gpus:",)))  # 1
        return
    vacated = frozenset(n for n in overlay.endpoints if draft.standings[n].current is not None)
    stopping = frozenset(n for n in vacated if _would_stop(draft, overlay, n))
    firm = sorted(n for n in stopping if n in draft.wanted and not draft.wanted[n].preemptible)
    if firm:
        message = f"it sets aside {', '.join(firm)}, which is not preemptible"
        draft.block(Blocked(subject, "NotPreemptible", message, ("set preemptible: true on it",)))  # 2
        return
    unseen = sorted(n for n in stopping if not _can_stop(draft, n))
    if unseen:
        message = f"it sets aside {', '.join(unseen)}, which cannot be seen well enough to be stopped"
        draft.block(Blocked(subject, "GpuUnknown", message, ("see `reconciler doctor`",), transient=True))  # 2
        return
    rivals = _rivals(draft, overlay)
    if rivals:
        message = f"{', '.join(rivals)} set the same endpoint otherwise"
        draft.block(Blocked(subject, "SetByAnother", message, (), _earliest(draft), transient=True))  # 3
        return
    board = draft.board.without(frozenset(f"endpoint/{n}" for n in overlay.endpoints))
    rivalling = ahead_of(draft, overlay, draft.now.wall)
    answer = _seek(draft, overlay, draft.board, keeping_off(rivalling))
    if isinstance(answer, tuple):
        placement, needs = answer
        consents = _consents(draft, overlay)
        taken = _port_conflict(draft, overlay, placement, needs)
        returning = _returning(draft, consents, needs, board, placement)
        if taken is not None:
            draft.block(Blocked(subject, "PortInUse", taken, ("choose another port",), transient=True))  # 5
        elif beginning := _beginning(draft, overlay, placement):
            message = f"{', '.join(beginning)} begins on a GPU that somebody would have to leave for it"
            draft.block(Blocked(subject, "WaitingForBegin", message, transient=True))  # 6
        elif returning:
            message = f"it waits for the place that {', '.join(returning)} is giving back, rather than displace more"
            draft.block(Blocked(subject, "WaitingForLease", message, transient=True))  # 6
        else:
            _take(draft, step, overlay, placement, needs, stopping)  # 7
        return
    if rivalling and isinstance(_seek(draft, overlay, draft.board, lambda need: need), tuple):
        slot = next_slot(draft, overlay, draft.now.wall, draft.windows, later)
        draft.block(window_taken(draft, overlay, draft.now.wall, rivalling, slot))  # 8
        return
    if answer is None:
        draft.block(_no_provider(draft, overlay))  # 4
        return
    if answer.reason == "CoolDown":
        policy = draft.situation.spec.policy
        cool = (
            cool_again(
                record,
                draft.now,
                max_evictions_per_hour=policy.max_evictions_per_hour,
                min_ready_s=policy.min_ready_s,
            )
            for record in draft.records.values()
        )
        draft.wakes.extend(end for end in cool if end is not None)
    draft.block(
        Blocked(subject, answer.reason, answer.message, answer.alternatives, _earliest(draft), answer.transient)
    )  # 9


def _port_conflict(draft: Draft, overlay: OverlaySpec, placement: Placement, needs: list[Need]) -> str | None:
    """Who has a port that an endpoint of this overlay needs, and would still have it: no eviction for its sake."""
    base, gone = draft.situation.spec.endpoints, {k.partition("/")[2] for k in placement.victims}
    for need in needs:
        if need.subject.kind != "endpoint":
            continue
        endpoint = overlay.endpoints.get(need.subject.name) or base[need.subject.name]
        holder = draft.situation.observed.ports.get(endpoint.port) if endpoint.port is not None else None
        if holder is not None:
            who = f"pid {holder.pid} ({holder.command})" if holder.pid is not None else "a process that cannot be seen"
            return f"port {endpoint.port}, which {endpoint.name} needs, is in use by {who}"
        for name, other in draft.wanted.items():
            rival = name != endpoint.name and name not in gone and name not in overlay.endpoints
            if rival and endpoint.port is not None and other.port == endpoint.port:
                return f"port {endpoint.port}, which {endpoint.name} needs, belongs to {name}"
    return None


def _beginning(draft: Draft, overlay: OverlaySpec, placement: Placement) -> list[str]:
    """Overlays, not less important, that are about to begin where its victims are: an eviction would delay them."""
    gpus = {g for key in placement.victims for g in draft.board.tenants[key].holds}
    return sorted(
        name
        for name, step in draft.steps.items()
        if step.record.state in ("admitted", "evicting", "starting")
        and step.record.priority >= overlay.priority
        and f"overlay/{name}" not in placement.victims
        and any(lease.overlay == name and lease.gpu in gpus for lease in draft.leases)
    )


def _returning(draft: Draft, consents: Consents, needs: list[Need], board: Board, placement: Placement) -> list[str]:
    """Overlays that are over and about to return leases with which fewer would have to give way; empty: none."""
    ending = sorted(n for n, s in draft.steps.items() if s.record.state == "completing")
    if not placement.victims or not ending:
        return []
    later = consents.seek(needs, board.without(frozenset(f"overlay/{n}" for n in ending)))
    return ending if later is not None and len(later.victims) < len(placement.victims) else []


def _rivals(draft: Draft, overlay: OverlaySpec) -> list[str]:
    """Overlays that hold places for endpoints which this one sets, or set them while this one would run them."""
    names = set(overlay.endpoints)
    holding = {x.overlay for x in draft.leases if x.subject.kind == "endpoint" and x.subject.name in names}
    runs = {e.name for e in _running(overlay)}
    in_force = [s.spec for s in draft.steps.values() if s.spec is not None and s.record.state in OVERRIDING]
    return sorted(holding | {other.name for other in in_force if runs & set(other.endpoints)})


def _would_stop(draft: Draft, overlay: OverlaySpec, name: str) -> bool:
    """Whether what the overlay sets for an endpoint ends the process that runs now."""
    current, new = draft.standings[name].current, overlay.endpoints[name]
    if current is None:
        return False
    same = new.process_hash == current.process_hash and draft.situation.satisfies(new.gpus, current.gpus)
    return new.state != "running" or not same


def _can_stop(draft: Draft, name: str) -> bool:
    standing = draft.standings[name]
    return standing.current is not None and standing.state != "unknown" and draft.situation.sees(standing.current.gpus)


def _own_needs(draft: Draft, overlay: OverlaySpec) -> list[Need] | None:
    """The overlay's own GPUs and those of the endpoints it sets; None when a pin does not exist."""
    needs: list[Need | None] = []
    if overlay.gpus is not None:
        needs.append(need_of(draft.situation, Subject("workload", overlay.name), overlay.gpus, overlay.memory))
    needs.extend(_endpoint_need(draft, e) for e in _running(overlay))
    found = [n for n in needs if n is not None]
    return found if len(found) == len(needs) else None


def _running(overlay: OverlaySpec) -> list[EndpointSpec]:
    return [e for _, e in sorted(overlay.endpoints.items()) if e.state == "running"]


def _endpoint_need(draft: Draft, endpoint: EndpointSpec) -> Need | None:
    current = draft.standings[endpoint.name].current
    prefer = current.gpus if current is not None else draft.records[endpoint.name].last_gpus
    return need_of(draft.situation, Subject("endpoint", endpoint.name), endpoint.gpus, endpoint.memory, prefer)


def _provider_choices(draft: Draft, overlay: OverlaySpec, *, placeless: bool = False) -> Iterator[list[Need]]:
    """Every way to have what the overlay requires: nothing to do, or standby endpoints to start, as needs.

    Who is wanted and has no place provides nothing: victims would wait for it in vain. With `placeless` it counts.
    """
    options: list[list[Need]] = []
    for capability in overlay.requires:
        after = {**draft.wanted, **{e.name: e for e in _running(overlay)}}
        for name in set(overlay.endpoints) - {e.name for e in _running(overlay)}:
            after.pop(name, None)
        if any(
            capability in e.capabilities
            and draft.records[n].failed is None
            and (placeless or n in overlay.endpoints or draft.has_place(n))
            for n, e in after.items()
        ):
            continue
        base = draft.situation.spec.endpoints.values()
        taken = {*after, *(x.subject.name for x in draft.leases if x.subject.kind == "endpoint")}
        standby = [e for e in base if e.state == "standby" and capability in e.capabilities and e.name not in taken]
        needs = [_endpoint_need(draft, e) for e in sorted(standby, key=lambda e: (-e.priority, e.name))]
        options.append([n for n in needs if n is not None])
    for choice in product(*options):
        unique = {n.subject: n for n in choice}
        yield [unique[s] for s in sorted(unique)]


def _no_provider(draft: Draft, overlay: OverlaySpec) -> Blocked:
    """Why nothing provides what an overlay requires: nothing offers it, or what does has no place at the moment."""
    subject = Subject("workload", overlay.name)
    offering = sorted(n for n, e in draft.wanted.items() if set(overlay.requires) & set(e.capabilities))
    away = [n for n in offering if draft.records[n].failed is None and not draft.has_place(n)]
    if not away:
        message = f"nothing offers {', '.join(overlay.requires)}"
        return Blocked(subject, "NoProvider", message, ("start or add a provider",))
    held = {n: draft.blocked.get(Subject("endpoint", n)) for n in away}
    told = ", ".join(f"{n} ({b.reason})" if b is not None else n for n, b in held.items())
    message = f"it requires {', '.join(overlay.requires)}, and what offers it has no place: {told}"
    hints = ("wait for its return, or add a standby provider",)
    return Blocked(subject, "NoProvider", message, hints, _earliest(draft), transient=True)


def _take(
    draft: Draft,
    step: OverlayStep,
    overlay: OverlaySpec,
    placement: Placement,
    needs: list[Need],
    vacated: frozenset[str],
) -> None:
    """Record the admission: leases, victims, and who will have to come back."""
    now, name = draft.now, overlay.name
    cause = Cause("overlay", overlay.source, name)
    for need in needs:
        for gpu in placement.gpus[need.subject]:
            lease = Lease(name, need.subject, gpu, need.memory_bytes[gpu], need.exclusive, now)
            draft.leases.append(lease)
    seized = sorted(k.partition("/")[2] for k in placement.victims if k.startswith("overlay/"))
    victims = {k.partition("/")[2] for k in placement.victims if k.startswith("endpoint/")} | vacated
    base = draft.situation.spec.endpoints
    victims.update(n for lower in seized for n in draft.steps[lower].record.evicted if n in base)
    evicted = sorted(victims)
    for victim in evicted:
        remembered = draft.records[victim]
        ran = draft.standings[victim].current is not None and not draft.evicted_from(victim)
        times = (*remembered.evictions, now.wall) if ran else remembered.evictions
        draft.records[victim] = replace(remembered, evicted_by=name, evictions=times)
        draft.standings[victim] = replace(draft.standings[victim], record=draft.records[victim])
        draft.say("evicted", victim, f"gives way to {name}", Cause("evict", overlay.source, name))
    for victim in seized:
        lower = draft.steps[victim]
        draft.move(victim, finish(lower.record, None, now, f"displaced by {name}"))
        draft.say("displaced", victim, f"gives way to {name}", cause)
    gpus = placement.gpus.get(Subject("workload", name), ())
    record = replace(
        enter(step.record, "evicting", now), gpus=gpus, evicted=tuple(evicted), seized=tuple(seized), outcome=None
    )
    draft.move(name, record)
    draft.say(
        "admitted", name, f"leases taken on {len({x.gpu for x in draft.leases if x.overlay == name})} GPUs", cause
    )
    draft.want()
    seat(draft)


def _earliest(draft: Draft) -> float | None:
    """When the next live overlay is predicted to end: the first moment at which the answer may differ."""
    ends = [
        predicted_end(s.record, s.spec.makespan, draft.now.wall)
        for s in draft.steps.values()
        if s.spec is not None and s.live
    ]
    return min(ends, default=None)
