"""Predicted against actual, part by part."""

from __future__ import annotations

import pytest
from builders import NOW, endpoint, overlay, spec
from msgspec.structs import replace
from plant import Behaviour, Plant, Run, overlay_state

from reconciler.plan.ledger import Span
from reconciler.plan.overlays import open_record, predicted_end

ASK = endpoint("ask", [0], priority=100)


def render(**fields: object):
    return overlay("render", gpus=[0], priority=500, duration=300.0, **fields)


def run_of(item, **behaviour) -> Run:
    run = Run(spec(ASK), Plant(totals=[80 << 30], behaviour=Behaviour(**behaviour)))
    run.settle()
    run.plant.advance(600.0)
    run.spec = spec(ASK, item)
    return run


def parts(run: Run) -> dict[str, Span]:
    spans = run.ledger.overlays["render"].spans
    assert len({span.part for span in spans}) == len(spans)
    return {span.part: span for span in spans}


def test_each_part_of_a_run_is_predicted_once_and_measured():
    run = run_of(render(), stop_s=3.0, memory_return_s=1.0, load_s=40.0, default_run_s=200.0)
    run.settle(until=overlay_state("render", "active"))
    evict = parts(run)["evict"]
    assert evict.predicted_s is not None
    assert evict.predicted_s > 0
    assert evict.actual_s is not None
    assert evict.actual_s == pytest.approx(evict.predicted_s, abs=3.0)
    assert evict.actual_s > 4.0, "a stop of 3 s, and 1 s until its memory is back"
    assert parts(run)["run"].predicted_s == pytest.approx(300.0, abs=1.0)
    assert parts(run)["run"].actual_s is None
    run.settle(until=overlay_state("render", "done"))
    found = parts(run)
    assert found["run"].actual_s == pytest.approx(200.0, abs=2.0)
    assert found["restore"].actual_s == pytest.approx(41.0, abs=4.0)
    assert found["restore"].predicted_s is not None
    began = [span.began.mono for span in run.ledger.overlays["render"].spans]
    assert began == sorted(began)
    assert run.decide().ledger.overlays["render"].spans == run.ledger.overlays["render"].spans


def test_a_wait_is_predicted_as_soon_as_anything_tells_its_end():
    later = render(start=NOW.wall + 3000.0)
    run = run_of(later)
    run.settle(until=overlay_state("render", "active"))
    wait = parts(run)["wait"]
    assert wait.predicted_s is not None
    assert wait.actual_s is not None
    assert wait.actual_s <= wait.predicted_s
    assert wait.began.wall + wait.predicted_s == pytest.approx(NOW.wall + 3000.0, abs=1.0)


def test_more_attempts_are_one_run():
    run = run_of(render(retries=2), default_run_s=50.0, exit_codes={"render": (1, 1, 0)})
    run.settle(until=overlay_state("render", "done"))
    assert parts(run)["run"].actual_s >= 150.0


def test_work_that_usually_ends_early_is_told_to_end_early_and_may_take_all_of_its_time():
    run = run_of(render())
    run.ledger = replace(run.ledger, runs={"render": 60.0})
    (end,) = [a for a in run.decide().actions if a.op == "wait_end"]
    assert end.expected[1] - end.expected[0] == 60.0
    run.settle(until=overlay_state("render", "active"))
    entry = next(e for e in run.ledger.agenda if e.endpoint == "ask")
    assert entry.until >= run.ledger.overlays["render"].active_since.wall + 300.0


BEGAN = NOW.wall
ENDS = [
    ({}, 50.0, 600.0, "as its file declares"),
    ({"usual_s": 100.0}, 50.0, 100.0, "as usual"),
    ({"usual_s": 900.0}, 50.0, 600.0, "its duration comes first"),
    ({"usual_s": 100.0}, 100.0, 600.0, "later than usual"),
    ({}, 700.0, 700.0, "it overruns"),
    ({"deadline": 80.0}, 50.0, 80.0, "its deadline comes first"),
    ({"deadline": 80.0, "usual_s": 70.0}, 50.0, 70.0, "as usual, before its deadline"),
    ({"deadline": 900.0, "duration": None}, 50.0, 900.0, "nothing but its deadline is known"),
    ({"duration": None}, 50.0, 50.0, "nothing is known"),
]


@pytest.mark.parametrize(("fields", "now", "end"), [case[:3] for case in ENDS], ids=[case[3] for case in ENDS])
def test_the_end_of_work_is_foreseen_by_the_first_of_what_bounds_it_that_is_not_past(fields, now, end):
    deadline = BEGAN + fields["deadline"] if "deadline" in fields else None
    item = overlay("render", duration=fields.get("duration", 600.0), deadline=deadline)
    record = replace(open_record(item, NOW), active_since=NOW)
    assert predicted_end(record, item.makespan, BEGAN + now, fields.get("usual_s")) == BEGAN + end


def test_work_that_has_not_begun_is_foreseen_to_end_its_duration_after_its_start_or_from_now_on():
    item = overlay("render", duration=600.0, start=BEGAN + 1000.0)
    record = open_record(item, NOW)
    assert predicted_end(record, item.makespan, BEGAN) == BEGAN + 1600.0
    assert predicted_end(record, item.makespan, BEGAN + 1200.0) == BEGAN + 1800.0
