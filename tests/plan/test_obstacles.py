"""What cannot be started is seen before anybody gives way for it, and begins once it can."""

from __future__ import annotations

from accounting import settled
from builders import NOW, endpoint, overlay, spec, uuid
from msgspec.structs import replace
from plant import Run, overlay_state

from reconciler.plan.actions import Blocked
from reconciler.plan.observed import Obstacle
from reconciler.plan.planner import fingerprint
from reconciler.plan.situation import Situation

ASK = endpoint("ask", [0], priority=100, capabilities=("ask",))
WORK = overlay("work", [0])
GONE = Obstacle("tool is not on PATH", "install it")


def blocked(run: Run, name: str) -> Blocked | None:
    return next((b for b in run.decide().blocked if b.subject.name == name), None)


def test_work_that_cannot_be_started_fails_in_its_place_and_displaces_nobody() -> None:
    run = settled(ASK)
    run.plant.obstacles = {WORK.placement_hash: GONE}
    run.spec = spec(ASK, WORK)
    said = blocked(run, "work")
    assert said is not None
    assert (said.reason, said.message) == ("CannotStart", "its work cannot be started: tool is not on PATH")
    assert said.alternatives == ("install it",)
    run.settle()
    record = run.ledger.overlays["work"]
    assert (record.state, record.reason) == ("failed", "its work cannot be started: tool is not on PATH")
    assert run.stops() == []


def test_work_that_waits_for_a_place_does_not_fail_for_what_is_not_there_meanwhile() -> None:
    run = settled(ASK)
    meek = replace(WORK, priority=50)
    run.plant.obstacles = {meek.placement_hash: GONE}
    run.spec = spec(ASK, meek)
    run.settle()
    assert run.ledger.overlays["work"].state == "pending"
    run.plant.obstacles = {}
    run.spec = spec(meek)
    run.settle(until=overlay_state("work", "active"))


def test_others_that_wait_are_not_kept_by_one_that_cannot_be_started() -> None:
    run = settled(ASK)
    other = overlay("other", [0], priority=500)
    run.plant.obstacles = {WORK.placement_hash: GONE}
    run.spec = spec(ASK, WORK, other)
    run.settle(until=overlay_state("other", "active"))
    assert run.ledger.overlays["work"].state == "pending"
    run.settle()
    assert (run.ledger.overlays["other"].state, run.ledger.overlays["work"].state) == ("done", "failed")


def test_an_endpoint_that_an_overlay_sets_is_looked_at_unless_it_runs_like_that() -> None:
    run = settled(ASK)
    anew = replace(ASK, process_hash="anew")
    sets = overlay("sets", None, workload=False, sets=(anew,))
    run.plant.obstacles = {"anew": GONE}
    run.spec = spec(ASK, sets)
    run.settle()
    assert run.stops() == []
    said = blocked(run, "sets")
    assert said is not None
    assert (said.reason, said.message) == ("CannotStart", "ask cannot be started: tool is not on PATH")
    same = overlay("same", None, workload=False, sets=(replace(ASK, priority=7),))
    run.plant.obstacles = {ASK.process_hash: GONE}
    run.spec = spec(ASK, same)
    run.settle(until=overlay_state("same", "active"))
    assert run.stops() == []


def test_a_provider_that_cannot_be_started_provides_nothing_and_another_one_is_taken() -> None:
    spare = replace(
        endpoint("spare", [0], capabilities=("chat",), state="standby", model="spare", priority=50), preemptible=True
    )
    asks = overlay("asks", None, requires=("chat",))
    run = settled(ASK, spare)
    run.plant.obstacles = {spare.process_hash: GONE}
    run.spec = spec(ASK, spare, asks)
    run.settle()
    assert run.stops() == []
    said = blocked(run, "asks")
    assert said is not None
    assert said.reason == "NoProvider"
    assert "spare (it cannot be started: tool is not on PATH)" in said.message
    assert "install it" in said.alternatives
    second = endpoint("second", [0], capabilities=("chat",), state="standby", model="second", priority=40)
    run.spec = spec(ASK, spare, second, asks)
    decided = run.settle(until=overlay_state("asks", "starting", "active"))
    assert {x.subject.name for x in decided.ledger.leases} == {"second"}


def test_a_window_to_come_keeps_its_place_and_one_whose_time_has_come_does_not() -> None:
    run = settled(ASK)
    start = NOW.wall + 7200.0
    window = overlay("window", [0], start=start, priority=900)
    lesser = overlay("lesser", [0], priority=500, duration=9000.0)
    run.plant.obstacles = {window.placement_hash: GONE}
    run.spec = spec(ASK, window, lesser)
    assert (b := blocked(run, "lesser")) is not None
    assert b.reason == "WindowTaken"
    run.settle(until=overlay_state("lesser", "active"))
    assert run.plant.now.wall >= start, "not before"
    assert (b := blocked(run, "window")) is not None
    assert b.reason == "CannotStart"


def test_an_edit_to_what_cannot_be_started_waits_and_what_runs_stays() -> None:
    run = settled(ASK)
    anew = replace(ASK, process_hash="anew")
    run.plant.obstacles = {"anew": GONE}
    run.spec = spec(anew)
    run.settle()
    assert run.stops() == []
    said = blocked(run, "ask")
    assert said is not None
    assert (said.reason, said.alternatives) == ("EditWaits", ("install it",))
    assert "the new version cannot be started (tool is not on PATH)" in said.message
    run.plant.obstacles = {}
    run.settle()
    assert [i.process_hash for i in run.plant.incarnations] == ["anew"]


def test_whom_an_overlay_sets_otherwise_comes_back_whatever_is_known_of_its_program() -> None:
    """That the overlay's version stayed for want of the other one would be a decision of nobody's."""
    run = settled(ASK)
    anew = replace(ASK, process_hash="anew")
    run.spec = spec(ASK, overlay("sets", None, workload=False, sets=(anew,), duration=600.0))
    run.settle(until=overlay_state("sets", "active"))
    run.plant.obstacles = {ASK.process_hash: GONE}
    run.settle()
    assert [(i.process_hash, i.gpus) for i in run.plant.incarnations] == [(ASK.process_hash, (uuid(0),))]


def test_a_saved_plan_is_another_once_something_can_be_started() -> None:
    run = settled(ASK)
    seen = run.plant.observe()
    situation = Situation(run.spec, seen, run.ledger, run.plant.now)
    assert fingerprint(seen, situation) != fingerprint(replace(seen, obstacles={"hash": GONE}), situation)
