"""What each way to take one GPU costs, and what is left of a box after it: the steps of the search."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, islice
from operator import itemgetter

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.plan.board import Board, Hold, Need, Tenant, Victims
from reconciler.plan.bounds import minimal_sets
from reconciler.plan.observed import Subject
from reconciler.plan.wishes import (
    BROKEN,
    CONTESTED,
    DELAY,
    DUE,
    ISLANDS,
    LOST,
    MOVES,
    NUMA,
    SCALE,
    TAIL,
    Cost,
    Levels,
    Wish,
    add,
)

CLOSELY = 64
"""Up to so many GPUs the price of each is worked out closely before any is taken."""
MOST_SETS = 200
"""Sets of victims looked at for one GPU: ten tenants of one size, any five of whom have to leave, make 252."""
Lawful = Callable[[Victims, frozenset[str]], bool]


class Branch(Struct, frozen=True):
    """What is decided so far."""

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


class Room(Struct, frozen=True):
    """What would have to leave a GPU."""

    must: Victims
    """All of these."""
    shared: list[Tenant]
    """And enough of these"""
    missing: int
    """to give up so many bytes."""


Way = tuple[Cost, Mapping[str, int], Victims]
"""One way to take one more GPU: the cost and the delays of the branch with it, and the victims that it adds."""
NOBODY = Room(frozenset(), [], 0)


class Pricing:
    """Branches of one search, from one GPU taken to the next."""

    def __init__(self, wishes: tuple[Wish, ...], board: Board, lawful: Lawful) -> None:
        self.levels = Levels(wishes, board)
        self.steps = 0
        self.missed: Cost | None = None
        """The least that a branch not looked at may cost."""
        self._board = board
        self._lawful = lawful
        self._waiting = frozenset(w.key for w in wishes if w.waits)
        self._rights: dict[str, dict[str, bool]] = {wish.key: {} for wish in wishes}
        """Wish → tenant → whether it may take its place."""
        self._laws: dict[tuple[Victims, frozenset[str]], bool] = {}
        self._losses: dict[tuple[str, Victims], Cost] = {}
        self._several = len(wishes) > 1
        self.shorts = 0
        """How often not all ways to have a GPU were looked at."""
        self._openings_of: dict[tuple[str, int, str], tuple[list[Victims], bool]] = {}
        """Wish, need and GPU → openings, as long as nobody else was seated and nothing decided on this GPU."""

    def prices(self, wish: Wish, need: Need, branch: Branch) -> dict[str, Cost]:
        """What each GPU that can be had costs at the least, in parts of `SCALE`; in NVML order.

        A GPU on which nothing makes room now will not have any further down: a branch only takes and never gives. On a
        fleet only those are looked at closely that may be among the cheapest.
        """
        prices: dict[str, Cost] = {}
        if wish.may_displace is None and not branch.taken and not branch.gone:
            return self._free(need)
        candidates = self.candidates(need)
        if len(candidates) <= CLOSELY:
            for gpu in candidates:
                ways = self.openings(wish, need, gpu, branch)
                if ways:
                    prices[gpu] = self._least(wish, need, gpu, ways, branch)
            return prices
        for gpu in candidates:
            room = self.room(wish, need, gpu, branch)
            if room is not None:
                prices[gpu] = self._roughly(wish, gpu, room)
        cheapest: list[Cost] = []
        for gpu in sorted(prices, key=prices.__getitem__):
            if len(cheapest) >= need.count and prices[gpu] > cheapest[need.count - 1]:
                break
            ways = self.openings(wish, need, gpu, branch)
            prices[gpu] = self._least(wish, need, gpu, ways, branch)
            insort(cheapest, prices[gpu])
        return prices

    def _free(self, need: Need) -> dict[str, Cost]:
        """The same for one that displaces nobody, as long as nothing is decided on."""
        prices, board, before = {}, self._board, self.levels.zero[:DUE]
        may_choose = need.count != len(need.candidates)
        for gpu, free in board.room_for(need).items():
            tail = [0] * len(TAIL)
            tail[MOVES] = SCALE * (bool(need.prefer) and gpu not in need.prefer)
            tail[CONTESTED] = SCALE * board.contested.get(gpu, 0) if may_choose else 0
            tail[BROKEN] = SCALE * (free >> 20)
            prices[gpu] = (*before, *tail)
        self.steps += 2 * len(need.candidates)
        return prices

    def _roughly(self, wish: Wish, gpu: str, room: Room) -> Cost:
        """A quick lower bound of what room on one GPU costs: how many victims of the highest priority that is needed.

        And what they lose at the least: whatever leaves besides costs more at an earlier level. As in `_least`, who
        holds several GPUs is paid for in parts; who moves is no victim.
        """
        missing = room.missing
        classes: dict[int, list[Tenant]] = {}
        for tenant in room.shared:
            if tenant.moves:
                missing -= tenant.holds[gpu].memory_bytes
            elif tenant.priority in classes:
                classes[tenant.priority].append(tenant)
            else:
                classes[tenant.priority] = [tenant]
        if missing <= 0:
            return self.levels.zero
        cost = list(self.levels.zero)
        for priority in sorted(classes):
            sizes = [tenant.holds[gpu].memory_bytes for tenant in classes[priority]]
            total = sum(sizes)
            if total >= missing:
                cost[self.levels.victim(wish.key, priority)], cost[LOST] = _fewest(classes[priority], sizes, missing)
                break
            missing -= total
        return tuple(cost)

    def may(self, wish: Wish, tenant: Tenant) -> bool:
        """Whether a wish may take a tenant's place."""
        if wish.may_displace is None:
            return False
        if tenant.preemptible is not None:  # quicker asked than remembered
            return wish.may_displace(tenant)
        rights = self._rights[wish.key]
        known = rights.get(tenant.key)
        if known is None:
            known = rights[tenant.key] = wish.may_displace(tenant)
        return known

    def is_lawful(self, victims: Victims, seated: frozenset[str]) -> bool:
        """Whether these may be displaced together, and these wishes seated."""
        key = victims, seated
        if key not in self._laws:
            self._laws[key] = self._lawful(victims, seated)
        return self._laws[key]

    def ways(
        self, wish: Wish, need: Need, gpu: str, chosen: tuple[str, ...], branch: Branch, less_than: Cost | None
    ) -> list[Way]:
        """Every way to take one more GPU, lawful or not, the cheapest first.

        With `less_than` those are left out whose victims alone add so much to the branch.
        """
        ways = self.openings(wish, need, gpu, branch)
        if less_than is not None:
            ways = [extra for extra in ways if self._losing(wish, extra) < less_than]
        grown = [(*self._grown(wish, need, gpu, chosen, extra, branch), extra) for extra in ways]
        return sorted(grown, key=itemgetter(0))

    def _losing(self, wish: Wish, extra: Victims) -> Cost:
        """What it adds to a branch that these tenants leave for a wish."""
        key = wish.key, extra
        if key not in self._losses:
            cost = list(self.levels.zero)
            for tenant in (self._board.tenants[k] for k in extra):
                level, count = self.levels.departure(wish.key, tenant)
                cost[level] += count
                cost[LOST] += tenant.lost_ms
            self._losses[key] = tuple(cost)
        return self._losses[key]

    def room(self, wish: Wish, need: Need, gpu: str, branch: Branch) -> Room | None:
        """What would have to leave one GPU; None: nothing makes room there."""
        self.steps += 1
        if wish.may_displace is None and not branch.gone and gpu not in branch.taken:
            free = self._board.free(gpu, alone=need.exclusive)
            return NOBODY if free is not None and need.memory_bytes[gpu] <= free else None
        lacking = need.memory_bytes[gpu] - self._board.capacity[gpu]
        given, must, shared = 0, [], []
        stay = [hold for _, hold in branch.taken.get(gpu, ())]
        for tenant in self._board.on(gpu):
            hold = tenant.holds[gpu]
            if tenant.key in branch.gone:
                if self._wants_back(tenant, wish):
                    stay.append(hold)
            elif not self.may(wish, tenant) or (branch.taken and self._delays(tenant, wish, branch)):
                stay.append(hold)
            elif need.exclusive or hold.exclusive:
                must.append(tenant.key)
            else:
                shared.append(tenant)
                given += hold.memory_bytes
        if stay:
            if need.exclusive or any(hold.exclusive for hold in stay):
                return None
            lacking += sum([hold.memory_bytes for hold in stay])
        return Room(frozenset(must), shared, lacking + given) if lacking <= 0 else None

    @staticmethod
    def _wants_back(tenant: Tenant, wish: Wish) -> bool:
        """Whether one that leaves will come back to a place that this wish may not keep it from; who moves does not."""
        if wish.may_prolong is None or tenant.moves or tenant.key in wish.frees:
            return False
        return not wish.may_prolong(tenant)

    def _delays(self, tenant: Tenant, wish: Wish, branch: Branch) -> bool:
        """Whether a wish that came first would have to wait for this tenant's end, though it needs none."""
        indifferent = {wish.key, *self._waiting}
        return any(owner not in indifferent for gpu in tenant.holds for owner, _ in branch.taken.get(gpu, ()))

    def openings(self, wish: Wish, need: Need, gpu: str, branch: Branch) -> list[Victims]:
        """The inclusion-minimal further victims that make room on one GPU; empty when nothing does."""
        if (
            gpu in branch.taken
            or (branch.gone and any(t.key in branch.gone for t in self._board.on(gpu)))
            or (branch.taken and self._several)
        ):
            found, all_seen = self._openings(wish, need, gpu, branch)
        else:  # as if nothing had been decided yet
            key = wish.key, id(need), gpu
            if key in self._openings_of:
                self.steps += 1
            else:
                self._openings_of[key] = self._openings(wish, need, gpu, branch)
            found, all_seen = self._openings_of[key]
        if not all_seen:
            self.shorts += 1
            self.miss(branch.cost)
        return found

    def _openings(self, wish: Wish, need: Need, gpu: str, branch: Branch) -> tuple[list[Victims], bool]:
        """The same, and whether they are all: no more than `MOST_SETS` are looked at."""
        room = self.room(wish, need, gpu, branch)
        if room is None or room.missing <= 0:
            return ([] if room is None else [room.must]), True
        sets = [room.must.union(keys) for keys in islice(minimal_sets(room.shared, gpu, room.missing), MOST_SETS + 1)]
        return sets[:MOST_SETS], len(sets) <= MOST_SETS

    def _least(self, wish: Wish, need: Need, gpu: str, ways: Sequence[Victims], branch: Branch) -> Cost:
        """What taking this GPU in the cheapest of these ways adds at the least to a branch, in parts of `SCALE`.

        A victim that holds several GPUs is paid for in equal parts on each; left out are delay and topology.
        """
        board, fresh = self._board, gpu not in branch.taken
        base = list(self.levels.zero)
        base[MOVES] = SCALE * (bool(need.prefer) and gpu not in need.prefer)
        base[CONTESTED] = SCALE * (board.contested.get(gpu, 0) if need.count != len(need.candidates) else 0)
        free = board.capacity[gpu] - sum(t.holds[gpu].memory_bytes for t in board.on(gpu) if t.key not in branch.gone)
        costs = []
        for way in ways:
            cost, freed = base.copy(), 0
            for tenant in (board.tenants[key] for key in way):
                parts, size = len(tenant.holds), tenant.holds[gpu].memory_bytes
                level, count = self.levels.departure(wish.key, tenant)
                cost[level] += SCALE * count // parts
                cost[LOST] += SCALE * tenant.lost_ms // parts
                if parts == 1:
                    freed += size
                    cost[BROKEN] += 0 if fresh else SCALE * (size >> 20)
            cost[BROKEN] += SCALE * ((free + freed) >> 20) if fresh else 0
            costs.append(cost)
        return tuple(min(costs))

    def _grown(
        self, wish: Wish, need: Need, gpu: str, chosen: tuple[str, ...], extra: Victims, branch: Branch
    ) -> tuple[Cost, Mapping[str, int]]:
        """The branch's cost with one more GPU taken, and the delays; no term ever shrinks."""
        cost, board, delays = list(add(branch.cost, self._losing(wish, extra))), self._board, branch.delays
        for key in extra if branch.taken else ():
            delays = self._vacate(board.tenants[key], branch, cost, delays)
        for tenant in board.on(gpu):
            if tenant.key in extra or tenant.key in branch.gone:
                delays = _later_of(delays, wish.key, tenant.departure_ms)
        if delays is not branch.delays:
            cost[DELAY] += sum(delays.values()) - sum(branch.delays.values())
        if need.prefer and gpu not in need.prefer:
            cost[MOVES] += 1
        if need.count != len(need.candidates):
            cost[CONTESTED] += board.contested.get(gpu, 0)
        if chosen:
            island, node = board.near(gpu)
            near = [board.near(c) for c in chosen]
            cost[ISLANDS] += island not in {i for i, _ in near}
            cost[NUMA] += node not in {n for _, n in near}
        if gpu not in branch.taken:
            stays = [t for t in board.on(gpu) if t.key not in extra and t.key not in branch.gone]
            cost[BROKEN] += (board.capacity[gpu] - sum(t.holds[gpu].memory_bytes for t in stays)) >> 20
        return tuple(cost), delays

    def _vacate(self, tenant: Tenant, branch: Branch, cost: list[int], delays: Mapping[str, int]) -> Mapping[str, int]:
        """Have a tenant leave GPUs that are taken already: who took them waits for it, and there is more room."""
        for gpu, hold in tenant.holds.items():
            if gpu in branch.taken:
                cost[BROKEN] += hold.memory_bytes >> 20
            for waiting, _ in branch.taken.get(gpu, ()):
                delays = _later_of(delays, waiting, tenant.departure_ms)
        return delays

    def freed(self, wish: Wish, branch: Branch) -> Branch:
        """The branch after those left whom a wish frees."""
        cost, delays = list(branch.cost), branch.delays
        for key in sorted(k for k in wish.frees - branch.gone if k in self._board.tenants):
            delays = self._vacate(self._board.tenants[key], branch, cost, delays)
        cost[DELAY] += sum(delays.values()) - sum(branch.delays.values())
        return replace(branch, cost=tuple(cost), delays=delays, gone=branch.gone | wish.frees)

    def candidates(self, need: Need) -> list[str]:
        """The GPUs of this board that may serve a need."""
        return [g for g in need.candidates if g in self._board.capacity]

    def miss(self, at_least: Cost) -> None:
        """Note what a branch that is not looked at may cost at the least."""
        self.missed = at_least if self.missed is None else min(self.missed, at_least)


def _fewest(tenants: Sequence[Tenant], sizes: Sequence[int], missing: int) -> tuple[int, int]:
    """Of tenants of one priority the fewest that may give up so many bytes, and the least that these lose, in parts.

    Who holds several GPUs counts on each in equal parts.
    """
    shares = [len(tenant.holds) for tenant in tenants]
    if max(shares) == 1:
        largest = max(sizes)
        if largest >= missing:
            return SCALE, SCALE * min([t.lost_ms for t, size in zip(tenants, sizes, strict=True) if size >= missing])
        count = 1 + sum([held < missing for held in accumulate(sorted(sizes, reverse=True))])
        return SCALE * count, SCALE * sum(sorted([tenant.lost_ms for tenant in tenants])[:count])
    there = [(s, SCALE // n, SCALE * t.lost_ms // n) for t, s, n in zip(tenants, sizes, shares, strict=True)]
    cost = 0
    for size, part, _ in sorted(
        there, key=lambda item: item[1] / max(1, item[0])
    ):  # as if the last one could leave in part
        if size >= missing:
            cost += part * missing // size
            break
        cost, missing = cost + part, missing - size
    return max(cost, min(part for _, part, _ in there)), min(lost for _, _, lost in there)


def taking(wish: Wish, need: Need, gpu: str, branch: Branch, way: Way) -> Branch:
    """The branch after one more GPU is taken in one of the `ways`."""
    cost, delays, extra = way
    held = (*branch.taken.get(gpu, ()), (wish.key, Hold(need.memory_bytes[gpu], need.exclusive)))
    return Branch(
        cost,
        branch.victims | extra,
        {**branch.by, **dict.fromkeys(extra, wish.key)},
        branch.gone | extra,
        {**branch.taken, gpu: held},
        branch.placed,
        branch.seated,
        delays,
    )


def _later_of(delays: Mapping[str, int], wish: str, until: int) -> Mapping[str, int]:
    return {**delays, wish: until} if until > delays.get(wish, 0) else delays
