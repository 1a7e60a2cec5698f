"""What several askers want at once, and what a way to seat them costs: the values of the search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from reconciler.plan.board import Board, Need, Tenant, Victims
from reconciler.plan.observed import Subject

Cost = tuple[int, ...]
"""Compared from left to right: see `Levels`."""
MOST_TOGETHER = 32
"""So many overlays, and so many endpoints that look for a place, are decided on at once; those beyond one by one.
Hardly anybody has more of them waiting on one box, and the search grows with each."""
TAIL = (
    "due",
    "lost_readiness_ms",
    "moves",
    "start_delay_ms",
    "contested",
    "nvlink_islands",
    "numa_nodes",
    "broken_into_mib",
)
DUE, LOST, MOVES, DELAY, CONTESTED, ISLANDS, NUMA, BROKEN = range(-len(TAIL), 0)

SCALE = 12
"""Bounds are counted in twelfths: a victim that holds 2, 3, 4 or 6 GPUs is paid for in equal parts on each of them."""

MayDisplace = Callable[[Tenant], bool]


class Wish(Struct, frozen=True):
    """What one asker wants, all or nothing, and in which ways."""

    key: str
    options: tuple[tuple[Need, ...], ...]
    """Each a whole way to have what it wants; the needs of one subject in two wishes are met once."""
    rank: int | None = None
    """Its priority if it may be left out; None: it has to be seated."""
    may_displace: MayDisplace | None = None
    """None: nobody."""
    group: int = 0
    """What a later group gets, or costs, is compared only where the earlier groups' is the same."""
    may_prolong: MayDisplace | None = None
    """Whose place it may have once that one left for another wish: it comes back so much later. None: anybody's."""
    frees: Victims = frozenset()
    """Tenants that go once it is seated, as its file says: they are no victims."""
    rivals: frozenset[str] = frozenset()
    """Wishes beside which it cannot be seated."""
    yields: tuple[frozenset[str], int] | None = None
    """Of one that has to be seated: the wishes that may take its place, and the priority at which it counts then."""
    waits: bool = False
    """Others may have whom they like leave its GPUs: it is no matter when it begins."""
    starts: tuple[frozenset[str], ...] = ()
    """Of each option the keys of the providers that it starts or takes over: they count as seated with it. Empty: of
    none any."""


class Proof(Struct, frozen=True):
    """How sure it is that nothing less would do."""

    optimal: bool
    bound: Cost
    """No answer costs less than this; the answer's own cost if it is proved."""
    steps: int


class Choice(Struct, frozen=True):
    """The least way that was found."""

    seated: tuple[str, ...]
    """Keys of the wishes that have what they want, in the order in which they were given."""
    gpus: Mapping[Subject, tuple[str, ...]]
    """By subject, in NVML order."""
    owners: Mapping[Subject, str]
    """By subject: the wish that it was placed for."""
    victims: Mapping[str, str]
    """Tenant, or wish that had to be seated → the wish that takes its place."""
    cost: Cost
    levels: tuple[str, ...]
    """The name of each part of the cost."""
    proof: Proof


class Levels:
    """Which part of a cost stands where.

    Group after group, in one descending order of priorities: how many victims of a priority, then how many askers of
    it are left out. So an asker's seat outweighs victims that are less important than it, and no others. Then, for all
    together, the parts of `TAIL`.
    """

    def __init__(self, wishes: Sequence[Wish], board: Board) -> None:
        victims = {w.yields[1] for w in wishes if w.yields is not None}
        if any(w.may_displace is not None for w in wishes):
            victims |= {t.priority for t in board.tenants.everybody()}
        parts: list[tuple[int, int, int]] = []
        for group in sorted({w.group for w in wishes}):
            seats = {w.rank for w in wishes if w.rank is not None and w.group == group}
            parts += [(group, *part) for part in sorted([*((p, 1) for p in victims), *((p, 0) for p in seats)])[::-1]]
        self._position = {part: i for i, part in enumerate(parts)}
        self._group = {w.key: w.group for w in wishes}
        names = [f"{'displaced' if victim else 'left_waiting'}@{priority}" for _, priority, victim in parts]
        self.names = (*names, *TAIL)
        self.zero: Cost = (0,) * len(self.names)

    def victim(self, by: str, priority: int) -> int:
        """Where a victim of this priority counts that makes room for the wish `by`."""
        return self._position[self._group[by], priority, 1]

    def departure(self, by: str, tenant: Tenant) -> tuple[int, int]:
        """Where it counts, and how much, that a tenant leaves for the wish `by`: as a victim, or as a move."""
        return (MOVES, tenant.moves) if tenant.moves else (self.victim(by, tenant.priority), 1)

    def seat(self, wish: Wish) -> int:
        """Where it counts that this wish is left out."""
        return self._position[wish.group, wish.rank or 0, 0]


def add(one: Cost, other: Cost) -> Cost:
    """Part by part."""
    return tuple([a + b for a, b in zip(one, other, strict=True)])


def whole(parts: Cost) -> Cost:
    """The least cost in whole numbers that is no less than one in parts of `SCALE`."""
    cost: list[int] = []
    for i, part in enumerate(parts):
        if part % SCALE:  # what comes after may be anything then
            return (*cost, part // SCALE + 1, *((0,) * (len(parts) - i - 1)))
        cost.append(part // SCALE)
    return tuple(cost)
