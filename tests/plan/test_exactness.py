"""One overlay's victims against trying out every set of victims, on boxes small enough for that."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from builders import RESERVE, claimed, endpoint, overlay, spec, uuid
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace
from plant import Plant, Run
from worlds import CAPABILITIES, PRIORITIES, examples

from reconciler.plan.ledger import Ledger, Timings
from reconciler.plan.observed import Incarnation
from reconciler.spec.spec import EndpointSpec, GpuCount, GpuPins, OverlaySpec, WholeGpu
from reconciler.units import GIB


class Small(Struct):
    """A baseline that stands, and one overlay that wants a place."""

    endpoints: list[EndpointSpec]
    asks: OverlaySpec
    sizes: list[int]
    floors: dict[str, int]
    loads: dict[str, float]

    def settled(self) -> Run:
        """The baseline, ready; without the overlay."""
        timings = {name: Timings(load, 0.0, 0.0) for name, load in self.loads.items()}
        run = Run(spec(*self.endpoints, floors=self.floors), Plant(totals=list(self.sizes)), Ledger(timings=timings))
        run.settle()
        return run


@st.composite
def smalls(draw: st.DrawFn) -> Small:
    """Up to sixteen GPUs, mostly five, and seven endpoints, crowded."""
    few = st.integers(1, 5)
    gpus = draw(st.one_of(few, few, few, st.integers(6, 16)))
    sizes = [draw(st.sampled_from([24, 40])) * GIB for _ in range(gpus)]
    found = []
    for index in range(draw(st.integers(1, 7))):
        most = min(2 if gpus <= 5 else 6, gpus)
        pins = st.lists(st.integers(0, gpus - 1), min_size=1, max_size=most, unique=True)
        found.append(
            endpoint(
                f"e{index}",
                draw(st.one_of(st.just(1), st.integers(1, most), pins)),
                memory=draw(st.sampled_from([None, 6, 10, 14, 0.3, 0.5])),
                priority=draw(st.sampled_from(PRIORITIES)),
                preemptible=draw(st.sampled_from([True, True, True, False])),
                capabilities=tuple(sorted(draw(st.sets(st.sampled_from(CAPABILITIES), max_size=1)))),
                port=8000 + index,
            )
        )
    claims = st.lists(st.integers(0, gpus - 1), min_size=1, max_size=gpus, unique=True)
    asks = overlay(
        "render",
        draw(st.one_of(st.integers(1, gpus), claims)),
        memory=draw(st.sampled_from([None, 8, 12, 20, 0.5])),
        priority=draw(st.sampled_from([15, 25, 35, 1000])),
        evict=draw(st.sampled_from([True, True, True, True, False])),
    )
    return Small(
        endpoints=found,
        asks=asks,
        sizes=sizes,
        floors={c: 1 for c in CAPABILITIES if draw(st.integers(0, 3)) == 0},
        loads={e.name: float(draw(st.sampled_from([10, 20, 40]))) for e in found},
    )


Cost = tuple[tuple[int, ...], float]


def lawful(small: Small, ready: list[EndpointSpec], gone: frozenset[str]) -> bool:
    """Both sides consent to each victim, and every floor holds without them."""
    asks = small.asks
    for item in ready:
        if item.name in gone and not (
            asks.allow_baseline_eviction and item.preemptible and item.priority < asks.priority
        ):
            return False
    for capability, floor in small.floors.items():
        had = {e.name for e in ready if capability in e.capabilities}
        if len(had - gone) < min(floor, len(had)):
            return False
    return True


def fits(small: Small, staying: list[Incarnation]) -> bool:
    """Whether the overlay has its GPUs next to those that stay."""
    asks, free = small.asks, []
    exclusive = isinstance(asks.memory, WholeGpu)
    for index, total in enumerate(small.sizes):
        here = [(i, i.memory_bytes[i.gpus.index(uuid(index))]) for i in staying if uuid(index) in i.gpus]
        alone = not here or not (exclusive or any(i.exclusive for i, _ in here))
        if alone and sum(size for _, size in here) + claimed(asks.memory, total) <= total - RESERVE:
            free.append(index)
    match asks.gpus:
        case GpuPins(refs):
            return set(refs) <= set(free)
        case GpuCount(count):
            return len(free) >= count
        case None:
            return True


def every_way(small: Small, run: Run) -> Iterator[tuple[Cost, frozenset[str]]]:
    """Every lawful set of victims that makes room, with its cost."""
    running = [i for i in run.plant.incarnations if i.alive]
    ready = [e for e in small.endpoints if run.plant.is_ready(e.name)]
    names = [e.name for e in ready]
    for size in range(len(names) + 1):
        for group in combinations(names, size):
            gone = frozenset(group)
            if lawful(small, ready, gone) and fits(small, [i for i in running if i.subject.name not in gone]):
                victims = [e for e in ready if e.name in gone]
                counts = tuple(sum(e.priority == p for e in victims) for p in sorted(PRIORITIES, reverse=True))
                lost = sum(small.loads[e.name] * max(1, len(e.capabilities)) for e in victims)
                yield (counts, lost), gone


@given(smalls())
@examples(120)
def test_the_victims_are_the_least_of_all_sets_that_make_room(small: Small) -> None:
    run = small.settled()
    ways = {gone: cost for cost, gone in every_way(small, run)}
    run.spec = spec(*small.endpoints, small.asks, floors=small.floors)
    record = run.decide().ledger.overlays["render"]
    homeless = [e.name for e in small.endpoints if not run.plant.is_ready(e.name)]
    if not ways:
        assert record.state == "pending", "admitted without a place"
        assert record.evicted == ()
        return
    assert record.state != "pending", f"{run.decide().blocked} though {min(ways.values())} would do"
    chosen = frozenset(record.evicted) - frozenset(homeless)
    assert chosen in ways, f"{sorted(chosen)} make no room, or may not be displaced"
    assert ways[chosen] == min(ways.values())
    for name in chosen:
        assert chosen - {name} not in ways, f"{name} is displaced in vain"


@given(smalls(), st.integers(1, 3))
@examples(40)
def test_more_gpus_never_need_more_victims(small: Small, more: int) -> None:
    run = small.settled()
    if not all(run.plant.is_ready(e.name) for e in small.endpoints):
        return  # who had no place takes one on the new GPUs, and may have to give it back
    before = min((cost for cost, _ in every_way(small, run)), default=None)
    larger = replace(small, sizes=[*small.sizes, *[40 * GIB] * more])
    run.plant.totals = larger.sizes
    run.settle()
    if before is None or isinstance(small.asks.gpus, GpuPins):
        return
    run.spec = spec(*small.endpoints, small.asks, floors=small.floors)
    record = run.decide().ledger.overlays["render"]
    counts = tuple(
        sum(e.priority == p for e in small.endpoints if e.name in record.evicted)
        for p in sorted(PRIORITIES, reverse=True)
    )
    assert record.state != "pending"
    assert counts <= before[0]
