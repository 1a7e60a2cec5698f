"""How admitted overlays move on: from evicting to active, and from completing back to the baseline."""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.plan.actions import Blocked, Cause
from reconciler.plan.draft import OVERRIDING, Arriving, Draft
from reconciler.plan.lacks import occupants, why_unusable
from reconciler.plan.ledger import TERMINAL, Lease, Quarantine
from reconciler.plan.naps import restless
from reconciler.plan.observed import Incarnation, Subject
from reconciler.plan.overlays import MEMORY_TIMEOUT_S, OverlayStep, enter, finish, open_record
from reconciler.spec.spec import OverlaySpec

PUT_AWAY_S = 0.1
"""How long putting away the records of an ended run may take before it is looked at again."""


def leavers(draft: Draft, overlay: str, leases: list[Lease]) -> list[Incarnation]:
    """Who still has to go before an overlay may begin.

    Whoever gives way to it, whoever has to leave its GPUs, work of other overlays that has to end there, and ended
    incarnations whose memory is not seen free.
    """
    gpus = {x.gpu for x in leases}
    found = [x.incarnation for x in draft.leaving.values() if x.overlay == overlay or gpus & set(x.incarnation.gpus)]
    here = [i for i in draft.situation.passing if gpus & set(i.gpus)]
    found += restless(draft, gpus)
    return found + [i for i in here if _lingers(draft, i) or _ends(draft, i)]


def _ends(draft: Draft, incarnation: Incarnation) -> bool:
    """Whether this is work that runs and has to end."""
    if incarnation.subject.kind != "workload" or not incarnation.alive:
        return False
    step = draft.steps.get(incarnation.subject.name)
    return step is None or step.stop_workload is not None


def _lingers(draft: Draft, incarnation: Incarnation) -> bool:
    return not incarnation.alive and not draft.situation.memory_returned(incarnation)


def quarantine_overdue(draft: Draft) -> None:
    """Quarantine every GPU that a process of ours has kept for too long.

    1. Its process ended, and its memory is not back. 2. It was killed, and does not end: the kernel waits for a driver.
    """
    situation = draft.situation
    for incarnation in situation.passing:
        undying = incarnation.undying_since if incarnation.alive else None
        since = undying or _ended(draft, incarnation)
        if since is None or (undying is None and (incarnation.alive or situation.memory_returned(incarnation))):
            continue
        due = since.plus(MEMORY_TIMEOUT_S)
        if draft.now.mono < due.mono:
            draft.wakes.append(due)
            continue
        for uuid in incarnation.gpus:
            room = situation.rooms.get(uuid)
            if room is None or room.unusable is not None or uuid in draft.quarantines:
                continue
            if undying is not None:  # 2
                reason = f"{incarnation.subject} does not end, {MEMORY_TIMEOUT_S:g} s after it was killed"
            elif room.lingering_bytes > situation.tolerance_bytes:  # 1
                reason = f"memory of {incarnation.subject} not returned {MEMORY_TIMEOUT_S:g} s after it ended"
            else:
                continue
            draft.quarantines[uuid] = Quarantine(uuid, draft.now, reason)
            draft.say("quarantined", uuid, reason, Cause("drift"))


def _ended(draft: Draft, incarnation: Incarnation) -> Instant | None:
    """When the last of it ended; of one that vanished: when that was first noticed."""
    ends = [incarnation.lived_until, incarnation.exited or _noticed(draft, incarnation)]
    return max((end for end in ends if end is not None), key=lambda end: end.mono, default=None)


def _noticed(draft: Draft, incarnation: Incarnation) -> Instant | None:
    name = incarnation.subject.name
    if incarnation.subject.kind == "workload":
        return draft.steps[name].record.since if name in draft.steps else None
    return next((e.at for e in draft.records[name].exits if e.incarnation == incarnation.id), None)


BROKEN = ("GpuLost", "GpuUnhealthy", "NotManaged")
"""Why a leased GPU is given up before anything runs on it; one that is unknown at the moment is waited for."""


def progress(draft: Draft) -> bool:
    """Move every live overlay as far as the facts allow; True when one of them moved."""
    before = dict(draft.steps)
    for step in before.values():
        match step.record.state:
            case "completing":
                _completing(draft, step)
            case "restoring":
                _restoring(draft, step)
    if draft.steps != before:  # leases were released: whoever waits for the place is looked at once all are seated anew
        return True
    for step in before.values():
        match step.record.state:
            case "admitted" | "evicting":
                _evicting(draft, step)
            case "starting":
                _starting(draft, step)
    return draft.steps != before


def _evicting(draft: Draft, step: OverlayStep) -> None:
    name, now = step.record.name, draft.now
    leases = [x for x in draft.leases if x.overlay == name]
    if leavers(draft, name, leases) and not _broken(draft, leases) and not _staying(draft, leases):
        return
    if not _place_is_there(draft, step, leases):
        return
    if now.wall < step.record.window_start:
        message, begin = "its place is free; its window has not begun", step.record.window_start
        draft.block(Blocked(Subject("workload", name), "NotYet", message, (), begin, transient=True))
        draft.wakes.append(now.plus(begin - now.wall))
    else:
        draft.move(name, enter(step.record, "starting", now))


def _broken(draft: Draft, leases: Collection[Lease]) -> bool:
    rooms = [draft.situation.rooms.get(x.gpu) for x in leases]
    return any(x.gpu in draft.quarantines for x in leases) or any(r and r.unusable in BROKEN for r in rooms)


def _place_is_there(draft: Draft, step: OverlayStep, leases: Collection[Lease]) -> bool:
    """Whether all that it leased can be used and is seen free.

    If not: it is over (a GPU is quarantined, or its memory is not given back in time), it looks for another place (a
    GPU broke, or somebody stays who was to leave), or it waits.
    """
    name, now = step.record.name, draft.now
    bad = sorted({x.gpu for x in leases if x.gpu in draft.quarantines})
    if bad:
        rooms = draft.situation.rooms
        gpus = ", ".join(str(rooms[g].gpu.index) if g in rooms else g for g in bad)
        draft.move(name, finish(step.record, "failed", now, f"GPU {gpus} is quarantined"))
        return False
    gone = [r for x in leases if (r := draft.situation.rooms.get(x.gpu)) is not None and r.unusable in BROKEN]
    if gone:  # another place may be found for what never began; what did has used up its tries elsewhere
        room, told = gone[0], why_unusable(draft.situation, gone[0])
        why = f"{room.unusable}: GPU {room.gpu.index}, which it had leased, cannot be used any more: {told}"
        draft.move(name, finish(step.record, "failed" if step.record.failures else None, now, why))
        return False
    staying = _staying(draft, leases)
    if staying:
        why = f"{', '.join(staying)} was to leave its GPUs, and stays"
        draft.move(name, finish(step.record, "failed" if step.record.failures else None, now, why))
        return False
    short = [x for x in leases if not _has_room(draft, x)]
    if not short:
        return True
    tight = [r for x in short if (r := draft.situation.rooms.get(x.gpu)) is not None]
    unseen = sorted({r.gpu.index for r in tight if r.unusable == "GpuUnknown"})
    if unseen:
        message = f"GPU {', '.join(map(str, unseen))}, which it has leased, cannot be read at the moment"
        draft.block(Blocked(Subject("workload", name), "GpuUnknown", message, transient=True))
        return False
    ends = [draft.records[v].exits[-1].at for v in step.record.evicted if draft.records[v].exits]
    due = max([step.record.since, *ends], key=lambda instant: instant.mono).plus(MEMORY_TIMEOUT_S)
    if now.mono >= due.mono:
        draft.move(name, finish(step.record, "failed", now, "the memory it leased was taken by someone else"))
        return False
    draft.wakes.append(due)
    taken = list(dict.fromkeys(r.gpu.uuid for r in tight if r.foreign_bytes))
    message = "memory that it has leased is in use by someone else"
    message += f": {occupants(draft.situation, taken)}" if taken else ""
    draft.block(Blocked(Subject("workload", name), "GpuOccupied", message, transient=True))
    return False


def _staying(draft: Draft, leases: Collection[Lease]) -> list[str]:
    """Endpoints beside which what was leased does not fit, and that do not leave: an edit was taken back, for one.

    Nobody displaced them, so they have the older right. Strangers and GPUs that cannot be read are another matter.
    """
    found: set[str] = set()
    ending = {f"overlay/{n}" for n, s in draft.steps.items() if s.record.state not in OVERRIDING}
    for gpu in {x.gpu for x in leases} & draft.board.capacity.keys():
        tenants = [t for t in draft.board.on(gpu) if t.key not in ending]
        held = [t.holds[gpu] for t in tenants]
        limit = draft.situation.gpus[gpu].total_bytes - draft.situation.spec.node.reserve_bytes
        limit -= sum(size for name, size in draft.guests.get(gpu, {}).items() if f"overlay/{name}" not in ending)
        if sum(h.memory_bytes for h in held) <= limit and not (len(held) > 1 and any(h.exclusive for h in held)):
            continue
        for tenant in tenants:
            kind, _, name = tenant.key.partition("/")
            if kind == "endpoint" and draft.standings[name].current is not None and not draft.evicted_from(name):
                found.add(name)
    return sorted(found)


def _has_room(draft: Draft, lease: Lease) -> bool:
    """Whether the leased memory is seen free now, next to those that stay."""
    capacity = draft.board.capacity.get(lease.gpu)
    if capacity is None:
        return False
    held = sum(t.holds[lease.gpu].memory_bytes for t in draft.board.on(lease.gpu))
    return held <= capacity


def _starting(draft: Draft, step: OverlayStep) -> None:
    """Begin once what it requires is ready; without a workload that is all there is to begin.

    Where nothing would provide that any more, or all that would has failed, it gives back its place, and is looked at
    anew.
    """
    name, overlay = step.record.name, step.spec
    if overlay is None:
        return
    missing = [c for c in overlay.requires if not _ready(draft, c)]
    lost = [c for c in missing if _failed(draft, c)]
    if lost:
        offered = any(set(lost) & set(e.capabilities) for e in draft.wanted.values())
        why = f"what offers {', '.join(lost)} has failed" if offered else f"nothing offers {', '.join(lost)} any more"
        draft.move(name, finish(step.record, "failed" if step.record.failures else None, draft.now, why))
    elif missing:
        message = f"waits for a ready provider of {', '.join(missing)}"
        draft.block(Blocked(Subject("workload", name), "WaitingForCapability", message, transient=True))
    elif overlay.workload is None:
        draft.move(name, replace(enter(step.record, "active", draft.now), active_since=draft.now))
    elif _is_to_begin(draft, step):  # since it was leased, or since the last try, the place may have been taken
        _place_is_there(draft, step, [x for x in draft.leases if x.overlay == name])


def _ready(draft: Draft, capability: str) -> bool:
    return any(
        capability in e.capabilities and draft.standings[n].state == "healthy" and n not in _leaving(draft)
        for n, e in draft.wanted.items()
    )


def _failed(draft: Draft, capability: str) -> bool:
    """Whether nothing wanted offers it, or all that does has been given up."""
    offering = [draft.records[n] for n, e in draft.wanted.items() if capability in e.capabilities]
    return all(record.failed is not None for record in offering)


def _leaving(draft: Draft) -> set[str]:
    return {x.incarnation.subject.name for x in draft.leaving.values()}


def arrange_workload(draft: Draft, step: OverlayStep) -> None:
    """Arrange the start of a workload whose overlay is `starting` and waits for nothing more."""
    name, overlay = step.record.name, step.spec
    subject = Subject("workload", name)
    if overlay is None or overlay.workload is None or subject in draft.blocked:
        return
    if _is_to_begin(draft, step):
        draft.arriving[subject] = arrival(draft, step, overlay)


def _is_to_begin(draft: Draft, step: OverlayStep) -> bool:
    """Whether nothing of the present attempt was started; the end of one that was is taken in on the next look."""
    subject = Subject("workload", step.record.name)
    begun = any(i.attempt == step.record.attempt for i in draft.situation.incarnations(subject))
    return not begun and not draft.situation.living(subject)


def arrival(draft: Draft, step: OverlayStep, overlay: OverlaySpec) -> Arriving:
    """The workload's start on its leased GPUs."""
    subject = Subject("workload", overlay.name)
    leases = draft.leased(subject)
    return Arriving(
        subject,
        tuple(x.gpu for x in leases),
        tuple(x.memory_bytes for x in leases),
        any(x.exclusive for x in leases),
        overlay.placement_hash,
        f"the work of overlay {overlay.name}",
        Cause("overlay", overlay.source, overlay.name),
        overlay.name,
        attempt=step.record.attempt,
    )


def _completing(draft: Draft, step: OverlayStep) -> None:
    """Release the leases once nothing of the overlay's runs and its memory is seen free."""
    name = step.record.name
    leases = [x for x in draft.leases if x.overlay == name]
    subjects = {x.subject for x in leases} | {Subject("workload", name)}
    situation = draft.situation
    for subject in subjects:
        for incarnation in situation.incarnations(subject):
            stays = subject.kind == "endpoint" and incarnation.alive and incarnation.id not in draft.leaving
            if stays:
                continue
            if incarnation.alive or not situation.memory_returned(incarnation):
                return
    if step.record.outcome is None and step.spec is None:  # its file cannot be read: who knows whether it runs again
        return
    if _runs_again_at_once(draft, step) and situation.incarnations(Subject("workload", name)):
        draft.wakes.append(draft.now.plus(PUT_AWAY_S))  # nobody is restored in between, only to be displaced again
        return
    draft.drop_leases(name)
    if step.record.outcome is None:
        assert step.spec is not None  # noqa: S101 - see above
        fresh = open_record(step.spec, draft.now)
        again = replace(fresh, window_start=step.record.window_start, seen=step.record.seen)
        draft.move(name, replace(again, reason=step.record.reason))
    else:
        draft.move(name, enter(step.record, "restoring", draft.now, step.record.reason))


def _runs_again_at_once(draft: Draft, step: OverlayStep) -> bool:
    """Whether its file was replaced by other work; one that was displaced makes room for whoever displaced it."""
    displaced = any(step.record.name in other.record.seized for other in draft.steps.values() if other.live)
    return step.record.outcome is None and not displaced


def _restoring(draft: Draft, step: OverlayStep) -> None:
    if all(_is_back(draft, victim, step.record.name) for victim in step.record.evicted):
        outcome = step.record.outcome or "done"
        assert outcome in TERMINAL  # noqa: S101 - the four outcomes are the four terminal states
        draft.move(step.record.name, enter(step.record, outcome, draft.now, step.record.reason))


def _is_back(draft: Draft, victim: str, overlay: str) -> bool:
    """Whether a displaced endpoint needs no more waiting for.

    Ready again; or no longer wanted; or given up; or displaced or kept from its place by another overlay meanwhile, or
    held back for one; or without a place until somebody edits a file.
    """
    standing = draft.standings.get(victim)
    if standing is None or victim not in draft.wanted:
        return True
    if draft.records[victim].failed is not None or any(o != overlay for o in draft.evicted_from(victim)):
        return True
    blocked = draft.blocked.get(Subject("endpoint", victim))
    placeless = blocked is not None and not blocked.transient
    if (placeless or victim in draft.kept_off) and (standing.current is None or victim in draft.naps):
        return True
    return standing.state == "healthy" and standing.current is not None and standing.current.id not in draft.leaving
