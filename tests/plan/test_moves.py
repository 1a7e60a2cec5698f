"""Moves against trying out every way, on hundreds of small boxes, and what holds of every plan that moves somebody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from random import Random

import pytest
from builders import NOW, RESERVE, claimed, endpoint, gpu, incarnation, observed, overlay, spec
from msgspec import Struct
from msgspec.structs import replace

from reconciler.plan.actions import Plan
from reconciler.plan.ledger import Ledger, Timings
from reconciler.plan.observed import Incarnation
from reconciler.plan.planner import plan
from reconciler.spec.spec import EndpointSpec, GpuPins, OverlaySpec, WholeGpu
from reconciler.units import GIB

CAPABILITIES = ("ask", "code")
Place = tuple[int, ...]


class Box(Struct):
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
            yield replace(incarnation(of, home), memory_bytes=tuple(claimed(of.memory, self.sizes[g]) for g in home))

    def places(self, of: EndpointSpec | OverlaySpec) -> list[Place]:
        """Every set of GPUs that it may have."""
        assert of.gpus is not None
        if isinstance(of.gpus, GpuPins):
            return [tuple(sorted(int(ref) for ref in of.gpus.refs))]
        return list(combinations(range(len(self.sizes)), of.gpus.count))

    def fits(self, held: Mapping[str, Place], extra: tuple[OverlaySpec, Place] | None = None) -> bool:
        """Whether everybody has room at once."""
        items: list[tuple[EndpointSpec | OverlaySpec, Place]] = [(self.endpoints[n], p) for n, p in held.items()]
        items += [extra] if extra is not None else []
        used: Counter[int] = Counter()
        many: Counter[int] = Counter()
        alone: set[int] = set()
        for of, place in items:
            for g in place:
                used[g] += claimed(of.memory, self.sizes[g])
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


@dataclass
class Pair:
    """Every way to admit several overlays that all may evict: each left out or somewhere, everybody stays, gives way,
    or moves to wherever they may."""

    box: Box
    best: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.order = sorted(self.box.overlays, key=lambda o: (-o.priority, o.name))
        self.names = sorted(self.box.endpoints)
        self.best = self.cost(set(), {}, set())
        self._seat(0, {})

    def cost(self, victims: set[str], moved: Mapping[str, Place], admitted: set[str]) -> tuple[int, ...]:
        """What is compared, the worst first: see `docs/concepts.md`."""
        of, parts = self.box.endpoints, []
        for priority in sorted({o.priority for o in self.order} | {10, 20, 30}, reverse=True):
            parts.append(sum(of[n].priority == priority for n in victims))
            parts.append(sum(o.priority == priority and o.name not in admitted for o in self.order))
        parts.append(sum(1 << i for i, o in enumerate(reversed(self.order)) if o.name not in admitted))
        leavers = [of[n] for n in (*victims, *moved)]
        parts.append(sum(round(self.box.loads[e.name] * 1000) * max(1, len(e.capabilities)) for e in leavers))
        parts.append(sum(len(set(p) - set(self.box.homes[n])) for n, p in moved.items()))
        return tuple(parts)

    def _seat(self, index: int, places: dict[str, Place]) -> None:
        if index == len(self.order):
            if places:
                self._go(0, places, {}, set(), {})
            return
        self._seat(index + 1, places)
        for place in self.box.places(self.order[index]):
            self._seat(index + 1, {**places, self.order[index].name: place})

    def fits(self, held: Mapping[str, Place], places: Mapping[str, Place]) -> bool:
        """Whether everybody has room at once, overlays included; `NAME+` is a second one like NAME."""
        everybody = {n: self.box.endpoints[n.removesuffix("+")] for n in held} | {o.name: o for o in self.order}
        return replace(self.box, endpoints=everybody).fits({**held, **places})  # type: ignore[arg-type]

    def _go(
        self, index: int, places: dict[str, Place], stay: dict[str, Place], victims: set[str], moved: dict[str, Place]
    ) -> None:
        if self.cost(victims, moved, set(places)) >= self.best or not self.fits({**stay, **moved}, places):
            return
        if index == len(self.names):
            held = {**stay, **moved}
            needed = all(not self.fits({**held, n: self.box.homes[n]}, places) for n in (*victims, *moved))
            lawful = needed and self.box.ready_enough({*victims, *moved}) and self.box.back(held)
            asked = [o for o in self.order if o.name in places]
            lawful = lawful and not any(self._puts_off(o, held, places, victims) for o in asked)
            if lawful and self._somebody_answers(places, stay, victims, moved):
                self.best = self.cost(victims, moved, set(places))
            return
        name = self.names[index]
        of, home = self.box.endpoints[name], self.box.homes[name]
        self._go(index + 1, places, {**stay, name: home}, victims, moved)
        if of.priority >= max(o.priority for o in self.order if o.name in places):
            return
        if of.movable:
            for other in self.box.places(of):
                if other != home:
                    self._go(index + 1, places, stay, victims, {**moved, name: other})
        if of.preemptible:
            self._go(index + 1, places, stay, {*victims, name}, moved)

    def _somebody_answers(
        self, places: Mapping[str, Place], stay: Mapping[str, Place], victims: set[str], moved: Mapping[str, Place]
    ) -> bool:
        """Whether each that leaves does so for an overlay that may have it leave and needs it to, as it is then."""
        leavers, admitted = sorted({*victims, *moved}), [o for o in self.order if o.name in places]
        return any(
            all(self._answers(n, dict(zip(leavers, by, strict=True)), admitted, places, stay, moved) for n in leavers)
            for by in product(range(len(admitted)), repeat=len(leavers))
        )

    def _answers(
        self, name: str, by: Mapping[str, int], admitted: Sequence[OverlaySpec], places: Mapping[str, Place],
        stay: Mapping[str, Place], moved: Mapping[str, Place],
    ) -> bool:  # fmt: skip
        turn, home = by[name], set(self.box.homes[name])
        if self.box.endpoints[name].priority >= admitted[turn].priority:
            return False
        met = any(home & set(p) and by[m] == turn for m, p in moved.items() if m != name)  # by one that it has moved
        met = met and not self.fits({**stay, **moved, name: self.box.homes[name]}, {})
        if not met and not home & set(places[admitted[turn].name]):
            return False
        if not met and any(home & set(places[o.name]) for o in admitted[:turn]):
            return False  # its end would delay one that comes before
        there = {n: self.box.homes[n] for n in by if by[n] > turn or n == name}
        kept = {f"{m}+": p for m, p in moved.items()}  # their places are kept from the beginning
        begun = {o.name: places[o.name] for o in admitted[: turn + 1]}
        return not self.fits({**stay, **there, **kept}, begun)

    def _puts_off(
        self, asks: OverlaySpec, held: Mapping[str, Place], places: Mapping[str, Place], victims: set[str]
    ) -> bool:
        """Whether it is in the place of a victim that it might not have displaced, and not beside it as well."""
        for name in victims:
            shared = set(places[asks.name]) & set(self.box.homes[name])
            lower = self.box.endpoints[name].priority < asks.priority
            everybody = {**held, **places, name: self.box.homes[name]}
            here = {n: tuple(sorted(shared & set(p))) for n, p in everybody.items()}
            own = {n: p for n, p in here.items() if n in places}
            if shared and not lower and not self.fits({n: p for n, p in here.items() if n not in own}, own):
                return True
        return False


def test_no_way_to_admit_two_overlays_costs_less_than_what_is_chosen_and_a_proof_is_one() -> None:
    moving = proved = 0
    for number in (*range(1000, 1080), 2130):
        here = box(number, overlays=2)
        here = replace(here, overlays=[replace(o, allow_baseline_eviction=True) for o in here.overlays])
        if not here.endpoints or len(here.sizes) > 4 or len(here.endpoints) > 5:
            continue
        decided, trial = here.decide(), Pair(here)
        admitted = {n for n, r in decided.ledger.overlays.items() if r.state != "pending"}
        victims = {n for r in decided.ledger.overlays.values() for n in r.evicted}
        _, moved, _ = outcome(decided)
        cost = trial.cost(victims, moved, admitted)
        assert cost >= trial.best, f"box {number}: the trial missed a way"
        if decided.proof != "bounded":
            assert cost == trial.best, f"box {number}"
            proved += 1
        moving += bool(moved)
    assert (moving > 8, proved > 50) == (True, True)
