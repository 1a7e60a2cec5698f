"""Where each window that has not begun will be, found anew on every look from the files and what is seen.

Nothing of it is remembered, and a window keeps its place all the same: the more important one comes first, and of
equals the one that was seen first; and where there is a place that is free whatever happens before, it is that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from math import inf

from msgspec import Struct
from msgspec.structs import replace

from reconciler.plan import solver
from reconciler.plan.actions import Blocked
from reconciler.plan.asking import badly_pinned, cannot_start, no_provider, not_preemptible, own_needs
from reconciler.plan.board import Board, Hold, Need, Tenant, endpoint_key
from reconciler.plan.draft import OVERRIDING, Draft, Window
from reconciler.plan.lacks import Refusal
from reconciler.plan.observed import Subject
from reconciler.plan.overlays import MEMORY_RETURN_S, OverlayStep, next_window, predicted_end
from reconciler.plan.placement import Placement, place
from reconciler.plan.settling import need_of
from reconciler.plan.windows import ahead_of, hard_end, keeping_off, keeps_off, lead_s, not_to_hinder, surely_over
from reconciler.spec.spec import OverlaySpec

MOST_SLOTS = 16
"""So many ends are looked at for a place: who waits for more of them waits for a different day."""
_KINDS = ("endpoint/", "overlay/")
HORIZON_S = 86400.0
"""So far ahead, and one more, the windows of a schedule after its next one are held, for others to be told at once."""
MOST_AHEAD = 24
"""Of one schedule: an hourly one has as many within the horizon."""
Fits = Callable[[OverlaySpec, float, Board, Callable[[Need], Need]], bool]
"""Whether there is such a placement."""
Moves = Callable[[OverlaySpec, float, Board, Callable[[Need], Need]], tuple[str, ...]]
"""Names of the endpoints that would have to be moved for it; none: nobody, or that does not help."""
Seek = Callable[[OverlaySpec, float, Board, Callable[[Need], Need]], tuple[Placement, list[Need]] | Refusal | None]
"""The least lawful placement of an overlay that begins at a moment (epoch seconds) on a board, its needs seen through a
filter; why there is none; or None: its files ask for what cannot be."""


class _Coming(Struct, frozen=True):
    """One window that needs a place."""

    step: OverlayStep
    overlay: OverlaySpec
    start: float
    live: bool
    """Its overlay is busy with the window before it."""

    @property
    def turn(self) -> tuple[int, float, str]:
        """The most important first, and of equals who was seen first."""
        record = self.step.record
        return -record.priority, (record.seen or record.since).wall, record.name


def reserve(draft: Draft, seek: Seek, fits: Fits, moves: Moves) -> tuple[Window, ...]:
    """Find a place for every window still to come; say of those that have none what is in their way, and until when.

    The outcomes for each, the most important and of equals the first seen first:
        1. it has a place           → its window, and a wake-up for the moment at which it opens
        2. other windows take it    → WindowTaken, with the next free slot
        3. it has none in any case  → the rule or the lack that stands in its way, and who would have to be moved;
                                      that nothing provides what it requires; or what its file asks for in vain
    """
    draft.windows = ()
    for coming in sorted(_to_come(draft), key=lambda c: c.turn):
        overlay, start = coming.overlay, coming.start
        firm = not_preemptible(draft, overlay)
        if firm is not None:
            draft.block(firm)  # 3
            continue
        if start <= draft.now.wall and cannot_start(draft, overlay) is not None:
            continue  # told when it is its turn: nobody waits for it once its time has come
        refusal: Refusal | None = None
        for surely in (True, False):  # a place that nobody holds by then whatever happens, else one that is foreseen
            off = keeping_off(ahead_of(draft, overlay, start, away=surely))
            board = _board_at(draft, start, surely=surely, window=overlay)
            answer = seek(overlay, start, board, off)
            if isinstance(answer, tuple):
                draft.windows += _windows(draft, coming, board, *answer)  # 1
                break
            refusal = answer
        else:
            if start <= draft.now.wall or coming.live:
                continue
            if refusal is None:  # 3
                pinned = own_needs(draft, overlay) is not None
                draft.block(no_provider(draft, overlay) if pinned else badly_pinned(draft, overlay))
            else:
                told = _conflict(draft, overlay, start, refusal, seek, fits)  # 2, 3
                draft.block(_with_moves(told, start, moves(overlay, start, board, off)))
    return draft.windows


def window_taken(
    draft: Draft, overlay: OverlaySpec, begin: float, rivals: Iterable[Window], slot: float | None
) -> Blocked:
    """Why an overlay does not begin in front of windows, or beside them. Of a schedule the first is named."""
    rivals = list(rivals)
    found = sorted(_touching(draft, overlay, rivals) or rivals, key=lambda w: (w.start, w.name))
    windows = sorted({w.name: w for w in reversed(found)}.values(), key=lambda w: (w.start, w.name))
    spans = []
    for window in windows:
        more = sum(w.name == window.name for w in found) - 1
        spans.append(f"{window.name} ({_span(draft, window)}{f', and {more} more' if more else ''})")
    hints = [f"its next free slot is {moment(slot)}"] if slot is not None else []
    hints += _bounded(draft, overlay, begin, found[0].opens)
    hints += _above(draft, overlay, windows)
    message = f"the place it would need is kept for {', '.join(spans)}"
    return Blocked(Subject("workload", overlay.name), "WindowTaken", message, tuple(hints), slot, transient=True)


def _touching(draft: Draft, overlay: OverlaySpec, windows: Iterable[Window]) -> list[Window]:
    """Those of these windows that keep an overlay from a GPU that it might have."""
    windows = list(windows)
    needs = (own_needs(draft, overlay) or []) if windows else []
    return [w for w in windows if any(keeping_off([w])(need).candidates != need.candidates for need in needs)]


def _bounded(draft: Draft, overlay: OverlaySpec, begin: float, opens: float) -> list[str]:
    """What would have it over, whatever it does, before a window opens; empty: nothing, or it is already."""
    brief = replace(overlay, makespan=replace(overlay.makespan, deadline=begin))
    if not hard_end(draft, brief, begin) < opens < hard_end(draft, overlay, begin):
        return []
    stopped = replace(overlay, makespan=replace(overlay.makespan, on_overrun="stop"))
    if hard_end(draft, stopped, begin) <= opens:
        how = "or by `on_overrun: stop`"
    elif overlay.workload is None or overlay.makespan.on_overrun == "stop":
        how = "or by a shorter duration"
    else:
        how = "or by a shorter duration and `on_overrun: stop`"
    return [f"bound it by a deadline, {how}, so that it ends before {moment(opens)}"]


def _above(draft: Draft, overlay: OverlaySpec, windows: Collection[Window]) -> list[str]:
    """What of its own file would give an overlay the right to the place of all these; empty: nothing would.

    An endpoint that is to be back there asks for consent as well, and may be one that nobody displaces.
    """
    names = {w.name for w in windows if w.end == inf}
    back = [r.endpoint for r in draft.returns if r.endpoint.name in names]
    if not all(e.preemptible for e in back):
        return []
    asked = ["set allow_baseline_eviction: true"] if back and not overlay.allow_baseline_eviction else []
    above = {w.name: w.priority for w in windows if w.priority >= overlay.priority}
    asked += [f"give it a priority above that of {', '.join(above)} ({max(above.values())})"] if above else []
    return [", and ".join(asked)] if asked else []


def _is_late(draft: Draft, window: Window) -> bool:
    """Whether the time of a window has come and it has not begun: something keeps it waiting."""
    return window.start < draft.now.wall and window.end < inf


def _span(draft: Draft, window: Window) -> str:
    if _is_late(draft, window):
        blocked = draft.blocked.get(Subject("workload", window.name))
        return f"due since {moment(window.start)}" + (f" and kept waiting: {blocked.reason}" if blocked else "")
    if window.end < inf:
        return f"{moment(window.start)} to {moment(window.end)}"
    known = window.start > draft.now.wall + MEMORY_RETURN_S  # else who keeps it away should be over, and is not
    return f"which is to be back {f'from {moment(window.start)} on' if known else 'as soon as it can'}"


def next_slot(draft: Draft, overlay: OverlaySpec, begin: float, fits: Fits) -> float | None:
    """The first moment after `begin`, epoch seconds, at which the overlay is predicted to have a place.

    Looked at are the predicted ends of live overlays and of windows, in order; None: none of the next `MOST_SLOTS`
    helps. It is the earliest: whoever else waits may be there first. Past the last window of a schedule that was looked
    at nothing is told: there are more; nor past its own deadline; nor where a window is late: when that begins, and so
    when it ends, nobody knows.
    """
    ends, last = {w.end for w in draft.windows}, inf
    rivals = _touching(draft, overlay, not_to_hinder(draft, overlay))
    if any(_is_late(draft, window) for window in rivals):
        return None
    for name in {w.name for w in rivals if draft.situation.spec.overlays[w.name].makespan.schedule is not None}:
        last = min(last, max(w.start for w in rivals if w.name == name))
    for step in draft.steps.values():
        if step.spec is not None and step.live:
            ends.add(predicted_end(step.record, step.spec.makespan, draft.now.wall) + MEMORY_RETURN_S)
    soonest = max(begin, draft.now.wall + MEMORY_RETURN_S)
    latest = min(last, inf if overlay.makespan.deadline is None else overlay.makespan.deadline)
    for moment_ in sorted(end for end in ends if soonest < end < latest)[:MOST_SLOTS]:
        off = keeping_off(ahead_of(draft, overlay, moment_))
        if fits(overlay, moment_, _board_at(draft, moment_, surely=False), off):
            return moment_
    return None


def slot_after(draft: Draft, overlay: OverlaySpec, others: Iterable[str], fits: Fits) -> float | None:
    """The first moment at which these live overlays are predicted to be over and this one to have a place, epoch s.

    None: there is none in sight, or nobody knows when one of them will be over.
    """
    ends = []
    for step in (draft.steps[name] for name in others):
        if step.spec is None:
            return None
        end = predicted_end(step.record, step.spec.makespan, draft.now.wall)
        if end <= draft.now.wall and step.record.state in OVERRIDING:
            return None
        ends.append(end)
    return next_slot(draft, overlay, max(ends, default=draft.now.wall), fits)


def moment(wall: float) -> str:
    """A moment for people, in UTC to the second, its date included: windows may be days away."""
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _to_come(draft: Draft) -> list[_Coming]:
    """Windows of overlays that were seen before their time and have not begun: one is kept until it is taken.

    While a schedule is busy with a window, or has just ended one, its next one is kept.
    """
    found = []
    for step in draft.steps.values():
        record, overlay = step.record, step.spec
        if overlay is None:
            continue
        if record.state == "pending" and record.window_start > record.since.wall:
            found.append(_Coming(step, overlay, max(draft.now.wall, record.window_start), live=False))
        elif overlay.makespan.schedule is not None and record.state != "pending":
            start = next_window(overlay.makespan, max(draft.now.wall, record.window_start))
            found.append(_Coming(step, overlay, start, live=True))
    return found


def _board_at(draft: Draft, wall: float, *, surely: bool, window: OverlaySpec | None = None) -> Board:
    """Who will have a place then: without the overlays that are over, and with whom they keep away or set aside.

    Who gave way to one, and would go elsewhere, goes nowhere that is kept for `window`: it has its own place, or none.
    With `surely` only those are over that something ends by then whatever they do; else those predicted to be. Of one
    that should have ended already nobody knows when it will.
    """

    def is_over(step: OverlayStep) -> bool:
        if surely:
            return surely_over(draft, step) <= wall
        if step.record.state not in OVERRIDING:
            return True
        if step.spec is None:  # its file cannot be read
            return False
        return draft.now.wall < predicted_end(step.record, step.spec.makespan, draft.now.wall) <= wall

    over = {name for name, step in draft.steps.items() if is_over(step)}
    base = draft.situation.spec.endpoints
    away: set[str] = set()
    if window is not None:
        arriving = [base[s.name] for s in draft.arriving if s.kind == "endpoint" and s.name in base]
        away = {e.name for e in arriving if keeps_off(window, e) and draft.evicted_from(e.name)}
    board = draft.board.without({*map(endpoint_key, away), *(f"overlay/{name}" for name in over)})
    aside = {name for name, owner in draft.owners.items() if owner not in over}
    for endpoint in sorted(base.values(), key=lambda e: (-e.priority, e.name)):
        key, subject = f"endpoint/{endpoint.name}", Subject("endpoint", endpoint.name)
        if endpoint.state != "running" or key in board.tenants or draft.records[endpoint.name].failed is not None:
            continue
        if endpoint.name in aside:
            continue
        home = draft.records[endpoint.name].last_gpus
        need = need_of(draft.situation, subject, endpoint.gpus, endpoint.memory, home)
        if need is not None and endpoint.name in away:
            need = replace(need, candidates=tuple(g for g in need.candidates if g in home))
        placement = place([need], board) if need is not None else None
        if need is not None and placement is not None:
            holds = {g: Hold(need.memory_bytes[g], need.exclusive) for g in placement.gpus[subject]}
            board.add(Tenant(key, endpoint.priority, holds))
    return board


def _windows(
    draft: Draft, coming: _Coming, board: Board, placement: Placement, needs: list[Need]
) -> tuple[Window, ...]:
    """The window, and of a schedule those after it within the horizon, in the same place."""
    record, overlay = coming.step.record, coming.overlay
    start = coming.start if coming.live else record.window_start
    victims = {kind: {k.partition("/")[2] for k in placement.victims if k.startswith(kind)} for kind in _KINDS}
    names = victims["endpoint/"] | set(overlay.endpoints)
    opens = start - lead_s(draft, names, victims["overlay/"])
    draft.wakes.append(draft.now.plus(opens - draft.now.wall))
    gone = placement.victims | {f"endpoint/{n}" for n in overlay.endpoints}
    board = board.without(frozenset(gone))
    beside: dict[str, int] = {}
    for need in needs:
        for gpu in placement.gpus[need.subject]:
            there = sum(t.holds[gpu].memory_bytes for t in board.on(gpu))
            left = beside.get(gpu, board.capacity[gpu] - there) - need.memory_bytes[gpu]
            beside[gpu] = 0 if need.exclusive else max(0, left)
    waits = replace(record, window_start=start, active_since=None)
    end = predicted_end(waits, overlay.makespan, draft.now.wall) + MEMORY_RETURN_S
    first = Window(overlay.name, overlay.priority, opens, start, end, tuple(sorted(names)), beside, overlay.requires)
    if overlay.makespan.schedule is None:
        return (first,)
    rivals = _touching_there(not_to_hinder(draft, overlay), placement, needs)
    starts = islice(_starts_after(draft, overlay, start), MOST_AHEAD)
    return (first, *(_later(first, at - start, taken=_is_taken(draft, overlay, at, rivals)) for at in starts))


def _touching_there(windows: Iterable[Window], placement: Placement, needs: list[Need]) -> list[Window]:
    """Those of these windows beside which not all of this placement would have room."""

    def fits(window: Window, need: Need) -> bool:
        return set(placement.gpus[need.subject]) <= set(keeping_off([window])(need).candidates)

    return [w for w in windows if not all(fits(w, need) for need in needs)]


def _is_taken(draft: Draft, overlay: OverlaySpec, start: float, rivals: Iterable[Window]) -> bool:
    """Whether one of these windows has begun by the time at which one of `overlay` from `start` on is surely over."""
    ahead = [w for w in rivals if start < w.end]
    return bool(ahead) and hard_end(draft, overlay, start) > min(w.opens for w in ahead)


def _starts_after(draft: Draft, overlay: OverlaySpec, start: float) -> Iterator[float]:
    """The starts of a schedule after this one, within the horizon, and the first beyond it: nothing is the last."""
    while True:
        start = next_window(overlay.makespan, start)
        yield start
        if start >= draft.now.wall + HORIZON_S:
            return


def _later(window: Window, seconds: float, *, taken: bool) -> Window:
    opens, start, end = (at + seconds for at in (window.opens, window.start, window.end))
    return replace(window, opens=opens, start=start, end=end, taken=taken)


def _with_moves(told: Blocked, start: float, moved: tuple[str, ...]) -> Blocked:
    """What is told of a window for which somebody would have to be moved: that is decided once it is due."""
    if not moved:
        return told
    names, verb = ", ".join(moved), "is" if len(moved) == 1 else "are"
    if not solver.is_available():
        hint = f"`{solver.INSTALL}`: it fits once {names} {verb} moved, and nobody is without the solver"
        return replace(told, alternatives=(*told.alternatives, hint))
    message = f"{told.message}; it fits once {names} {verb} moved, which is decided when it is due"
    return replace(told, message=message, earliest_start=start)


def _conflict(
    draft: Draft,
    overlay: OverlaySpec,
    start: float,
    refusal: Refusal,
    seek: Seek,
    fits: Fits,
) -> Blocked:
    rivals = ahead_of(draft, overlay, start)
    if rivals:  # what stands in the way beside the windows is told, not how little they leave
        board = _board_at(draft, start, surely=False, window=overlay)
        alone = seek(overlay, start, board, lambda need: need)
        if isinstance(alone, tuple):
            return window_taken(draft, overlay, start, rivals, next_slot(draft, overlay, start, fits))  # 2
        refusal = alone or refusal
    subject = Subject("workload", overlay.name)
    message = f"its window at {moment(start)}: {refusal.message}"
    slot = next_slot(draft, overlay, start, fits)
    return Blocked(subject, refusal.reason, message, refusal.alternatives, slot, transient=True)  # 3
