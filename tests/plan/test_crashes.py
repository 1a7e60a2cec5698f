"""19: a daemon that dies at any step, and one that comes after it, end where one that lives would have ended."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from plant import Run
from worlds import World, examples, worlds

from reconciler.plan.actions import Plan
from reconciler.plan.ledger import TERMINAL


class Mortal(Run):
    """A run whose daemon dies again and again: before its decision is kept, before it acts, or half-way through."""

    fate: Random
    deaths: int = 0

    def step(self) -> tuple[Plan, bool]:
        death = self.fate.choice(["", "", "", "before", "kept", "half"])
        if not death or self.deaths > 60 or self.plant.answered or self.plant.called:
            return super().step()
        self.deaths += 1
        decided = self.decide()
        self.watch(self, decided)
        if death == "before":
            return decided, True
        self.ledger = decided.ledger
        if death == "half":
            ready = [a for a in decided.actions if a.ready]
            kept = {a.id for a in ready if self.fate.random() < 0.5}
            self.plant.act(replace(decided, actions=tuple(a for a in decided.actions if a.id in kept), archive=()))
        return decided, True


def twice(run: Run, _: Plan) -> None:
    """Nothing lives twice."""
    living = [i.subject for i in run.plant.incarnations if i.alive]
    assert len(living) == len(set(living))


def outcome(run: Run, last: Plan) -> tuple[object, ...]:
    """Where a run has come to rest, whatever the way and the time it took."""
    running = {i.subject: i.process_hash for i in run.plant.incarnations if i.alive}
    return running, {n: r.state for n, r in last.ledger.overlays.items()}, last.ledger.leases


@given(worlds(), st.integers(0, 2**32))
@examples(45)
def test_19_a_crash_at_any_step_and_a_new_daemon_end_at_the_same_fixed_point(world: World, seed: int) -> None:
    world.between_s = 0.0  # what else is asked for comes at once: how long a crash takes decides nothing
    ends = []
    for kind in (Run, Mortal):
        run = kind(world.before, world.plant(), watch=twice)
        if isinstance(run, Mortal):
            run.fate = Random(seed)
        run.settle(max_steps=2000)
        run.spec = world.after
        last = run.settle(max_steps=2000)
        ends.append(outcome(run, last))
        assert all(r.state in TERMINAL or r.state == "pending" for r in last.ledger.overlays.values())
    assert ends[0] == ends[1]
