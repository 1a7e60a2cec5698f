"""Who has a place: leases first, then those that run, then those that are wanted and do not run yet.

Seating never displaces anybody. What comes out is the board that admission decides on, who has to leave, who is to be
started where, and who is wanted and finds no place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Literal

from msgspec.structs import replace

from reconciler.plan.actions import Blocked, Cause
from reconciler.plan.board import Board, Hold, Need, Tenant, Tenants, endpoint_key
from reconciler.plan.draft import Draft, Leaving
from reconciler.plan.edits import carry_out as carry_out_edits
from reconciler.plan.edits import is_as_wanted, seat_running
from reconciler.plan.endpoints import Standing
from reconciler.plan.guests import find_guests
from reconciler.plan.ledger import EndpointRecord
from reconciler.plan.moving import in_words, under_way
from reconciler.plan.naps import lie_down, rise
from reconciler.plan.observed import Incarnation, Subject
from reconciler.plan.placement import place
from reconciler.plan.search import solve
from reconciler.plan.settling import held_by_overlays, need_elsewhere, settle
from reconciler.plan.windows import find_returns, place_owed
from reconciler.plan.wishes import MOST_TOGETHER, Wish
from reconciler.spec.spec import EndpointSpec, GpuPins


def seat(draft: Draft) -> None:
    """Make board, leaving, arriving and blocked anew from the leases and records as they are now."""
    asking = _seat_one_by_one(draft)
    places = _places_together(draft, asking)
    if places:
        draft.places |= places
        _seat_one_by_one(draft)
    draft.returns = find_returns(draft)


def _seat_one_by_one(draft: Draft) -> list[list[EndpointSpec]]:
    """Seat everybody; returns those who looked for a place, who comes first in front, in classes."""
    situation = draft.situation
    rooms = situation.rooms
    draft.rouse()
    board = Board(
        {u: r.capacity_bytes for u, r in rooms.items() if r.unusable is None and u not in draft.quarantines},
        {u: r.gpu.numa_node for u, r in rooms.items()},
        islands={u: r.gpu.nvlink_island for u, r in rooms.items()},
        tenants=Tenants(draft.residents),
    )
    draft.board = board.without(map(endpoint_key, draft.roused))
    draft.leaving, draft.arriving, draft.blocked, draft.kept_off, draft.naps = {}, {}, {}, {}, {}
    _seat_leases(draft)
    homeless: list[EndpointSpec] = []
    edited: list[EndpointSpec] = []
    for name in draft.stirring():
        endpoint, standing = draft.wanted.get(name), draft.standings[name]
        fate = _keep(draft, name, endpoint, standing)
        if endpoint is None or fate == "stays":
            continue
        if fate == "edited":
            edited.append(endpoint)
        elif draft.records[name].failed is None:
            homeless.append(endpoint)
    for need in rise(draft):
        occupied = Blocked(need.subject, "GpuOccupied", "it sleeps: the memory it had is in use", transient=True)
        draft.block(held_by_overlays(draft, need) or occupied)
    away = [e.name for e in homeless if draft.records[e.name].evicted_by is not None]
    aside = [name for name in draft.owners if name in situation.running]
    draft.owed = {name: place_owed(draft, name) for name in (*away, *aside, *draft.naps)}
    # Who moves has been promised its place. Who ran up to now keeps its place before one that had none: nothing was
    # stopped in vain. Whose place an overlay takes comes last: it is no reason for another one to lose the place that
    # it has found.
    moved: list[EndpointSpec] = []
    ran: list[EndpointSpec] = []
    new: list[EndpointSpec] = []
    displaced: list[EndpointSpec] = []
    for endpoint in sorted(homeless, key=_by_priority):
        if draft.evicted_from(endpoint.name):
            displaced.append(endpoint)
        elif under_way(draft, endpoint.name) is not None:
            moved.append(endpoint)
        else:
            (ran if situation.incarnations(Subject("endpoint", endpoint.name)) else new).append(endpoint)
    anew, given_up = carry_out_edits(draft, sorted(edited, key=_by_priority), [*moved, *ran])
    asking = [moved, ran, anew, new, sorted([*displaced, *given_up], key=_by_priority)]
    draft.board.contested = _contested(draft, chain.from_iterable(asking))
    for endpoint in sorted(chain.from_iterable(asking), key=lambda e: draft.places.get(e.name) == ()):
        settle(draft, endpoint, draft.standings[endpoint.name])
    return asking


def _contested(draft: Draft, asking: Iterable[EndpointSpec]) -> Counter[str]:
    """How many pins of those that look for a place, or wait, name each GPU."""
    waiting = (s.spec for s in draft.steps.values() if s.spec is not None and s.record.state == "pending")
    claims = [*(endpoint.gpus for endpoint in asking), *(overlay.gpus for overlay in waiting)]
    pins: Counter[str] = Counter()
    for claim in claims:
        if isinstance(claim, GpuPins):
            pins.update(draft.situation.resolve_pins(claim) or ())
    return pins


def _places_together(draft: Draft, asking: list[list[EndpointSpec]]) -> dict[str, tuple[str, ...]]:
    """The least places for all who look for one, where each by itself left one out or had one move in vain.

    Who is left out has none. Empty: as good as it is.
    """
    rank = {e.name: (-i, e.priority) for i, group in enumerate(asking) for e in group}
    needs: dict[str, Need] = {}
    for endpoint in chain.from_iterable(asking):
        need, blocked = need_elsewhere(draft, endpoint), draft.blocked.get(Subject("endpoint", endpoint.name))
        held = blocked is not None and blocked.reason == "Held"
        fixed = held or under_way(draft, endpoint.name) is not None
        if need is not None and not fixed and not draft.leased(need.subject):
            needs[endpoint.name] = need
    if not 1 < len(needs) <= MOST_TOGETHER:
        return {}
    board = draft.board.without(frozenset(map(endpoint_key, needs)))
    better = False
    for name, need in list(needs.items()):
        arriving = draft.arriving.get(need.subject)
        if arriving is None and endpoint_key(name) not in draft.board.tenants:  # left out
            if place([need], board) is None:
                del needs[name]
            else:
                better = True
        elif arriving is not None and set(need.prefer) - set(arriving.gpus):  # moved
            home = replace(need, candidates=tuple(g for g in need.candidates if g in need.prefer))
            better |= place([home], board) is not None
    if not better or all(n.count == len(n.candidates) for n in needs.values()):
        return {}
    order = {r: i for i, r in enumerate(sorted(set(rank.values())))}
    wishes = [Wish(endpoint_key(n), ((need,),), rank=order[rank[n]]) for n, need in needs.items()]
    choice = solve(wishes, board)
    places = {} if choice is None else {n: choice.gpus.get(Subject("endpoint", n), ()) for n in needs}
    now = {n: draft.arriving[need.subject].gpus if need.subject in draft.arriving else () for n, need in needs.items()}
    return {} if places == now else places


def _by_priority(endpoint: EndpointSpec) -> tuple[int, str]:
    return -endpoint.priority, endpoint.name


def _seat_leases(draft: Draft) -> None:
    """Seat overlays; each with what is leased, less what its guest has of it: that is no capacity any more."""
    draft.guests = find_guests(draft)
    for name in sorted({x.overlay for x in draft.leases}):
        holds: dict[str, Hold] = {}
        for lease in draft.leases:
            if lease.overlay == name:
                guest = draft.guests.get(lease.gpu, {}).get(name, 0)
                before = holds.get(lease.gpu, Hold(-guest, exclusive=False))
                size = before.memory_bytes + lease.memory_bytes
                holds[lease.gpu] = Hold(size, before.exclusive or lease.exclusive)
        draft.board.add(Tenant(f"overlay/{name}", draft.steps[name].record.priority, holds))


def _keep(
    draft: Draft, name: str, endpoint: EndpointSpec | None, standing: Standing
) -> Literal["stays", "leaves", "edited"]:
    """Decide on what runs of one endpoint.

    It stays where it is, it leaves (or nothing runs), or the files want another process in its stead (or did: an
    overlay displaced that one).
    """
    situation, subject = draft.situation, Subject("endpoint", name)
    for extra in situation.living(subject)[1:]:  # two at once: the older one counts, the other has no place
        if standing.state != "unknown" and extra.phase != "unknown":
            draft.leaving[extra.id] = Leaving(extra, "a second incarnation", Cause("cleanup"))
    current = standing.current
    if current is None:
        return "leaves"
    leaving = _must_leave(draft, name, endpoint, standing, current)
    if leaving is None and endpoint is not None and standing.state != "unknown" and situation.sees(current.gpus):
        displaced = any(draft.evicted_from(name).values()) and draft.records[name].nap is None
        if displaced or not is_as_wanted(draft, endpoint, current):
            return "edited"
    if leaving is not None and not situation.sees(current.gpus):
        message = "its GPUs cannot be read at the moment; nothing is done to it"
        draft.block(Blocked(subject, "GpuUnknown", message, transient=True))
        leaving = None
    awake = lie_down(draft, endpoint, current, leaving) if endpoint is not None else ""
    if awake is None:
        return "stays"
    if leaving is None:
        seat_running(draft, draft.board, name, endpoint)
        return "stays"
    draft.leaving[current.id] = replace(leaving, reason=f"{leaving.reason}; {awake}") if awake else leaving
    draft.records[name] = replace(draft.records[name], ending=_ending(draft.records[name], standing, leaving))
    return "leaves"


def _ending(record: EndpointRecord, standing: Standing, leaving: Leaving) -> str | None:
    """What is wrong with one that leaves, if that is why it does; None: nothing, or it would leave anyway."""
    if standing.must_restart is not None:
        return (record.ending or f"it was {standing.must_restart}") if leaving.cause.kind == "drift" else None
    if record.nap is not None and record.nap.failed is not None and leaving.cause.kind in ("drift", "evict"):
        return record.nap.failed
    return record.ending


def _must_leave(
    draft: Draft, name: str, endpoint: EndpointSpec | None, standing: Standing, current: Incarnation
) -> Leaving | None:
    """Why a running incarnation has to go, if it has to.

    The first that holds:

    1. unknown: it stays, whatever the files say
    2. an overlay sets it aside, or displaced it
    3. nobody wants it (any more)
    4. it does not serve: its leader is gone, unhealthy for too long, or never ready
    5. it is moved
    6. a stop is under way already: it is seen through; or its engine failed to sleep or to wake up
    7. a clean start was asked for
    """
    situation = draft.situation
    if standing.state == "unknown":
        return None  # 1
    owner = draft.owners.get(name)
    if endpoint is None and owner is not None:
        cause = Cause("overlay", draft.steps[owner].record.source, owner)
        return Leaving(current, f"set aside by {owner}", cause, owner)  # 2
    for overlay, gpus in draft.evicted_from(name).items():
        if gpus & set(current.gpus):
            step = draft.steps[overlay]
            cause = Cause("evict", step.record.source, overlay)
            waits = any(x.overlay == overlay and x.gpu in current.gpus for x in draft.leases)
            return Leaving(current, f"gives way to {overlay}", cause, overlay if waits else None)  # 2
    if endpoint is None:  # 3
        known = situation.spec.endpoints.get(name)
        if known is None:
            return Leaving(current, "no longer in the set points", Cause("removed"))
        return Leaving(current, f"its set point is {known.state}", Cause("setpoint", known.source))
    if current.phase in ("exited", "vanished"):
        return Leaving(current, standing.reason, Cause("drift", endpoint.source, detail="leftovers"))  # 4
    if standing.must_restart is not None:
        return Leaving(current, standing.must_restart, Cause("drift", endpoint.source, detail="unhealthy"))  # 4
    move = under_way(draft, name)
    if move is not None and move.incarnation == current.id:
        return Leaving(current, *in_words(draft, move))  # 5
    record = draft.records[name]
    if current.stop is not None:  # 6
        broken = Cause("drift", endpoint.source, detail="it is ended")
        cause = broken if record.ending else Cause("cleanup", endpoint.source)
        return Leaving(current, record.ending or "a stop is under way", cause)
    if record.nap is not None and record.nap.failed is not None:
        return Leaving(current, record.nap.failed, Cause("drift", endpoint.source, detail="sleep"))  # 6
    renew = record.renew_before
    if renew is not None and current.started.mono < renew.mono:
        return Leaving(current, "a clean start was asked for", Cause("request", endpoint.source))  # 7
    return None
