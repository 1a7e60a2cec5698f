"""The examples plan what their `plan.txt` says. `REWRITE=1 pytest tests/plan/test_examples.py` writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace
from plant import Plant, Run

from reconciler.plan.actions import Plan
from reconciler.plan.ledger import TERMINAL
from reconciler.plan.render import gpu_indices, render_plan
from reconciler.spec.load import SourceText, resolve
from reconciler.spec.spec import Spec

EXAMPLES = Path(__file__).parents[2] / "examples"
PLANNED = sorted(path.parent.name for path in EXAMPLES.glob("*/plan.txt"))
GPUS = {"nightly-training": 2, "capability-on-demand": 2, "evening-model": 2, "maintenance": 3}
"""How many the plan was made on; 4 if not said."""


def read_example(name: str) -> Spec:
    """What the real loader makes of the example's files."""
    folder = EXAMPLES / name
    setpoints = SourceText("setpoints.yaml", (folder / "setpoints.yaml").read_text("utf-8"))
    files = sorted((folder / "overlays").glob("*.yaml"))
    overlays = [SourceText(f"overlays/{path.name}", path.read_text("utf-8")) for path in files]
    found = resolve(setpoints, overlays, hostname="box", read_env_file=lambda _: b"")
    assert not found.problems, "\n".join(map(str, found.problems))
    return found


def baseline_of(name: str) -> tuple[Run, Spec]:
    """The example's box with its baseline ready, at 21:00 UTC or shortly after; and the example with its overlays."""
    whole = read_example(name)
    run = Run(replace(whole, overlays={}), Plant(totals=[80 << 30] * GPUS.get(name, 4)))
    run.settle()
    wanted = [e.name for e in whole.endpoints.values() if e.state == "running"]
    assert all(run.plant.is_ready(n) for n in wanted)
    return run, whole


def test_the_five_examples_have_a_plan() -> None:
    assert PLANNED == ["capability-on-demand", "evening-model", "maintenance", "nightly-training", "render-tonight"]


@pytest.mark.parametrize("name", PLANNED)
def test_an_example_plans_exactly_what_it_says(name: str) -> None:
    run, run.spec = baseline_of(name)
    text = render_plan(run.decide(), gpu_indices(run.plant.observe())) + "\n"
    file = EXAMPLES / name / "plan.txt"
    if os.environ.get("REWRITE"):
        file.write_text(text, "utf-8")
    assert text == file.read_text("utf-8")


@pytest.mark.parametrize("name", PLANNED)
def test_after_an_example_the_baseline_is_back(name: str) -> None:
    run, run.spec = baseline_of(name)
    before = {i.subject: i.process_hash for i in run.plant.incarnations}
    once = {n for n, o in run.spec.overlays.items() if o.makespan.schedule is None}

    def over(decided: Plan) -> bool:
        records = decided.ledger.overlays
        resting = all(r.state in ("pending", *TERMINAL) for r in records.values())
        return resting and all(records[n].state in TERMINAL for n in once)

    run.settle(until=over)
    assert all(run.ledger.overlays[n].state == "done" for n in once), run.ledger.overlays
    assert {i.subject: i.process_hash for i in run.plant.incarnations} == before
    assert all(run.plant.is_ready(subject.name) for subject in before)
