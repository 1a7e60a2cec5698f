"""Windows that have not begun, as rules: what each keeps others from, and when making room for it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import inf

from reconciler.plan.actions import Blocked
from reconciler.plan.board import Need
from reconciler.plan.draft import Draft, Window
from reconciler.plan.overlays import MEMORY_RETURN_S
from reconciler.plan.placement import place
from reconciler.spec.spec import EndpointSpec, OverlaySpec

KILL_S = 10.0
"""How long a whole tree may take to vanish after SIGKILL: what ends hard is counted as there until then."""
WORTH_LOADS = 2.0
"""An endpoint is not brought back for less than so many times its own load time."""


def departure_s(draft: Draft, name: str) -> float:
    """Seconds from asking an endpoint to leave until its memory is back, as predicted; 0 for one that is not there."""
    standing = draft.standings.get(name)
    endpoint = draft.wanted.get(name) or draft.situation.spec.endpoints.get(name)
    if standing is None or standing.current is None or endpoint is None:
        return 0.0
    return draft.situation.leaving_s(endpoint) + MEMORY_RETURN_S


def lead_s(draft: Draft, victims: Iterable[str]) -> float:
    """Seconds before a start at which its victims have to be asked to leave: they leave side by side."""
    return max((departure_s(draft, name) for name in victims), default=0.0)


def hard_end(draft: Draft, overlay: OverlaySpec, begin: float) -> float:
    """Epoch seconds at which an overlay that takes its place at `begin` has given it back, whatever it does.

    Infinite if nothing bounds it. Counted are its victims' predicted departure, every attempt, and a stop that needs
    all of its grace.
    """
    makespan, work = overlay.makespan, overlay.workload
    after = (work.stop.grace_s + KILL_S if work is not None else 0.0) + MEMORY_RETURN_S
    ends = [inf if makespan.deadline is None else makespan.deadline + after]
    if makespan.duration_s is not None and not overlay.requires:
        victims = draft.standings if overlay.allow_baseline_eviction else overlay.endpoints
        begun = begin + lead_s(draft, victims)
        if work is None:
            ends.append(begun + makespan.duration_s + after)
        elif makespan.on_overrun == "stop":
            ends.append(begun + (work.retries + 1) * (makespan.duration_s + makespan.grace_s + after))
    return min(ends)


def ahead_of(draft: Draft, overlay: OverlaySpec, begin: float, among: Iterable[Window] | None = None) -> list[Window]:
    """The windows whose place this overlay may not take, were it to begin at `begin`.

    Those not less important, and not over by then, unless its hard end comes before they open. One that has a window
    itself yields to those alone that came before it.
    """
    windows = list(draft.windows if among is None else among)
    if not windows:
        return []
    last = hard_end(draft, overlay, begin)
    own = next((i for i, w in enumerate(windows) if w.name == overlay.name), len(windows))
    windows = windows[:own]
    others = [w for w in windows if w.priority >= overlay.priority]
    return [w for w in others if begin < w.end and last > w.opens]


def keeping_off(windows: Iterable[Window]) -> Callable[[Need], Need]:
    """A need without the GPUs on which one of these windows leaves too little beside itself."""
    windows = tuple(windows)

    def fits(need: Need, gpu: str) -> bool:
        shares = [w.beside[gpu] for w in windows if gpu in w.beside]
        return not shares or (not need.exclusive and need.memory_bytes[gpu] <= min(shares))

    return lambda need: replace(need, candidates=tuple(g for g in need.candidates if fits(need, g)))


def spared(draft: Draft, endpoint: EndpointSpec, need: Need) -> Blocked | None:
    """Why an endpoint is not brought back now: its place would be taken again before it was worth the load.

    Only windows count that may displace it, and that open within twice its load time.
    """
    until = draft.now.wall + WORTH_LOADS * draft.situation.timings(endpoint).load_s
    soon = [w for w in draft.windows if endpoint.name in w.victims and w.opens < until]
    if not soon:
        return None
    elsewhere = keeping_off(soon)(need)
    if place([elsewhere], draft.board) is not None:
        return None
    last = max(soon, key=lambda w: w.end)
    names = ", ".join(sorted(w.name for w in soon))
    message = f"{names} would displace it again before it had been ready as long as it takes to load"
    return Blocked(need.subject, "Held", message, (), last.end, transient=True)
