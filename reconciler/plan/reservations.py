"""Where each window that has not begun will be, found anew on every look from the files and what is seen.

Nothing of it is remembered, and a window keeps its place all the same: the more important one comes first, and of
equals the one that was seen first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from reconciler.plan.actions import Blocked
from reconciler.plan.board import Board, Hold, Need, Tenant
from reconciler.plan.draft import OVERRIDING, Draft, Window
from reconciler.plan.observed import Subject
from reconciler.plan.overlays import MEMORY_RETURN_S, OverlayStep, predicted_end
from reconciler.plan.placement import Placement, place
from reconciler.plan.preemption import Refusal
from reconciler.plan.settling import need_of
from reconciler.plan.windows import ahead_of, hard_end, keeping_off, lead_s
from reconciler.spec.spec import OverlaySpec

MOST_SLOTS = 16
"""So many ends are looked at for a place: who waits for more of them waits for a different day."""
Fits = Callable[[OverlaySpec, Board, Callable[[Need], Need]], bool]
"""Whether there is such a placement."""
Seek = Callable[[OverlaySpec, Board, Callable[[Need], Need]], tuple[Placement, list[Need]] | Refusal | None]
"""The least lawful placement of an overlay on a board, its needs seen through a filter; why there is none; or None:
its files ask for what cannot be."""


def reserve(draft: Draft, seek: Seek, fits: Fits) -> tuple[Window, ...]:
    """Find a place for every window still to come; say of those that have none what is in their way, and until when.

    The outcomes for each, the most important and of equals the first seen first:
        1. it has a place           → its window, and a wake-up for the moment at which it opens
        2. other windows take it    → WindowTaken, with the next free slot
        3. it has none in any case  → the rule or the lack that stands in its way
    """
    found: list[Window] = []
    for step in sorted(_to_come(draft), key=lambda s: (-s.record.priority, s.record.since.wall, s.record.name)):
        overlay, start = step.spec, max(draft.now.wall, step.record.window_start)
        assert overlay is not None  # noqa: S101 - `_to_come` leaves out those without a file
        rivals = ahead_of(draft, overlay, start, found)
        answer = seek(overlay, _board_at(draft, start), keeping_off(rivals))
        if isinstance(answer, tuple):
            found.append(_window(draft, step, overlay, *answer))  # 1
        elif answer is not None and start > draft.now.wall:
            draft.block(_conflict(draft, overlay, start, found, answer, seek, fits))  # 2, 3
    return tuple(found)


def window_taken(
    draft: Draft, overlay: OverlaySpec, begin: float, rivals: Iterable[Window], slot: float | None
) -> Blocked:
    """Why an overlay does not begin in front of windows, or beside them."""
    windows = sorted(rivals, key=lambda w: (w.start, w.name))
    spans = ", ".join(f"{w.name} ({moment(w.start)} to {moment(w.end)})" for w in windows)
    hints = [f"its next free slot is {moment(slot)}"] if slot is not None else []
    first = windows[0]
    if begin < first.opens and hard_end(draft, overlay, begin) > first.opens:
        hints.append(f"bound it by a deadline, or by `on_overrun: stop`, so that it ends before {moment(first.opens)}")
    hints.append(f"give it a priority above that of {', '.join(w.name for w in windows)}")
    message = f"the place it would need is kept for {spans}"
    return Blocked(Subject("workload", overlay.name), "WindowTaken", message, tuple(hints), slot, transient=True)


def next_slot(draft: Draft, overlay: OverlaySpec, begin: float, windows: Iterable[Window], fits: Fits) -> float | None:
    """The first moment after `begin`, epoch seconds, at which the overlay is predicted to have a place.

    Looked at are the predicted ends of live overlays and of these windows, in order; None: none of the next
    `MOST_SLOTS` helps. It is the earliest: whoever else waits may be there first.
    """
    windows = tuple(windows)
    ends = {w.end for w in windows}
    for step in draft.steps.values():
        if step.spec is not None and step.live:
            ends.add(predicted_end(step.record, step.spec.makespan, draft.now.wall) + MEMORY_RETURN_S)
    for moment_ in sorted(end for end in ends if end > max(begin, draft.now.wall + MEMORY_RETURN_S))[:MOST_SLOTS]:
        off = keeping_off(ahead_of(draft, overlay, moment_, windows))
        if fits(overlay, _board_at(draft, moment_), off):
            return moment_
    return None


def moment(wall: float) -> str:
    """A moment for people, in UTC to the second, its date included: windows may be days away."""
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _to_come(draft: Draft) -> list[OverlayStep]:
    """Overlays that were seen before their time and have not begun: a window is kept until it is taken."""
    return [
        step
        for step in draft.steps.values()
        if step.spec is not None
        and step.record.state == "pending"
        and step.record.window_start > step.record.since.wall
    ]


def _board_at(draft: Draft, wall: float) -> Board:
    """Who will have a place then: without the overlays predicted to be over, and with whom they keep away.

    Of one that should have ended already nobody knows when it will.
    """
    over = {
        name
        for name, s in draft.steps.items()
        if s.spec is None
        or s.record.state not in OVERRIDING
        or draft.now.wall < predicted_end(s.record, s.spec.makespan, draft.now.wall) <= wall
    }
    board = draft.board.without(frozenset(f"overlay/{name}" for name in over))
    baseline = draft.situation.spec.endpoints.values()
    for endpoint in sorted(baseline, key=lambda e: (-e.priority, e.name)):
        key, subject = f"endpoint/{endpoint.name}", Subject("endpoint", endpoint.name)
        if endpoint.state != "running" or key in board.tenants or draft.records[endpoint.name].failed is not None:
            continue
        need = need_of(draft.situation, subject, endpoint.gpus, endpoint.memory, draft.records[endpoint.name].last_gpus)
        placement = place([need], board) if need is not None else None
        if need is not None and placement is not None:
            holds = {g: Hold(need.memory_bytes[g], need.exclusive) for g in placement.gpus[subject]}
            board.add(Tenant(key, endpoint.priority, holds))
    return board


def _window(draft: Draft, step: OverlayStep, overlay: OverlaySpec, placement: Placement, needs: list[Need]) -> Window:
    start = step.record.window_start
    names = {k.partition("/")[2] for k in placement.victims if k.startswith("endpoint/")} | set(overlay.endpoints)
    opens = start - lead_s(draft, names)
    if opens > draft.now.wall:
        draft.wakes.append(draft.now.plus(opens - draft.now.wall))
    gone = placement.victims | {f"endpoint/{n}" for n in overlay.endpoints}
    board = _board_at(draft, start).without(frozenset(gone))
    beside: dict[str, int] = {}
    for need in needs:
        for gpu in placement.gpus[need.subject]:
            there = sum(t.holds[gpu].memory_bytes for t in board.on(gpu))
            left = beside.get(gpu, board.capacity[gpu] - there) - need.memory_bytes[gpu]
            beside[gpu] = 0 if need.exclusive else max(0, left)
    end = predicted_end(step.record, overlay.makespan, draft.now.wall) + MEMORY_RETURN_S
    return Window(overlay.name, overlay.priority, opens, start, end, tuple(sorted(names)), beside)


def _conflict(
    draft: Draft,
    overlay: OverlaySpec,
    start: float,
    found: list[Window],
    refusal: Refusal,
    seek: Seek,
    fits: Fits,
) -> Blocked:
    rivals = ahead_of(draft, overlay, start, found)
    if rivals:  # what stands in the way beside the windows is told, not how little they leave
        alone = seek(overlay, _board_at(draft, start), lambda need: need)
        if isinstance(alone, tuple):
            return window_taken(draft, overlay, start, rivals, next_slot(draft, overlay, start, found, fits))  # 2
        refusal = alone or refusal
    subject = Subject("workload", overlay.name)
    message = f"its window at {moment(start)}: {refusal.message}"
    return Blocked(subject, refusal.reason, message, refusal.alternatives, start, transient=True)  # 3
