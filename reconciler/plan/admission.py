"""Which waiting overlays begin now, where, and in whose place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.plan.actions import Blocked, Cause, Verdict
from reconciler.plan.asking import (
    badly_pinned,
    can_stop,
    cannot_start,
    consents_of,
    heirs_of,
    no_provider,
    not_preemptible,
    obstacle_of,
    own_needs,
    provider_choices,
    providers_of,
    rivals_of,
    would_stop,
)
from reconciler.plan.board import Board, Need
from reconciler.plan.draft import Draft, Window
from reconciler.plan.endpoints import cool_again
from reconciler.plan.lacks import Refusal
from reconciler.plan.ledger import Lease
from reconciler.plan.moving import begin
from reconciler.plan.observed import Subject
from reconciler.plan.overlays import OverlayStep, enter, finish
from reconciler.plan.placement import Placement
from reconciler.plan.rehousing import rehouse
from reconciler.plan.reservations import Fits, next_slot, reserve, slot_after, window_taken
from reconciler.plan.seating import seat
from reconciler.plan.together import Seat, begins_before, foreseen_moves, seat_together
from reconciler.plan.why import tell
from reconciler.plan.windows import ahead_of, keeping_off, lead_s, not_to_hinder
from reconciler.spec.spec import OverlaySpec
from reconciler.units import counted

LOOK_AGAIN_S = 1.0


def admit_all(draft: Draft) -> None:
    """Admit the best set of the waiting overlays; say of the others why they wait."""
    draft.windows = ()
    seat(draft)

    def seek(overlay: OverlaySpec, begin: float, board: Board, off: _Off, *, why: bool = True) -> _Answer:
        if begin <= draft.now.wall:
            return _seek(draft, overlay, board, off, why=why)
        later = frozenset({"NoProvider"})
        answer = _seek(draft, overlay, board, off, begin=begin, waive=later, why=False)
        if isinstance(answer, tuple):
            return answer
        # A cool-down that is not known to be over by then may be all the same.
        return _seek(draft, overlay, board, off, begin=begin, waive=later | {"CoolDown"}, why=why)

    def fits(overlay: OverlaySpec, begin: float, board: Board, off: _Off) -> bool:
        return isinstance(seek(overlay, begin, board, off, why=False), tuple)

    draft.windows = reserve(draft, seek, fits, partial(foreseen_moves, draft))
    if draft.windows:
        told = [b for b in draft.blocked.values() if b.subject.kind == "workload"]
        seat(draft)
        for blocked in told:
            draft.block(blocked)
    opens = {w.name: w.opens for w in reversed(draft.windows)}  # of several of one overlay the next
    due: list[OverlayStep] = []
    waiting = [s for s in draft.steps.values() if s.record.state == "pending" and s.spec is not None]
    for step in sorted(waiting, key=lambda s: (-s.record.priority, s.record.window_start, s.record.name)):
        if draft.situation.incarnations(Subject("workload", step.record.name)):
            # Its end would be taken for the end of the run that begins.
            subject = Subject("workload", step.record.name)
            draft.block(Blocked(subject, "LastRun", "its last run is not put away yet", transient=True))
            draft.wakes.append(draft.now.plus(LOOK_AGAIN_S))
        elif draft.now.wall < opens.get(step.record.name, step.record.window_start):
            subject, begin = Subject("workload", step.record.name), step.record.window_start
            draft.block(Blocked(subject, "NotYet", "its window has not begun", (), begin, transient=True))
        elif not draft.situation.observed.clock_jumped or step.record.window_start <= step.record.since.wall:
            due.append(step)
    _admit_together(draft, due)
    for step in due:
        if draft.steps[step.record.name].record.state == "pending" and step.spec is not None:
            _admit(draft, step.spec, fits)
    if rehouse(draft):
        seat(draft)


_Answer = tuple[Placement, list[Need]] | Refusal | None
_Off = Callable[[Need], Need]


def _seek(
    draft: Draft,
    overlay: OverlaySpec,
    board: Board,
    off: _Off,
    *,
    begin: float | None = None,
    waive: frozenset[str] = frozenset(),
    why: bool = True,
) -> _Answer:
    """The least lawful choice of providers, places and victims; why there is none; None: nothing provides.

    Args:
        draft: the decision so far
        overlay: who asks
        board: who has a place
        off: takes from a need the GPUs that it is kept off
        begin: epoch seconds of its start; None: now
        waive: rules that do not count
        why: whether it is to be told why there is none
    """
    own = own_needs(draft, overlay)
    if own is None:
        return None
    board = board.without(frozenset(f"endpoint/{n}" for n in overlay.endpoints))
    consents = consents_of(draft, overlay, begin)
    best: tuple[Placement, list[Need]] | None = None
    refusal: Refusal | None = None
    placeless = "NoProvider" in waive
    for providers in provider_choices(draft, overlay, board, placeless=placeless):
        needs, starts = [off(need) for need in (*own, *providers)], providers_of(overlay, providers)
        placement = consents.seek(needs, board, starts, waive=waive)
        if placement is None:
            refusal = refusal or (consents.explain(needs, board, starts) if why else None)
        elif best is None or placement.cost < best[0].cost:
            best = placement, needs
    return best or refusal


def _admit_together(draft: Draft, due: Sequence[OverlayStep]) -> None:
    """Admit the best set of the overlays that are due: the least choice for all of them at once.

    Those that would have to wait for a moment all the same are left out, and the rest chosen anew.
    """
    fit = [s.spec for s in due if s.spec is not None and _unfit(draft, s.spec) is None]
    while fit:
        found = seat_together(draft, fit)
        hindered = [
            each.overlay.name
            for position, each in enumerate(found.seats)
            if _hindrance(draft, each, found.seats[:position]) is not None
        ]
        if hindered:
            fit = [overlay for overlay in fit if overlay.name not in hindered]
            continue
        draft.places |= found.places
        draft.unmoved = found.unmoved
        verdict = found.why()
        if verdict is not None:
            draft.verdicts.append(verdict)
        for each in found.seats:
            _take(draft, each, verdict)
        if found.seats:
            draft.want()
            seat(draft)
        return


def _admit(draft: Draft, overlay: OverlaySpec, fits: Fits) -> None:
    """Say why an overlay that was not admitted with the others waits; or admit it by itself after all.

    The outcomes:
        1. a pin names a GPU that this node does not have            → NoSuchGpu
        2. it sets aside an endpoint that is not preemptible         → NotPreemptible, or GpuUnknown
           or cannot be stopped now
        3. another overlay has its own version of an endpoint it sets → SetByAnother
           or what it would start is not there to be started          → CannotStart; it fails if only its work cannot
        4. nothing that has a place, or finds one, can provide what   → NoProvider
           it requires
        5. a port that its endpoints need is not free for them       → PortInUse
        6. it would spare victims to wait for a lease being returned → WaitingForLease, as in 9
           or another begins beside its victims at this moment       → WaitingForBegin
        7. some choice of providers, places and victims is lawful    → leases, the least choice
        8. only windows to come stand in the way                     → WindowTaken, and the next free slot
        9. none is                                                   → the rule or the lack that stands in the way
    """
    subject = Subject("workload", overlay.name)
    unfit = _unfit(draft, overlay)
    if unfit is not None:
        if unfit.reason == "SetByAnother":
            slot = slot_after(draft, overlay, {*rivals_of(draft, overlay), *heirs_of(draft, overlay)}, fits)
            unfit = replace(unfit, earliest_start=slot)
        draft.block(unfit)  # 1, 2, 3
        if unfit.reason == "CannotStart":
            _fail_in_vain(draft, overlay)
        return
    rivalling = ahead_of(draft, overlay, draft.now.wall)
    answer = _seek(draft, overlay, draft.board, keeping_off(rivalling))
    if isinstance(answer, tuple):
        placement, needs = answer
        alone = Seat(overlay, tuple(needs), placement.gpus, placement.victims)
        hindrance = _hindrance(draft, alone, ())
        if hindrance is not None:
            draft.block(hindrance)  # 5, 6, 8
            return
        _take(draft, alone, None)  # 7
        draft.want()
        seat(draft)
        return
    if rivalling:  # what stands in the way beside the windows is told, not how little they leave
        answer = _seek(draft, overlay, draft.board, lambda need: need)
        if isinstance(answer, tuple) or (_cooling(answer) and _once_cooled(draft, overlay, rivalling) is None):
            slot = next_slot(draft, overlay, draft.now.wall, fits)
            draft.block(window_taken(draft, overlay, draft.now.wall, rivalling, slot))  # 8
            return
    if answer is None:
        draft.block(no_provider(draft, overlay, next_slot(draft, overlay, draft.now.wall, fits)))  # 4
        return
    soon = answer.reason == "WaitingForLease"  # what was foreseen of one that ends sooner is no more
    earliest = None if soon else next_slot(draft, overlay, draft.now.wall, fits)
    cool = _cool(draft, overlay, rivalling) if _cooling(answer) else None
    if cool is not None:
        cool_wall = draft.now.wall + cool.since(draft.now)
        earliest = cool_wall if earliest is None else min(earliest, cool_wall)
    draft.block(Blocked(subject, answer.reason, answer.message, answer.alternatives, earliest, answer.transient))  # 9


def _fail_in_vain(draft: Draft, overlay: OverlaySpec) -> None:
    """Fail an overlay whose work would begin now and is certain not to start, before anybody gives way for it."""
    record, obstacle = draft.steps[overlay.name].record, obstacle_of(draft, overlay)
    if obstacle is None or draft.now.wall < record.window_start:
        return
    off = keeping_off(ahead_of(draft, overlay, draft.now.wall))
    if isinstance(_seek(draft, overlay, draft.board, off, why=False), tuple):
        reason = f"its work cannot be started: {obstacle.message}"
        draft.move(overlay.name, enter(record, "failed", draft.now, reason))


def _cool(draft: Draft, overlay: OverlaySpec, rivalling: Sequence[Window]) -> Instant | None:
    """When the victims that it would take may be evicted again; None: the time alone does not tell.

    Others may be sooner: it is asked again at the end of each cool-down.
    """
    policy, ends = draft.situation.spec.policy, {}
    for name, record in draft.records.items():
        end = cool_again(
            record,
            draft.now,
            max_evictions_per_hour=policy.max_evictions_per_hour,
            min_ready_s=policy.min_ready_s,
        )
        if end is not None:
            ends[name] = end
    draft.wakes.extend(ends.values())
    cooled = _once_cooled(draft, overlay, rivalling)
    if cooled is None:
        return None
    names = [key.partition("/")[2] for key in sorted(cooled.victims) if key.startswith("endpoint/")]
    return max((ends[n] for n in names if n in ends), key=lambda end: end.mono, default=None)


def _cooling(answer: _Answer) -> bool:
    return isinstance(answer, Refusal) and answer.reason == "CoolDown"


def _once_cooled(draft: Draft, overlay: OverlaySpec, rivalling: Sequence[Window]) -> Placement | None:
    """The place that it would have beside the windows if no cool-down stood in the way."""
    answer = _seek(draft, overlay, draft.board, keeping_off(rivalling), waive=frozenset({"CoolDown"}), why=False)
    return answer[0] if isinstance(answer, tuple) else None


def _unfit(draft: Draft, overlay: OverlaySpec) -> Blocked | None:
    """Outcomes 1 to 3 of `_admit`: what keeps an overlay waiting wherever there is room."""
    subject = Subject("workload", overlay.name)
    if own_needs(draft, overlay) is None:
        return badly_pinned(draft, overlay)  # 1
    firm = not_preemptible(draft, overlay)
    if firm is not None:
        return firm  # 2
    unseen = sorted(n for n in _stopping(draft, overlay) if not can_stop(draft, n))
    if unseen:
        message = f"it sets aside {', '.join(unseen)}, which cannot be seen well enough to be stopped"
        return Blocked(subject, "GpuUnknown", message, ("see `reconciler status`",), transient=True)  # 2
    rivals = rivals_of(draft, overlay)
    if rivals:
        done = "sets the same endpoint otherwise, or runs" if len(rivals) == 1 else "set the same otherwise, or run"
        message = f"{', '.join(rivals)} {done} on it"
        return Blocked(subject, "SetByAnother", message, transient=True)  # 3
    return cannot_start(draft, overlay)  # 3


def _stopping(draft: Draft, overlay: OverlaySpec) -> frozenset[str]:
    """Endpoints that run now and that the overlay's `set` ends."""
    return frozenset(n for n in overlay.endpoints if would_stop(draft, overlay, n))


def _hindrance(draft: Draft, found: Seat, beside: Sequence[Seat]) -> Blocked | None:
    """Outcomes 5, 6 and 8 of `_admit`: why a lawful place is not taken now, `beside` being taken with it."""
    subject = Subject("workload", found.overlay.name)
    together = found.victims.union(*(other.victims for other in beside))
    starts = frozenset().union(*(providers_of(each.overlay, each.needs) for each in (found, *beside)))
    window = _crowded(draft, found, beside) or consents_of(draft, found.overlay).hinders(together, starts)
    if window is not None:
        return window_taken(draft, found.overlay, draft.now.wall, [window], None)  # 8
    taken = _port_conflict(draft, found, beside)
    if taken is not None:
        return Blocked(subject, "PortInUse", taken, ("choose another port",), transient=True)  # 5
    beginning = _beginning(draft, found)
    if beginning:
        message = f"{', '.join(beginning)} begins on a GPU that somebody would have to leave, or load on, for it"
        return Blocked(subject, "WaitingForBegin", message, transient=True)  # 6
    returning = _returning(draft, found)
    if returning:
        message = f"it waits for the place that {', '.join(returning)} is giving back, rather than displace more"
        return Blocked(subject, "WaitingForLease", message, transient=True)  # 6
    return None


def _crowded(draft: Draft, found: Seat, beside: Sequence[Seat]) -> Window | None:
    """A window that leaves room beside itself for each of them, and not for all."""
    for window in ahead_of(draft, found.overlay, draft.now.wall):
        near = [found, *(s for s in beside if window in ahead_of(draft, s.overlay, draft.now.wall))]
        for gpu, left in window.beside.items():
            taken = [_share(each, gpu) for each in near]
            if taken[0] and sum(taken) > left:
                return window
    return None


def _share(found: Seat, gpu: str) -> int:
    """Bytes that it gets on one GPU."""
    return sum(need.memory_bytes[gpu] for need in found.needs if gpu in found.gpus[need.subject])


def _port_conflict(draft: Draft, found: Seat, beside: Sequence[Seat]) -> str | None:
    """Who has a port that an endpoint of this overlay needs, and would still have it: no eviction for its sake."""
    base, overlay = draft.situation.spec.endpoints, found.overlay
    gone = {k.partition("/")[2] for each in (found, *beside) for k in each.victims}
    gone.update(n for each in (found, *beside) for n in each.overlay.endpoints)
    started = {n.subject.name: each.overlay for each in beside for n in each.needs if n.subject.kind == "endpoint"}
    engines = [need for need in found.needs if need.subject.kind == "endpoint"]
    if not engines:
        return None
    others = {n: e for n, e in draft.wanted.items() if n not in gone}
    others |= {n: by.endpoints.get(n) or base[n] for n, by in started.items()}
    for need in engines:
        endpoint = overlay.endpoints.get(need.subject.name) or base[need.subject.name]
        holder = draft.situation.observed.ports.get(endpoint.port) if endpoint.port is not None else None
        if holder is not None:
            who = f"pid {holder.pid} ({holder.command})" if holder.pid is not None else "a process that cannot be seen"
            return f"port {endpoint.port}, which {endpoint.name} needs, is in use by {who}"
        for name, other in others.items():
            if name != endpoint.name and endpoint.port is not None and other.port == endpoint.port:
                return f"port {endpoint.port}, which {endpoint.name} needs, belongs to {name}"
    return None


def _beginning(draft: Draft, found: Seat) -> list[str]:
    """Overlays, not less important, that begin where its leavers are, or where its endpoints would still load then.

    They would wait: on one GPU one engine comes or goes at a time.
    """
    needs = [n for n in found.needs if n.subject.kind == "endpoint" and not _goes_on(draft, found.overlay, n.subject)]
    loading = {g for need in needs for g in found.gpus[need.subject]}
    loading.update(g for places in found.moves.values() for g in places)
    gpus = {g for key in found.leavers for g in draft.board.tenants[key].holds} | loading
    names = {
        name
        for name in draft.steps
        if begins_before(draft, name, found.overlay)
        and f"overlay/{name}" not in found.victims
        and any(lease.overlay == name and lease.gpu in gpus for lease in draft.leases)
    }
    base, own = draft.situation.spec.endpoints, found.overlay.endpoints
    engines = [own.get(n.subject.name) or base[n.subject.name] for n in needs]
    engines += [base[name] for name in found.moves]
    loaded = draft.now.wall + lead_s(draft, (k.partition("/")[2] for k in found.leavers))
    loaded += max((draft.situation.timings(e).load_s for e in engines), default=0.0)
    soon = (w for w in not_to_hinder(draft, found.overlay) if draft.now.wall < w.start < loaded)
    names |= {w.name for w in soon if loading & w.beside.keys()}
    return sorted(names)


def _goes_on(draft: Draft, overlay: OverlaySpec, engine: Subject) -> bool:
    """Whether an endpoint that runs for another overlay is taken over as it is: nothing of it is started."""
    return engine.name not in overlay.endpoints and draft.standings[engine.name].current is not None


def _returning(draft: Draft, found: Seat) -> list[str]:
    """Overlays that are over and about to return leases with which fewer would have to leave; empty: none."""
    ending = sorted(n for n, s in draft.steps.items() if s.record.state == "completing")
    if not found.leavers or not ending:
        return []
    gone = {f"endpoint/{n}" for n in found.overlay.endpoints} | {f"overlay/{n}" for n in ending}
    starts = providers_of(found.overlay, found.needs)
    later = consents_of(draft, found.overlay).seek(found.needs, draft.board.without(frozenset(gone)), starts)
    spared = later is not None and len(later.victims) < len(found.leavers) and len(later.victims) <= len(found.victims)
    return ending if spared else []


def _take(draft: Draft, found: Seat, verdict: Verdict | None) -> None:
    """Record the admission: leases, victims, and who will have to come back. Everybody has to be seated anew."""
    overlay, now, name = found.overlay, draft.now, found.overlay.name
    step, vacated = draft.steps[name], _stopping(draft, overlay)
    cause = Cause("overlay", overlay.source, name)
    near = ahead_of(draft, overlay, now.wall)
    draft.windows = tuple(
        replace(w, beside={g: max(0, left - _share(found, g)) for g, left in w.beside.items()}) if w in near else w
        for w in draft.windows
    )
    taken_over = {Subject("endpoint", n) for n in providers_of(overlay, found.needs)}
    draft.leases = [x for x in draft.leases if x.subject not in taken_over]
    for need in found.needs:
        for gpu in found.gpus[need.subject]:
            lease = Lease(name, need.subject, gpu, need.memory_bytes[gpu], need.exclusive, now)
            draft.leases.append(lease)
    seized = sorted(k.partition("/")[2] for k in found.victims if k.startswith("overlay/"))
    victims = {k.partition("/")[2] for k in found.victims if k.startswith("endpoint/")} | vacated
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
    for endpoint, places in sorted(found.moves.items()):
        begin(draft, endpoint, places, name)
    for victim in seized:
        lower = draft.steps[victim]
        draft.move(victim, finish(lower.record, None, now, f"displaced by {name}"))
        draft.say("displaced", victim, f"gives way to {name}", cause)
    gpus = found.gpus.get(Subject("workload", name), ())
    why = " ".join(tell(verdict)) if verdict is not None and found.leavers else ""
    record = replace(
        enter(step.record, "evicting", now),
        gpus=gpus,
        evicted=tuple(evicted),
        moved=tuple(sorted(found.moves)),
        seized=tuple(seized),
        outcome=None,
        why=why,
    )
    draft.move(name, record)
    count = len({x.gpu for x in draft.leases if x.overlay == name})
    draft.say("admitted", name, f"leases taken on {counted(count, 'GPU')}" + (f". {why}" if why else ""), cause)
