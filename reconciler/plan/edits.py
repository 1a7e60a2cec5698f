"""Edits of what runs: who is stopped as the files want another process in its stead, and whose edit has to wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from reconciler.plan.actions import Blocked, Cause
from reconciler.plan.board import Board, Tenant, endpoint_key
from reconciler.plan.draft import Draft, Leaving
from reconciler.plan.endpoints import as_tenant, holds_of
from reconciler.plan.moving import under_way
from reconciler.plan.observed import Incarnation, Subject
from reconciler.plan.placement import place
from reconciler.plan.settling import need_elsewhere, own_need
from reconciler.spec.spec import EndpointSpec


def is_as_wanted(draft: Draft, endpoint: EndpointSpec, current: Incarnation) -> bool:
    """Whether what runs is what the files ask for, where they ask for it."""
    if current.process_hash != endpoint.process_hash:
        return False
    leases = draft.leased(current.subject)
    if leases:
        return sorted(x.gpu for x in leases) == sorted(current.gpus)
    return draft.situation.satisfies(endpoint.gpus, current.gpus)


def carry_out(
    draft: Draft, edited: Sequence[EndpointSpec], before: Sequence[EndpointSpec]
) -> tuple[list[EndpointSpec], list[EndpointSpec]]:
    """Have those leave whose new version has a place; the others stay as they are, and their edit waits.

    An edited one counts as if it ran where it is to run, and its old place as free. So who is displaced there has given
    up both: it keeps the old one as long as nobody else was given that, or can only go there.

    Args:
        draft: the decision so far; who stays on is seated on its board here
        edited: those that run otherwise than the files say or were displaced elsewhere than where they run, the most
            important first
        before: those that are given their places before them, in this order

    Returns:
        Those that leave for a new place, and those that leave without one.
    """
    waiting = {e.name: blocked for e in edited if (blocked := _not_startable(draft, e)) is not None}
    for endpoint in edited:
        if endpoint.name in waiting:
            seat_running(draft, draft.board, endpoint.name, endpoint)
            draft.block(waiting[endpoint.name])
    edited = [e for e in edited if e.name not in waiting]
    if not edited:
        return [], []
    base = draft.board.without(())
    for endpoint in before:
        _hold_place(draft, endpoint, base)
    displaced = [e for e in edited if any(draft.evicted_from(e.name).values())]
    firm = [e for e in edited if e not in displaced]
    keeping = [e for e in displaced if _has_room_still(draft, e, base)]
    board, going = _new_places(draft, firm, keeping, base)
    if any(_is_crowded(draft, e, board) for e in firm if e not in going):
        board, going = _new_places(draft, firm, (), base)
    moving, given_up = _displaced_elsewhere(draft, displaced, board)
    going += moving
    for endpoint in edited:
        current = draft.standings[endpoint.name].current
        if current is None or endpoint in given_up:
            continue
        if endpoint in going:
            reason, cause = _why(draft, endpoint)
            draft.leaving[current.id] = Leaving(current, reason, cause, draft.owners.get(endpoint.name))
            continue
        seat_running(draft, draft.board, endpoint.name, endpoint)
        if not is_as_wanted(draft, endpoint, current):
            message = "its edit waits: the new version has no place yet, so the running one stays"
            draft.block(Blocked(current.subject, "EditWaits", message, transient=True))
    return going, given_up


def _not_startable(draft: Draft, endpoint: EndpointSpec) -> Blocked | None:
    """That an edit waits since its new version cannot be started, where the edit is all that it would be ended for."""
    current, record = draft.standings[endpoint.name].current, draft.records[endpoint.name]
    if current is None or current.process_hash == endpoint.process_hash:
        return None
    if endpoint.name in draft.owners or record.evicted_by is not None or draft.evicted_from(endpoint.name):
        return None
    obstacle = draft.situation.observed.obstacles.get(endpoint.process_hash)
    if obstacle is None:
        return None
    message = f"its edit waits: the new version cannot be started ({obstacle.message}), so the running one stays"
    return Blocked(current.subject, "EditWaits", message, (obstacle.hint,) if obstacle.hint is not None else ())


def _new_places(
    draft: Draft, edited: Sequence[EndpointSpec], keeping: Iterable[EndpointSpec], base: Board
) -> tuple[Board, list[EndpointSpec]]:
    """Whose new version has a place beside those that `base` shows and those that keep theirs; and all of them seated.

    All edits together, so that endpoints may change places; where that does not fit, one after the other. Places are
    sought in the order in which they are given out afterwards: nobody is stopped for a place that is not there.
    """
    board = base.without(())
    for endpoint in keeping:
        seat_running(draft, board, endpoint.name, endpoint)
    together = board.without(())
    if all(_fits_anew(draft, endpoint, together) for endpoint in edited):
        return together, list(edited)
    for endpoint in edited:
        seat_running(draft, board, endpoint.name, endpoint)
    return board, [endpoint for endpoint in edited if _fits_anew(draft, endpoint, board)]


def _displaced_elsewhere(
    draft: Draft, displaced: Sequence[EndpointSpec], board: Board
) -> tuple[list[EndpointSpec], list[EndpointSpec]]:
    """Who of those that an overlay displaced where they were to run leaves for a new place, and who without one.

    1. it runs otherwise than wanted, and there is another place for that → it leaves for it
    2. nobody was given its old place meanwhile                          → it stays there
    3. otherwise                                                         → it gives way
    """
    moving, given_up = [], []
    for endpoint in displaced:
        current, holders = draft.standings[endpoint.name].current, sorted(draft.evicted_from(endpoint.name))
        if current is None:
            continue
        if not is_as_wanted(draft, endpoint, current) and _fits_anew(draft, endpoint, board):
            moving.append(endpoint)  # 1
            continue
        seat_running(draft, board, endpoint.name, endpoint)
        if not _is_crowded(draft, endpoint, board):
            continue  # 2
        board.remove(endpoint_key(endpoint.name))
        cause = Cause("evict", draft.steps[holders[0]].record.source, holders[0])
        draft.leaving[current.id] = Leaving(current, f"gives way to {holders[0]}", cause)
        given_up.append(endpoint)  # 3
    return moving, given_up


def _hold_place(draft: Draft, endpoint: EndpointSpec, board: Board) -> None:
    """Keep the place that one will have which was promised it or is started again, as the files have it now."""
    move = under_way(draft, endpoint.name)
    if move is not None:
        need = own_need(draft, endpoint)
        if need is not None:
            board.add(Tenant(endpoint_key(endpoint.name), endpoint.priority, need.holds(move.gpus)))
    elif not _fits_anew(draft, endpoint, board):
        seat_running(draft, board, endpoint.name, endpoint)


def _has_room_still(draft: Draft, endpoint: EndpointSpec, base: Board) -> bool:
    board = base.without(())
    seat_running(draft, board, endpoint.name, endpoint)
    return not _is_crowded(draft, endpoint, board)


def _is_crowded(draft: Draft, endpoint: EndpointSpec, board: Board) -> bool:
    """Whether others were given so much of the place where an endpoint runs that it does not fit beside them."""
    current = draft.standings[endpoint.name].current
    return current is not None and any(board.is_crowded(gpu) for gpu in current.gpus)


def _fits_anew(draft: Draft, endpoint: EndpointSpec, board: Board) -> bool:
    """Whether an endpoint, as the files have it now, has a place on the board, which it then takes."""
    subject = Subject("endpoint", endpoint.name)
    if draft.leased(subject):
        return True
    need = need_elsewhere(draft, endpoint)
    if need is None:
        return False
    without = board.without((endpoint_key(endpoint.name),))
    chosen = draft.places.get(endpoint.name, ())
    kept = replace(need, candidates=tuple(g for g in need.candidates if g in chosen))
    placement = (place([kept], without) if chosen else None) or place([need], without)
    if placement is None:
        return False
    board.add(Tenant(endpoint_key(endpoint.name), endpoint.priority, need.holds(placement.gpus[subject])))
    return True


def seat_running(draft: Draft, board: Board, name: str, endpoint: EndpointSpec | None) -> None:
    """Seat what runs of an endpoint, wanted or not; who has leases is seated with its overlay."""
    current = draft.standings[name].current
    if current is None or draft.leased(current.subject):
        return
    if endpoint is None:
        board.add(Tenant(endpoint_key(name), 0, holds_of(current)))
    else:
        ready = draft.standings[name].state == "healthy"
        board.add(as_tenant(draft.situation, current, endpoint, ready=ready))


def _why(draft: Draft, endpoint: EndpointSpec) -> tuple[str, Cause]:
    owner, evicted_by = draft.owners.get(endpoint.name), draft.records[endpoint.name].evicted_by
    if owner is not None:
        return f"overlay {owner} sets it differently", Cause("overlay", endpoint.source, owner)
    if evicted_by is not None:
        return f"{evicted_by} no longer needs its place", Cause("restore", endpoint.source, evicted_by)
    return "its set points were edited", Cause("edit", endpoint.source)
