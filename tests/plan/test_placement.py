"""One asker's place against trying out every set of GPUs and victims: all parts of the cost, not victims alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from random import Random

from reconciler.plan.board import Board, Hold, Need, Tenant
from reconciler.plan.observed import Subject
from reconciler.plan.placement import Placement, place
from reconciler.plan.search import solve
from reconciler.plan.wishes import Proof, Wish

SUBJECT = Subject("workload", "render")


def case(number: int) -> tuple[Board, Need]:
    """A small crowded board, sizes in MiB, and a need; always the same for one number."""
    draw = Random(number)
    gpus = [f"g{i}" for i in range(draw.randint(1, 4))]
    board = Board({g: draw.choice([20, 24, 40]) << 20 for g in gpus}, {g: draw.choice([0, 0, 1, None]) for g in gpus})
    board.islands = {g: draw.choice([0, 1, 1]) for g in gpus} if draw.random() < 0.5 else dict.fromkeys(gpus)
    board.contested = {g: draw.randint(0, 2) for g in gpus if draw.random() < 0.3}
    free = dict(board.capacity)
    for index in range(draw.randint(0, 5)):
        on = draw.sample(gpus, draw.choice([n for n in (1, 1, 2) if n <= len(gpus)]))
        size = draw.choice([4, 6, 10]) << 20
        alone = draw.random() < 0.15
        if any(free[g] < size or (alone and free[g] < board.capacity[g]) for g in on):
            continue
        for g in on:
            free[g] = -1 if alone else free[g] - size
        holds = {g: Hold(size, alone) for g in on}
        priority, lost = draw.choice([10, 10, 20]), draw.choice([0, 1000, 1000, 2500])
        board.add(Tenant(f"endpoint/e{index}", priority, holds, lost, draw.choice([500, 4000]), ()))
    count = draw.randint(1, min(3, len(gpus)))
    candidates = tuple(sorted(draw.sample(gpus, count))) if draw.random() < 0.2 else tuple(gpus)
    prefer = tuple(draw.sample(gpus, count)) if draw.random() < 0.4 else ()
    alone, size = draw.random() < 0.3, draw.choice([6, 10, 16, 20]) << 20
    return board, Need(SUBJECT, candidates, count, dict.fromkeys(candidates, size), alone, prefer)


def cost(board: Board, need: Need, on: tuple[str, ...], gone: frozenset[str]) -> tuple[int, ...]:
    """The cost of one way, from what is there afterwards."""
    leave = [board.tenants[k] for k in gone]
    near = [t for t in leave if set(on) & set(t.holds)]
    stay = [t for t in board.tenants.values() if t.key not in gone]
    levels = sorted({t.priority for t in board.tenants.values()}, reverse=True)
    return (
        *(sum(t.priority == p for t in leave) for p in levels),
        0,
        sum(t.lost_ms for t in leave),
        sum(g not in need.prefer for g in on) if need.prefer else 0,
        max((t.departure_ms for t in near), default=0),
        sum(board.contested.get(g, 0) for g in on) if need.count != len(need.candidates) else 0,
        len({board.islands[g] for g in on}) - 1 if on else 0,
        len({board.numa[g] for g in on}) - 1 if on else 0,
        sum((board.capacity[g] - sum(t.holds[g].memory_bytes for t in stay if g in t.holds)) >> 20 for g in on),
    )


def fits(board: Board, need: Need, on: tuple[str, ...], gone: frozenset[str]) -> bool:
    for g in on:
        there = [t.holds[g] for t in board.on(g) if t.key not in gone]
        if there and (need.exclusive or any(h.exclusive for h in there)):
            return False
        if sum(h.memory_bytes for h in there) + need.memory_bytes[g] > board.capacity[g]:
            return False
    return True


def ways(board: Board, need: Need, firm: frozenset[str]) -> Iterator[tuple[tuple[int, ...], frozenset[str]]]:
    """Every way that fits, none of whose victims goes in vain."""
    names = [k for k in board.tenants if k not in firm]
    for on in combinations(need.candidates, need.count):
        for size in range(len(names) + 1):
            for group in combinations(names, size):
                gone = frozenset(group)
                if fits(board, need, on, gone) and not any(fits(board, need, on, gone - {k}) for k in gone):
                    yield cost(board, need, on, gone), gone


def test_a_place_costs_the_least_of_all_ways_in_every_part() -> None:
    fitting = displacing = 0
    for number in range(3000):
        board, need = case(number)
        firm = frozenset(k for i, k in enumerate(board.tenants) if (number >> i) % 5 == 0)
        best = min(ways(board, need, firm), default=None, key=lambda way: way[0])
        found = place([need], board, may_displace=lambda t, firm=firm: t.key not in firm)
        told = f"case {number}: {found}; better: {best}"
        assert (found is None) == (best is None), told
        if found is not None and best is not None:
            assert found.cost == best[0], told
            assert found.proof.optimal
            fitting += 1
            displacing += bool(found.victims)
    assert fitting > 2000
    assert displacing > 900


def test_the_cost_that_is_told_is_that_of_the_place_that_is_given() -> None:
    for number in range(500):
        board, need = case(number)
        found = place([need], board, may_displace=lambda _: True)
        if isinstance(found, Placement):
            on = tuple(found.gpus[SUBJECT])
            assert fits(board, need, on, found.victims)
            assert found.cost == cost(board, need, on, found.victims), f"case {number}: {found}"


def test_a_place_beside_everybody_is_the_one_that_the_search_comes_to() -> None:
    found = 0
    for number in range(400):
        board, need = case(number)
        quick, searched = place([need], board), solve((Wish("asker", ((need,),)),), board)
        assert (quick is None) == (searched is None), f"case {number}"
        if quick is not None and searched is not None:
            found += 1
            assert (quick.gpus, quick.cost) == (searched.gpus, searched.cost), f"case {number}"
    assert 50 < found < 350


def test_the_one_place_of_one_gpu_is_proved_to_be_the_best_by_having_looked_at_all() -> None:
    board = Board(dict.fromkeys(("g0", "g1", "g2"), 80 << 20), dict.fromkeys(("g0", "g1", "g2")))
    board.islands = dict.fromkeys(board.capacity)
    board.add(Tenant("endpoint/other", 10, {"g0": Hold(70 << 20, exclusive=False)}))
    board.add(Tenant("endpoint/small", 10, {"g2": Hold(20 << 20, exclusive=False)}))
    need = Need(SUBJECT, ("g0", "g1", "g2"), 1, dict.fromkeys(board.capacity, 60 << 20), exclusive=False, prefer=())
    found = place([need], board)
    assert found is not None
    assert (found.gpus, found.victims) == ({SUBJECT: ("g2",)}, frozenset()), "where the least is left"
    assert found.proof == Proof(optimal=True, bound=found.cost, steps=3)
