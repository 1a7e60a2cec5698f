"""The least way to seat several askers together: an exact search by branch and bound, bounded in work.

What is compared, from left to right (`Levels`):

1. in one descending order of priorities: of askers of a priority how many are left out, of victims of a priority how
   many there are. An asker's seat outweighs victims that are less important than it, and no others.
2. who was due first
3. lost readiness   4. moves   5. start delay   6. pins of others   7. topology   8. free memory broken into

Costs are integers and only grow along a branch, so a branch that costs at the least as much as the best answer is cut.
GPUs are tried cheapest first and then in NVML order, and ties keep the first: equal input gives equal output. After
`LIMIT` steps the best answer found so far stands, with a bound of what may have been missed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from reconciler.plan.board import Board, Hold, Need, Tenant, Victims
from reconciler.plan.bounds import Bounds, Gang, minimal_sets
from reconciler.plan.observed import Subject
from reconciler.plan.wishes import (
    BROKEN,
    CONTESTED,
    DELAY,
    DUE,
    LOST,
    MOVES,
    TOPOLOGY,
    Choice,
    Cost,
    Levels,
    Proof,
    Wish,
    add,
)

LIMIT = 2000
"""Steps of one search, of some 0.1 ms each: a quarter of a second, and every look decides anew."""
MOST_SETS = 200
"""Sets of victims looked at for one GPU: ten tenants of one size, any five of whom have to leave, make 252."""
Lawful = Callable[[Victims, frozenset[str]], bool]


@dataclass(frozen=True, slots=True)
class _Branch:
    cost: Cost
    victims: Victims = frozenset()
    by: Mapping[str, str] = field(default_factory=dict)
    """Victim → the wish that takes its place."""
    gone: Victims = frozenset()
    """Victims, and whom seated wishes free."""
    taken: Mapping[str, tuple[tuple[str, Hold], ...]] = field(default_factory=dict)
    """What the wishes seated so far hold, by GPU."""
    placed: Mapping[Subject, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    """Subject → the wish it was placed for, and its GPUs."""
    seated: frozenset[str] = frozenset()
    delays: Mapping[str, int] = field(default_factory=dict)
    """Wish → until when the last one that leaves its GPUs is gone."""


def solve(
    wishes: Sequence[Wish],
    board: Board,
    lawful: Lawful = lambda _victims, _seated: True,
    *,
    limit: int = LIMIT,
) -> Choice | None:
    """The least way to seat `wishes` together, or None when those that have to be seated do not fit.

    Args:
        wishes: who asks; of equals the one that was due first stands first
        board: who has a place
        lawful: may these tenants be displaced together, and these wishes be seated? Monotone: once it refuses two sets
            it refuses all larger ones
        limit: steps after which the best answer so far is taken
    """
    search = _Search(tuple(wishes), board, lawful, limit, None)
    return search.answer()


def next_best(
    than: Choice, wishes: Sequence[Wish], board: Board, lawful: Lawful, *, limit: int = LIMIT
) -> tuple[Choice | None, bool]:
    """The least way to seat the same wishes with other victims, and whether the search for it came to its end."""
    search = _Search(tuple(wishes), board, lawful, limit, than)
    return search.answer(), search.missed is None


class _Search:
    def __init__(
        self, wishes: tuple[Wish, ...], board: Board, lawful: Lawful, limit: int, other_than: Choice | None
    ) -> None:
        self._wishes = wishes
        self._board = board
        self._lawful = lawful
        self._limit = limit
        self._not_these = None if other_than is None else frozenset(other_than.victims)
        self._seated = None if other_than is None else frozenset(other_than.seated)
        self._rights: dict[tuple[str, str], bool] = {}
        self._laws: dict[tuple[Victims, frozenset[str]], bool] = {}
        self.levels = Levels(wishes, board)
        self._bounds = Bounds(wishes, board, self.levels, self._may)
        self.best: _Branch | None = None
        self.steps = 0
        self.missed: Cost | None = None
        """The least that a branch not looked at may cost."""

    def answer(self) -> Choice | None:
        """The least way that is found; None: none is."""
        self._wish(0, _Branch(self.levels.zero))
        best = self.best
        if best is None:
            return None
        order = {gpu: i for i, gpu in enumerate(self._board.capacity)}
        gpus = {s: tuple(sorted(found, key=order.__getitem__)) for s, (_, found) in best.placed.items()}
        owners = {s: owner for s, (owner, _) in best.placed.items()}
        bound = best.cost if self.missed is None else min(best.cost, self.missed)
        proof = Proof(bound == best.cost, bound, self.steps)
        seated = tuple(w.key for w in self._wishes if w.key in best.seated)
        return Choice(seated, gpus, owners, dict(sorted(best.by.items())), best.cost, self.levels.names, proof)

    # ------------------------------------------------------------ wishes

    def _wish(self, index: int, branch: _Branch) -> None:
        """Seat the wishes from `index` on, or leave them out."""
        if self._cut(add(branch.cost, self._bounds.later(index, branch.taken, branch.gone))):
            return
        if index == len(self._wishes):
            if branch.victims != self._not_these:
                self.best = branch
            return
        wish = self._wishes[index]
        if wish.key in branch.gone:  # a seated wish frees its place
            self._wish(index + 1, branch)
            return
        if self.steps >= self._limit and self.best is None and wish.rank is not None:
            self._miss(branch.cost)
            self._leave_out(index, branch)
            return
        given = None if self._seated is None or wish.rank is None else wish.key in self._seated
        if given is not False and not wish.rivals & branch.seated:
            begun = self._freed(wish, replace(branch, seated=branch.seated | {wish.key}))
            if self._is_lawful(begun.victims, begun.seated):
                later = self._bounds.later(index + 1, begun.taken, begun.gone)
                for option in wish.options:
                    self._needs(index, option, begun, later)
        if given is True:
            return
        self._leave_out(index, branch)

    def _leave_out(self, index: int, branch: _Branch) -> None:
        """Go on without one that may be left out, or whose place is taken by one that may."""
        wish, cost = self._wishes[index], list(branch.cost)
        if wish.rank is not None:
            cost[self.levels.seat(wish)] += 1
            cost[DUE] += 1 << (len(self._wishes) - 1 - index)
            self._wish(index + 1, replace(branch, cost=tuple(cost)))
        elif wish.yields is not None:
            by = self._who_takes_it(wish, wish.yields[0], branch)
            if by is not None:
                cost[self.levels.victim(by, wish.yields[1])] += 1
                victims = branch.victims | {wish.key}
                if self._is_lawful(victims, branch.seated):
                    left = replace(branch, cost=tuple(cost), victims=victims, by={**branch.by, wish.key: by})
                    self._wish(index + 1, left)

    def _who_takes_it(self, wish: Wish, takers: frozenset[str], branch: _Branch) -> str | None:
        """The first seated wish without which this one would have a place, if it may take it."""
        for taker in (w.key for w in self._wishes if w.key in takers & branch.seated):
            taken = {g: tuple(x for x in held if x[0] != taker) for g, held in branch.taken.items()}
            without = replace(branch, taken=taken)
            for (need,) in wish.options:
                if sum(bool(self._openings(wish, need, g, without)) for g in self._candidates(need)) >= need.count:
                    return taker
        return None

    def _needs(self, index: int, needs: tuple[Need, ...], branch: _Branch, later: Cost) -> None:
        """Meet the needs of one wish, one after the other."""
        if not needs:
            if not self._in_vain(self._wishes[index], branch):
                self._wish(index + 1, branch)
            return
        wish, need = self._wishes[index], needs[0]
        if need.subject in branch.placed:  # another wish has it already
            self._needs(index, needs[1:], branch, later)
            return
        # A GPU on which nothing makes room now will not have any further down: a branch only takes and never gives.
        prices = {}
        for gpu in self._candidates(need):
            ways = self._openings(wish, need, gpu, branch)
            if ways:
                prices[gpu] = min(self._at_least(wish, need, gpu, way, branch) for way in ways)
        if len(prices) >= need.count:
            self._choose(
                index, needs, Gang(prices, self.levels.zero, self._board.numa, need.count), 0, (), branch, later
            )

    def _in_vain(self, wish: Wish, branch: _Branch) -> bool:
        """Whether it has room without one of those that it displaces."""
        return any(
            all(self._leaves_room(key, gpu, branch) for gpu in self._board.tenants[key].holds)
            for key, by in branch.by.items()
            if by == wish.key
        )

    def _leaves_room(self, key: str, gpu: str, branch: _Branch) -> bool:
        """Whether there would be room on a GPU for a tenant that is gone."""
        held = [hold for _, hold in branch.taken.get(gpu, ())]
        if not held:
            return True
        there = [t.holds[gpu] for t in self._board.on(gpu) if t.key not in branch.gone or t.key == key]
        if any(h.exclusive for h in (*held, *there)):
            return False
        return sum(h.memory_bytes for h in (*held, *there)) <= self._board.capacity[gpu]

    def _candidates(self, need: Need) -> list[str]:
        return [g for g in need.candidates if g in self._board.capacity]

    def _choose(
        self, index: int, needs: tuple[Need, ...], gang: Gang, position: int, chosen: tuple[str, ...],
        branch: _Branch, later: Cost,
    ) -> None:  # fmt: skip
        """Pick the next GPU of one gang; the order is kept so that no set is tried twice."""
        wish, need = self._wishes[index], needs[0]
        missing = need.count - len(chosen)
        if missing == 0:
            placed = {**branch.placed, need.subject: (wish.key, chosen)}
            self._needs(index, needs[1:], replace(branch, placed=placed), later)
            return
        base = add(branch.cost, later)
        tried: set[object] = set()
        for next_position in range(position, len(gang.gpus) - missing + 1):
            if self._cut(add(base, gang.at_least(next_position, missing))):
                return
            gpu = gang.gpus[next_position]
            alike = None if gpu in branch.taken else self._bounds.alike(gpu, branch.gone)
            if alike is not None and alike in tried:
                continue
            tried.add(alike)
            self.steps += 1
            further = self._ways(wish, need, gpu, chosen, branch)
            rest = gang.at_least(next_position + 1, missing - 1)
            for way in sorted(further, key=lambda b: b.cost):
                if self._cut(add(add(way.cost, later), rest)):
                    break
                self._choose(index, needs, gang, next_position + 1, (*chosen, gpu), way, later)

    def _cut(self, at_least: Cost) -> bool:
        """Whether a branch need not be looked at: it cannot be better, or the work is bounded.

        Past the limit there is a first answer all the same: who may be left out is, and the rest are seated.
        """
        if self.best is not None and at_least >= self.best.cost:
            return True
        if self.steps < self._limit or (self.best is None and self.steps < 2 * self._limit):
            return False
        self._miss(at_least)
        return True

    def _miss(self, at_least: Cost) -> None:
        """Note what a branch that is not looked at may cost at the least."""
        self.missed = at_least if self.missed is None else min(self.missed, at_least)

    # ------------------------------------------------------------ victims

    def _may(self, wish: Wish, tenant: Tenant) -> bool:
        if wish.may_displace is None:
            return False
        key = wish.key, tenant.key
        if key not in self._rights:
            self._rights[key] = wish.may_displace(tenant)
        return self._rights[key]

    def _is_lawful(self, victims: Victims, seated: frozenset[str]) -> bool:
        key = victims, seated
        if key not in self._laws:
            self._laws[key] = self._lawful(victims, seated)
        return self._laws[key]

    def _ways(self, wish: Wish, need: Need, gpu: str, chosen: tuple[str, ...], branch: _Branch) -> list[_Branch]:
        """Every lawful way to take one more GPU."""
        found = []
        for extra in self._openings(wish, need, gpu, branch):
            victims = branch.victims | extra
            if extra and not self._is_lawful(victims, branch.seated):
                continue
            cost, delays = self._grown(wish, need, gpu, chosen, extra, branch)
            held = (*branch.taken.get(gpu, ()), (wish.key, Hold(need.memory_bytes[gpu], need.exclusive)))
            found.append(
                replace(
                    branch, cost=cost, victims=victims, gone=branch.gone | extra, delays=delays,
                    taken={**branch.taken, gpu: held}, by={**branch.by, **dict.fromkeys(extra, wish.key)},
                )
            )  # fmt: skip
        return found

    def _openings(self, wish: Wish, need: Need, gpu: str, branch: _Branch) -> list[Victims]:
        """The inclusion-minimal further victims that make room on one GPU; empty when nothing does."""
        staying = [t for t in self._board.on(gpu) if t.key not in branch.gone]
        movable = [t for t in staying if self._may(wish, t) and not _delays(t, wish, branch)]
        fixed = [t.holds[gpu] for t in staying if t not in movable] if len(movable) < len(staying) else []
        fixed += [hold for _, hold in branch.taken.get(gpu, ())]
        wanted, capacity = need.memory_bytes[gpu], self._board.capacity[gpu]
        if wanted > capacity or any(h.exclusive for h in fixed) or (need.exclusive and fixed):
            return []
        missing = wanted + sum(h.memory_bytes for h in fixed) - capacity
        if missing > 0:
            return []
        if need.exclusive:
            return [frozenset(t.key for t in movable)]
        must = frozenset(t.key for t in movable if t.holds[gpu].exclusive)
        shared = [t for t in movable if t.key not in must]
        missing += sum(t.holds[gpu].memory_bytes for t in shared)
        if missing <= 0:
            return [must]
        return [must | group for group in self._minimal(shared, gpu, missing, branch)]

    def _minimal(self, shared: list[Tenant], gpu: str, missing: int, branch: _Branch) -> list[Victims]:
        found = [frozenset(keys) for keys in islice(minimal_sets(shared, gpu, missing), MOST_SETS + 1)]
        if len(found) > MOST_SETS:
            self._miss(branch.cost)
        return found[:MOST_SETS]

    # ------------------------------------------------------------ costs

    def _at_least(self, wish: Wish, need: Need, gpu: str, way: Victims, branch: _Branch) -> Cost:
        """What taking this GPU this way costs at the least, whatever else the gang takes.

        Victims that hold other GPUs as well may be victims already; they are left out, as are delay and topology.
        """
        alone = frozenset(key for key in way if len(self._board.tenants[key].holds) == 1)
        cost = list(self._grown(wish, need, gpu, (), alone, replace(branch, cost=self.levels.zero))[0])
        cost[DELAY] = 0
        return tuple(cost)

    def _grown(
        self, wish: Wish, need: Need, gpu: str, chosen: tuple[str, ...], extra: Victims, branch: _Branch
    ) -> tuple[Cost, Mapping[str, int]]:
        """The branch's cost with one more GPU taken, and the delays; no term ever shrinks."""
        cost, board, delays = list(branch.cost), self._board, branch.delays
        for key in extra:
            tenant = board.tenants[key]
            cost[self.levels.victim(wish.key, tenant.priority)] += 1
            cost[LOST] += tenant.lost_ms
            delays = self._vacate(tenant, branch, cost, delays)
        for tenant in board.on(gpu):
            if tenant.key in extra or tenant.key in branch.gone:
                delays = _later_of(delays, wish.key, tenant.departure_ms)
        if delays is not branch.delays:
            cost[DELAY] += sum(delays.values()) - sum(branch.delays.values())
        if need.prefer and gpu not in need.prefer:
            cost[MOVES] += 1
        if need.count != len(need.candidates):
            cost[CONTESTED] += board.contested.get(gpu, 0)
        if chosen and board.numa.get(gpu) not in {board.numa.get(c) for c in chosen}:
            cost[TOPOLOGY] += 1
        if gpu not in branch.taken:
            stays = [t for t in board.on(gpu) if t.key not in extra and t.key not in branch.gone]
            cost[BROKEN] += (board.capacity[gpu] - sum(t.holds[gpu].memory_bytes for t in stays)) >> 20
        return tuple(cost), delays

    def _vacate(self, tenant: Tenant, branch: _Branch, cost: list[int], delays: Mapping[str, int]) -> Mapping[str, int]:
        """Have a tenant leave GPUs that are taken already: who took them waits for it, and there is more room."""
        for gpu, hold in tenant.holds.items():
            if gpu in branch.taken:
                cost[BROKEN] += hold.memory_bytes >> 20
            for waiting, _ in branch.taken.get(gpu, ()):
                delays = _later_of(delays, waiting, tenant.departure_ms)
        return delays

    def _freed(self, wish: Wish, branch: _Branch) -> _Branch:
        """The branch after those left whom a wish frees."""
        cost, delays = list(branch.cost), branch.delays
        for key in sorted((wish.frees - branch.gone) & self._board.tenants.keys()):
            delays = self._vacate(self._board.tenants[key], branch, cost, delays)
        cost[DELAY] += sum(delays.values()) - sum(branch.delays.values())
        return replace(branch, cost=tuple(cost), delays=delays, gone=branch.gone | wish.frees)


def _delays(tenant: Tenant, wish: Wish, branch: _Branch) -> bool:
    """Whether a wish that came first would have to wait for this tenant's end, though it needs none."""
    return any(owner != wish.key for gpu in tenant.holds for owner, _ in branch.taken.get(gpu, ()))


def _later_of(delays: Mapping[str, int], wish: str, until: int) -> Mapping[str, int]:
    return {**delays, wish: until} if until > delays.get(wish, 0) else delays
