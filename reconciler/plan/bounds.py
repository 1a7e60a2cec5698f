"""What is still to come costs at the least, and which GPUs are alike: what lets the search leave branches out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby

from reconciler.plan.board import Board, Tenant, Victims
from reconciler.plan.observed import Subject
from reconciler.plan.wishes import BROKEN, LOST, MOVES, Cost, Levels, Wish, add


class Gang:
    """The GPUs that a gang may take, cheapest first, and what so many of them cost at the least, in parts of `SCALE`.

    Costs are compared from left to right, and that order is kept by adding: the sum of the cheapest parts is no more
    than the sum of any other ones.
    """

    def __init__(
        self, prices: Mapping[str, Cost], zero: Cost, near: Callable[[str], object], count: int, before: Victims
    ) -> None:
        self.before = before
        self.gpus = sorted(prices, key=prices.__getitem__)
        if count > 1:
            equals = [list(some) for _, some in groupby(self.gpus, key=prices.__getitem__)]
            self.gpus = [gpu for some in equals for gpu in _near_first(some, near, count)]
        self._prices, self._sums = prices, [zero]

    def at_least(self, position: int, count: int) -> Cost:
        """A lower bound of what `count` GPUs from `position` on add to the cost."""
        sums = self._sums
        for gpu in self.gpus[len(sums) - 1 : position + count]:  # of thousands the first few are looked at
            sums.append(add(sums[-1], self._prices[gpu]))
        return tuple([b - a for a, b in zip(sums[position], sums[position + count], strict=True)])


def _near_first(gpus: list[str], near: Callable[[str], object], count: int) -> list[str]:
    """Of GPUs that cost the same first those of which so many are near each other."""
    if len(gpus) == 1:
        return gpus
    together: dict[object, list[str]] = {}
    for gpu in gpus:
        together.setdefault(near(gpu), []).append(gpu)
    groups = sorted(together.values(), key=lambda group: len(group) < count)
    return [gpu for group in groups for gpu in group]


def minimal_sets(tenants: Sequence[Tenant], gpu: str, missing: int) -> Iterator[tuple[str, ...]]:
    """The sets of tenants that give up so many bytes of one GPU together, and would not without any one of them."""
    ordered = sorted(tenants, key=lambda t: (-t.holds[gpu].memory_bytes, t.key))  # so the last one is the smallest
    sizes = [t.holds[gpu].memory_bytes for t in ordered]
    left = [*accumulate(reversed(sizes), initial=0)][::-1]

    def sets(position: int, still: int) -> Iterator[tuple[str, ...]]:
        for i in range(position, len(ordered)):
            if left[i] < still:
                return
            if sizes[i] >= still:
                yield (ordered[i].key,)
            else:
                for more in sets(i + 1, still - sizes[i]):
                    yield (ordered[i].key, *more)

    yield from sets(0, missing)


class Bounds:
    """Lower bounds for one set of wishes on one board."""

    def __init__(
        self, wishes: tuple[Wish, ...], board: Board, levels: Levels, may: Callable[[Wish, Tenant], bool]
    ) -> None:
        self._wishes = wishes
        self._board = board
        self._levels = levels
        self._may = may
        self._demands = _demands(wishes) if len(wishes) > 1 else [[], []]
        self._displacing = any(w.may_displace is not None for w in wishes)
        self._freed = frozenset[str]().union(*(w.frees for w in wishes))
        self._anybody: dict[str, bool] = {}
        self._looks: dict[str, object] = {}

    def later(self, index: int, taken: Mapping[str, object], gone: Victims) -> Cost:
        """What the wishes from `index` on that want whole GPUs add to the cost at the least.

        No GPU serves two of them, so together they pay for the cheapest so many. Counted are those of one group, and
        only victims that are less important than every one of them: a wish that is left out then costs more at an
        earlier level. Who holds several GPUs may be paid for already, and whom a file sets aside is not: left out.
        """
        demands = self._demands[index]
        if not demands:
            return self._levels.zero
        asking = [self._wishes[i] for i, _ in demands]
        lowest = min(w.rank for w in asking if w.rank is not None)
        prices = []
        for gpu in self._board.capacity:
            price = None if gpu in taken else self._price(gpu, asking, lowest, gone)
            if price is not None:
                prices.append(price)
        wanted = sum(count for _, count in demands)
        if wanted <= len(prices):
            total = self._levels.zero
            for price in sorted(prices)[:wanted]:
                total = add(total, price)
            return total
        cost, room = list(self._levels.zero), len(prices)
        for rank in sorted({w.rank for w in asking if w.rank is not None}, reverse=True):
            for count, i in sorted((count, i) for i, count in demands if self._wishes[i].rank == rank):
                room -= count
                if room < 0:
                    cost[self._levels.seat(self._wishes[i])] += 1
                    room += count
        return tuple(cost)

    def _price(self, gpu: str, asking: list[Wish], lowest: int, gone: Victims) -> Cost | None:
        """What a whole GPU costs at the least, whoever of these takes it; None: nobody can."""
        cost = list(self._levels.zero)
        for tenant in self._board.on(gpu):
            if tenant.key in gone or tenant.key in self._freed:
                continue
            if len(tenant.holds) > 1:
                if not self._leaves_for_anybody(tenant):
                    return None
                continue
            if not any(self._may(wish, tenant) for wish in asking):
                return None
            cost[LOST] += tenant.lost_ms
            if tenant.moves:
                cost[MOVES] += tenant.moves
            elif tenant.priority < lowest:
                cost[self._levels.victim(asking[0].key, tenant.priority)] += 1
        cost[BROKEN] = self._board.capacity[gpu] >> 20
        return tuple(cost)

    def _leaves_for_anybody(self, tenant: Tenant) -> bool:
        if tenant.key not in self._anybody:
            self._anybody[tenant.key] = any(self._may(wish, tenant) for wish in self._wishes)
        return self._anybody[tenant.key]

    def alike(self, gpu: str, gone: Victims) -> object | None:
        """What tells a GPU that nobody took from others; None: it is like no other. One of those alike is enough."""
        if gone and any(t.key in gone for t in self._board.on(gpu)):
            return None
        if gpu not in self._looks:
            self._looks[gpu] = self._look(gpu)
        return self._looks[gpu]

    def _look(self, gpu: str) -> object | None:
        board, tenants = self._board, []
        for tenant in board.on(gpu):
            like_no_other = tenant.offers is None or len(tenant.holds) > 1 or tenant.key in self._freed
            if self._displacing and like_no_other:
                return None
            rights = tuple((self._may(w, tenant), w.may_prolong is None or w.may_prolong(tenant)) for w in self._wishes)
            hold = tenant.holds[gpu]
            price = (tenant.priority, tenant.moves, tenant.lost_ms, tenant.departure_ms, tenant.offers)
            worth = price if self._displacing else ()
            tenants.append((rights, hold.memory_bytes, hold.exclusive, worth))
        needs = [need for wish in self._wishes for option in wish.options for need in option]
        asked = [(gpu in need.candidates and need.memory_bytes[gpu], gpu in need.prefer) for need in needs]
        where = board.capacity[gpu], board.near(gpu), board.contested.get(gpu, 0)
        return where, tuple(asked), tuple(sorted(tenants, key=repr))


def _demands(wishes: tuple[Wish, ...]) -> list[list[tuple[int, int]]]:
    """For each position: which wishes of the next group want how many whole GPUs, of those that may be left out.

    What two wishes want both is met once, and so is not counted.
    """
    asked: dict[Subject, set[str]] = {}
    for wish in wishes:
        for need in (n for option in wish.options for n in option):
            asked.setdefault(need.subject, set()).add(wish.key)
    each = []
    for index, wish in enumerate(wishes):
        own = [sum(n.count for n in o if n.exclusive and len(asked[n.subject]) == 1) for o in wish.options]
        if wish.rank is not None and min(own, default=0) > 0:
            each.append((index, min(own)))
    rest = [[(i, count) for i, count in each if i >= start] for start in range(len(wishes) + 1)]
    return [[(i, count) for i, count in some if wishes[i].group == wishes[some[0][0]].group] for some in rest]
