"""The way back: which displaced endpoints return once overlays are over, and where to, as it is predicted now."""

from __future__ import annotations

from msgspec import Struct

from reconciler.plan.board import Tenant, endpoint_key
from reconciler.plan.draft import Draft
from reconciler.plan.endpoints import holds_of
from reconciler.plan.ledger import Lease, Nap
from reconciler.plan.naps import wakes
from reconciler.plan.observed import Incarnation, Subject
from reconciler.plan.placement import place
from reconciler.plan.settling import own_need
from reconciler.spec.spec import EndpointSpec


class Return(Struct, frozen=True):
    """One endpoint's way back."""

    endpoint: EndpointSpec
    holders: tuple[str, ...]
    """Overlays that displaced it, or set it aside since, which are over by then."""
    after: tuple[str, ...]
    """Overlays that have to be over first: also those that only hold a GPU which it comes back to."""
    nap: Nap | None = None
    """It sleeps and is woken up where it is; else it is started:"""
    gpus: tuple[str, ...] = ()
    memory_bytes: tuple[int, ...] = ()
    exclusive: bool = False


def returning(draft: Draft, ending: frozenset[str]) -> list[Return]:
    """Who comes back once these overlays are over, the most important first, and where."""
    found: list[Return] = []
    if not ending:
        return found
    board = draft.board.without(frozenset(f"overlay/{n}" for n in ending))
    baseline = draft.situation.spec.endpoints
    for lease in draft.leases:  # which the board no longer shows
        current = _stays(draft, lease) if lease.overlay in ending else None
        if current is not None:
            board.add(Tenant(endpoint_key(lease.subject.name), 0, holds_of(current)))
    displaced = {n for step in draft.steps.values() for n in step.record.evicted if n in baseline}
    displaced |= {n for n in draft.owners if n in baseline and draft.records[n].evicted_by is not None}
    for name in sorted(displaced, key=lambda n: (-baseline[n].priority, n)):
        endpoint = baseline[name]
        holders, owner = tuple(o for o in draft.evicted_from(name) if o in ending), draft.owners.get(name)
        if owner is not None and owner not in holders:
            holders = (*holders, owner) if owner in ending else ()
        subject = Subject("endpoint", name)
        current = draft.standings[name].current
        placed = subject in draft.arriving or (current is not None and current.id not in draft.leaving)
        dozes = name in draft.naps and draft.naps[name].waking is None and not wakes(draft, name)
        elsewhere = name in draft.owners and endpoint_key(name) not in board.tenants
        if not holders or endpoint.state != "running" or (placed and not dozes and not elsewhere):
            continue
        nap = draft.naps.get(name)
        if nap is not None and dozes and current is not None:
            found.append(Return(endpoint, holders, _holding(draft, ending, holders, current.gpus), nap))
            continue
        need = own_need(draft, endpoint)
        placement = place([need], board) if need else None
        if need is None or placement is None:
            continue
        gpus = placement.gpus[subject]
        sizes = tuple(need.memory_bytes[g] for g in gpus)
        board.add(Tenant(endpoint_key(name), endpoint.priority, need.holds(gpus)))
        after = _holding(draft, ending, holders, gpus)
        found.append(Return(endpoint, holders, after, None, gpus, sizes, need.exclusive))
    return found


def _stays(draft: Draft, lease: Lease) -> Incarnation | None:
    """What runs on the lease of an overlay and goes on running there when that is over.

    It is what the baseline asks for as well; or the overlay is over already, and nobody has asked it to leave.
    """
    name = lease.subject.name
    if lease.subject.kind != "endpoint" or name not in draft.wanted:
        return None
    endpoint, current = draft.situation.running.get(name), draft.standings[name].current
    if current is None or current.id in draft.leaving:
        return None
    if name in draft.owners and (
        endpoint is None
        or current.process_hash != endpoint.process_hash
        or not draft.situation.satisfies(endpoint.gpus, current.gpus)
    ):
        return None
    return current


def _holding(draft: Draft, ending: frozenset[str], holders: tuple[str, ...], gpus: tuple[str, ...]) -> tuple[str, ...]:
    """The overlays that displaced it, and whoever else's still holds one of these GPUs: no prefix may oversubscribe."""
    held = {x.overlay for x in draft.leases if x.gpu in gpus and x.overlay in ending}
    return tuple(sorted({*holders, *held}))
