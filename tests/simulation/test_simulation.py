"""Thousands of boxes on which things break: nothing that must never happen happens, and each comes to rest.

Each seed is one box with its overlays and faults; `benchmarks/soak.py --seeds N` runs more of them.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from box import SimActor
from msgspec.structs import replace
from running import Outcome, faulty, report, run, shrink
from scenario import KINDS, Draw, Fault, Scenario
from verdicts import false_incidents, missed

from reconciler.act.process import Launch
from reconciler.journal.decisions import digest
from reconciler.loop import daemon as daemon_module
from reconciler.plan import graph, naps
from reconciler.plan.actions import Plan
from reconciler.plan.ledger import Nap
from reconciler.plan.observed import Incarnation
from reconciler.plan.planner import plan
from reconciler.plan.situation import Situation

SEEDS = 2000
BATCH = 20
REPLAYED = 40
TOLD = (0, 1, 3, 4)
"""Boxes with twenty overlays each, for some of which others give way: once as planned and once with twenty strikes;
`soak.py --incidents N` has more."""


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_whatever_breaks_nothing_unlawful_happens_and_the_box_comes_to_rest(first: int) -> None:
    for seed in range(first, first + BATCH):
        outcome = faulty(seed)
        assert outcome.problem is None, report(outcome)


def test_the_seeds_strike_with_everything_and_make_things_happen() -> None:
    drawn = [Draw(seed).faulty() for seed in range(SEEDS)]
    struck = {fault.kind for scenario in drawn for fault in scenario.faults}
    assert struck == set(KINDS)
    seen = [faulty(seed) for seed in range(40)]
    happened = {line.split(" ", 1)[1].split(" ")[0] for outcome in seen for line in outcome.trace}
    assert {"started", "evicted", "signalled", "ended", "killed", "dead", "incident", "settled"} <= happened
    naps = {" ".join(line.split()[1:3]) for outcome in seen for line in outcome.trace}
    assert {"told to", "did sleep", "did wake"} <= naps


def test_a_seed_tells_the_same_story_in_another_process_with_other_hashes() -> None:
    code = (
        "import hashlib, sys; sys.path[:0] = sys.argv[1:4]; from running import faulty;"
        "print(hashlib.sha256('\\n'.join(l for s in range(12) for l in faulty(s).trace).encode()).hexdigest())"
    )
    here = Path(__file__).parent
    mine = hashlib.sha256("\n".join(line for seed in range(12) for line in faulty(seed).trace).encode()).hexdigest()
    for hashes in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(here), str(here.parent / "plan"), str(here.parent)],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": hashes},
        )  # fmt: skip
        assert done.stdout.strip() == mine


def test_every_decision_made_again_from_what_the_journal_kept_is_the_same_plan_byte_for_byte() -> None:
    """Over daemons that were killed at their writes, full disks, torn files and jumping clocks."""
    kept = [d for seed in range(REPLAYED) for d in run(Draw(seed).faulty(), keep=True).decisions]
    for decision in kept:
        inputs = decision.inputs
        assert digest(plan(inputs.spec, inputs.observed, inputs.ledger, inputs.now)) == decision.outcome, decision.id
    assert len(kept) > 5 * REPLAYED  # daemons that are killed, and journals that are put aside, leave fewer


# ---------------------------------------------------------------- it finds what is wrong


def _never_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    real = daemon_module.decide

    def forgetful(*given: Any) -> Plan:
        plan = real(*given)
        kept = tuple(a for a in plan.actions if not (a.op == "start" and a.cause.kind == "restore"))
        return replace(plan, actions=kept)

    monkeypatch.setattr(daemon_module, "decide", forgetful)


def _acts_before_it_records(monkeypatch: pytest.MonkeyPatch) -> None:
    real = daemon_module.decide

    def careless(spec: Any, observed: Any, ledger: Any, now: Any) -> Plan:
        plan = real(spec, observed, ledger, now)
        return replace(plan, ledger=replace(plan.ledger, overlays=ledger.overlays, leases=ledger.leases))

    monkeypatch.setattr(daemon_module, "decide", careless)


def _nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real = daemon_module.decide

    def hasty(*given: Any) -> Plan:
        plan = real(*given)
        return replace(plan, actions=tuple(replace(a, ready=True) for a in plan.actions))

    monkeypatch.setattr(daemon_module, "decide", hasty)


def _the_dark_counts_as_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Situation, "sees", lambda *_: True)


def _starts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Situation.living

    def blind(self: Situation, subject: Any) -> list[Incarnation]:
        return [i for i in real(self, subject) if i.phase != "unknown"]

    monkeypatch.setattr(Situation, "living", blind)


def _work_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = SimActor.ensure_started

    async def twice(self: SimActor, launch: Launch) -> None:
        await real(self, launch)
        if launch.subject.kind == "workload":
            await real(self, replace(launch, incarnation=launch.incarnation + "b"))

    monkeypatch.setattr(SimActor, "ensure_started", twice)


def _a_sleepers_word_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def rested(situation: Situation, _endpoint: Any, incarnation: Incarnation, nap: Nap) -> bool:
        said = nap.slept is not None and nap.waking is None
        return said and naps.says_asleep(nap, situation.probe(incarnation))

    for module in (naps, graph):
        monkeypatch.setattr(module, "rested", rested)


@pytest.mark.parametrize(
    ("mutate", "likely"),
    [
        (_never_restored, 5),
        (_acts_before_it_records, 0),
        (_nothing_is_waited_for, 0),
        (_the_dark_counts_as_empty, 91),
        (_starts_twice, 6),
        (_work_is_started_again, 0),
        (_a_sleepers_word_is_enough, 97),
    ],
)
def test_a_program_with_a_mistake_is_found_out(
    mutate: Callable[[pytest.MonkeyPatch], None], likely: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one of the first 250 seeds; the one that found it last time is tried first."""
    mutate(monkeypatch)
    assert any(faulty(seed).problem is not None for seed in (likely, *range(250)))


def test_a_failing_seed_is_told_by_the_least_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(scenario: Scenario) -> Outcome:
        wrong = any(f.kind == "crash" for f in scenario.faults)
        return replace(run(replace(scenario, faults=(), drops=())), scenario=scenario, problem="x" if wrong else None)

    base = Draw(3).faulty()
    faults = tuple(Fault(float(n), kind, 0, 5.0) for n, kind in enumerate(("hang", "crash", "kill", "foreign")))
    least = shrink(of(replace(base, faults=faults)), of)
    assert [f.kind for f in least.scenario.faults] == ["crash"]
    assert least.scenario.drops == ()


# ---------------------------------------------------------------- planned is not broken


@pytest.mark.parametrize("seed", TOLD)
def test_overlays_that_keep_their_word_raise_no_incident(seed: int) -> None:
    outcome = run(Draw(seed).planned(20))
    assert outcome.problem is None, report(outcome)
    assert list(outcome.box.incidents) == []
    assert len(outcome.box.evictions) > 2, "it was not for want of disturbance"


@pytest.mark.parametrize("seed", TOLD)
def test_each_thing_that_nobody_planned_is_an_incident_and_nothing_else_is(seed: int) -> None:
    outcome = run(Draw(seed).struck(20, 20))
    assert outcome.problem is None, report(outcome)
    assert missed(outcome) == []
    assert false_incidents(outcome) == []
    assert len(outcome.box.struck) > 5
