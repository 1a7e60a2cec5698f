"""How long the planner takes, beside an exact solver and a greedy rule, on the same boxes in the same process.

First table: one overlay that needs victims, placed by our search, by CP-SAT (ortools, if it is installed: the extra
`solver`), and greedily as Kubernetes preempts: on each GPU remove everybody who may be displaced, let those stay who
still fit, the most important first, and take the GPUs whose victims are the least important, then the fewest. Compared
is what `docs/concepts.md` compares first: victims by priority, then lost readiness.

Second table: how often moves spare a victim, and what looking for them takes, whole decisions.

Third table: whole decisions, `plan()` from observation to actions: nothing to do on a converged box, and the admission
of an overlay that needs victims. Aims: p99 <= 10 ms at 16x50 and <= 1 s at 1,000x8 for one overlay, <= 200 ms for an
unchanged 1,000x8. At the end, the exponent with which time grows with the number of nodes.

usage: python benchmarks/planner.py [--long] [--cp-sat-seconds S]
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/plan"))

from builders import NOW, endpoint, gpu, incarnation, observed, overlay, spec
from stage import show

from reconciler.cli.wiring import GC_THRESHOLD
from reconciler.loop.deciding import decide as plan
from reconciler.plan.board import Board, Hold, Need, Tenant
from reconciler.plan.ledger import Ledger, Timings
from reconciler.plan.observed import Observed, Subject
from reconciler.plan.placement import place
from reconciler.units import GIB

TOTAL, USABLE = 80 * GIB, 79 * GIB
PRIORITIES = (10, 20, 30, 40, 50)
ASKER = 600
FIRM = 900
"""Priority of those who need not give way."""


class Size(Struct, frozen=True):
    """Nodes of so many GPUs each, with so many endpoints in all."""

    name: str
    nodes: int
    per_node: int
    endpoints: int
    runs: int
    """Instances, and decisions of each kind."""


SIZES = (
    Size("8x50", 1, 8, 50, 200),
    Size("16x50", 2, 8, 50, 200),
    Size("16x100", 2, 8, 100, 100),
    Size("100x8", 100, 8, 5_000, 8),
)
FLEET = Size("1000x8", 1000, 8, 50_000, 3)


class Instance(Struct, frozen=True):
    """Who is where on one box, and what an overlay asks for."""

    board: Board
    need: Need
    sizes: dict[str, int]
    """Endpoint -> GiB on each of its GPUs."""
    load_s: dict[str, float]


def instance(size: Size, seed: int) -> Instance:
    """A crowded box: endpoints on parts of one or two GPUs of a node, until so many have a place, or no more fit."""
    draw = Random(f"{size.name}/{seed}")
    names = [f"GPU-{i:08d}" for i in range(size.nodes * size.per_node)]
    board = Board(dict.fromkeys(names, USABLE), {n: 2 * i // size.per_node for i, n in enumerate(names)})
    free = dict.fromkeys(names, 79)
    sizes, load_s = {}, {}
    largest = 79 * len(names) // size.endpoints
    tries = 0
    while len(board.tenants) < size.endpoints and tries < 4 * size.endpoints:
        tries += 1
        first = draw.randrange(size.nodes) * size.per_node
        on = sorted(draw.sample(names[first : first + size.per_node], draw.choice([1, 1, 1, 2])))
        part = min(draw.randint(2, 2 * largest), *(free[n] for n in on))
        if part < 2:
            continue
        for n in on:
            free[n] -= part
        name = f"e{len(board.tenants):05d}"
        sizes[name], load_s[name] = part, float(draw.randint(10, 90))
        holds = dict.fromkeys(on, Hold(part * GIB, exclusive=False))
        priority = FIRM if draw.random() < 0.1 else draw.choice(PRIORITIES)
        board.add(Tenant(f"endpoint/{name}", priority, holds, round(load_s[name] * 1000), 3500, ()))
    count = draw.choice([1, 2, 4])
    wanted = draw.choice([40, 60]) * GIB
    need = Need(Subject("workload", "render"), tuple(names), count, dict.fromkeys(names, wanted), exclusive=False)
    return Instance(board, need, sizes, load_s)


def may(tenant: Tenant) -> bool:
    return tenant.priority < ASKER


Cost = tuple[int, ...]
T = TypeVar("T")


def cost(board: Board, victims: Sequence[str]) -> Cost:
    """Victims by priority, the highest first, then lost readiness."""
    gone = [board.tenants[v] for v in victims]
    return (*(sum(t.priority == p for t in gone) for p in reversed(PRIORITIES)), sum(t.lost_ms for t in gone))


def ours(case: Instance) -> tuple[Cost | None, bool]:
    found = place([case.need], case.board, may_displace=may)
    if found is None:
        return None, True
    return cost(case.board, sorted(found.victims)), found.proof.optimal


def greedy(case: Instance) -> Cost | None:
    """Kubernetes' rule, with a GPU in the place of a node; a gang takes its best GPUs one after the other."""
    board, need = case.board, case.need
    victims: set[str] = set()
    taken: set[str] = set()
    for _ in range(need.count):
        ways = []
        for g in need.candidates:
            if g in taken:
                continue
            there = [t for t in board.on(g) if t.key not in victims]
            room = board.capacity[g] - need.memory_bytes[g] - sum(t.holds[g].memory_bytes for t in there if not may(t))
            if room < 0:
                continue
            gone = []
            for tenant in sorted((t for t in there if may(t)), key=lambda t: (-t.priority, t.key)):
                if tenant.holds[g].memory_bytes <= room:
                    room -= tenant.holds[g].memory_bytes
                else:
                    gone.append(tenant)
            worst = max((t.priority for t in gone), default=0)
            ways.append(((worst, sum(t.priority for t in gone), len(gone), g), [t.key for t in gone]))
        if not ways:
            return None
        (*_, g), gone_keys = min(ways)
        taken.add(str(g))
        victims.update(gone_keys)
    return cost(board, sorted(victims))


def cp_sat(case: Instance, limit_s: float) -> tuple[Cost | None, bool]:
    """The same by CP-SAT, the levels as weights; and whether it proved its answer."""
    from ortools.sat.python import cp_model

    board, need, model = case.board, case.need, cp_model.CpModel()
    goes = {k: model.new_bool_var(k) for k, t in board.tenants.items() if may(t)}
    used = {}
    for g in need.candidates:
        there = board.on(g)
        room = (
            board.capacity[g] - need.memory_bytes[g] - sum(t.holds[g].memory_bytes for t in there if t.key not in goes)
        )
        if room < 0:
            continue
        used[g] = model.new_bool_var(g)
        stay = sum((t.holds[g].memory_bytes // GIB) * (1 - goes[t.key]) for t in there if t.key in goes)
        model.add(stay <= room // GIB).only_enforce_if(used[g])
    model.add(sum(used.values()) == need.count)
    weight = {p: 1 << (28 + 6 * i) for i, p in enumerate(PRIORITIES)}
    tenants = board.tenants
    model.minimize(sum((weight[tenants[k].priority] + tenants[k].lost_ms // 1000) * var for k, var in goes.items()))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = limit_s
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, status == cp_model.INFEASIBLE
    return cost(board, [k for k, var in goes.items() if solver.value(var)]), status == cp_model.OPTIMAL


def has_cp_sat() -> bool:
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        return False
    return cp_model is not None


# ---------------------------------------------------------------- whole decisions


def settle_memory() -> None:
    """What is there stays: collections look only at what comes and goes, as often as in the daemon."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)


def decisions(case: Instance, overlays: int) -> tuple[list[float], list[float]]:
    """Milliseconds of `plan()` on the converged box, and of the admission of an overlay."""
    items, running = [], []
    for index, (key, tenant) in enumerate(case.board.tenants.items()):
        name = key.partition("/")[2]
        on = [int(g[4:]) for g in tenant.holds]
        made = endpoint(name, len(on), memory=case.sizes[name], priority=tenant.priority, port=8000 + index)
        items.append(made)
        running.append(incarnation(made, on))
    ledger = Ledger(timings={n: Timings(s, 1.0, 1.0) for n, s in case.load_s.items()})
    before = spec(*items)

    def look() -> Observed:
        gpus = [gpu(i, total=TOTAL, numa_node=case.board.numa[g]) for i, g in enumerate(case.board.capacity)]
        return observed(*gpus, incarnations=[replace(i) for i in running])

    ledger = plan(before, look(), ledger, NOW).ledger
    settle_memory()  # as the daemon does; what it sees comes after that
    seen = look()
    same = [milliseconds(lambda: plan(before, seen, ledger, NOW))[0] for _ in range(overlays)]
    admitted = []
    for index in range(overlays):
        asks = overlay("render", 1 + index % 2, memory=40 + 10 * (index % 3), priority=ASKER)
        after = replace(before, overlays={"render": asks}, digest=f"{before.digest}-{index}")
        taken, decided = milliseconds(lambda after=after: plan(after, seen, ledger, NOW))
        assert decided.ledger.overlays["render"].state != "pending" or decided.blocked
        admitted.append(taken)
    return same, admitted


def moved(size: Size, boxes: int) -> list[str]:
    """Whole decisions where every second endpoint may be moved, beside the same ones where none may."""
    times, fewer, lower, none, proved = [], 0, 0, 0, 0
    for seed in range(boxes):
        case, items, running = instance(size, seed), [], []
        for index, (key, tenant) in enumerate(case.board.tenants.items()):
            name, on = key.partition("/")[2], [int(g[4:]) for g in tenant.holds]
            items.append(
                endpoint(
                    name, len(on), memory=case.sizes[name], priority=tenant.priority, port=8000 + index,
                    movable=index % 2 == 0,
                )
            )  # fmt: skip
            running.append(incarnation(items[-1], on))
        gpus = [gpu(i, total=TOTAL) for i in range(len(case.board.capacity))]
        seen = observed(*gpus, incarnations=running)
        ledger = Ledger(timings={n: Timings(s, 1.0, 1.0) for n, s in case.load_s.items()})
        asks = overlay("render", 1, memory=40, priority=ASKER)
        firm = plan(spec(*(replace(e, movable=False) for e in items), asks), seen, ledger, NOW)
        taken, decided = milliseconds(lambda: plan(spec(*items, asks), seen, ledger, NOW))  # noqa: B023 - called at once
        times.append(taken)
        proved += decided.proof != "bounded"
        before, after = (
            sorted(
                (case.board.tenants[f"endpoint/{n}"].priority for n in p.ledger.overlays["render"].evicted),
                reverse=True,
            )
            for p in (firm, decided)
        )
        fewer += len(after) < len(before)
        lower += after < before
        none += bool(before) and not after
    return [
        size.name,
        str(boxes),
        *quantiles(times),
        *(f"{100 * n / boxes:.0f} %" for n in (lower, fewer, none, proved)),
    ]


def milliseconds(call: Callable[[], T]) -> tuple[float, T]:
    begun = time.perf_counter()
    result = call()
    return (time.perf_counter() - begun) * 1000, result


def quantiles(values: Sequence[float]) -> list[str]:
    """p50 and p99; of few values the greatest stands for p99."""
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    return [f"{statistics.median(ordered):.2f}", f"{p99:.2f}"]


def searches(size: Size, cp_sat_s: float) -> list[str]:
    """One row: the three rules on the same instances."""
    times: dict[str, list[float]] = {"ours": [], "cp": [], "greedy": []}
    proved = worse = compared = differs = fits = 0
    for seed in range(size.runs):
        case = instance(size, seed)
        taken, (mine, optimal) = milliseconds(lambda case=case: ours(case))
        times["ours"].append(taken)
        proved += optimal
        taken, rule = milliseconds(lambda case=case: greedy(case))
        times["greedy"].append(taken)
        if mine is not None:
            fits += 1
            worse += rule is None or rule > mine
        if cp_sat_s > 0:
            taken, (exact, certain) = milliseconds(lambda case=case: cp_sat(case, cp_sat_s))
            times["cp"].append(taken)
            if certain and optimal:
                compared += 1
                differs += exact != mine
    cp = [*quantiles(times["cp"]), f"{differs} of {compared}"] if times["cp"] else ["", "", ""]
    percent = f"{100 * worse / max(1, fits):.0f} %"
    return [
        size.name, str(size.runs), *quantiles(times["ours"]), f"{proved} of {size.runs}", *cp,
        *quantiles(times["greedy"]), percent,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="CP-SAT also on the fleet; ten times as many instances")
    parser.add_argument("--cp-sat-seconds", type=float, default=10.0, help="its time limit; 0 leaves it out")
    options = parser.parse_args()
    limit = options.cp_sat_seconds if has_cp_sat() else 0.0
    sizes = [replace(s, runs=s.runs * (10 if options.long else 1)) for s in SIZES]
    head = [
        "GPUs x endpoints", "instances", "ours p50", "p99", "proved", "CP-SAT p50", "p99", "differs", "greedy p50",
        "p99", "greedy worse",
    ]  # fmt: skip
    rows = [searches(size, limit) for size in sizes]
    rows.append(searches(FLEET, limit if options.long else 0.0))
    show("Victims and place of one overlay, ms", head, rows)
    if has_cp_sat():
        head = ["GPUs x endpoints", "boxes", "p50", "p99", "less given up", "fewer victims", "none left", "proved"]
        show("One overlay where every second endpoint may move, ms", head, [moved(size, 40) for size in sizes[:3]])
    rows, same_p50, admit_p50 = [], {}, {}
    for size in (*sizes, FLEET):
        case = instance(size, 0)
        same, admitted = decisions(case, size.runs)
        same_p50[size.nodes], admit_p50[size.nodes] = statistics.median(same), statistics.median(admitted)
        rows.append([size.name, str(len(case.board.tenants)), *quantiles(same), *quantiles(admitted)])
    head = ["GPUs x endpoints", "endpoints", "unchanged p50", "p99", "one overlay p50", "p99"]
    show("Whole decisions, ms", head, rows)
    for title, p50 in (("unchanged", same_p50), ("one overlay", admit_p50)):
        exponent = math.log(p50[FLEET.nodes] / p50[100]) / math.log(FLEET.nodes / 100)
        print(f"\n{title}: from 100 to 1,000 nodes time grows with the {exponent:.2f}th power of their number")


if __name__ == "__main__":
    main()
