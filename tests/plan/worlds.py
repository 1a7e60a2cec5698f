"""Generated boxes with their set points, and the settings under which they are tried.

As it stands the same few examples are tried every time. `PLAN_EXAMPLES=20 pytest tests/plan --timeout 0` tries twenty
times as many, other ones each time.
"""

from __future__ import annotations

import os
from typing import Any

from builders import endpoint, foreign, overlay, spec
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from msgspec import Struct, field
from msgspec.structs import replace
from plant import Behaviour, Plant, Run

from reconciler.spec.spec import EndpointSpec, Evict, OverlaySpec, Spec, Stop
from reconciler.units import GIB

SCALE = int(os.environ.get("PLAN_EXAMPLES", "0"))
SMALL = 8
"""GPUs of a box that is not a large one."""
CAPABILITIES = ("ask", "code")
PRIORITIES = (10, 20, 30, 900)
REFUSALS = (frozenset(), frozenset(), frozenset({"sleep"}), frozenset({"wake"}))


def examples(count: int) -> settings:
    """So many examples, always the same ones; or many times as many random ones if asked for."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(
        max_examples=count * max(1, SCALE), derandomize=not SCALE, deadline=None, suppress_health_check=slow,
        database=None, phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )  # fmt: skip


def _short(item: EndpointSpec | OverlaySpec) -> str:
    """An endpoint or overlay in one line, for a failing example."""
    claims = f"{item.name} gpus={getattr(item.gpus, 'refs', None) or (item.gpus.count if item.gpus else None)}"
    claims += f" memory={item.memory} priority={item.priority}"
    if isinstance(item, EndpointSpec):
        flags = ("" if item.preemptible else " not preemptible") + (" movable" if item.movable else "")
        return f"{claims} {item.state}{flags} offers={item.capabilities} hash={item.process_hash} {item.stop.drain_s}"
    work = item.workload and f"work retries={item.workload.retries} preemptible={item.workload.preemptible}"
    sets = [_short(e) for e in item.endpoints.values()]
    return f"{claims} evict={item.allow_baseline_eviction} {work} requires={item.requires} sets={sets}"


class World(Struct):
    """A baseline, and what happens to it once it stands."""

    before: Spec
    between: Spec
    """The edit, and some of the overlays."""
    between_s: float
    after: Spec
    """The rest of the overlays."""
    sizes: list[int]
    behaviour: Behaviour
    foreign: dict[int, int] = field(default_factory=dict)
    unknown: frozenset[int] = frozenset()
    numa: dict[int, int] = field(default_factory=dict)
    residue_gib: int = 1
    """What engines keep while they sleep; more than is planned makes their sleep a stop."""
    host_gib: int = 256

    def __repr__(self) -> str:
        lines = [f"  before {_short(e)}" for e in self.before.endpoints.values()]
        lines += [f"  after  {_short(e)}" for e in (*self.after.endpoints.values(), *self.after.overlays.values())]
        rest = (
            f"first {sorted(self.between.overlays)} for {self.between_s} s",
            self.before.floors,
            self.sizes,
            self.behaviour,
            self.foreign,
            self.unknown,
        )
        return "\n".join(["World", *lines, f"  {rest}"])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def plant(self) -> Plant:
        """The box with nothing on it."""
        plant = Plant(totals=list(self.sizes), behaviour=self.behaviour, numa=self.numa)
        plant.residue, plant.host_bytes = self.residue_gib * GIB, self.host_gib * GIB
        return plant

    def happen(self, run: Run) -> None:
        """From the baseline to the end of all overlays, with strangers and silent GPUs all the while."""
        self.disturb(run.plant)
        run.spec = self.between
        late = run.plant.now.plus(self.between_s).mono
        run.settle(until=lambda decided: decided.now.mono >= late)
        run.spec = self.after

    def disturb(self, plant: Plant) -> None:
        """Strangers come, and GPUs fall silent."""
        plant.foreign = {i: [foreign(900 + i, size)] for i, size in self.foreign.items()}
        plant.overrides = {i: {"state": "unknown"} for i in self.unknown}


def box_sizes(most: int = 16) -> st.SearchStrategy[int]:
    """How many GPUs a box has: many are small, and some are as large as they come."""
    small = st.integers(1, min(SMALL, most))
    return small if most <= SMALL else st.one_of(small, small, small, st.integers(SMALL + 1, most))


def _claims(gpus: int) -> st.SearchStrategy[int | list[int]]:
    most = min(3 if gpus <= SMALL else 6, gpus)
    pins = st.lists(st.integers(0, gpus - 1), min_size=1, max_size=most, unique=True)
    return st.one_of(st.integers(1, most), st.integers(1, most), pins, pins, st.integers(0, most))


_memories = st.sampled_from([None, None, None, 0.25, 0.5, 0.9, 10, 20])


@st.composite
def endpoints(draw: st.DrawFn, gpus: int, index: int, *, plain: bool = False, sleepers: bool = False) -> EndpointSpec:
    """One endpoint; `plain`: running, with at least one GPU; `sleepers`: it may give way by sleeping."""
    made = endpoint(
        f"e{index}",
        draw(_claims(gpus)),
        memory=draw(_memories),
        capabilities=tuple(sorted(draw(st.sets(st.sampled_from(CAPABILITIES))))),
        priority=draw(st.sampled_from(PRIORITIES)),
        state="running" if plain else draw(st.sampled_from(["running", "running", "running", "standby", "stopped"])),
        preemptible=draw(st.sampled_from([True, True, True, False])),
        movable=draw(st.booleans()),
        port=8000 + index,
        stop=Stop(drain_s=draw(st.sampled_from([0.0, 15.0]))),
        evict=draw(st.sampled_from([Evict(), Evict(), Evict("sleep", 1, 4 * GIB), Evict("sleep", 2)]))
        if sleepers
        else Evict(),
    )
    return replace(made, gpus=replace(made.gpus, count=1)) if plain and made.gpus.count == 0 else made


@st.composite
def overlays(draw: st.DrawFn, gpus: int, index: int, known: list[EndpointSpec]) -> OverlaySpec:
    """One overlay: work, a reservation, or other set points."""
    work = draw(st.sampled_from([True, True, False]))
    sets = []
    if known and draw(st.integers(0, 4)) == 0:
        target = draw(st.sampled_from(known))
        other = draw(st.sampled_from(["stopped", "model"]))
        if other == "stopped":
            sets.append(replace(target, state="stopped"))
        else:
            sets.append(replace(target, state="running", model="other", process_hash=target.process_hash + "-other"))
    return overlay(
        f"o{index}",
        draw(_claims(gpus)) if work or not sets else None,
        memory=draw(_memories),
        priority=draw(st.sampled_from([1000, 25, 15, 5])),
        evict=draw(st.sampled_from([True, True, False])),
        duration=600.0,
        requires=draw(st.sampled_from([(), (), (), ("ask",), ("code",)])) if work else (),
        workload=work,
        retries=draw(st.integers(0, 1)),
        preemptible=draw(st.booleans()),
        sets=sets,
    )


@st.composite
def worlds(draw: st.DrawFn, most_gpus: int = 16, *, sleepers: bool = False) -> World:
    """A box with a baseline, then overlays, edits, strangers and silent GPUs. A quarter have more than eight GPUs.

    `sleepers`: who can may give way by sleeping, and no endpoint is edited.
    """
    gpus = draw(box_sizes(most_gpus))
    sizes = [draw(st.sampled_from([24, 80])) * GIB] * gpus
    if draw(st.integers(0, 3)) == 0:
        sizes = [draw(st.sampled_from([24, 80])) * GIB for _ in range(gpus)]
    baseline = [
        draw(endpoints(gpus, i, sleepers=sleepers))
        for i in range(draw(st.integers(1, min(7 if gpus <= SMALL else 10, gpus + 2))))
    ]
    floors = {c: draw(st.integers(1, 2)) for c in CAPABILITIES if draw(st.integers(0, 2)) == 0}
    later = list(baseline)
    if baseline and not sleepers and draw(st.integers(0, 2)) == 0:  # one is edited, or another one in its stead
        index = draw(st.integers(0, len(baseline) - 1))
        later[index] = draw(endpoints(gpus, index))
    if len(later) > 1 and draw(st.integers(0, 4)) == 0:
        later.pop()
    added = [draw(overlays(gpus, i, later)) for i in range(draw(st.sampled_from([1, 2, 3, 0])))]
    first = draw(st.integers(0, len(added)))
    busy = {}
    if draw(st.integers(0, 2)) == 0:
        busy = draw(st.dictionaries(st.integers(0, gpus - 1), st.sampled_from([1, 5, 30]), max_size=2))
    silent = draw(st.sets(st.integers(0, gpus - 1), max_size=1)) if draw(st.integers(0, 3)) == 0 else set()
    runs = {o.name: draw(st.sampled_from([60.0, 300.0, 900.0])) for o in added}
    codes = {o.name: draw(st.sampled_from([(0,), (1, 0), (1,)])) for o in added}
    return World(
        before=spec(*baseline, floors=floors),
        between=spec(*later, *added[:first], floors=floors),
        between_s=draw(st.sampled_from([0.0, 20.0, 100.0, 400.0])),
        after=spec(*later, *added, floors=floors),
        sizes=sizes,
        behaviour=Behaviour(
            run_s=runs,
            exit_codes=codes,
            stop_s=draw(st.sampled_from([0.5, 30.0, 90.0])),
            failing=draw(st.sampled_from(REFUSALS)) if sleepers else frozenset(),
        ),
        residue_gib=draw(st.sampled_from([1, 1, 5])) if sleepers else 1,
        host_gib=draw(st.sampled_from([256, 9])) if sleepers else 256,
        foreign={i: min(size * GIB, sizes[i] - GIB) for i, size in busy.items()},
        unknown=frozenset(silent),
        numa={i: i * 2 // gpus for i in range(gpus)},
    )
