"""Properties of every plan and of every run, on generated boxes. How many are tried: see `worlds.py`."""

from __future__ import annotations

from accounting import lawful
from builders import spec
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from plant import Run, describe
from worlds import World, examples, worlds

from reconciler.plan.actions import Plan
from reconciler.plan.ledger import TERMINAL
from reconciler.plan.planner import plan
from reconciler.spec.spec import Spec


def watched(world: World) -> Run:
    """A run of the baseline, every decision of which is checked."""
    run = Run(world.before, world.plant(), watch=lawful)
    run.settle()
    return run


@given(worlds())
@examples(80)
def test_every_run_comes_to_rest_and_every_plan_on_the_way_is_lawful(world: World) -> None:
    run = watched(world)
    world.happen(run)
    last = run.settle()
    again = run.decide()
    assert again.actions == last.actions
    assert again.ledger == run.ledger, "a plan that changes nothing remembers something new"
    run.plant.foreign, run.plant.overrides = {}, {}
    last = run.settle()
    run.spec = spec(*world.after.endpoints.values(), floors=world.after.floors)  # the files of all overlays removed
    last = run.settle()
    assert all(r.state in TERMINAL for r in last.ledger.overlays.values()), describe(last)
    assert last.ledger.leases == ()
    assert last.converged
    assert last.actions == ()
    assert_is_the_baseline(run, last)


@given(worlds(sleepers=True))
@examples(45)
def test_5_6_12_15_18_20_hold_as_well_where_endpoints_sleep_refuse_to_or_keep_too_much(world: World) -> None:
    run = watched(world)
    world.happen(run)
    run.settle()
    run.plant.foreign, run.plant.overrides = {}, {}
    run.settle()
    run.spec = spec(*world.after.endpoints.values(), floors=world.after.floors)
    last = run.settle()
    assert last.ledger.leases == ()
    assert last.actions == ()
    assert_is_the_baseline(run, last)
    wanted = {n for n, e in run.spec.endpoints.items() if e.state == "running"}
    awake = {i.subject.name for i in run.plant.incarnations if i.id not in run.plant.asleep}
    assert {i.subject.name for i in run.plant.incarnations} - awake <= {b.subject.name for b in last.blocked}, wanted


def assert_is_the_baseline(run: Run, last: Plan) -> None:
    """What should run is ready or says why not, and nothing else runs."""
    wanted = {n: e for n, e in run.spec.endpoints.items() if e.state == "running"}
    blocked = {b.subject.name for b in last.blocked}
    for name, item in wanted.items():
        assert run.plant.is_ready(name) or name in blocked, f"{name} is not there and nobody says why"
        current = run.plant.current(name)
        assert current is None or current.process_hash == item.process_hash or name in blocked
    assert {i.subject.name for i in run.plant.incarnations} <= set(wanted)


@given(worlds(), st.integers(0, 15))
@examples(30)
def test_20_nothing_destructive_is_done_on_a_gpu_that_falls_silent(world: World, index: int) -> None:
    world = replace(world, unknown=frozenset({index % len(world.sizes)}))
    run = watched(world)
    world.happen(run)
    run.settle()


def backwards(spec: Spec) -> Spec:
    """The same spec, its maps filled in the opposite order."""
    return replace(
        spec,
        endpoints=dict(reversed(spec.endpoints.items())),
        overlays={
            n: replace(o, endpoints=dict(reversed(o.endpoints.items()))) for n, o in reversed(spec.overlays.items())
        },
        floors=dict(reversed(spec.floors.items())),
    )


@given(worlds())
@examples(30)
def test_the_order_of_files_and_maps_does_not_matter(world: World) -> None:
    def same(run: Run, decided: Plan) -> None:
        seen = run.plant.observe()
        probes = dict(reversed(seen.probes.items()))
        ledger = replace(
            run.ledger,
            overlays=dict(reversed(run.ledger.overlays.items())),
            endpoints=dict(reversed(run.ledger.endpoints.items())),
        )
        assert plan(backwards(run.spec), replace(seen, probes=probes), ledger, run.plant.now) == decided

    run = Run(world.before, world.plant(), watch=same)
    run.settle()
    world.happen(run)
    run.settle()
