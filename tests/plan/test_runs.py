"""Whole runs of planner and plant: what happens from the first decision until nothing happens any more."""

from __future__ import annotations

import pytest
from builders import NOW, endpoint, gpu, incarnation, observed, overlay, spec, uuid
from msgspec.structs import replace
from plant import Behaviour, Plant, Run, overlay_state

from reconciler.plan.actions import Plan
from reconciler.plan.ledger import Ledger
from reconciler.plan.observed import Subject
from reconciler.plan.planner import plan
from reconciler.plan.requests import clean_start, reset, stopped
from reconciler.spec.spec import Restart, Stop
from reconciler.units import GIB


def settled(*items, plant: Plant | None = None, **options) -> Run:
    """A run in which everything that can be ready is."""
    run = Run(spec(*items, **options), plant or Plant())
    run.settle()
    return run


def with_overlays(run: Run, *overlays) -> Run:
    run.spec = spec(*run.spec.endpoints.values(), *overlays, floors=run.spec.floors)
    return run


def test_a_baseline_of_four_gpus_starts_once_and_then_nothing_is_left_to_do():
    run = settled(endpoint("thinking", [0, 1]), endpoint("ask", [2]), endpoint("other", 1))
    decided = run.decide()
    assert sorted(run.starts()) == ["ask", "other", "thinking"]
    assert decided.converged
    assert decided.actions == decided.changes == decided.blocked == ()
    assert decided.ledger == run.ledger


def test_an_overlay_evicts_one_endpoint_runs_its_work_and_the_endpoint_comes_back_to_its_gpu():
    run = settled(endpoint("thinking", [0, 1]), endpoint("ask", [2]), endpoint("low", [3], priority=30))
    before = run.plant.current("low")
    with_overlays(run, overlay("render"))
    run.settle(until=overlay_state("render", "active"))
    assert run.plant.current("low") is None
    assert run.plant.current("render", "workload").gpus == before.gpus
    last = run.settle()
    assert last.ledger.overlays["render"].state == "done"
    assert last.ledger.leases == ()
    assert run.stops() == ["low"]
    assert run.plant.is_ready("low")
    assert run.plant.current("low").gpus == before.gpus


def test_an_overlay_that_swaps_a_model_runs_the_other_model_until_it_ends_and_then_the_old_one():
    swapped = endpoint("thinking", [0, 1, 2, 3], model="other", port=8080)
    run = settled(endpoint("thinking", [0, 1, 2, 3], model="m", port=8080))
    with_overlays(run, overlay("open-run", None, workload=False, sets=[swapped], duration=3600.0))
    run.settle(until=overlay_state("open-run", "active"))
    run.plant.advance(60)
    run.settle(until=lambda _: run.plant.is_ready("thinking"))
    assert run.plant.current("thinking").process_hash == swapped.process_hash
    last = run.settle()
    assert last.ledger.overlays["open-run"].state == "done"
    assert run.plant.current("thinking").process_hash == run.spec.endpoints["thinking"].process_hash
    assert run.starts() == ["thinking"] * 3
    assert run.stops() == ["thinking"] * 2


def test_work_that_only_sets_an_endpoint_stopped_begins_after_that_endpoint_is_gone():
    run = settled(endpoint("coding", [0]))
    quiet = replace(run.spec.endpoints["coding"], state="stopped")
    with_overlays(run, overlay("bench", None, sets=[quiet]))
    run.settle(until=overlay_state("bench", "active"))
    ops = [(a.op, a.subject.name) for a in run.plant.history]
    assert ops.index(("stop", "coding")) < ops.index(("start_workload", "bench"))
    began = run.plant.current("bench", "workload").started
    ended = next(e for e in run.ledger.endpoints["coding"].exits)
    assert ended.at.mono <= began.mono
    run.settle()
    assert run.plant.is_ready("coding")


def test_a_higher_overlay_takes_the_place_of_preemptible_work_only_after_that_work_is_gone():
    run = settled(plant=Plant(totals=[80 * GIB]))
    with_overlays(run, overlay("idle", 1, priority=10, preemptible=True, duration=None, deadline=NOW.wall + 36000))
    run.settle(until=overlay_state("idle", "active"))
    with_overlays(run, *run.spec.overlays.values(), overlay("render", 1, priority=600))
    run.plant.behaviour = Behaviour(stop_s=200.0)  # longer than memory may take to come back
    decided = run.decide()
    stop = next(a for a in decided.actions if a.op == "stop_workload")
    start = next(a for a in decided.actions if a.op == "start_workload" and a.subject.name == "render")
    assert _follows(decided, start.id, stop.id)
    last = run.settle()
    assert last.ledger.overlays["render"].state == "done"
    assert last.ledger.overlays["idle"].state == "done"
    assert run.starts() == ["idle", "render", "idle"]


def _follows(decided: Plan, later: int, earlier: int) -> bool:
    needs = decided.actions[later - 1].needs
    return earlier in needs or any(_follows(decided, n, earlier) for n in needs)


def test_a_gang_that_lost_one_gpu_starts_again_elsewhere():
    run = settled(endpoint("pair", 2), plant=Plant(totals=[80 * GIB] * 4))
    assert run.plant.current("pair").gpus == (uuid(0), uuid(1))
    run.plant.overrides[0] = {"state": "lost"}
    run.plant.end("pair-1", 1)
    run.settle()
    assert run.plant.is_ready("pair")
    assert uuid(0) not in run.plant.current("pair").gpus


def test_a_standby_provider_stays_for_the_second_overlay_that_requires_it():
    provider = endpoint("coding", 1, capabilities=("code",), state="standby")
    run = settled(provider)
    first = overlay("first", None, requires=("code",))
    second = overlay("second", None, requires=("code",))
    with_overlays(run, first, second)
    run.plant.behaviour = Behaviour(run_s={"first": 60, "second": 600})
    run.settle(until=overlay_state("first", "done"))
    run.step()
    assert run.plant.is_ready("coding")
    last = run.settle()
    assert last.ledger.overlays["second"].state == "done"
    assert run.starts().count("coding") == 1
    assert run.plant.current("coding") is None


def test_an_edited_endpoint_keeps_its_place_before_one_that_never_had_any():
    run = settled(endpoint("runs", 1, priority=10), plant=Plant(totals=[80 * GIB]))
    edited = endpoint("runs", 1, priority=10, model="new")
    run.spec = spec(edited, endpoint("waits", 1, priority=900))
    run.settle()
    assert run.plant.current("runs").process_hash == edited.process_hash
    assert run.plant.current("waits") is None


def test_two_endpoints_may_swap_their_pins_in_one_edit():
    run = settled(endpoint("a", [0]), endpoint("b", [1]))
    run.spec = spec(endpoint("a", [1]), endpoint("b", [0]))
    run.settle()
    assert run.plant.current("a").gpus == (uuid(1),)
    assert run.plant.current("b").gpus == (uuid(0),)
    assert run.plant.is_ready("a")
    assert run.plant.is_ready("b")


def test_memory_that_a_vanished_process_keeps_quarantines_its_gpu():
    run = settled(endpoint("a", 1), plant=Plant(totals=[80 * GIB] * 2))
    run.plant.end("a-1", 1)
    run.plant.frees_at["a-1"] = float("inf")
    gone = {"phase": "vanished", "exit_code": None, "exited": None}
    run.plant._change("a-1", lambda i: replace(i, **gone))
    run.settle(until=lambda p: bool(p.ledger.quarantines))
    assert list(run.ledger.quarantines) == [uuid(0)]
    run.settle(until=lambda _: run.plant.is_ready("a"))
    assert run.plant.current("a").gpus == (uuid(1),)


def test_memory_of_what_a_leader_left_behind_has_its_time_to_come_back_once_the_last_of_it_is_gone():
    """A leader that ended while no daemon ran: its engine held the GPU for an hour until the next one ended it."""
    pinned = endpoint("a", [0])
    ended = {"phase": "exited", "pid": None, "exit_code": -9, "exited": NOW.plus(-3600)}
    held = {"used": 70 * GIB, "processes": ()}

    def decided(**fields):
        before = incarnation(pinned, [0], **ended, **fields)
        return plan(spec(pinned), observed(gpu(0, **held), incarnations=[before]), Ledger(boot_id="boot"), NOW)

    assert not decided(lived_until=NOW.plus(-1)).ledger.quarantines
    shut = decided(lived_until=None)
    assert [q.reason for q in shut.ledger.quarantines.values()] == ["memory of a not returned 60 s after it ended"]
    (blocked,) = [b for b in shut.blocked if b.subject.name == "a"]
    assert (blocked.reason, blocked.message) == (
        "Quarantined",
        "GPU 0 cannot be used: memory of a not returned 60 s after it ended",
    )


def test_a_killed_process_that_lives_on_quarantines_its_gpu_and_holds_up_nobody_else():
    run = settled(endpoint("a", [0]), plant=Plant(totals=[80 * GIB] * 2))
    run.plant.behaviour.stop_s = 1e6
    run.spec = spec(endpoint("a", [0], state="stopped"), endpoint("b", [1]), endpoint("c", [0]))
    run.settle(until=lambda _: run.plant.is_ready("b"))
    run.plant._change("a-1", lambda i: replace(i, undying_since=run.plant.now))
    assert not run.decide().ledger.quarantines, "most who take a while end within the minute"
    run.plant.advance(59)
    assert not run.decide().ledger.quarantines
    run.plant.advance(1)
    decided, _ = run.step()
    assert list(decided.ledger.quarantines) == [uuid(0)]
    assert decided.ledger.quarantines[uuid(0)].reason == "a does not end, 60 s after it was killed"
    assert decided.endpoints["a"].reason == "it was killed and does not end: the kernel waits for something"
    assert run.plant.is_ready("b")
    blocked = {b.subject.name: b.reason for b in run.decide().blocked}
    assert blocked["c"] == "Quarantined"
    run.ledger, _ = reset(run.ledger, uuid(0), {uuid(0): uuid(0)})
    assert list(run.step()[0].ledger.quarantines) == [uuid(0)], "a reset changes nothing while it lives"
    run.plant.end("a-1", -9)
    run.settle()
    assert run.plant.current("c") is None
    run.ledger, _ = reset(run.ledger, uuid(0), {uuid(0): uuid(0)})
    run.settle()
    assert run.plant.is_ready("c")
    assert run.plant.current("c").gpus == (uuid(0),)


def test_ready_for_long_enough_ends_a_row_of_failures():
    run = settled(endpoint("a", 1, restart=Restart(reset_after_s=600)))
    run.plant.end("a-1", 1)
    run.settle()
    assert run.ledger.endpoints["a"].streak == 1
    run.plant.advance(601)
    assert run.decide().ledger.endpoints["a"].streak == 0
    assert run.decide().budgets == ()


def test_the_objective_counts_the_victims_of_this_decision_alone():
    run = settled(endpoint("a", 1, priority=1), plant=Plant(totals=[80 * GIB]))
    with_overlays(run, overlay("render"))
    assert run.decide().objective["victims"] == 1
    run.settle(until=overlay_state("render", "active"))
    assert run.decide().objective["victims"] == 0


def test_an_edit_is_one_change_and_not_two():
    run = settled(endpoint("a", 1))
    run.spec = spec(endpoint("a", 1, model="new"))
    decided = run.decide()
    assert [(c.symbol, str(c.subject)) for c in decided.changes] == [("~", "a")]
    assert [a.op for a in decided.actions] == ["drain", "stop", "wait_memory", "start", "wait_ready"]
    assert decided.changes[0].actions == (1, 2, 3, 4, 5)


def test_an_endpoint_that_crashes_again_and_again_is_given_up_and_says_so_until_it_is_edited():
    restart = Restart(max_restarts=3)
    run = Run(
        spec(endpoint("bad", 1, restart=restart)), Plant(behaviour=Behaviour(crashes=frozenset({"bad"}), load_s=5))
    )
    last = run.settle()
    assert run.starts() == ["bad"] * 4
    assert last.converged
    assert last.endpoints["bad"].state == "failed"
    run.plant.behaviour = Behaviour()
    run.spec = spec(endpoint("bad", 1, restart=restart, model="better"))
    run.settle()
    assert run.plant.is_ready("bad")


@pytest.mark.parametrize(("code", "outcome"), [(0, "done"), (3, "failed")])
def test_whatever_the_work_ends_with_its_victim_comes_back(code, outcome):
    run = settled(endpoint("a", 1, priority=1), plant=Plant(totals=[80 * GIB]))
    run.plant.behaviour = Behaviour(exit_codes={"render": (code,)})
    with_overlays(run, overlay("render"))
    last = run.settle()
    assert last.ledger.overlays["render"].state == outcome
    assert last.ledger.overlays["render"].exit_code == code
    assert run.plant.is_ready("a")


def test_work_that_could_not_be_run_says_why():
    run = settled(plant=Plant(totals=[80 * GIB]))
    run.plant.behaviour = Behaviour(default_run_s=100.0)
    with_overlays(run, overlay("render"))
    run.settle(until=overlay_state("render", "active"))
    work, said = run.plant.current("render", "workload"), "no-such: no such program on PATH"
    run.plant.end(work.id, 127)
    run.plant._change(work.id, lambda i: replace(i, failure=said))
    assert run.settle().ledger.overlays["render"].reason == f"the workload failed: exit code 127 ({said})"


def test_work_that_failed_is_tried_again_as_often_as_it_may_be():
    run = settled(plant=Plant(totals=[80 * GIB]))
    run.plant.behaviour = Behaviour(exit_codes={"render": (1, 1, 0)})
    with_overlays(run, overlay("render", retries=2))
    last = run.settle()
    assert run.starts() == ["render"] * 3
    assert last.ledger.overlays["render"].state == "done"


def test_a_start_that_was_cut_short_is_made_again_and_is_no_try():
    run = settled(plant=Plant(totals=[80 * GIB]))
    run.plant.behaviour = Behaviour(exit_codes={"render": (1, 1, 1, 0)}, unstarted={"render": 2})
    with_overlays(run, overlay("render", retries=1))
    last = run.settle()
    assert run.starts() == ["render"] * 4  # two that came to nothing, one that failed, one that went well
    assert len(run.plant.begun) == 2
    assert last.ledger.overlays["render"].state == "done"


def test_work_whose_every_start_is_cut_short_is_given_up_and_its_victim_comes_back():
    run = settled(endpoint("a", 1, priority=1), plant=Plant(totals=[80 * GIB]))
    run.plant.behaviour = Behaviour(unstarted={"render": 1000})
    with_overlays(run, overlay("render"))
    last = run.settle()
    assert run.starts() == ["a", *["render"] * 4, "a"]
    assert last.ledger.overlays["render"].state == "failed"
    assert run.plant.is_ready("a")


def test_a_removed_file_ends_the_work_and_brings_the_victim_back():
    run = settled(endpoint("a", 1, priority=1), plant=Plant(totals=[80 * GIB]))
    with_overlays(run, overlay("render"))
    run.settle(until=overlay_state("render", "active"))
    with_overlays(run)
    last = run.settle()
    assert last.ledger.overlays["render"].state == "cancelled"
    assert run.stops() == ["a", "render"]
    assert run.plant.is_ready("a")


def test_overlays_back_to_back_restore_nothing_in_between():
    run = settled(endpoint("a", 1, priority=1), plant=Plant(totals=[80 * GIB]))
    with_overlays(run, overlay("first", priority=700), overlay("second", priority=600))
    run.settle()
    assert run.starts() == ["a", "first", "second", "a"]
    assert run.stops() == ["a"]


def test_work_past_its_makespan_goes_on_or_is_stopped_as_its_file_says():
    for policy, outcome in (("continue", "done"), ("stop", "failed")):
        run = settled(plant=Plant(totals=[80 * GIB]))
        run.plant.behaviour = Behaviour(default_run_s=3000)
        with_overlays(run, overlay("render", duration=600.0, grace=60.0, on_overrun=policy))
        seen = set()
        run.watch = lambda _run, p, seen=seen: seen.add(p.ledger.overlays["render"].state)
        last = run.settle()
        assert last.ledger.overlays["render"].state == outcome
        assert ("overrun" in seen) == (policy == "continue")


def test_a_deadline_is_hard():
    run = settled(plant=Plant(totals=[80 * GIB]))
    run.plant.behaviour = Behaviour(default_run_s=30_000)
    with_overlays(run, overlay("render", deadline=NOW.wall + 1000))
    last = run.settle()
    assert last.ledger.overlays["render"].state == "failed"
    assert run.plant.now.wall < NOW.wall + 1010


def test_a_counted_endpoint_moves_out_of_the_way_of_a_pin_when_there_is_another_gpu():
    run = settled(endpoint("a", 1, priority=1), plant=Plant(totals=[80 * GIB] * 2))
    assert run.plant.current("a").gpus == (uuid(0),)
    with_overlays(run, overlay("render", [0]))
    run.settle(until=lambda p: p.ledger.overlays["render"].state == "active" and run.plant.is_ready("a"))
    assert run.plant.current("a").gpus == (uuid(1),)
    run.settle()
    assert run.starts().count("a") == 2


def test_a_reservation_holds_its_gpu_for_its_duration_and_runs_nothing():
    run = settled(endpoint("a", 1, priority=1), plant=Plant(totals=[80 * GIB]))
    with_overlays(run, overlay("guest", workload=False, duration=600.0))
    run.settle(until=overlay_state("guest", "active"))
    began = run.plant.now
    assert run.plant.incarnations == []
    last = run.settle(until=lambda p: p.ledger.overlays["guest"].state not in ("active", "overrun"))
    assert last.now.since(began) == pytest.approx(600, abs=1)
    run.settle()
    assert run.plant.is_ready("a")


def test_an_unreadable_gpu_is_left_alone_until_it_can_be_read_again():
    run = settled(endpoint("a", [0], priority=1), plant=Plant(totals=[80 * GIB]))
    run.plant.overrides[0] = {"state": "unknown"}
    with_overlays(run, overlay("render"))
    decided = run.decide()
    assert [a for a in decided.actions if a.ready] == []
    assert decided.endpoints["a"].state == "healthy"
    run.settle(until=lambda p: not p.actions)
    run.plant.overrides.clear()
    last = run.settle()
    assert last.ledger.overlays["render"].state == "done"


def test_two_incarnations_of_one_endpoint_end_with_the_older_one_alone():
    run = settled(endpoint("a", 1))
    first = run.plant.current("a")
    run.plant.incarnations.append(replace(first, id="a-9", gpus=(uuid(3),), started=first.started.plus(5), pid=77))
    run.plant.ready_at["a-9"] = 0.0
    run.settle()
    assert [i.id for i in run.plant.incarnations] == [first.id]


def test_a_stop_under_way_is_seen_through_and_asked_for_once():
    run = settled(endpoint("a", 1, stop=Stop(drain_s=0)))
    run.spec = spec()
    run.step()
    run.spec = spec(endpoint("a", 1, stop=Stop(drain_s=0)))
    run.settle()
    assert run.stops() == ["a"]
    assert run.starts() == ["a", "a"]


def test_work_of_an_overlay_nobody_knows_is_ended():
    run = settled()
    with_overlays(run, overlay("render"))
    run.settle(until=overlay_state("render", "active"))
    run.spec = spec()
    run.ledger = replace(run.ledger, overlays={}, leases=())
    run.settle()
    assert run.plant.incarnations == []
    assert Subject("workload", "render") not in {i.subject for i in run.plant.incarnations}


def test_a_workload_whose_record_was_lost_keeps_its_gpu_and_is_not_started_again():
    run = settled(endpoint("low", [0], priority=30))
    with_overlays(run, overlay("render", gpus=[0]))
    run.settle(until=overlay_state("render", "active"))
    job = run.plant.current("render", "workload")
    began = run.ledger.overlays["render"].active_since
    run.plant.advance(100)
    run.ledger = Ledger()
    decided = run.decide()
    record = decided.ledger.overlays["render"]
    assert (record.state, record.since, record.active_since) == ("active", run.plant.now, job.started)
    assert (record.gpus, record.attempt, record.window_start) == (job.gpus, job.attempt, job.started.wall)
    assert record.reason == "adopted: its workload runs, and no record of it was left"
    assert abs(job.started.since(began)) < 1, "its time is not counted anew"
    assert [x.gpu for x in decided.ledger.leases] == list(job.gpus)
    assert not [a for a in decided.actions if a.ready and a.op in ("start", "start_workload")]
    run.settle()
    assert run.starts().count("render") == 1
    assert run.plant.is_ready("low")


def test_a_file_removed_and_dropped_again_unchanged_is_a_new_run():
    run = settled(endpoint("low", [0]), plant=Plant(totals=[80 * GIB]))
    with_overlays(run, overlay("render"))
    run.settle(until=overlay_state("render", "active"))
    with_overlays(run)
    assert run.settle().ledger.overlays["render"].state == "cancelled"
    run.plant.advance(1000)
    with_overlays(run, overlay("render"))
    assert run.settle().ledger.overlays["render"].state == "done"
    assert run.starts().count("render") == 2


def test_a_file_dropped_again_while_its_removal_is_still_carried_out_runs_afterwards():
    run = settled(endpoint("low", [0]), plant=Plant(totals=[80 * GIB]))
    with_overlays(run, overlay("render"))
    run.settle(until=overlay_state("render", "active"))
    with_overlays(run)
    run.step()
    with_overlays(run, overlay("render"))
    run.settle()
    run.plant.advance(1000)  # past the cool-down of `low`
    run.settle()
    assert run.starts().count("render") == 2


def test_work_that_replaces_other_work_takes_its_place_without_a_restoration_in_between():
    run = settled(endpoint("low", [0]), plant=Plant(totals=[80 * GIB]))
    with_overlays(run, overlay("render"))
    run.settle(until=overlay_state("render", "active"))
    with_overlays(run, replace(overlay("render"), placement_hash="other", on_edit="replace"))
    assert run.settle().ledger.overlays["render"].state == "done"
    assert run.starts().count("render") == 2
    assert run.starts().count("low") == 2
    assert run.stops().count("low") == 1


def test_a_clean_start_does_not_wait_for_an_endpoint_that_gives_way_to_an_overlay():
    run = settled(endpoint("low", [0], priority=1), endpoint("other", [1]), plant=Plant(totals=[80 * GIB] * 2))
    with_overlays(run, overlay("render", [0]))
    run.settle(until=overlay_state("render", "active"))
    run.ledger, _ = clean_start(run.ledger, ["low", "other"], run.plant.now)
    while not run.plant.is_ready("other") or run.starts().count("other") < 2:
        run.step()
        run.plant.advance(1)
    run.step()
    assert run.ledger.overlays["render"].state == "active"
    assert run.ledger.endpoints["low"].renew_before is None
    assert run.ledger.endpoints["other"].renew_before is None


def test_an_overlay_whose_temporary_endpoint_has_no_free_port_displaces_nobody():
    run = settled(endpoint("a", [0], priority=30, port=8080), endpoint("b", [1], priority=40, port=8081))
    guest = endpoint("guest", 1, port=9000)
    other = endpoint("other", 1, port=9000)
    with_overlays(run, overlay("first", None, workload=False, sets=[guest], duration=3600.0))
    run.settle(until=lambda _: run.plant.is_ready("guest"))
    stops = run.stops()
    with_overlays(
        run,
        *run.spec.overlays.values(),
        overlay("second", None, workload=False, sets=[other], duration=3600.0),
    )
    decided = run.decide()
    blocked = {b.subject.name: b for b in decided.blocked}
    assert blocked["second"].reason == "PortInUse"
    assert "guest" in blocked["second"].message
    assert run.stops() == stops


def test_a_job_that_follows_another_takes_its_place_rather_than_a_more_important_endpoints():
    plant = Plant(totals=[80 * GIB] * 2)
    run = settled(endpoint("low", [0], priority=30), endpoint("mid", [1], priority=300), plant=plant)
    with_overlays(run, overlay("first"))
    run.settle(until=overlay_state("first", "active"))
    run.spec = spec(*run.spec.endpoints.values(), overlay("second", duration=60.0))  # the first one's file is removed
    last = run.settle()
    assert last.ledger.overlays["second"].state == "done"
    assert "mid" not in run.stops()
    assert run.plant.is_ready("low")
    assert run.plant.is_ready("mid")


@pytest.mark.parametrize("days", [0, 2])
def test_down_ends_what_lives_and_afterwards_runs_again_but_for_what_was_over_before(days):
    live = overlay("live", [0], duration=30 * 86400.0)
    run = settled(endpoint("ask", [1]), overlay("over", [2], duration=600.0))
    with_overlays(run, overlay("over", [2], duration=600.0))
    run.settle()
    whole = spec(*run.spec.endpoints.values(), overlay("over", [2], duration=600.0), live, overlay("waits", 9))
    run.plant.behaviour = Behaviour(run_s={"live": 30 * 86400.0})
    run.plant.advance(days * 86400.0)
    run.spec = whole
    run.settle(until=overlay_state("live", "active"))
    begun = len(run.plant.begun)
    run.spec = stopped(whole, ("ask",))
    run.settle()
    records = run.ledger.overlays
    assert {n: r.state for n, r in records.items()} == {"over": "done", "live": "cancelled", "waits": "cancelled"}
    assert records["live"].reason == "everything is to be stopped"
    assert not [i for i in run.plant.incarnations if i.alive]
    run.spec = whole
    run.settle(until=overlay_state("live", "active"))
    assert {n: r.state for n, r in run.ledger.overlays.items()} == {
        "over": "done",
        "live": "active",
        "waits": "pending",
    }
    assert len(run.plant.begun) == begun + 1


def test_down_in_the_moment_when_a_job_ends_does_not_have_it_run_again():
    run = settled(endpoint("ask", [1]))
    with_overlays(run, overlay("job", [0]))
    whole = run.spec
    run.settle(until=overlay_state("job", "completing"))
    run.spec = stopped(whole, ("ask",))
    run.settle()
    run.spec = whole
    run.settle()
    assert run.ledger.overlays["job"].state == "done"
    assert len(run.plant.begun) == 1


def test_the_file_of_work_that_is_being_displaced_may_be_removed() -> None:
    run = settled(endpoint("ask", [1]))
    rough, final = overlay("rough", [0], priority=100, preemptible=True), overlay("final", [0], priority=600)
    with_overlays(run, rough)
    run.settle(until=overlay_state("rough", "active"))
    with_overlays(run, rough, final)
    run.settle(until=overlay_state("rough", "completing"))
    with_overlays(run, final)
    last = run.settle(until=overlay_state("final", "active"))
    assert last.ledger.overlays["rough"].state == "cancelled"
    assert last.ledger.overlays["rough"].reason == "its file was removed"
