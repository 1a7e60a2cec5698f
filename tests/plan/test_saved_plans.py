"""26. A stale saved plan does nothing: it is refused as soon as it would not be decided again, and not before."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from builders import RESERVE, endpoint, foreign, spec
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from plant import Plant, Run
from test_properties_in_time import timed_worlds
from worlds import World, examples, worlds

from reconciler.cli.saved_plan import read_saved, refuse_if_stale, save
from reconciler.errors import StalePlanError
from reconciler.plan.actions import Plan
from reconciler.plan.observed import Observed
from reconciler.plan.planner import plan
from reconciler.units import GIB

MIB = 1 << 20


def deeds(decided: Plan) -> list[object]:
    """What a plan does, whenever it does it."""
    return [(a.op, a.subject, a.gpus, a.needs, a.ready, str(a.cause)) for a in decided.actions]


def refused(old: tuple[Plan, Observed], new: tuple[Plan, Observed]) -> bool:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.plan"
        save(path, *old)
        try:
            refuse_if_stale(read_saved(path), *new, path)
        except StalePlanError:
            return True
    return False


def decisions(world: World) -> list[tuple[Plan, Observed]]:
    """Those of a whole run, with what each of them saw."""
    seen: list[tuple[Plan, Observed]] = []
    run = Run(world.before, world.plant(), watch=lambda r, decided: seen.append((decided, r.plant.observe())))
    run.settle()
    world.happen(run)
    run.settle()
    return seen


@given(worlds(), st.data())
@examples(40)
def test_26_a_plan_is_refused_once_another_one_would_be_carried_out(world: World, data: st.DataObject) -> None:
    seen = decisions(world)
    old, new = data.draw(st.sampled_from(seen)), data.draw(st.sampled_from(seen))
    if deeds(old[0]) != deeds(new[0]) or old[0].spec_hash != new[0].spec_hash:
        assert refused(old, new)
    assert not refused(old, old)


@given(timed_worlds(), st.sampled_from([30.0, 1400.0, 3000.0, 10_000.0]))
@examples(60)
def test_26_time_alone_makes_a_plan_stale_exactly_when_it_changes_what_is_done(world: World, passed: float) -> None:
    run = Run(world.before, world.plant())
    run.settle()
    seen, now = run.plant.observe(), run.plant.now
    old, new = (plan(world.after, seen, run.ledger, moment) for moment in (now, now.plus(passed)))
    assert refused((old, seen), (new, seen)) == (deeds(old) != deeds(new))


@given(worlds(), st.integers(0, 64))
@examples(40)
def test_26_memory_that_grows_inside_a_claim_makes_no_plan_stale(world: World, grown: int) -> None:
    def check(run: Run, decided: Plan) -> None:
        seen = run.plant.observe()
        now = run.plant.now
        before = plan(run.spec, seen, run.ledger, now)
        gpus = tuple(
            replace(
                g,
                used_bytes=g.used_bytes + grown * MIB,
                processes=tuple(
                    replace(p, memory_bytes=p.memory_bytes + grown * MIB)
                    if p is first and p.memory_bytes is not None else p
                    for p in g.processes
                ),
            )
            if g.used_bytes is not None and g.processes
            and (first := next((p for p in g.processes if p.owner is not None), None)) is not None
            else g
            for g in seen.gpus
        )  # fmt: skip
        busier = replace(seen, gpus=gpus)
        assert not refused((before, seen), (plan(run.spec, busier, run.ledger, now), busier))

    run = Run(world.before, world.plant(), watch=check)
    run.settle()


def test_26_a_stranger_inside_the_reserve_makes_no_plan_stale_and_one_beyond_it_does() -> None:
    run = Run(spec(endpoint("ask", [0], memory=20)), Plant())
    run.settle()
    assert run.spec.node.reserve_bytes == RESERVE == GIB

    def looked(held: int) -> tuple[Plan, Observed]:
        run.plant.foreign = {0: [foreign(900, held)]}
        seen = run.plant.observe()
        return plan(run.spec, seen, run.ledger, run.plant.now), seen

    desktop = looked(250 * MIB)
    assert not refused(desktop, looked(260 * MIB))
    assert not refused(desktop, looked(GIB - MIB))
    assert refused(desktop, looked(2 * GIB))
