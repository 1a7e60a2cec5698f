"""Guests: what its owner runs in a reservation is none of ours, and its memory counts once.

What is foreign on a GPU counts as used. A reservation that is active there was made for something foreign: what came
since then is taken for its guest, whose memory is a part of the claim. What was there before is a stranger's, and
counts beside it; and so does what a guest takes beyond the claim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from reconciler.plan.board import Board
from reconciler.plan.draft import Draft
from reconciler.plan.ledger import Lease, Strangers
from reconciler.plan.observed import Gpu
from reconciler.plan.situation import Room


def know_strangers(draft: Draft) -> list[Lease]:
    """The leases, those of active reservations with the strangers beside them, who are noted once.

    Where a GPU cannot be read they are noted on the first look at it: whoever came in between counts as one. Where one
    of two reservations on a GPU is over they are noted anew: whose guest is still there, nobody can tell.
    """
    over = _given_up(draft)
    hosts = {n for n, step in draft.steps.items() if step.record.state == "active" and _is_reservation(draft, n)}

    def looked(lease: Lease) -> Lease:
        if lease.strangers is not None and lease.gpu not in over:
            return lease
        hosted = lease.overlay in hosts and lease.subject.kind == "workload"
        room = draft.situation.rooms.get(lease.gpu)
        return replace(lease, strangers=_strangers_in(room) if hosted and room is not None else None)

    return [looked(lease) for lease in draft.leases]


def _strangers_in(room: Room) -> Strangers | None:
    """Who holds foreign memory on a GPU now; None: it cannot be read."""
    if room.gpu.state != "ok" or room.gpu.used_bytes is None or room.gpu.processes is None:
        return None
    named = _named(room.gpu)
    return Strangers(tuple(sorted(named.items())), room.foreign_bytes - sum(named.values()))


def _is_reservation(draft: Draft, name: str) -> bool:
    """Whether an overlay holds its GPUs for a guest: it asks for nothing to run, and nothing of it was adopted."""
    step = draft.steps[name]
    return step.spec is not None and step.spec.workload is None and step.workload is None


def _given_up(draft: Draft) -> set[str]:
    """GPUs on which a reservation that was active is over with this decision."""
    kept = {(x.overlay, x.gpu) for x in draft.leases if x.strangers is not None}
    before = draft.situation.ledger.leases
    return {x.gpu for x in before if x.strangers is not None and (x.overlay, x.gpu) not in kept}


def find_guests(draft: Draft) -> dict[str, dict[str, int]]:
    """GPU → overlay → bytes of its reservation there that count as foreign memory already: its guest's."""
    hosts: dict[str, list[tuple[Lease, Strangers]]] = {}
    for lease in draft.leases:
        if lease.strangers is not None:
            hosts.setdefault(lease.gpu, []).append((lease, lease.strangers))
    rooms, unsure = draft.situation.rooms, _given_up(draft)
    known = {gpu: rooms[gpu] for gpu in hosts if gpu in rooms and gpu not in unsure}
    return {gpu: dict(_in_claims(draft, room, hosts[gpu])) for gpu, room in known.items()}


def _in_claims(draft: Draft, room: Room, hosts: Sequence[tuple[Lease, Strangers]]) -> Iterator[tuple[str, int]]:
    """Of each overlay with a reservation on a GPU: what its guest has of the claim.

    The order is that in which they became active: what was promised before, or was there, is beside the next one.
    """
    foreign, reserve = room.foreign_bytes, draft.situation.spec.node.reserve_bytes
    hosts = sorted(hosts, key=lambda host: (_begun(draft, host[0].overlay), host[0].overlay))
    taken = 0
    for lease, strangers in hosts:
        taken = max(taken, _strange(strangers, room.gpu, foreign)) + lease.memory_bytes
    beside = taken - sum(lease.memory_bytes for lease, _ in hosts)
    inside = max(reserve, foreign) - max(reserve, beside)  # or less: the rest is what guests have beyond the claims
    for lease, _ in hosts:
        part = min(inside, lease.memory_bytes)
        inside -= part
        yield lease.overlay, part


def guests_gone(draft: Draft, board: Board) -> Board:
    """A board on which all guests of reservations are gone with these."""
    more = {gpu: sum(guests.values()) for gpu, guests in draft.guests.items() if gpu in board.capacity}
    return replace(board, capacity={g: size + more.get(g, 0) for g, size in board.capacity.items()}) if more else board


def _begun(draft: Draft, overlay: str) -> float:
    begun = draft.steps[overlay].record.active_since
    return begun.mono if begun is not None else draft.now.mono


def _strange(strangers: Strangers, gpu: Gpu, foreign: int) -> int:
    """The most of what is foreign on a GPU now that may be of those who were there before the reservation.

    A stranger has what his process has. One that is not to be seen may be back under another pid, or without a name.
    """
    now, gone, seen = _named(gpu), strangers.nameless_bytes, 0
    for pid, size in strangers.processes:
        if pid in now:
            seen += now[pid]
        else:
            gone += size
    return seen + min(gone, foreign - seen)


def _named(gpu: Gpu) -> dict[int, int]:
    """What NVML names a foreign process for, by pid."""
    found: dict[int, int] = {}
    for process in gpu.processes or ():
        if process.owner is None and process.memory_bytes:
            found[process.pid] = found.get(process.pid, 0) + process.memory_bytes
    return found
