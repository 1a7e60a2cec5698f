"""Which GPUs for which needs, and whom that displaces: an exact search over values. It knows no rule of who may.

The board shows every GPU as it will be once all that is leaving has left. Rules come in as two questions: may this
tenant be displaced, and may this set of tenants be displaced together. The answer is the least placement by
`Cost`, found by branch and bound: costs only grow along a branch, so a branch that already costs as much as the best
answer is cut. Symmetric GPUs are tried in NVML order and ties keep the first, so equal input gives equal output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from reconciler.plan.observed import Subject
from reconciler.units import GIB

Victims = frozenset[str]
Cost = tuple[float, ...]
"""Compared from left to right: victims per priority, highest first; lost readiness in capability-seconds; moves;
contested pins; NUMA nodes beyond the first; GiB left over on shared GPUs."""


@dataclass(frozen=True, slots=True)
class Need:
    """One subject's all-or-nothing wish: so many GPUs, so many bytes on each."""

    subject: Subject
    candidates: tuple[str, ...]
    """UUIDs that may serve, in NVML order. With a pin exactly the pinned ones, and `count` of them."""
    count: int
    memory_bytes: Mapping[str, int]
    """Bytes claimed on each candidate."""
    exclusive: bool
    prefer: tuple[str, ...] = ()
    """Where it ran last; other GPUs count as moves."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A tenant's part of one GPU."""

    memory_bytes: int
    exclusive: bool


@dataclass(frozen=True, slots=True)
class Tenant:
    """Someone who holds, or is about to hold, parts of GPUs."""

    key: str
    """Unique and sortable: `endpoint/NAME` or `overlay/NAME`."""
    priority: int
    holds: Mapping[str, Hold]
    lost_readiness: float = 0.0
    """Capability-seconds that displacing it is predicted to cost."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything goes, and who gives way."""

    gpus: Mapping[Subject, tuple[str, ...]]
    victims: Victims
    cost: Cost


@dataclass(slots=True)
class Board:
    """Every GPU with its capacity and its tenants."""

    capacity: Mapping[str, int]
    """Usable bytes of each GPU that may be used at all, in NVML order."""
    numa: Mapping[str, int | None]
    tenants: dict[str, Tenant] = field(default_factory=dict)
    contested: Mapping[str, int] = field(default_factory=dict)
    """How many waiting pins name this GPU: taken last by those who may choose."""

    def add(self, tenant: Tenant) -> None:
        """Seat a tenant; what it holds under the same key is replaced."""
        self.tenants[tenant.key] = tenant

    def on(self, gpu: str) -> list[Tenant]:
        """The tenants of one GPU."""
        return [t for t in self.tenants.values() if gpu in t.holds]

    def without(self, keys: Victims) -> Board:
        """The board after these tenants left."""
        rest = {k: t for k, t in self.tenants.items() if k not in keys}
        return Board(self.capacity, self.numa, rest, self.contested)


@dataclass(frozen=True, slots=True)
class _Branch:
    victims: Victims
    taken: tuple[tuple[str, Hold], ...]
    """What the needs placed so far hold, by GPU."""
    placed: tuple[tuple[Subject, tuple[str, ...]], ...]
    cost: Cost


def place(
    needs: Sequence[Need],
    board: Board,
    *,
    may_displace: Callable[[Tenant], bool],
    may_displace_all: Callable[[Victims], bool] = lambda _: True,
) -> Placement | None:
    """The least placement of all `needs` together, or None when they do not fit whatever gives way.

    `may_displace_all` must be monotone: once it refuses a set it refuses every larger one.
    """
    priorities = sorted({t.priority for t in board.tenants.values() if may_displace(t)}, reverse=True)
    search = _Search(needs, board, may_displace, may_displace_all, {p: i for i, p in enumerate(priorities)})
    search.descend(0, _Branch(frozenset(), (), (), (0.0,) * (len(priorities) + 5)))
    return search.best


class _Rest:
    """The GPUs that a gang may take, and what the cheapest of them cost at the least.

    Costs are compared from left to right, and that order is kept by adding: the sum of the cheapest parts is no more
    than the sum of any other ones.
    """

    def __init__(self, gpus: tuple[str, ...], least: Sequence[Cost]) -> None:
        self.gpus = gpus
        self._least = least
        self._sums: dict[tuple[int, int], Cost] = {}

    def at_least(self, position: int, count: int) -> Cost:
        """A lower bound of what `count` GPUs from `position` on add to the cost."""
        key = position, count
        if key not in self._sums:
            total = (0.0,) * len(self._least[0])
            for cost in sorted(self._least[position:])[:count]:
                total = _sum(total, cost)
            self._sums[key] = total
        return self._sums[key]


def _sum(one: Cost, other: Cost) -> Cost:
    return tuple(a + b for a, b in zip(one, other, strict=True))


class _Search:
    def __init__(
        self,
        needs: Sequence[Need],
        board: Board,
        may_displace: Callable[[Tenant], bool],
        may_displace_all: Callable[[Victims], bool],
        rank: Mapping[int, int],
    ) -> None:
        self._needs = needs
        self._board = board
        self._may_displace_all = may_displace_all
        self._rank = rank
        self._movable = {key for key, tenant in board.tenants.items() if may_displace(tenant)}
        self._on = {gpu: board.on(gpu) for gpu in board.capacity}
        self.best: Placement | None = None

    def descend(self, index: int, branch: _Branch) -> None:
        """Place the needs from `index` on."""
        if self.best is not None and branch.cost >= self.best.cost:
            return
        if index == len(self._needs):
            self.best = Placement(dict(branch.placed), branch.victims, branch.cost)
            return
        need = self._needs[index]
        # A GPU on which nothing makes room now will not have any further down: a branch only takes and never gives.
        openings = {g: self._openings(need, g, branch) for g in need.candidates if g in self._board.capacity}
        usable = tuple(g for g, ways in openings.items() if ways)
        if len(usable) >= need.count:
            least = [min(self._at_least(need, g, way, branch) for way in openings[g]) for g in usable]
            self._choose(index, need, _Rest(usable, least), 0, (), branch)

    def _choose(
        self, index: int, need: Need, rest: _Rest, position: int, chosen: tuple[str, ...], branch: _Branch
    ) -> None:
        """Pick the next GPU of one gang; GPUs stay in NVML order so that no set is tried twice."""
        missing = need.count - len(chosen)
        if missing == 0:
            done = _Branch(branch.victims, branch.taken, (*branch.placed, (need.subject, chosen)), branch.cost)
            self.descend(index + 1, done)
            return
        for next_position in range(position, len(rest.gpus) - missing + 1):
            if self._is_hopeless(branch.cost, rest.at_least(next_position, missing)):
                return
            gpu = rest.gpus[next_position]
            ways = []
            for extra in self._openings(need, gpu, branch):
                victims = branch.victims | extra
                if not extra or self._may_displace_all(victims):
                    ways.append((self._grown(need, gpu, chosen, extra, victims, branch), victims))
            taken = (*branch.taken, (gpu, Hold(need.memory_bytes[gpu], need.exclusive)))
            for cost, victims in sorted(ways, key=lambda way: way[0]):
                if self._is_hopeless(cost, rest.at_least(next_position + 1, missing - 1)):
                    break
                further = _Branch(victims, taken, branch.placed, cost)
                self._choose(index, need, rest, next_position + 1, (*chosen, gpu), further)

    def _is_hopeless(self, cost: Cost, at_least: Cost) -> bool:
        return self.best is not None and _sum(cost, at_least) >= self.best.cost

    def _openings(self, need: Need, gpu: str, branch: _Branch) -> list[Victims]:
        """The inclusion-minimal further victims that make room on one GPU; empty when nothing does."""
        staying = [t for t in self._on[gpu] if t.key not in branch.victims]
        movable = [t for t in staying if t.key in self._movable]
        fixed = [t.holds[gpu] for t in staying if t.key not in self._movable]
        fixed += [hold for taken_gpu, hold in branch.taken if taken_gpu == gpu]
        wanted = need.memory_bytes[gpu]
        if wanted > self._board.capacity[gpu] or any(h.exclusive for h in fixed) or (need.exclusive and fixed):
            return []
        if need.exclusive:
            return [frozenset(t.key for t in movable)]
        must = frozenset(t.key for t in movable if t.holds[gpu].exclusive)
        shared = [t for t in movable if t.key not in must]
        missing = wanted + sum(h.memory_bytes for h in fixed) - self._board.capacity[gpu]
        missing += sum(t.holds[gpu].memory_bytes for t in shared)
        if missing <= 0:
            return [must]
        found: list[Victims] = []
        for size in range(1, len(shared) + 1):
            for group in combinations(shared, size):
                keys = must | {t.key for t in group}
                enough = sum(t.holds[gpu].memory_bytes for t in group) >= missing
                if enough and not any(smaller <= keys for smaller in found):
                    found.append(keys)
        return found

    def _at_least(self, need: Need, gpu: str, way: Victims, branch: _Branch) -> Cost:
        """What taking this GPU this way costs at the least, whatever else the gang takes.

        Victims that hold other GPUs as well may be victims already; they are left out, as are NUMA nodes.
        """
        alone = frozenset(key for key in way if len(self._board.tenants[key].holds) == 1)
        before = _Branch(branch.victims, branch.taken, branch.placed, (0.0,) * len(branch.cost))
        return self._grown(need, gpu, (), alone, branch.victims | way, before)

    def _grown(
        self, need: Need, gpu: str, chosen: tuple[str, ...], extra: Victims, victims: Victims, branch: _Branch
    ) -> Cost:
        """The branch's cost with one more GPU taken; no term ever shrinks."""
        cost = list(branch.cost)
        lost, moves, contested, numa, waste = range(len(self._rank), len(self._rank) + 5)
        for key in sorted(extra):
            tenant = self._board.tenants[key]
            cost[self._rank[tenant.priority]] += 1
            cost[lost] += tenant.lost_readiness
        if need.prefer and gpu not in need.prefer:
            cost[moves] += 1
        if need.count != len(need.candidates):
            cost[contested] += self._board.contested.get(gpu, 0)
        if chosen and self._board.numa.get(gpu) not in {self._board.numa.get(c) for c in chosen}:
            cost[numa] += 1
        if not need.exclusive:
            used = sum(t.holds[gpu].memory_bytes for t in self._on[gpu] if t.key not in victims)
            used += sum(hold.memory_bytes for taken_gpu, hold in branch.taken if taken_gpu == gpu)
            cost[waste] += round(max(0, self._board.capacity[gpu] - used - need.memory_bytes[gpu]) / GIB, 3)
        return tuple(cost)
