"""Windows that have not begun, as rules: what each keeps others from, and when making room for it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

from msgspec.structs import replace

from reconciler.plan.actions import Blocked
from reconciler.plan.board import Need, Tenant, endpoint_key
from reconciler.plan.draft import OVERRIDING, Draft, Return, Window
from reconciler.plan.observed import Incarnation, Subject
from reconciler.plan.overlays import MEMORY_RETURN_S, WORKLOAD_STOP_S, OverlayStep, memory_return_s, predicted_end
from reconciler.spec.spec import EndpointSpec, GpuPins, OverlaySpec, Stop, WholeGpu

KILL_S = 10.0
"""How long a whole tree may take to vanish after SIGKILL: what ends hard is counted as there until then."""
WORTH_LOADS = 2.0
"""An endpoint is not brought back for less than so many times its own load time."""


def departure_s(draft: Draft, name: str) -> float:
    """Seconds from asking an endpoint to leave until its memory is back, as predicted; 0 for one that is not there."""
    standing = draft.standings.get(name)
    endpoint = draft.wanted.get(name) or draft.situation.spec.endpoints.get(name)
    return 0.0 if standing is None or standing.current is None or endpoint is None else _way_out_s(draft, endpoint)


def _way_out_s(draft: Draft, endpoint: EndpointSpec) -> float:
    times = draft.situation.timings(endpoint)
    return draft.situation.leaving_s(endpoint, times) + memory_return_s(times)


def lead_s(draft: Draft, endpoints: Iterable[str], seized: Iterable[str] = ()) -> float:
    """Seconds before a start at which its victims have to be asked to leave: they leave side by side.

    Args:
        draft: the decision so far
        endpoints: those that give way
        seized: overlays that do, with the endpoints that they run
    """
    names = set(endpoints)
    seized = set(seized)
    names.update(x.subject.name for x in draft.leases if x.overlay in seized and x.subject.kind == "endpoint")
    ways = [departure_s(draft, name) for name in names] + [WORKLOAD_STOP_S + MEMORY_RETURN_S] * bool(seized)
    return max(ways, default=0.0)


def hard_end(draft: Draft, overlay: OverlaySpec, begin: float) -> float:
    """Epoch seconds at which an overlay that takes its place at `begin` has given it back, whatever it does.

    Infinite if nothing bounds it. Counted are its victims' predicted departure, every attempt, and a stop that needs
    all of its grace.
    """
    victims = draft.standings if overlay.allow_baseline_eviction else overlay.endpoints
    begun = inf if overlay.requires else begin + lead_s(draft, victims)
    return _bound(overlay, begun, 1 + (overlay.workload.retries if overlay.workload is not None else 0))


def surely_over(draft: Draft, step: OverlayStep) -> float:
    """Epoch seconds at which a live overlay has given its place back, whatever it does; infinite: nothing bounds it."""
    record, overlay = step.record, step.spec
    if record.state not in OVERRIDING:  # it is being ended
        return record.since.wall + _after_s(overlay, step.workload)
    if overlay is None:  # its file cannot be read
        return inf
    attempts = 1 + (overlay.workload.retries - record.attempt if overlay.workload is not None else 0)
    if record.active_since is not None:
        return _bound(overlay, record.active_since.wall, attempts)
    admitted = min((x.since.wall for x in draft.leases if x.overlay == record.name), default=record.since.wall)
    begun = max(draft.now.wall, record.window_start, admitted + lead_s(draft, record.evicted, record.seized))
    return _bound(overlay, inf if overlay.requires else begun, attempts)


def _bound(overlay: OverlaySpec, begun: float, attempts: int) -> float:
    makespan, after = overlay.makespan, _after_s(overlay)
    ends = [inf if makespan.deadline is None else makespan.deadline + after]
    if makespan.duration_s is not None and overlay.workload is None:
        ends.append(begun + makespan.duration_s + after)
    elif makespan.duration_s is not None and makespan.on_overrun == "stop":
        ends.append(begun + attempts * (makespan.duration_s + makespan.grace_s + after))
    return min(ends)


def _after_s(overlay: OverlaySpec | None, running: Incarnation | None = None) -> float:
    """Seconds from the moment at which an overlay is ended to that at which its memory is back, whatever it does."""
    if overlay is not None and overlay.workload is None:
        return MEMORY_RETURN_S
    asked = running.stop_settings if running is not None else None
    if overlay is not None and overlay.workload is not None:
        asked = overlay.workload.stop
    return (asked or Stop()).grace_s + KILL_S + MEMORY_RETURN_S


def not_to_hinder(draft: Draft, overlay: OverlaySpec) -> list[Window]:
    """The windows that this overlay may not delay: those not less important.

    One that has a window itself yields to those alone that came before it.
    """
    own = next((i for i, w in enumerate(draft.windows) if w.name == overlay.name), len(draft.windows))
    return [w for w in draft.windows[:own] if w.priority >= overlay.priority]


def ahead_of(draft: Draft, overlay: OverlaySpec, begin: float, *, away: bool = False) -> list[Window]:
    """The windows whose place this overlay may not take, were it to begin at `begin`.

    Those that it may not delay, and that are not over by then, unless its hard end comes before they open. The return
    of an endpoint that it might not displace is one: nobody prolongs an absence that he could not have brought about.
    With `away`, endpoints that are predicted to be back by then may not be.
    """
    windows = [*not_to_hinder(draft, overlay), *_returning(draft, overlay, begin, away=away)]
    if not windows:
        return []
    last = hard_end(draft, overlay, begin)
    return [w for w in windows if begin < w.end and last > w.opens]


def may_prolong(overlay: OverlaySpec, endpoint: EndpointSpec) -> bool:
    """Whether an overlay may have the place of an endpoint that is away on the account of another."""
    lower = overlay.allow_baseline_eviction and endpoint.preemptible and endpoint.priority < overlay.priority
    return lower or endpoint.name in overlay.endpoints


def find_returns(draft: Draft) -> tuple[Return, ...]:
    """Whose place is to be given back: every endpoint that an overlay displaced, or keeps from its place since.

    So is that of one that an overlay sets otherwise, as it is to run after that. One that is kept away by nothing but a
    GPU that cannot be read now still has its place: unknown is not absent.
    """
    found = []
    for name in draft.stirring():
        endpoint, holders = to_be_back(draft, name), {n for n, held in draft.evicted_from(name).items() if held}
        if name in draft.owners and name in draft.situation.running:
            holders.add(draft.owners[name])
        blocked, displaced = draft.blocked.get(Subject("endpoint", name)), draft.records[name].evicted_by is not None
        if name in draft.kept_off and displaced:
            holders.add(draft.kept_off[name])
        unseen = displaced and blocked is not None and blocked.reason == "GpuUnknown"
        if endpoint is None or not (holders or unseen):
            continue
        sizes = {g: size for g, size in place_owed(draft, name).items() if g in draft.board.capacity}
        sizes = {g: left for g, size in sizes.items() if (left := still_owed(draft, name, g, size))}
        if not sizes:  # it has its place
            continue
        ends = [
            predicted_end(step.record, step.spec.makespan, draft.now.wall) + MEMORY_RETURN_S
            for step in (draft.steps[n] for n in holders if n in draft.steps)
            if step.spec is not None
        ]
        at = max(ends, default=draft.now.wall)
        found.append(Return(endpoint, at, sizes, isinstance(endpoint.memory, WholeGpu)))
    return tuple(found)


def to_be_back(draft: Draft, name: str) -> EndpointSpec | None:
    """An endpoint as it is to run once no overlay sets it otherwise; None: it is not to."""
    return draft.situation.running.get(name) or draft.wanted.get(name)


def place_owed(draft: Draft, name: str) -> dict[str, int]:
    """The GPUs that an endpoint is to have again, with its bytes on each; empty: nobody knows which.

    One that may choose has the place in which it ran: had there been another, it would have moved.
    """
    endpoint = to_be_back(draft, name)
    if endpoint is None:
        return {}
    gpus = draft.situation.resolve_pins(endpoint.gpus) if isinstance(endpoint.gpus, GpuPins) else None
    known = [g for g in gpus or draft.records[name].last_gpus if g in draft.situation.gpus]
    return draft.situation.sizes(endpoint.memory, known)


def still_owed(draft: Draft, name: str, gpu: str, size: int) -> int:
    """Bytes of a place that its endpoint does not have yet, as seated so far; one that sleeps has a residue of it."""
    tenant = draft.board.tenants.get(endpoint_key(name))
    if tenant is None:
        return size
    return max(0, size - tenant.holds[gpu].memory_bytes) if gpu in tenant.holds else 0


def _returning(draft: Draft, overlay: OverlaySpec, begin: float, *, away: bool) -> list[Window]:
    """The returns that an overlay may not put off, as windows without an end; later than that they have their place."""
    owed = [r for r in draft.returns if not may_prolong(overlay, r.endpoint)]
    found = []
    for back in owed:
        if begin > draft.now.wall and begin >= back.at and not away:
            continue
        beside: dict[str, int] = {}
        for gpu in back.memory_bytes:
            alone = any(r.exclusive for r in owed if gpu in r.memory_bytes)
            stays = [t.holds[gpu].memory_bytes for t in draft.board.on(gpu) if not _over_by(draft, t, back.at)]
            wanted = sum(r.memory_bytes.get(gpu, 0) for r in owed)
            beside[gpu] = 0 if alone else max(0, draft.board.capacity[gpu] - sum(stays) - wanted)
        name, priority = back.endpoint.name, back.endpoint.priority
        found.append(Window(name, priority, back.at, back.at, inf, (), beside))
    return found


def _over_by(draft: Draft, tenant: Tenant, wall: float) -> bool:
    """Whether a tenant is an overlay that is predicted to be over by then."""
    kind, _, name = tenant.key.partition("/")
    step = draft.steps.get(name) if kind == "overlay" else None
    if step is None or step.spec is None:
        return False
    return predicted_end(step.record, step.spec.makespan, draft.now.wall) + MEMORY_RETURN_S <= wall


def keeping_off(windows: Iterable[Window]) -> Callable[[Need], Need]:
    """A need without the GPUs on which one of these windows leaves too little beside itself."""
    windows = tuple(windows)
    if not windows:
        return lambda need: need

    def fits(need: Need, gpu: str) -> bool:
        shares = [w.beside[gpu] for w in windows if gpu in w.beside]
        return not shares or (not need.exclusive and need.memory_bytes[gpu] <= min(shares))

    return lambda need: replace(need, candidates=tuple(g for g in need.candidates if fits(need, g)))


def opening_soon(draft: Draft, endpoint: EndpointSpec) -> list[Window]:
    """The windows that would have an endpoint's place again before it was worth the load, were it brought back to it.

    Only those count that may displace it, and that open within twice its load time; or, if it was displaced lately,
    before it has been ready for so long that it may be displaced again: they would have to wait for that. One whose
    time has come and that did not begin waits for something else: nobody knows how long.
    """
    load_s = draft.situation.timings(endpoint).load_s
    worth_s = WORTH_LOADS * load_s
    if draft.records[endpoint.name].evictions:
        worth_s = max(worth_s, load_s + draft.situation.spec.policy.min_ready_s)
    until, way_s = draft.now.wall + worth_s, _way_out_s(draft, endpoint)
    to_come = [w for w in draft.windows if draft.now.wall < w.start]
    return [w for w in to_come if min(w.opens, w.start - way_s) < until and _may_displace(draft, w, endpoint)]


def _may_displace(draft: Draft, window: Window, endpoint: EndpointSpec) -> bool:
    return may_prolong(draft.situation.spec.overlays[window.name], endpoint) or endpoint.name in window.victims


def keeps_off(overlay: OverlaySpec, endpoint: EndpointSpec) -> bool:
    """Whether an endpoint that is away from its own place goes to none that is kept for this overlay's window.

    It is less important, and the overlay may not displace it: it could not begin.
    """
    return overlay.priority > endpoint.priority and not may_prolong(overlay, endpoint)


def not_to_settle_on(draft: Draft, endpoint: EndpointSpec) -> list[Window]:
    """The windows to come that an endpoint which is away from its own place keeps off."""
    return [w for w in draft.windows if keeps_off(draft.situation.spec.overlays[w.name], endpoint)]


def held_back(subject: Subject, soon: Iterable[Window]) -> Blocked:
    """That an endpoint is not brought back in front of these windows."""
    last = max(soon, key=lambda w: w.end)
    names = ", ".join(sorted({w.name for w in soon}))
    message = f"{names} would displace it again before it had been ready as long as it takes to load"
    return Blocked(subject, "Held", message, (), last.end, transient=True)
