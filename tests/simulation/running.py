"""Running scenarios: one, many, and from a failing one to the least of it that still fails."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from box import Box, Patches, new_loop
from msgspec import Struct
from scenario import Draw, Scenario

from reconciler.journal.decisions import Decision
from reconciler.journal.reader import JournalReader

MEMORY = Path("/dev/shm")


class Outcome(Struct):
    """How one scenario went."""

    scenario: Scenario
    problem: str | None
    trace: tuple[str, ...]
    box: Box
    decisions: tuple[Decision, ...] = ()
    """What its daemons decided, if that was to be kept."""

    @property
    def reason(self) -> str:
        """The problem without its particulars, to tell one from another."""
        return (self.problem or "").split(":")[0][:60]


def run(scenario: Scenario, *, keep: bool = False) -> Outcome:
    """Live through it; the same scenario, the same trace. With `keep`, its decisions are read back at the end."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks of daemons that were killed end as they may
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        loop = new_loop()
        box = Box(Path(folder), scenario, loop)
        problem: str | None = None
        asyncio.set_event_loop(loop)
        try:
            with Patches(box):
                loop.run_until_complete(box.live())
        except AssertionError as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            asyncio.set_event_loop(None)
            loop.close()
        return Outcome(scenario, problem, tuple(box.trace), box, decisions(box) if keep else ())


def decisions(box: Box) -> tuple[Decision, ...]:
    """Every decision of the box's daemons that its journal still has."""
    with JournalReader.open_readonly(box.state.journal) as journal:
        newest = journal.decision()
        numbers = range(1, newest.id + 1) if newest is not None else ()
        return tuple(found for n in numbers if (found := journal.decision(n)) is not None)


def shrink(failed: Outcome, again: Callable[[Scenario], Outcome] = run) -> Outcome:
    """The least of a failing scenario that fails in the same way: overlays and faults left out one after the other."""
    least, progress = failed, True
    while progress:
        progress = False
        smaller = [least.scenario.without(f) for f in least.scenario.faults]
        smaller += [least.scenario.without_drop(d) for d in least.scenario.drops]
        for scenario in smaller:
            outcome = again(scenario)
            if outcome.problem is not None and outcome.reason == least.reason:
                least, progress = outcome, True
                break
    return least


def report(failed: Outcome) -> str:
    """A failing seed for people: what it was made of, what happened, and how to see it again."""
    least = shrink(failed)
    return "\n".join(
        [
            f"seed {failed.scenario.seed} fails; again: python benchmarks/soak.py --seed {failed.scenario.seed}",
            str(least.scenario),
            *least.trace[-60:],
            str(least.problem),
        ]
    )


def faulty(seed: int) -> Outcome:
    """One seed of the box where everything breaks."""
    return run(Draw(seed).faulty())
