"""A move that was decided: how long it is in force, and what people are told of it."""

from __future__ import annotations

from msgspec.structs import replace

from reconciler.plan.actions import Cause
from reconciler.plan.board import endpoint_key
from reconciler.plan.draft import OVERRIDING, Draft
from reconciler.plan.ledger import Move
from reconciler.plan.observed import Subject
from reconciler.spec.spec import GpuCount


def under_way(draft: Draft, name: str) -> Move | None:
    """The move of an endpoint that is decided and not over; None: there is none, or it is called off.

    1. it is wanted no more, was given up, or is to have other GPUs than it was promised → called off
    2. it has come where it was to come                                                → over
    3. who ran was asked to stop, or has ended                                         → it is seen through
    4. the overlay for which it makes room holds or looks for its place, or the        → in force
       endpoint for which it does still has none
    5. otherwise nobody needs it                                                       → called off
    """
    record, endpoint = draft.records[name], draft.wanted.get(name)
    move = record.move
    if move is None or endpoint is None or record.failed is not None:
        return None  # 1
    if not isinstance(endpoint.gpus, GpuCount) or endpoint.gpus.count != len(move.gpus):
        return None  # 1
    standing = draft.standings[name]
    if standing.current is not None and standing.current.id != move.incarnation:
        return None if standing.state == "healthy" else move  # 2, 3
    if standing.current is None or standing.current.stop is not None:
        return move  # 3
    return move if _is_needed(draft, move) else None  # 4, 5


def _is_needed(draft: Draft, move: Move) -> bool:
    name = move.by.removeprefix(endpoint_key(""))
    if name != move.by:
        return name in draft.wanted and draft.standings[name].current is None and draft.records[name].failed is None
    step = draft.steps.get(name)
    return step is not None and step.record.state in OVERRIDING


def for_whom(move: Move) -> str:
    """The name of the overlay or endpoint that somebody makes room for."""
    return move.by.removeprefix(endpoint_key(""))


def in_words(draft: Draft, move: Move) -> tuple[str, Cause]:
    """A move for people: why, and on whose account."""
    index = {uuid: gpu.index for uuid, gpu in draft.situation.gpus.items()}
    where = ", ".join(str(index[g]) if g in index else g for g in move.gpus)
    told = f"makes room for {for_whom(move)}, and moves to GPU {where}"
    if for_whom(move) != move.by:
        endpoint = draft.wanted.get(for_whom(move))
        return told, Cause("move", endpoint.source if endpoint is not None else None)
    step = draft.steps.get(move.by)
    return told, Cause("move", step.record.source if step is not None else None, move.by)


def begin(draft: Draft, name: str, gpus: tuple[str, ...], by: str) -> None:
    """Promise an endpoint that runs another place, which it leaves its own for. It counts among its evictions.

    `by` is the name of an overlay, or the key of an endpoint.
    """
    record, current = draft.records[name], draft.standings[name].current
    assert current is not None  # noqa: S101 - only who runs is moved
    move = Move(current.id, gpus, by, draft.now)
    record = replace(record, move=move, evictions=(*record.evictions, draft.now.wall))
    draft.records[name] = record
    draft.moving.add(name)
    draft.standings[name] = replace(draft.standings[name], record=record)
    reason, cause = in_words(draft, move)
    draft.say("moved", name, reason, cause)


def remembered(draft: Draft, name: str) -> Move | None:
    """What the record keeps of a move: nothing once it is over or called off, else the place that it has now."""
    move, arriving = under_way(draft, name), draft.arriving.get(Subject("endpoint", name))
    return replace(move, gpus=arriving.gpus) if move is not None and arriving is not None else move
