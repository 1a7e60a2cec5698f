"""Moves against trying out every way, on hundreds of small boxes, and what holds of every plan that moves somebody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from random import Random

import pytest
from builders import NOW, endpoint, gpu, incarnation, observed, overlay, spec

from reconciler.plan.actions import Plan
from reconciler.plan.ledger import Ledger, Timings
from reconciler.plan.observed import Incarnation
from reconciler.plan.planner import plan
from reconciler.spec.spec import EndpointSpec, GpuPins, MemoryBytes, MemoryFraction, OverlaySpec, WholeGpu
from reconciler.units import GIB

RESERVE = GIB
CAPABILITIES = ("ask", "code")
Place = tuple[int, ...]


def claimed(of: EndpointSpec | OverlaySpec, total: int) -> int:
    """Bytes on one GPU."""
    match of.memory:
        case WholeGpu():
            return total - RESERVE
        case MemoryFraction(fraction):
            return int(total * fraction)
        case MemoryBytes(size):
            return size


@dataclass
class Box:
    """A baseline that runs, ready, and overlays that were seen just now."""

    sizes: list[int]
    endpoints: dict[str, EndpointSpec]
    homes: dict[str, Place]
    overlays: list[OverlaySpec]
    floors: dict[str, int]
    loads: dict[str, float]

    def decide(self) -> Plan:
        gpus = [gpu(i, total=size) for i, size in enumerate(self.sizes)]
        timings = {name: Timings(load, 0.0, 0.0) for name, load in self.loads.items()}
        files = spec(*self.endpoints.values(), *self.overlays, floors=self.floors)
        return plan(files, observed(*gpus, incarnations=self.running()), Ledger(timings=timings), NOW)

    def running(self) -> Iterator[Incarnation]:
        for name, home in self.homes.items():
            of = self.endpoints[name]
            yield replace(incarnation(of, home), memory_bytes=tuple(claimed(of, self.sizes[g]) for g in home))

    def places(self, of: EndpointSpec | OverlaySpec) -> list[Place]:
        """Every set of GPUs that it may have."""
        assert of.gpus is not None
        if isinstance(of.gpus, GpuPins):
            return [tuple(sorted(int(ref) for ref in of.gpus.refs))]
        return list(combinations(range(len(self.sizes)), of.gpus.count))

    def fits(self, held: Mapping[str, Place], extra: tuple[OverlaySpec, Place] | None = None) -> bool:
        """Whether everybody has room at once."""
        items = [(self.endpoints[n], p) for n, p in held.items()]
        items += [extra] if extra is not None else []
        used: Counter[int] = Counter()
        many: Counter[int] = Counter()
        alone: set[int] = set()
        for of, place in items:
            for g in place:
                used[g] += claimed(of, self.sizes[g])
                many[g] += 1
                alone |= {g} if isinstance(of.memory, WholeGpu) else set()
        return all(used[g] <= size - RESERVE for g, size in enumerate(self.sizes)) and all(many[g] == 1 for g in alone)

    def back(self, held: Mapping[str, Place]) -> bool:
        """Whether all others find a place beside those that hold one."""
        away = [n for n in self.endpoints if n not in held]
        if not away:
            return self.fits(held)
        return self.fits(held) and any(self.back({**held, away[0]: p}) for p in self.places(self.endpoints[away[0]]))

    def ready_enough(self, gone: set[str]) -> bool:
        """Whether every floor holds without these."""
        return all(
            any(c in e.capabilities for n, e in self.endpoints.items() if n not in gone)
            for c, floor in self.floors.items()
            if floor and any(c in e.capabilities for e in self.endpoints.values())
        )


def box(number: int, *, overlays: int = 1) -> Box:
    """The box with this number; always the same."""
    draw = Random(number)
    many = draw.choice([2, 2, 3, 3, 4, 5, 6])
    sizes = [draw.choice([24, 40, 80]) * GIB for _ in range(many)]
    if draw.random() < 0.6:
        sizes = [sizes[0]] * many
    found = Box(sizes, {}, {}, [], {c: 1 for c in CAPABILITIES if draw.random() < 0.2}, {})
    for index in range(draw.randint(2, 8)):
        home = tuple(sorted(draw.sample(range(many), draw.choice([1, 1, 1, 2]))))
        pinned = draw.random() < 0.3
        made = endpoint(
            f"e{index}",
            home if pinned else len(home),
            memory=draw.choice([None, 6, 10, 14, 20, 0.3, 0.5]),
            priority=draw.choice([10, 20, 20, 30]),
            preemptible=draw.random() < 0.8,
            movable=not pinned and draw.random() < 0.7,
            capabilities=tuple(sorted(draw.sample(CAPABILITIES, draw.choice([0, 1, 1, 2])))),
            port=8000 + index,
        )
        before = dict(found.endpoints)
        found.endpoints[made.name] = made
        if found.fits({**found.homes, made.name: home}):
            found.homes[made.name] = home
            found.loads[made.name] = float(draw.choice([10, 20, 40]))
        else:
            found.endpoints = before
    for index in range(overlays):
        count = draw.choice([c for c in (1, 1, 2, 3) if c <= many])
        found.overlays.append(
            overlay(
                f"o{index}",
                draw.sample(range(many), count) if draw.random() < 0.4 else count,
                memory=draw.choice([None, 8, 12, 30, 0.4]),
                priority=draw.choice([15, 25, 35, 35, 900]),
                evict=draw.random() < 0.9,
            )
        )
    return found


@dataclass
class Trial:
    """Every way to admit one overlay: everybody stays, gives way, or moves to wherever they may."""

    box: Box
    best: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        (self.asker,) = self.box.overlays
        self.names = sorted(self.box.endpoints)
        self.best = self.cost(set(), {}, admitted=False)
        for place in self.box.places(self.asker):
            self._go(0, place, {}, set(), {})

    def cost(self, victims: set[str], moved: Mapping[str, Place], *, admitted: bool) -> tuple[int, ...]:
        """What is compared, the worst first: see `docs/concepts.md`."""
        of, asker = self.box.endpoints, self.asker
        parts: list[int] = []
        for priority in sorted({asker.priority, 10, 20, 30}, reverse=True):
            parts.append(sum(of[n].priority == priority for n in victims))
            parts.append(int(not admitted and asker.priority == priority))
        leavers = [of[n] for n in (*victims, *moved)]
        parts.append(sum(round(self.box.loads[e.name] * 1000) * max(1, len(e.capabilities)) for e in leavers))
        parts.append(sum(len(set(p) - set(self.box.homes[n])) for n, p in moved.items()))
        return tuple(parts)

    def _go(self, index: int, place: Place, stay: dict[str, Place], victims: set[str], moved: dict[str, Place]) -> None:
        if self.cost(victims, moved, admitted=True) >= self.best:
            return
        if not self.box.fits({**stay, **moved}, (self.asker, place)):
            return
        if index == len(self.names):
            needed = all(self._needed(name, place, {**stay, **moved}) for name in (*victims, *moved))
            if needed and self.box.ready_enough({*victims, *moved}) and self.box.back({**stay, **moved}):
                self.best = self.cost(victims, moved, admitted=True)
            return
        name = self.names[index]
        of, home = self.box.endpoints[name], self.box.homes[name]
        self._go(index + 1, place, {**stay, name: home}, victims, moved)
        if not self.asker.allow_baseline_eviction or of.priority >= self.asker.priority:
            return
        if of.movable:
            for other in self.box.places(of):
                if other != home:
                    self._go(index + 1, place, stay, victims, {**moved, name: other})
        if of.preemptible:
            self._go(index + 1, place, stay, {*victims, name}, moved)

    def _needed(self, name: str, place: Place, held: Mapping[str, Place]) -> bool:
        """Whether the overlay does not fit with this one where it is."""
        return not self.box.fits({**held, name: self.box.homes[name]}, (self.asker, place))


def outcome(decided: Plan) -> tuple[set[str], dict[str, Place], bool]:
    """Victims, who moves where, and whether the first overlay is admitted."""
    record = decided.ledger.overlays["o0"]
    moved = {
        n: tuple(sorted(int(g.removeprefix("GPU-")) for g in r.move.gpus))
        for n, r in decided.ledger.endpoints.items()
        if r.move is not None
    }
    return set(record.evicted), moved, record.state != "pending"


@pytest.mark.parametrize("block", range(6))
def test_no_way_to_admit_an_overlay_costs_less_than_the_one_with_the_moves_that_are_chosen(block: int) -> None:
    moving = 0
    for number in range(block * 50, block * 50 + 50):
        here = box(number)
        if not here.endpoints:
            continue
        decided, trial = here.decide(), Trial(here)
        victims, moved, admitted = outcome(decided)
        assert trial.cost(victims, moved, admitted=admitted) == trial.best, f"box {number}"
        assert decided.proof != "bounded", f"box {number}"
        moving += bool(moved)
    assert moving, "nobody moves on any of these boxes"
