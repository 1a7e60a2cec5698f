"""The least way to seat several askers together: an exact search by branch and bound, bounded in work.

What is compared, from left to right (`Levels`):

1. in one descending order of priorities: of askers of a priority how many are left out, of victims of a priority how
   many there are. An asker's seat outweighs victims that are less important than it, and no others.
2. who was due first
3. lost readiness   4. moves   5. start delay   6. pins of others   7. NVLink islands, then NUMA nodes
8. free memory broken into

Costs are integers and only grow along a branch, so a branch that costs at the least as much as the best answer is cut.
GPUs are tried cheapest first and then in NVML order, and ties keep the first: equal input gives equal output. After
`LIMIT` steps the best answer found so far stands, with a bound of what may have been missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat

from msgspec.structs import replace

from reconciler.plan.board import Board, Need
from reconciler.plan.bounds import Bounds, Gang
from reconciler.plan.pricing import Branch, Lawful, Pricing, taking
from reconciler.plan.wishes import (
    DUE,
    LOST,
    SCALE,
    Choice,
    Cost,
    Proof,
    Wish,
    add,
    whole,
)

LIMIT = 20_000
"""Steps of one search, each a look at one GPU for one need, of some 10 µs: a fifth of a second. Every look decides
anew. On a fleet at least so many that each GPU is looked at `LOOKS` times."""
MOVE = 10
"""Going on from one wish to the next counts as so many looks: the bound of those still to come looks at every GPU."""
LOOKS = 4
_NOBODY: frozenset[str] = frozenset()


def solve(
    wishes: Sequence[Wish],
    board: Board,
    lawful: Lawful = lambda _victims, _seated: True,
    *,
    may_be: Callable[[Branch], bool] = lambda _: True,
    limit: int = LIMIT,
) -> Choice | None:
    """The least way to seat `wishes` together, or None when those that have to be seated do not fit.

    Args:
        wishes: who asks; of equals the one that was due first stands first
        board: who has a place
        lawful: may these tenants be displaced together, and these wishes be seated, with whom they start? Monotone but
            for those: once it refuses two sets it refuses all larger ones
        may_be: is this, with everybody decided on, an answer? Asked of those alone that cost less than the best so far
        limit: steps after which the best answer so far is taken
    """
    return Search(wishes, board, lawful, limit=limit).least(may_be)


class Search(Pricing):
    """What some wishes ask of one board: the least way to seat them together, and then the next best.

    What GPUs cost as long as nothing is decided on is worked out once for both.
    """

    def __init__(
        self,
        wishes: Sequence[Wish],
        board: Board,
        lawful: Lawful = lambda _victims, _seated: True,
        *,
        limit: int = LIMIT,
    ) -> None:
        super().__init__(tuple(wishes), board, lawful)
        self._wishes = tuple(wishes)
        self._limit = max(limit, LOOKS * len(board.capacity)) if limit == LIMIT else limit
        self._bounds = Bounds(self._wishes, board, self.levels, self.may)
        self._untouched: dict[tuple[str, int], tuple[Gang | None, int, bool]] = {}
        """Wish and need → its gang as long as nothing is decided on, the steps that took, and whether all was seen."""
        self._begin(None, lambda _: True)

    def least(self, may_be: Callable[[Branch], bool] = lambda _: True) -> Choice | None:
        """The least way that is found; None: none is. See `solve`."""
        self._begin(None, may_be)
        return self._answer()

    def next_best(self, than: Choice) -> tuple[Choice | None, bool]:
        """The least way to seat the same wishes with other victims, and whether the search for it came to its end."""
        self._begin(than, lambda _: True)
        return self._answer(), self.missed is None

    def _begin(self, other_than: Choice | None, may_be: Callable[[Branch], bool]) -> None:
        self.steps, self.missed = 0, None
        self._not_these = None if other_than is None else frozenset(other_than.victims)
        self._seated = None if other_than is None else frozenset(other_than.seated)
        self._best: Branch | None = None
        self._may_be = may_be

    def _answer(self) -> Choice | None:
        self._wish(0, Branch(self.levels.zero))
        best = self._best
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

    def _wish(self, index: int, branch: Branch) -> None:
        """Seat the wishes from `index` on, or leave them out."""
        self.steps += MOVE
        if self._cut(add(branch.cost, self._bounds.later(index, branch.taken, branch.gone))):
            return
        if index == len(self._wishes):
            if branch.victims != self._not_these and self._may_be(branch):
                self._best = branch
            return
        wish = self._wishes[index]
        if wish.key in branch.gone:  # a seated wish frees its place
            self._wish(index + 1, branch)
            return
        if self.steps >= self._limit and self._best is None and wish.rank is not None:
            self.miss(branch.cost)
            self._leave_out(index, branch)
            return
        given = None if self._seated is None or wish.rank is None else wish.key in self._seated
        if given is not False and not wish.rivals & branch.seated:
            begun = self.freed(wish, replace(branch, seated=branch.seated | {wish.key}))
            later: Cost | None = None
            for option, starts in zip(wish.options, wish.starts or repeat(_NOBODY), strict=False):
                started = replace(begun, seated=begun.seated | starts) if starts else begun
                if self.is_lawful(started.victims, started.seated):
                    later = later or self._bounds.later(index + 1, begun.taken, begun.gone)
                    self._needs(index, option, started, later)
        if given is True:
            return
        self._leave_out(index, branch)

    def _leave_out(self, index: int, branch: Branch) -> None:
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
                if self.is_lawful(victims, branch.seated):
                    left = replace(branch, cost=tuple(cost), victims=victims, by={**branch.by, wish.key: by})
                    self._wish(index + 1, left)

    def _who_takes_it(self, wish: Wish, takers: frozenset[str], branch: Branch) -> str | None:
        """The first seated wish without which this one would have a place, if it may take it."""
        for taker in (w.key for w in self._wishes if w.key in takers & branch.seated):
            taken = {g: tuple(x for x in held if x[0] != taker) for g, held in branch.taken.items()}
            without = replace(branch, taken=taken)
            for (need,) in wish.options:
                if sum(bool(self.openings(wish, need, g, without)) for g in self.candidates(need)) >= need.count:
                    return taker
        return None

    def _needs(self, index: int, needs: tuple[Need, ...], branch: Branch, later: Cost) -> None:
        """Meet the needs of one wish, one after the other."""
        if not needs:
            if not self._in_vain(self._wishes[index], branch):
                self._wish(index + 1, branch)
            return
        wish, need = self._wishes[index], needs[0]
        if need.subject in branch.placed:  # another wish has it already
            self._needs(index, needs[1:], branch, later)
            return
        gang = self._gang(wish, need, branch)
        if gang is not None:
            self._choose(index, needs, gang, 0, (), branch, later)

    def _gang(self, wish: Wish, need: Need, branch: Branch) -> Gang | None:
        """The GPUs that a need may have; None: they are too few."""
        key, untouched = (wish.key, id(need)), not branch.taken and not branch.victims and branch.gone <= wish.frees
        if untouched and key in self._untouched:
            gang, steps, short = self._untouched[key]
            self.steps += steps
            if short:
                self.miss(branch.cost)
            return gang
        steps, shorts = self.steps, self.shorts
        prices = self.prices(wish, need, branch)
        enough = len(prices) >= need.count
        gang = Gang(prices, self.levels.zero, self._board.near, need.count, branch.victims) if enough else None
        if untouched:
            self._untouched[key] = gang, self.steps - steps, self.shorts > shorts
        return gang

    def _in_vain(self, wish: Wish, branch: Branch) -> bool:
        """Whether it has room without one of those that it displaces."""
        return any(
            all(self._leaves_room(key, gpu, branch) for gpu in self._board.tenants[key].holds)
            for key, by in branch.by.items()
            if by == wish.key
        )

    def _leaves_room(self, key: str, gpu: str, branch: Branch) -> bool:
        """Whether there would be room on a GPU for a tenant that is gone."""
        held = [hold for _, hold in branch.taken.get(gpu, ())]
        if not held:
            return True
        there = [t.holds[gpu] for t in self._board.on(gpu) if t.key not in branch.gone or t.key == key]
        if any(h.exclusive for h in (*held, *there)):
            return False
        return sum(h.memory_bytes for h in (*held, *there)) <= self._board.capacity[gpu]

    def _choose(
        self, index: int, needs: tuple[Need, ...], gang: Gang, position: int, chosen: tuple[str, ...],
        branch: Branch, later: Cost,
    ) -> None:  # fmt: skip
        """Pick the next GPU of one gang; the order is kept so that no set is tried twice."""
        wish, need = self._wishes[index], needs[0]
        missing = need.count - len(chosen)
        if missing == 0:
            placed = {**branch.placed, need.subject: (wish.key, chosen)}
            self._needs(index, needs[1:], replace(branch, placed=placed), later)
            return
        paid = self._paid(wish, gang, chosen, branch, later)
        best, less_than = self._best, self._less_than(branch.cost, later)
        tried: set[object] = set()
        for next_position in range(position, len(gang.gpus) - missing + 1):
            if self._cut(whole(add(paid, gang.at_least(next_position, missing)))):
                return
            gpu = gang.gpus[next_position]
            alike = None if gpu in branch.taken else self._bounds.alike(gpu, branch.gone)
            if alike is not None and alike in tried:
                continue
            tried.add(alike)
            if self._best is not best:
                best, less_than = self._best, self._less_than(branch.cost, later)
            for way in self.ways(wish, need, gpu, chosen, branch, less_than):
                cost, _, extra = way
                so_far = add(cost, later)
                if self._best is not None and so_far >= self._best.cost:
                    break  # those that follow cost more
                if extra and not self.is_lawful(branch.victims | extra, branch.seated):
                    continue
                grown, now = taking(wish, need, gpu, branch, way), (*chosen, gpu)
                rest = gang.at_least(next_position + 1, missing - 1)
                at_least = add(self._paid(wish, gang, now, grown, later), rest)
                if not self._cut(max(whole(at_least), so_far)):
                    self._choose(index, needs, gang, next_position + 1, now, grown, later)

    def _less_than(self, *paid: Cost) -> Cost | None:
        """What a branch that costs so much already may cost beside it to be better than the best; None: anything.

        Less part by part: the order of costs is kept by that.
        """
        if self._best is None:
            return None
        return tuple([best - sum(parts) for best, *parts in zip(self._best.cost, *paid, strict=True)])

    def _paid(self, wish: Wish, gang: Gang, chosen: tuple[str, ...], branch: Branch, later: Cost) -> Cost:
        """What a branch costs at the least, in parts, apart from GPUs that the gang does not have yet.

        A victim of this gang that holds several GPUs is paid for in parts, one for each of them that is taken: the
        others are in the prices of the GPUs still to come.
        """
        cost = [SCALE * (a + b) for a, b in zip(branch.cost, later, strict=True)]
        for key in branch.victims - gang.before:
            tenant = self._board.tenants[key]
            if len(tenant.holds) > 1:
                parts = len(tenant.holds.keys() & set(chosen))
                level, count = self.levels.departure(wish.key, tenant)
                cost[level] -= SCALE * count - parts * (SCALE * count // len(tenant.holds))
                cost[LOST] -= SCALE * tenant.lost_ms - parts * (SCALE * tenant.lost_ms // len(tenant.holds))
        return tuple(cost)

    def _cut(self, at_least: Cost) -> bool:
        """Whether a branch need not be looked at: it cannot be better, or the work is bounded.

        Past the limit there is a first answer all the same: who may be left out is, and the rest are seated.
        """
        if self._best is not None and at_least >= self._best.cost:
            return True
        if self.steps < self._limit or (self._best is None and self.steps < 2 * self._limit):
            return False
        self.miss(at_least)
        return True
