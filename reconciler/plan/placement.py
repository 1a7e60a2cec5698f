"""One asker's place: which GPUs for its needs, and whom that displaces. What several ask together is `admission`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from reconciler.plan.board import Board, Need, Tenant, Victims
from reconciler.plan.observed import Subject
from reconciler.plan.search import solve
from reconciler.plan.wishes import Cost, Proof, Wish


@dataclass(frozen=True, slots=True)
class Placement:
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
    wish = Wish("asker", (tuple(needs),), may_displace=may_displace)
    found = solve((wish,), board, lambda victims, _: may_displace_all(victims))
    return None if found is None else Placement(found.gpus, frozenset(found.victims), found.cost, found.proof)
