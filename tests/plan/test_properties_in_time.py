"""Properties that hold over time: shifted clocks, toggled files, bounded suppressions; and those of the single decision
that a larger box must not make worse. Numbers in names are those of the list that the planner promises to hold."""

from __future__ import annotations

from typing import Any

from accounting import lawful
from builders import NOW, endpoint, overlay, spec
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from plant import Plant, Run
from worlds import World, box_sizes, examples, worlds

from reconciler.clock import Instant
from reconciler.plan.actions import Plan
from reconciler.spec.spec import OverlaySpec, Spec

HOUR = 3600.0


def later(of: Spec, seconds: float) -> Spec:
    """The same files, every moment in them later by so much."""

    def moved(item: OverlaySpec) -> OverlaySpec:
        span = item.makespan
        start = None if span.start is None else span.start + seconds
        deadline = None if span.deadline is None else span.deadline + seconds
        return replace(item, makespan=replace(span, start=start, deadline=deadline))

    return replace(of, overlays={n: moved(o) for n, o in of.overlays.items()})


def windowed(draw: st.DrawFn, of: Spec) -> Spec:
    """The same files, some of the overlays with a start to come or a deadline."""

    def timed(item: OverlaySpec) -> OverlaySpec:
        start = draw(st.sampled_from([None, 300.0, 1500.0]))
        deadline = draw(st.sampled_from([None, 2500.0, 9000.0]))
        wall = NOW.wall + 1000
        return replace(
            item,
            makespan=replace(
                item.makespan,
                start=None if start is None else wall + start,
                deadline=None if deadline is None else wall + deadline,
                on_overrun=draw(st.sampled_from(["continue", "stop"])),
            ),
        )

    return replace(of, overlays={n: timed(o) for n, o in sorted(of.overlays.items())})


@st.composite
def timed_worlds(draw: st.DrawFn) -> World:
    """A box whose overlays have windows and deadlines; up to 16 GPUs."""
    world = draw(worlds())
    after = windowed(draw, world.after)
    between = replace(world.between, overlays={n: after.overlays[n] for n in world.between.overlays})
    return replace(world, between=between, after=after)


def told(decided: Plan) -> list[Any]:
    """What a decision says, its moments relative to it."""
    wall = decided.now.wall
    return [
        [
            (a.op, a.subject, a.gpus, a.needs, a.ready, [round(t - wall, 3) for t in a.expected])
            for a in decided.actions
        ],
        [(b.subject, b.reason, b.earliest_start and round(b.earliest_start - wall, 3)) for b in decided.blocked],
        [(n, r.state, r.gpus, r.evicted) for n, r in decided.ledger.overlays.items()],
        decided.next_wake and round(decided.next_wake.wall - wall, 3),
    ]


@given(timed_worlds(), st.sampled_from([1.0, 86400.0, 1e6]))
@examples(25)
def test_24_the_same_later_is_the_same_plan_later(world: World, shift: float) -> None:
    def run_from(begin: Instant, by: float) -> list[Any]:
        said: list[Any] = []
        run = Run(world.before, world.plant(), watch=lambda _, decided: said.append(told(decided)))
        run.plant.now = begin
        run.settle()
        run.plant.advance(max(0.0, begin.mono + 1000 - run.plant.now.mono))
        shifted = replace(world, between=later(world.between, by), after=later(world.after, by))
        shifted.happen(run)
        run.settle()
        return said

    moved = Instant(NOW.wall + shift, NOW.mono)
    assert run_from(NOW, 0.0) == run_from(moved, shift)


@given(timed_worlds())
@examples(25)
def test_18_and_25_after_windows_and_deadlines_the_baseline_is_back_and_no_suppression_is_left(world: World) -> None:
    def bounded(run: Run, decided: Plan) -> None:
        lawful(run, decided)  # 4 to 9, 13 and 15
        spans = [o.makespan for o in world.after.overlays.values()]
        longest = sum((s.duration_s or 0.0) + s.grace_s for s in spans) + 10_000
        for entry in decided.ledger.agenda:
            assert entry.start <= decided.now.wall
            assert entry.until <= entry.start + longest + 3 * HOUR, "an entry without an end worth the name"

    run = Run(world.before, world.plant(), watch=bounded)
    run.settle()
    world.happen(run)
    run.settle()
    run.plant.foreign, run.plant.overrides = {}, {}
    run.spec = spec(*world.after.endpoints.values(), floors=world.after.floors)
    last = run.settle()
    assert last.ledger.leases == ()
    assert last.actions == ()
    blocked = {b.subject.name for b in last.blocked}
    wanted = {n for n, e in run.spec.endpoints.items() if e.state == "running"}
    assert {i.subject.name for i in run.plant.incarnations} <= wanted
    assert all(run.plant.is_ready(n) or n in blocked for n in wanted)
    assert {entry.endpoint for entry in last.ledger.agenda} <= blocked


@given(
    st.lists(st.tuples(st.sampled_from([1.0, 60.0, 130.0, 400.0, 1500.0]), st.booleans()), min_size=5, max_size=30),
    box_sizes(),
    st.data(),
)
@examples(20)
def test_22_evictions_per_hour_are_bounded_however_files_are_toggled(
    toggles: list[tuple[float, bool]], gpus: int, data: st.DataObject
) -> None:
    ask = endpoint("ask", gpus, priority=40)
    run = Run(spec(ask), Plant(totals=[80 << 30] * gpus))
    run.settle()
    stopped: dict[str, float] = {}

    def count(run: Run, decided: Plan) -> None:
        for found in run.plant.incarnations:
            if found.subject.name == "ask" and found.stop is not None:
                stopped.setdefault(found.id, decided.now.wall)

    run.watch = count
    for index, (seconds, there) in enumerate(toggles):
        asks = overlay(f"o{index % 3}", data.draw(st.integers(1, gpus)), duration=30.0)
        run.spec = spec(ask, asks) if there else spec(ask)
        run.plant.behaviour.default_run_s = 20.0
        end = run.plant.now.plus(seconds).mono
        run.settle(until=lambda decided, end=end: decided.now.mono >= end)
        if run.plant.now.mono < end:
            run.plant.advance(end - run.plant.now.mono)
    evicted = sorted(stopped.values())
    assert all(len([t for t in evicted if begin <= t < begin + HOUR]) <= 3 for begin in evicted)


@given(worlds(most_gpus=15))
@examples(50)
def test_16_one_more_free_gpu_never_means_more_victims_nor_fewer_admitted(world: World) -> None:
    """Asked of one overlay alone on a box whose counted claims are met: where nobody else moves onto the new GPU."""
    run = Run(world.before, Plant(totals=list(world.sizes), numa=world.numa))
    run.settle()
    for name, item in sorted(world.after.overlays.items()):
        if item.endpoints or item.requires:
            continue
        settled = [e for e in world.before.endpoints.values() if run.plant.is_ready(e.name) or e.state != "running"]
        if len(settled) < len(world.before.endpoints):
            continue
        run.spec = replace(world.before, overlays={name: item})
        before = run.decide().ledger.overlays[name]
        run.plant.totals.append(world.sizes[0])
        after = run.decide().ledger.overlays[name]
        run.plant.totals.pop()
        if before.state != "pending":
            assert after.state != "pending"
            worse = [world.before.endpoints[n].priority for n in after.evicted]
            best = [world.before.endpoints[n].priority for n in before.evicted]
            assert sorted(worse, reverse=True) <= sorted(best, reverse=True)
