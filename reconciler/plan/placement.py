"""One asker's place: which GPUs for its needs, and whom that displaces. What several ask together is `admission`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from reconciler.plan.board import Board, Need, Tenant, Victims
from reconciler.plan.observed import Subject
from reconciler.plan.search import solve
from reconciler.plan.wishes import BROKEN, CONTESTED, MOVES, TAIL, Cost, Proof, Wish


class Placement(Struct, frozen=True):
    """Where everything goes, and who gives way."""

    gpus: Mapping[Subject, tuple[str, ...]]
    victims: Victims
    cost: Cost
    proof: Proof


def place(
    needs: Sequence[Need],
    board: Board,
    *,
    may_displace: Callable[[Tenant], bool] | None = None,
    may_displace_all: Callable[[Victims], bool] = lambda _: True,
) -> Placement | None:
    """The least placement of all `needs` together, or None when they do not fit whatever gives way.

    `may_displace_all` must be monotone: once it refuses a set it refuses every larger one. Without `may_displace`
    nobody is displaced.
    """
    if may_displace is None and len(needs) == 1:
        if not may_displace_all(frozenset()):
            return None
        free = board.room_for(needs[0])
        if needs[0].count == 1 or len(free) < needs[0].count:
            return _cheapest(needs[0], board, free)
    wish = Wish("asker", (tuple(needs),), may_displace=may_displace)
    found = solve((wish,), board, lambda victims, _: may_displace_all(victims))
    return None if found is None else Placement(found.gpus, frozenset(found.victims), found.cost, found.proof)


def _cheapest(need: Need, board: Board, free: Mapping[str, int]) -> Placement | None:
    """What the search would come to for one GPU, or for more than there are: most questions are of this kind."""
    if len(free) < need.count:
        return None
    may_choose = need.count != len(need.candidates)

    def price(gpu: str) -> tuple[int, int, int]:
        contested = board.contested.get(gpu, 0) if may_choose else 0
        return int(bool(need.prefer) and gpu not in need.prefer), contested, free[gpu] >> 20

    gpu = min(free, key=price)
    cost = [0] * len(TAIL)
    cost[MOVES], cost[CONTESTED], cost[BROKEN] = price(gpu)
    proof = Proof(optimal=True, bound=tuple(cost), steps=len(need.candidates))
    return Placement({need.subject: (gpu,)}, frozenset(), tuple(cost), proof)
