"""What a waiting overlay asks for: its needs, the ways to have what it requires, and the rules that hold for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

from msgspec.structs import replace

from reconciler.plan.actions import Blocked
from reconciler.plan.board import Board, Need
from reconciler.plan.draft import OVERRIDING, Draft
from reconciler.plan.lacks import no_such_gpu
from reconciler.plan.observed import Obstacle, Subject
from reconciler.plan.overlays import predicted_end
from reconciler.plan.preemption import Consents
from reconciler.plan.settling import need_of, own_need
from reconciler.plan.windows import hard_end, not_to_hinder
from reconciler.spec.spec import EndpointSpec, OverlaySpec


def own_needs(draft: Draft, overlay: OverlaySpec) -> list[Need] | None:
    """The overlay's own GPUs and those of the endpoints it sets; None when a pin does not exist."""
    needs: list[Need | None] = []
    if overlay.gpus is not None:
        needs.append(need_of(draft.situation, Subject("workload", overlay.name), overlay.gpus, overlay.memory))
    needs.extend(own_need(draft, e) for e in running(overlay))
    found = [n for n in needs if n is not None]
    return found if len(found) == len(needs) else None


def running(overlay: OverlaySpec) -> list[EndpointSpec]:
    """The endpoints that it runs a version of its own of."""
    return [e for _, e in sorted(overlay.endpoints.items()) if e.state == "running"]


def provider_choices(
    draft: Draft, overlay: OverlaySpec, board: Board, *, placeless: bool = False
) -> Iterator[list[Need]]:
    """Every way to have what the overlay requires: nothing to do, or standby endpoints to start, as needs.

    Who is wanted and has no place, or cannot be started, provides nothing: victims would wait for it in vain. With
    `placeless` it counts, and so does who is set aside by another overlay now.

    A standby endpoint that was started for another overlay is there as long as that one is. So on a board without that
    overlay it is not; and where the overlay may be displaced, its provider may be taken over as well: then its place is
    one of the needs, where it runs (one that does not run yet has any). Or others are started in its stead.
    """
    options: list[list[tuple[Need, ...]]] = []
    lent = {x.subject.name: by for x in draft.leases if (by := draft.lender(x.subject.name)) is not None}
    for capability in overlay.requires:
        aside = draft.situation.running if placeless else {}
        after = {**aside, **draft.wanted, **{e.name: e for e in running(overlay)}}
        for name in set(overlay.endpoints) - {e.name for e in running(overlay)}:
            after.pop(name, None)
        ending = {name for name, by in lent.items() if f"overlay/{by}" not in board.tenants}
        there = [
            name
            for name, e in after.items()
            if capability in e.capabilities
            and draft.records[name].failed is None
            and (placeless or name in overlay.endpoints or draft.has_place(name))
            and name not in ending
        ]
        if not all(name in lent and _may_end(draft, lent[name]) for name in there):
            continue
        base = draft.situation.spec.endpoints
        taken = {*after, *(x.subject.name for x in draft.leases if x.subject.kind == "endpoint")} - ending
        able = [e for e in base.values() if e.state == "standby" and capability in e.capabilities]
        taken |= overlay.endpoints.keys()
        standby = [e for e in able if e.name not in taken and draft.records[e.name].failed is None]
        found = [*(base[n] for n in sorted(there)), *sorted(standby, key=lambda e: (-e.priority, e.name))]
        if not placeless:
            obstacles = draft.situation.observed.obstacles
            found = [e for e in found if e.process_hash not in obstacles or (e.name in there and _runs(draft, e))]
        needs = [_taken_over(draft, e) if e.name in there else own_need(draft, e) for e in found]
        options.append([*([()] if there else []), *((need,) for need in needs if need is not None)])
    for choice in product(*options):
        unique = {n.subject: n for needs in choice for n in needs}
        yield [unique[s] for s in sorted(unique)]


def _may_end(draft: Draft, name: str) -> bool:
    """Whether the work of an overlay may be displaced, by whom ever."""
    step = draft.steps[name].spec
    return step is not None and step.workload is not None and step.workload.preemptible


def _runs(draft: Draft, endpoint: EndpointSpec) -> bool:
    return draft.standings[endpoint.name].current is not None


def _taken_over(draft: Draft, endpoint: EndpointSpec) -> Need | None:
    """What a standby endpoint needs to go on for another overlay than the one that it was started for."""
    need, leases = own_need(draft, endpoint), draft.leased(Subject("endpoint", endpoint.name))
    if need is None or not _runs(draft, endpoint):
        return need
    places, sizes = tuple(x.gpu for x in leases), {x.gpu: x.memory_bytes for x in leases}
    return replace(need, candidates=places, count=len(places), memory_bytes=sizes, exclusive=leases[0].exclusive)


def providers_of(overlay: OverlaySpec, needs: Iterable[Need]) -> frozenset[str]:
    """Names of the endpoints among its needs that it requires, and does not set itself."""
    engines = {need.subject.name for need in needs if need.subject.kind == "endpoint"}
    return frozenset(engines - overlay.endpoints.keys())


def consents_of(draft: Draft, overlay: OverlaySpec, begin: float | None = None) -> Consents:
    """The rules of displacement that hold for it, as everybody is seated now, were it to begin at `begin` (None: now).

    A window to come that it may not delay has to find its victims as lawful as they are now.
    """
    begin = draft.now.wall if begin is None else begin
    windows = tuple(not_to_hinder(draft, overlay))
    last = hard_end(draft, overlay, begin) if windows else begin
    stopping = frozenset(n for n in overlay.endpoints if would_stop(draft, overlay, n))
    live = {n: s.spec for n, s in draft.steps.items() if s.spec is not None and s.record.state in OVERRIDING}
    leaving = frozenset(x.incarnation.subject.name for x in draft.leaving.values())
    displaced = {n: s.record.evicted for n, s in draft.steps.items()}
    engines = [(x.overlay, x.subject.name) for x in draft.leases if x.subject.kind == "endpoint"]
    lent = {n: frozenset(name for by, name in engines if by == n) for n, _ in engines}
    ending = frozenset(n for n, s in draft.steps.items() if s.record.state == "completing")
    return Consents(
        draft.situation, overlay, draft.wanted, draft.standings, live, displaced, stopping, leaving,
        draft.has_place, draft.calm.keys(), draft.now.plus(begin - draft.now.wall), last, windows, lent, ending,
    )  # fmt: skip


def rivals_of(draft: Draft, overlay: OverlaySpec) -> list[str]:
    """Overlays that hold places for endpoints which this one sets, or set them while this one would run them."""
    names = set(overlay.endpoints)
    holding = {x.overlay for x in draft.leases if x.subject.kind == "endpoint" and x.subject.name in names}
    runs = {e.name for e in running(overlay)}
    in_force = [s.spec for s in draft.steps.values() if s.spec is not None and s.record.state in OVERRIDING]
    return sorted(holding | {other.name for other in in_force if runs & set(other.endpoints)})


def heirs_of(draft: Draft, overlay: OverlaySpec) -> list[str]:
    """Overlays in force that will go on with a standby endpoint which this one sets, once whoever runs it is over."""
    base = draft.situation.spec.endpoints
    engines = [base[n] for n in overlay.endpoints if n in base and draft.leased(Subject("endpoint", n))]
    lent = {c for engine in engines if engine.state == "standby" for c in engine.capabilities}
    in_force = [s.spec for s in draft.steps.values() if s.spec is not None and s.record.state in OVERRIDING]
    return sorted(other.name for other in in_force if lent & set(other.requires))


def would_stop(draft: Draft, overlay: OverlaySpec, name: str) -> bool:
    """Whether what the overlay sets for an endpoint ends the process that runs now."""
    current, new = draft.standings[name].current, overlay.endpoints[name]
    if current is None:
        return False
    same = new.process_hash == current.process_hash and draft.situation.satisfies(new.gpus, current.gpus)
    return new.state != "running" or not same


def can_stop(draft: Draft, name: str) -> bool:
    """Whether an endpoint is seen well enough to be stopped."""
    standing = draft.standings[name]
    return standing.current is not None and standing.state != "unknown" and draft.situation.sees(standing.current.gpus)


def obstacle_of(draft: Draft, overlay: OverlaySpec) -> Obstacle | None:
    """What is certain to keep its work from starting; None: nothing that is known, or it has none."""
    return draft.situation.observed.obstacles.get(overlay.placement_hash) if overlay.workload is not None else None


def cannot_start(draft: Draft, overlay: OverlaySpec) -> Blocked | None:
    """That its work, or an endpoint that it sets, cannot be started as it is: nobody gives way for it.

    None: nothing is known that would keep them from it.
    """
    obstacles, found = draft.situation.observed.obstacles, obstacle_of(draft, overlay)
    told = [f"its work cannot be started: {found.message}"] if found is not None else []
    hints = [found.hint] if found is not None else []
    for endpoint in running(overlay):
        current, found = draft.standings[endpoint.name].current, obstacles.get(endpoint.process_hash)
        if found is not None and (current is None or current.process_hash != endpoint.process_hash):
            told.append(f"{endpoint.name} cannot be started: {found.message}")
            hints.append(found.hint)
    if not told:
        return None
    ways = tuple(dict.fromkeys(hint for hint in hints if hint is not None))
    return Blocked(Subject("workload", overlay.name), "CannotStart", "; ".join(told), ways)


def badly_pinned(draft: Draft, overlay: OverlaySpec) -> Blocked:
    """That what an overlay asks for is pinned to a GPU that this node does not have."""
    own = () if overlay.gpus is None else (overlay.gpus,)
    message, hint = no_such_gpu(draft.situation, *own, *(e.gpus for e in running(overlay)))
    return Blocked(Subject("workload", overlay.name), "NoSuchGpu", message, (hint,))


def not_preemptible(draft: Draft, overlay: OverlaySpec) -> Blocked | None:
    """That an overlay sets aside what may not be displaced; None: it does not."""
    aside = sorted(n for n in overlay.endpoints if would_stop(draft, overlay, n) and n in draft.wanted)
    firm = [n for n in aside if not draft.wanted[n].preemptible]
    if not firm:
        return None
    message = f"it sets aside {', '.join(firm)}, which is not preemptible"
    return Blocked(Subject("workload", overlay.name), "NotPreemptible", message, ("set preemptible: true on it",))


def no_provider(draft: Draft, overlay: OverlaySpec, slot: float | None = None) -> Blocked:
    """Why nothing provides what an overlay requires: nothing offers it, or what does is set aside, or has no place.

    Args:
        draft: the decision so far
        overlay: who asks
        slot: epoch seconds at which it would have a place, were the provider there; None: not known
    """
    subject, base = Subject("workload", overlay.name), draft.situation.running
    why, back, hints = [], [], []

    def offers(endpoint: EndpointSpec | None) -> bool:
        return endpoint is not None and not set(overlay.requires).isdisjoint(endpoint.capabilities)

    endpoints, obstacles = draft.situation.spec.endpoints, draft.situation.observed.obstacles
    standby = {n: e for n, e in endpoints.items() if e.state == "standby" and n not in draft.wanted}
    spare = {n: e for n, e in standby.items() if draft.records[n].failed or e.process_hash in obstacles}
    for name, endpoint in sorted({**spare, **draft.wanted}.items()):
        if not offers(endpoint):
            continue
        blocked = draft.blocked.get(Subject("endpoint", name))
        if draft.records[name].failed is not None:
            why.append(f"{name} (failed)")
            hints.append(f"`reconciler reset {name}`")
        elif name in spare:
            obstacle = obstacles[endpoint.process_hash]
            why.append(f"{name} (it cannot be started: {obstacle.message})")
            hints += [obstacle.hint] if obstacle.hint is not None else []
        elif not draft.has_place(name):
            why.append(f"{name} ({blocked.reason})" if blocked is not None else name)
            back.append(blocked.earliest_start if blocked is not None else None)
    for name, engine in draft.situation.spec.endpoints.items():
        told = name in spare or name in draft.wanted
        leases = draft.leased(Subject("endpoint", name)) if offers(engine) and not told else ()
        if leases and engine.state == "standby":
            why.append(f"{name} (ends with {leases[0].overlay})")
            back.append(None)
    for name, owner in sorted(draft.owners.items()):
        step = draft.steps[owner]
        if step.spec is not None and not offers(draft.wanted.get(name)) and offers(base.get(name)):
            why.append(f"{name} (set aside by {owner})")
            back.append(predicted_end(step.record, step.spec.makespan, draft.now.wall))
    if not why:
        message = f"nothing offers {', '.join(overlay.requires)}"
        return Blocked(subject, "NoProvider", message, ("start or add a provider",))
    message = f"it requires {', '.join(overlay.requires)}, and what offers it has no place: {', '.join(why)}"
    hints.append("wait for its return, or add a standby provider" if back else "add a standby provider")
    known = [wall for wall in back if wall is not None]
    earliest = max(slot, min(known)) if known and slot is not None else None
    return Blocked(subject, "NoProvider", message, tuple(hints), earliest, transient=True)
