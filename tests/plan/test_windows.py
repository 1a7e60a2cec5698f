"""Windows to come: what is kept for them, when room is made, and who is told what."""

from __future__ import annotations

import time
from itertools import pairwise
from math import inf
from typing import Any

import pytest
from accounting import settled
from builders import NOW, endpoint, incarnation, observed, overlay, spec, uuid
from builders import gpu as gpu_of
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace
from plant import Plant, Run, overlay_state
from worlds import examples

from reconciler.plan.actions import Blocked, Plan
from reconciler.plan.admission import admit_all
from reconciler.plan.agenda import SLACK_FACTOR, SLACK_S
from reconciler.plan.draft import Draft
from reconciler.plan.ledger import Lease, Ledger, OverlayState, Timings
from reconciler.plan.observed import Incarnation, PortHolder, Subject
from reconciler.plan.overlays import MEMORY_RETURN_S, WORKLOAD_STOP_S, OverlayStep, open_record
from reconciler.plan.planner import plan
from reconciler.plan.reservations import moment
from reconciler.plan.windows import KILL_S, departure_s, hard_end, lead_s, surely_over
from reconciler.spec.spec import OverlaySpec, Stop, WholeGpu

HOUR = 3600.0


def blocked(decided: Plan, name: str) -> Blocked | None:
    """What is said of a waiting overlay or endpoint."""
    return next((b for b in decided.blocked if b.subject.name == name), None)


def begun(run: Run, name: str) -> float | None:
    """Seconds after NOW at which the work of an overlay was started."""
    record = run.ledger.overlays[name]
    return None if record.active_since is None else record.active_since.wall - NOW.wall


def test_the_gpu_is_free_and_the_work_begins_at_the_start_not_later_and_not_earlier() -> None:
    ask = endpoint("ask", 1, priority=40)
    run = settled(ask)
    start = NOW.wall + 2 * HOUR
    run.spec = spec(ask, overlay("night", 1, start=start))
    run.settle(until=overlay_state("night", "evicting"))
    early = start - run.plant.now.wall
    times = run.decide().ledger.overlays["night"]
    assert times.state == "evicting"
    assert 0 < early < 60, "room is made shortly before the start"
    run.settle(until=overlay_state("night", "active"))
    assert begun(run, "night") == 2 * HOUR


def test_room_is_made_in_time_for_the_memory_to_be_back_as_late_as_it_was_measured_to_be() -> None:
    ask = endpoint("ask", 1, priority=40)
    night = overlay("night", 1, start=NOW.wall + HOUR)
    for memory_s, lead in ((None, 3.5), (4.0, 6.0)):
        learnt = {"ask": Timings(load_s=40.0, drain_s=0.0, stop_s=2.0, memory_s=memory_s)}
        seen = observed(gpu_of(0), incarnations=[incarnation(ask, [0])])
        wake = plan(spec(ask, night), seen, Ledger(timings=learnt), NOW).next_wake
        assert wake is not None
        assert NOW.wall + HOUR - wake.wall == lead


def test_work_without_a_hard_end_does_not_begin_in_front_of_a_window_and_is_told_its_next_slot() -> None:
    night = overlay("night", 1, start=NOW.wall + HOUR, duration=600, priority=600)
    work = overlay("work", 1, duration=600, priority=500)
    decided = plan(spec(night, work), observed(gpu_of(0)), Ledger(), NOW)
    said = blocked(decided, "work")
    assert said is not None
    assert said.reason == "WindowTaken"
    assert "night (2026-11-23 22:00:00Z to 2026-11-23 22:10:01Z)" in said.message
    assert said.earliest_start == NOW.wall + HOUR + 600 + 1.5
    assert not decided.actions


def test_work_whose_hard_end_comes_before_the_window_begins_in_front_of_it() -> None:
    night = overlay("night", 1, start=NOW.wall + HOUR, priority=600)
    work = overlay("work", 1, duration=1200, priority=500, deadline=NOW.wall + 0.9 * HOUR)
    decided = plan(spec(night, work), observed(gpu_of(0)), Ledger(), NOW)
    assert decided.ledger.overlays["work"].state == "starting"
    late = overlay("work", 1, duration=1200, priority=500, deadline=NOW.wall + HOUR)
    decided = plan(spec(night, late), observed(gpu_of(0)), Ledger(), NOW)
    assert decided.ledger.overlays["work"].state == "pending", "its stop may need the grace, beyond the start"


def test_work_goes_beside_a_window_where_there_is_room_for_both() -> None:
    night = overlay("night", 1, start=NOW.wall + HOUR, memory=40, priority=600)
    work = overlay("work", 1, memory=30, priority=500)
    decided = plan(spec(night, work), observed(gpu_of(0)), Ledger(), NOW)
    assert decided.ledger.overlays["work"].state == "starting"
    large = overlay("work", 1, memory=50, priority=500)
    decided = plan(spec(night, large), observed(gpu_of(0)), Ledger(), NOW)
    assert decided.ledger.overlays["work"].state == "pending"


def test_more_important_work_takes_the_place_of_a_window_which_is_told_at_once() -> None:
    night = overlay("night", 1, start=NOW.wall + 300, priority=500)
    work = overlay("work", 1, priority=600, duration=900)
    run = Run(spec(night, work), Plant(totals=[80 << 30]))
    run.settle(until=overlay_state("work", "active"))
    said = blocked(run.decide(), "night")
    assert said is not None
    assert said.reason == "PriorityTooLow"
    assert "its window at 2026-11-23 21:05:00Z" in said.message


def test_of_two_windows_for_one_place_the_one_seen_first_keeps_it_and_the_other_hears_of_it() -> None:
    first = overlay("zebra", 1, start=NOW.wall + 2 * HOUR, duration=HOUR)
    second = overlay("ant", 1, start=NOW.wall + 2.5 * HOUR, duration=HOUR)
    run = Run(spec(first), Plant(totals=[80 << 30]))
    run.step()
    run.plant.advance(1)
    run.spec = spec(first, second)
    decided = run.decide()
    said = blocked(decided, "ant")
    assert said is not None
    assert said.reason == "WindowTaken"
    assert said.earliest_start == NOW.wall + 3 * HOUR + 1.5
    assert blocked(decided, "zebra").reason == "NotYet"  # type: ignore[union-attr]


def test_an_endpoint_is_not_brought_back_for_less_than_twice_its_load_time() -> None:
    ask = endpoint("ask", 1, priority=40)
    run = settled(ask)
    began = run.plant.now.wall
    work = overlay("work", 1, priority=600, duration=300)
    night = overlay("night", 1, priority=600, start=began + 500, duration=300)
    run.plant.behaviour.default_run_s = 400
    run.spec = spec(ask, bounded(work, began + 430), night)
    run.settle(until=overlay_state("work", "done"))
    words = "night would displace it again before it had been ready as long as it takes to load"
    end = began + 500 + 300 + MEMORY_RETURN_S
    held = Blocked(Subject("endpoint", "ask"), "Held", words, (), end, transient=True)
    assert blocked(run.decide(), "ask") == held
    times = run.situation().timings(ask)
    until = end + SLACK_FACTOR * (times.drain_s + times.stop_s + times.load_s) + SLACK_S
    (entry,) = run.ledger.agenda
    assert (entry.reason, entry.overlay, entry.until) == ("gives way to night", "night", until)
    assert entry.start == run.ledger.overlays["work"].since.wall, "from when it had been over"
    run.plant.advance(5.0)
    assert run.decide().ledger.agenda == (entry,)
    later = overlay("later", 1, priority=600, start=began + 550, duration=100, memory=20)
    small = overlay("night", 1, priority=600, start=began + 500, duration=300, memory=20)
    run.spec = spec(ask, bounded(work, began + 430), small, later)
    said = blocked(run.decide(), "ask")
    assert said == replace(held, message=f"later, {words}"), "the one that is over last"
    run.spec = spec(ask, bounded(work, began + 430), night)
    run.settle(until=overlay_state("night", "active"))
    assert run.starts().count("ask") == 1, "it was started for a moment only"
    run.settle()
    assert run.plant.is_ready("ask")


def test_work_that_has_no_place_even_without_the_windows_is_told_what_it_lacks_beside_them() -> None:
    ask = endpoint("ask", 1, priority=40)
    run = settled(ask)
    night = overlay("night", 1, start=NOW.wall + 2 * HOUR, priority=600)
    polite = overlay("polite", 1, priority=100, evict=False)
    later = overlay("later", 1, priority=100, evict=False, start=NOW.wall + 2 * HOUR)
    run.spec = spec(ask, night)
    run.step()
    run.spec = spec(ask, night, polite, later)
    decided = run.decide()
    for name in ("polite", "later"):
        said = blocked(decided, name)
        assert said is not None
        assert said.reason == "NoConsent"


def test_a_window_that_outlasts_a_cool_down_is_what_is_told() -> None:
    ask = endpoint("ask", 1, priority=40)
    run = settled(ask)
    run.spec = spec(ask, overlay("one", 1, duration=60))
    run.settle(until=overlay_state("one", "done"))
    night = overlay("night", 1, priority=600, start=run.plant.now.wall + HOUR)
    endless, brief = overlay("endless", 1, duration=60), bounded(overlay("brief", 1, duration=60), NOW.wall + 900)
    run.spec = spec(ask, night, endless)
    waits, told = blocked(run.decide(), "endless"), "to wait for the cool-down would not help"
    assert waits is not None
    assert waits.reason == "WindowTaken", told
    run.spec = spec(ask, night, brief)
    waits = blocked(run.decide(), "brief")
    assert waits is not None
    assert waits.reason == "CoolDown"
    assert waits.message == "ask has been ready for less than 2m since it was last evicted"


def test_who_gave_way_does_not_go_where_a_window_to_come_could_not_displace_it() -> None:
    gang = endpoint("gang", 2, priority=40)
    run = settled(gang, gpus=3)
    home = run.plant.incarnations[0].gpus
    (free,) = {uuid(0), uuid(1), uuid(2)} - set(home)
    night = overlay("night", [int(free[-1])], priority=800, evict=False, start=run.plant.now.wall + HOUR)
    render = overlay("render", 1, duration=60)
    run.spec = spec(gang, night, render)
    run.settle(until=overlay_state("render", "done"))
    assert [i.gpus for i in run.plant.incarnations] == [home]
    decided = run.settle(until=overlay_state("night", "active"))
    assert decided.ledger.overlays["night"].window_start == decided.ledger.overlays["night"].active_since.wall  # type: ignore[union-attr]
    assert run.plant.is_ready("gang")


def bounded(item: OverlaySpec, deadline: float) -> OverlaySpec:
    """The same overlay with a hard end."""
    return replace(item, makespan=replace(item.makespan, deadline=deadline))


def test_the_end_of_a_cool_down_wakes_the_planner() -> None:
    ask = endpoint("ask", 1, priority=40)
    run = settled(ask)
    run.spec = spec(ask, overlay("one", 1, duration=60))
    run.settle(until=overlay_state("one", "done"))
    run.spec = spec(ask, overlay("two", 1, duration=60))
    decided = run.decide()
    assert blocked(decided, "two").reason == "CoolDown"  # type: ignore[union-attr]
    ready_since = decided.ledger.endpoints["ask"].ready_since
    assert decided.next_wake is not None
    assert ready_since is not None
    assert decided.next_wake.mono == ready_since.mono + 120
    run.settle(until=overlay_state("two", "active"))


def begun_late(run: Run, name: str, start: float) -> float:
    """Seconds after its start at which an overlay's work began."""
    run.settle(until=overlay_state(name, "active"))
    since = run.ledger.overlays[name].active_since
    assert since is not None
    return since.wall - start


def test_an_endpoint_is_not_brought_back_to_cool_down_into_a_window() -> None:
    """It would be ready for 75 s by the time at which it has to leave, and it has to have been for 120 s."""
    ask = endpoint("ask", 1, priority=40)
    run = settled(ask)
    night = overlay("night", 1, start=NOW.wall + 2000)
    before = overlay("before", 1, start=NOW.wall + 1700, duration=100, on_overrun="stop")
    run.plant.behaviour.run_s = {"before": 9000.0}
    run.spec = spec(ask, night)
    run.step()
    run.spec = spec(ask, night, before)
    assert begun_late(run, "night", NOW.wall + 2000) == 0.0
    assert run.starts() == ["ask", "before", "night"]


def test_the_evictions_that_a_window_will_need_are_not_spent_before_it() -> None:
    ask = endpoint("ask", 1, priority=40)
    run = settled(ask)
    night = overlay("night", 1, start=NOW.wall + 2400)
    early = [
        overlay(f"r{i}", 1, start=NOW.wall + 200 + 600 * i, duration=50, deadline=NOW.wall + 270 + 600 * i)
        for i in range(3)
    ]
    run.plant.behaviour.default_run_s = 40.0
    run.spec = spec(ask, night)
    run.step()
    run.spec = spec(ask, night, *early)
    decided = run.decide()
    assert decided.ledger.overlays["night"].state == "pending"
    said = blocked(decided, "r2")
    assert said is not None
    assert said.reason == "NoEvictionLeft"
    assert "ask could then not give way to night within the hour" in said.message
    assert begun_late(run, "night", NOW.wall + 2400) == 0.0
    assert [n for n in run.starts() if n != "ask"] == ["r0", "r1", "night"]


def test_work_does_not_take_the_provider_that_a_window_will_leave() -> None:
    """Both offer what has to be ready once. The window is to have the one, so nobody below it gets the other."""
    one, two = (endpoint(f"e{i}", [i], priority=40, capabilities=("chat",)) for i in range(2))
    run = Run(spec(one, two, floors={"chat": 1}), Plant(totals=[80 << 30] * 2))
    run.settle()
    night = overlay("night", [0], start=NOW.wall + 600)
    work = overlay("work", [1], priority=500)
    run.spec = spec(one, two, night, floors={"chat": 1})
    run.step()
    run.spec = spec(one, two, night, work, floors={"chat": 1})
    said = blocked(run.decide(), "work")
    assert said is not None
    assert said.reason == "FloorWouldBreak"
    assert begun_late(run, "night", NOW.wall + 600) == 0.0


def test_what_fits_beside_a_window_one_by_one_does_not_begin_together() -> None:
    run = Run(spec(), Plant(totals=[80 << 30]))
    night = overlay("night", 1, memory=40, start=NOW.wall + 600)
    pair = [overlay(f"r{i}", 1, memory=20, priority=500) for i in range(2)]
    run.spec = spec(night)
    run.step()
    run.spec = spec(night, *pair)
    run.plant.behaviour.run_s = {"r0": 9000.0, "r1": 9000.0}
    decided = run.decide()
    assert [r.state for n, r in decided.ledger.overlays.items() if n != "night"] == ["starting", "pending"]
    assert blocked(decided, "r1").reason == "WindowTaken"  # type: ignore[union-attr]
    assert begun_late(run, "night", NOW.wall + 600) == 0.0


def test_a_window_keeps_a_place_that_is_free_whatever_runs_longer_than_it_said() -> None:
    """GPU 1 is foreseen to be free by then, for nothing; but only what runs on GPU 0 has to be gone by then."""
    ask = endpoint("ask", [0], priority=40)
    run = Run(spec(ask), Plant(totals=[80 << 30] * 2))
    run.settle()
    long = overlay("long", [1], priority=500, duration=300)
    run.plant.behaviour.run_s = {"long": 9000.0}
    run.spec = spec(ask, long)
    run.settle(until=overlay_state("long", "active"))
    start = run.plant.now.wall + 900
    night = overlay("night", 1, start=start)
    run.spec = spec(ask, long, night)
    run.step()
    other = overlay("other", [0], priority=500)
    run.plant.behaviour.run_s["other"] = 9000.0
    run.spec = spec(ask, long, night, other)
    assert blocked(run.decide(), "other").reason == "WindowTaken"  # type: ignore[union-attr]
    assert begun_late(run, "night", start) == 0.0


def test_while_a_schedule_is_busy_its_next_window_is_kept_and_those_of_a_day_are_told_of() -> None:
    hourly = overlay("hourly", 1, duration=600)
    hourly = replace(hourly, makespan=replace(hourly.makespan, schedule="0 * * * *", timezone="UTC"))
    run = Run(spec(hourly), Plant(totals=[80 << 30]))
    run.plant.behaviour.default_run_s = 500.0
    run.settle(until=overlay_state("hourly", "active"))
    patient = overlay("patient", 1, duration=600)
    late = overlay("late", 1, start=NOW.wall + 5.1 * HOUR, duration=600)
    run.spec = spec(hourly, patient, late)
    said = blocked(run.decide(), "late")
    assert said is not None
    assert said.reason == "WindowTaken"
    assert "hourly (2026-11-24 02:00:00Z to 2026-11-24 02:10:01Z, and 20 more)" in said.message
    assert said.transient, "the time alone mends it"
    draft = Draft.of(run.situation())
    admit_all(draft)
    kept = [w for w in draft.windows if w.name == "hourly"]
    assert len(kept) > 20
    assert kept[0].start > run.plant.now.wall, "the one that it is busy with is kept by nobody"
    for one, other in pairwise(kept):
        assert {other.opens - one.opens, other.start - one.start, other.end - one.end} == {HOUR}
    run.settle(until=lambda decided: decided.now.wall >= NOW.wall + 2 * HOUR)
    assert run.plant.begun == [NOW.wall + HOUR, NOW.wall + 2 * HOUR], "the patient one got in between"


def test_a_window_is_kept_however_an_overlay_before_it_in_the_alphabet_ends_whose_file_is_gone() -> None:
    gone, night = overlay("a-gone", [0], duration=900), overlay("night", [0], start=NOW.wall + HOUR, duration=600)
    run = Run(spec(gone), Plant(totals=[80 << 30]))
    run.settle(until=overlay_state("a-gone", "active"))
    run.spec = spec(night)
    assert run.decide().ledger.overlays["a-gone"].state == "completing"
    draft = Draft.of(run.situation())
    admit_all(draft)
    (kept,) = draft.windows
    assert (kept.name, kept.start) == ("night", NOW.wall + HOUR)


def test_moments_are_told_in_utc_wherever_the_box_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert moment(NOW.wall) == "2026-11-23 21:00:00Z"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_those_that_leave_side_by_side_are_asked_as_early_as_the_slowest_of_them_needs() -> None:
    quick, slow = endpoint("quick", [0], memory=20), endpoint("slow", [0], memory=20)
    idle = endpoint("idle", [0], memory=20, state="stopped")
    aux = overlay("sets", None, workload=False, sets=[endpoint("aux", [1])])
    other = overlay("other", [0], memory=10, evict=False)
    run = settled(quick, slow, idle, gpus=2)
    run.spec = spec(quick, slow, idle, aux, other)
    run.settle(until=lambda p: run.plant.is_ready("aux") and p.ledger.overlays["other"].state == "active")
    stops = {"quick": 1.0, "slow": 20.0, "aux": 30.0, "idle": 40.0}
    run.ledger = replace(run.ledger, timings={name: Timings(60.0, 0.0, stop) for name, stop in stops.items()})
    draft = Draft.of(run.situation())
    ways = {name: departure_s(draft, name) for name in ("quick", "slow", "aux", "idle", "nobody")}
    work = WORKLOAD_STOP_S + MEMORY_RETURN_S
    assert 0.0 == ways["nobody"] == ways["idle"] < ways["quick"] < ways["slow"] < ways["aux"]
    assert lead_s(draft, []) == 0.0
    assert lead_s(draft, ["quick", "slow"]) == ways["slow"]
    assert lead_s(draft, ["quick"], ["sets"]) == ways["aux"], "with the endpoints that it runs"
    assert lead_s(draft, [], ["other"]) == work


def end_of(
    state: OverlayState, overlay_: OverlaySpec | None, running: Incarnation | None = None, **fields: Any
) -> float:
    """Seconds after NOW at which a live overlay that entered this state at NOW is surely over."""
    known = overlay_ or overlay("work", 1)
    record = replace(open_record(known, NOW), state=state, **fields)
    step = OverlayStep(record, overlay_, running, None)
    return surely_over(Draft.of(Run(spec(), Plant()).situation()), step) - NOW.wall


def test_what_is_being_ended_is_over_after_its_grace_a_kill_and_the_return_of_its_memory() -> None:
    work = overlay("work", 1)
    assert work.workload is not None
    patient = replace(work, workload=replace(work.workload, stop=replace(Stop(), grace_s=100.0)))
    for state in ("completing", "restoring"):
        assert end_of(state, patient) == 100.0 + KILL_S + MEMORY_RETURN_S  # type: ignore[arg-type]
        assert end_of(state, None) == Stop().grace_s + KILL_S + MEMORY_RETURN_S  # type: ignore[arg-type]
        begun = incarnation(work, [0], stop_settings=replace(Stop(), grace_s=100.0))
        assert end_of(state, None, begun) == 100.0 + KILL_S + MEMORY_RETURN_S  # type: ignore[arg-type]


def test_what_runs_is_over_after_every_try_that_is_left_if_it_is_stopped_then_and_else_nobody_knows() -> None:
    stopped = overlay("work", 1, duration=600.0, grace=60.0, on_overrun="stop", retries=3)
    turn = 600.0 + 60.0 + Stop().grace_s + KILL_S + MEMORY_RETURN_S
    for attempt, left in ((0, 4), (1, 3), (3, 1)):
        assert end_of("active", stopped, active_since=NOW.plus(-50.0), attempt=attempt) == left * turn - 50.0
    assert end_of("active", overlay("work", 1, retries=3), active_since=NOW) == inf
    assert end_of("active", None, active_since=NOW) == inf, "its file cannot be read"
    reserved = overlay("work", 1, duration=600.0, workload=False)
    assert end_of("active", reserved, active_since=NOW) == 600.0 + MEMORY_RETURN_S


def test_what_is_to_begin_is_over_after_the_departure_of_whom_it_may_evict_and_after_every_try() -> None:
    ask = endpoint("ask", [0])
    run = settled(ask)
    draft = Draft.of(run.situation())
    begin, way = NOW.wall + 500.0, departure_s(draft, "ask")
    work = overlay("work", [0], duration=600.0, grace=60.0, on_overrun="stop", retries=2)
    turn = 600.0 + 60.0 + Stop().grace_s + KILL_S + MEMORY_RETURN_S
    assert way > 0.0
    assert hard_end(draft, work, begin) == begin + way + 3 * turn
    assert hard_end(draft, replace(work, allow_baseline_eviction=False), begin) == begin + 3 * turn
    held = overlay("held", [0], duration=600.0, workload=False)
    assert hard_end(draft, held, begin) == begin + way + 600.0 + MEMORY_RETURN_S
    assert hard_end(draft, replace(work, requires=("ask",)), begin) == inf, "nobody knows when it has its provider"
    needy = bounded(replace(work, requires=("ask",)), begin + 99.0)
    assert hard_end(draft, needy, begin) == begin + 99.0 + Stop().grace_s + KILL_S + MEMORY_RETURN_S


def test_what_was_admitted_is_over_a_departure_and_every_try_after_its_leases_its_start_or_now() -> None:
    ask = endpoint("ask", [0])
    run = settled(ask)
    draft = Draft.of(run.situation())
    now, way = draft.now.wall, departure_s(draft, "ask")
    work = overlay("work", [0], duration=600.0, grace=60.0, on_overrun="stop", retries=1)
    record = replace(open_record(work, draft.now.plus(-5.0)), state="evicting", evicted=("ask",))
    every = 2 * (600.0 + 60.0 + Stop().grace_s + KILL_S + MEMORY_RETURN_S)

    def begins(admitted_s: float | None, item: OverlaySpec = work, **fields: Any) -> float:
        """Seconds from now at which it is counted as begun; `admitted_s`: that is when it was given a lease."""
        lease = Lease(
            "work", Subject("workload", "work"), uuid(0), 1, exclusive=True, since=draft.now.plus(admitted_s or 0)
        )
        other = replace(lease, overlay="other", since=draft.now.plus(-9000.0))
        draft.leases = [other] if admitted_s is None else [other, lease]
        return surely_over(draft, OverlayStep(replace(record, **fields), item, None, None)) - every - now

    assert begins(-1.0) == way - 1.0
    assert begins(None) == way - 5.0, "no lease: when it entered its state"
    assert begins(-1000.0) == 0.0, "they should be gone already"
    assert begins(-1.0, window_start=now + 300.0) == 300.0
    assert begins(-1.0, evicted=()) == 0.0
    assert begins(-1.0, replace(work, requires=("ask",))) == inf


@st.composite
def rivals(draw: st.DrawFn, gpus: int, span: float) -> list[OverlaySpec]:
    """Lower and equal overlays of every kind, now and later."""
    made = []
    for index in range(draw(st.integers(1, 5))):
        start = draw(st.sampled_from([None, None, 0.05 * span, 0.4 * span, 0.8 * span, span - 30, span + 100]))
        deadline = draw(st.sampled_from([None, None, 0.5 * span, span - 60, span + 600]))
        late = None if deadline is None else NOW.wall + max(deadline, (start or 0.0) + 60) + 100
        pins = st.lists(st.integers(0, gpus - 1), min_size=1, max_size=4, unique=True)
        made.append(
            overlay(
                f"r{index}",
                draw(st.one_of(st.integers(1, min(gpus, 4)), pins)),
                memory=draw(st.sampled_from([None, 20, 40])),
                priority=draw(st.sampled_from([100, 600])),
                evict=draw(st.sampled_from([True, True, True, False])),
                start=None if start is None else NOW.wall + start,
                deadline=late,
                duration=draw(st.sampled_from([30.0, 100.0, 600.0, 3000.0])),
                on_overrun=draw(st.sampled_from(["continue", "stop"])),
                requires=draw(st.sampled_from([(), (), (), ("ask",)])),
                workload=draw(st.sampled_from([True, True, False])),
                retries=draw(st.integers(0, 1)),
                preemptible=draw(st.booleans()),
            )
        )
    return made


@given(st.data())
@examples(40)
def test_23_an_admitted_reservation_is_never_delayed_by_a_lower_or_equal_one(data: st.DataObject) -> None:
    gpus = data.draw(st.sampled_from([1, 2, 3, 4, 1, 2, 3, 4, 8, 16]))
    most = min(gpus, 4)
    offers = st.sampled_from([(), ("ask",), ("ask", "code")])
    base = [
        endpoint(
            f"e{i}", data.draw(st.sampled_from([[i], 1])), memory=data.draw(st.sampled_from([None, 30])),
            priority=data.draw(st.sampled_from([40, 50])), port=8000 + i, capabilities=data.draw(offers),
        )
        for i in range(gpus)
    ]  # fmt: skip
    floors = {c: 1 for c in ("ask", "code") if data.draw(st.booleans())}
    run = Run(spec(*base, floors=floors), Plant(totals=[80 << 30] * gpus))
    run.settle()
    span = data.draw(st.sampled_from([600.0, 2000.0]))
    start = NOW.wall + span
    pins = st.lists(st.integers(0, gpus - 1), min_size=1, max_size=most, unique=True)
    night = overlay(
        "night", data.draw(st.one_of(st.integers(1, most), pins)),
        memory=data.draw(st.sampled_from([None, 40])), priority=600, start=start, duration=600,
    )  # fmt: skip
    run.spec = spec(*base, night, floors=floors)
    decided, _ = run.step()
    assume(blocked(decided, "night").reason == "NotYet")  # type: ignore[union-attr]  # a floor may keep it out
    added = data.draw(rivals(gpus, span))
    run.plant.behaviour.stop_s = 1.0
    run.plant.behaviour.run_s = {o.name: data.draw(st.sampled_from([20.0, 50.0, 500.0, 9000.0])) for o in added}
    run.plant.behaviour.exit_codes = {o.name: data.draw(st.sampled_from([(0,), (1,)])) for o in added}
    first = data.draw(st.integers(0, len(added)))
    run.spec = spec(*base, night, *added[:first], floors=floors)
    then = run.plant.now.plus(data.draw(st.sampled_from([0.0, 50.0, 300.0]))).mono
    run.settle(until=lambda p: p.now.mono >= then)
    run.spec = spec(*base, night, *added, floors=floors)
    run.settle(until=lambda p: p.ledger.overlays["night"].active_since is not None)
    since = run.ledger.overlays["night"].active_since
    assert since is not None
    # Of one that shares its GPU, and ends just then, the memory is seen back first.
    slack = 0.0 if isinstance(night.memory, WholeGpu) else run.plant.behaviour.memory_return_s
    assert start <= since.wall <= start + slack


def test_a_window_in_which_work_still_runs_is_told_when_that_is_over_and_not_its_own_start() -> None:
    run = settled(gpus=1)
    hog = overlay("hog", [0], duration=HOUR)
    run.spec = spec(hog)
    run.settle(until=overlay_state("hog", "active"))
    began = run.plant.now.wall
    for priority in (hog.priority, hog.priority - 1):
        run.spec = spec(hog, overlay("later", [0], priority=priority, start=began + HOUR / 2, duration=600))
        said = blocked(run.decide(), "later")
        assert said is not None
        assert said.reason == "PriorityTooLow"
        assert said.earliest_start == began + HOUR + 1.5


def test_a_window_that_no_end_in_sight_would_help_has_no_earliest_start() -> None:
    ask = endpoint("ask", [0], priority=900)
    run = settled(ask)
    run.spec = spec(ask, overlay("later", [0], start=run.plant.now.wall + HOUR))
    said = blocked(run.decide(), "later")
    assert said is not None
    assert said.reason == "PriorityTooLow"
    assert said.earliest_start is None


def test_only_windows_in_the_way_are_named_and_what_bounds_a_reservation_is_its_duration() -> None:
    near, beside = (overlay(n, [i], start=NOW.wall + HOUR, priority=900) for i, n in enumerate(("near", "beside")))
    hold = overlay("hold", [0], duration=2 * HOUR, workload=False)
    decided = plan(spec(near, beside, hold), observed(gpu_of(0), gpu_of(1)), Ledger(), NOW)
    said = blocked(decided, "hold")
    assert said is not None
    assert "near (" in said.message
    assert "beside" not in said.message
    assert said.alternatives[1] == (
        "bound it by a deadline, or by a shorter duration, so that it ends before 2026-11-23 22:00:00Z"
    )


def test_of_two_nightly_windows_the_second_is_told_at_once_that_nothing_has_it_over_by_the_first() -> None:
    def nightly(name: str, hour: int, **fields: Any) -> OverlaySpec:
        made = overlay(name, 1, duration=HOUR, **fields)
        return replace(made, makespan=replace(made.makespan, schedule=f"0 {hour} * * *", timezone="UTC"))

    run = Run(spec(nightly("early", 22)), Plant(totals=[80 << 30]))
    run.step()
    run.spec = spec(nightly("early", 22), nightly("late", 2))
    said = blocked(run.decide(), "late")
    assert said is not None
    assert said.reason == "WindowTaken"
    assert said.earliest_start is None, "it would not be over by the night after"
    assert said.alternatives[0].startswith("bound it by a deadline, or by `on_overrun: stop`")
    run.spec = spec(nightly("early", 22), nightly("late", 2, on_overrun="stop"))
    run.settle(until=lambda decided: decided.now.wall >= NOW.wall + 30 * HOUR)
    assert [at - NOW.wall for at in run.plant.begun[:4]] == [HOUR, 5 * HOUR, 25 * HOUR, 29 * HOUR]


def test_an_endpoint_that_a_window_requires_does_not_wait_for_it_to_begin() -> None:
    ask = endpoint("ask", [0], memory=10, priority=40, capabilities=("ask",))
    run = settled(ask)
    short = overlay("short", [0], duration=300)
    run.spec = spec(ask, short)
    run.settle(until=overlay_state("short", "active"))
    night = overlay("night", [0], memory=20, priority=600, start=run.plant.now.wall + 310, requires=("ask",))
    run.spec = spec(ask, short, night)
    run.settle(until=overlay_state("night", "active"))
    assert run.plant.is_ready("ask")


def test_nor_does_any_once_its_time_has_come_and_something_else_keeps_it() -> None:
    ask = endpoint("ask", [0], memory=10, priority=40)
    run = settled(ask)
    short = overlay("short", [0], duration=300)
    run.spec = spec(ask, short)
    run.settle(until=overlay_state("short", "active"))
    extra = endpoint("extra", [0], memory=20, port=9000)
    night = overlay("night", None, workload=False, sets=[extra], priority=600, start=run.plant.now.wall + 290)
    run.plant.ports = {9000: PortHolder(9000, 77, "squatter")}
    run.spec = spec(ask, short, night)
    run.settle(until=lambda decided: run.plant.is_ready("ask"))
    assert run.plant.is_ready("ask")
    assert blocked(run.decide(), "night").reason == "PortInUse"  # type: ignore[union-attr]


def test_no_slot_is_promised_past_its_own_deadline() -> None:
    run = settled(gpus=1)
    hog = overlay("hog", [0], duration=HOUR)
    run.spec = spec(hog)
    run.settle(until=overlay_state("hog", "active"))
    run.spec = spec(hog, overlay("brief", [0], duration=60, deadline=run.plant.now.wall + HOUR / 2))
    said = blocked(run.decide(), "brief")
    assert said is not None
    assert said.earliest_start is None


def test_nor_is_it_held_back_for_a_window_that_something_else_keeps_after_its_time() -> None:
    ask = endpoint("ask", [0], priority=40)
    run = settled(ask)
    short = overlay("short", [0], duration=300)
    run.spec = spec(ask, short)
    run.settle(until=overlay_state("short", "active"))
    extra, start = endpoint("extra", [0], port=9000), run.plant.now.wall + 320
    night = overlay("night", None, workload=False, sets=[extra], priority=600, start=start)
    run.plant.ports = {9000: PortHolder(9000, 77, "squatter")}
    run.spec = spec(ask, short, night)
    run.settle(until=lambda decided: blocked(decided, "ask") is not None and blocked(decided, "ask").reason == "Held")  # type: ignore[union-attr]
    assert run.plant.now.wall < start
    run.settle(until=lambda decided: run.plant.is_ready("ask"))
    assert run.plant.is_ready("ask")


def test_a_window_does_not_count_on_the_place_of_one_that_is_still_away_and_may_be_back_by_then() -> None:
    gang = endpoint("gang", [0, 1], priority=40)
    run = settled(gang, gpus=2)
    short = overlay("short", [1], duration=600)
    run.spec = spec(gang, short)
    run.settle(until=overlay_state("short", "active"))
    run.spec = spec(gang, short, overlay("night", [0], evict=False, start=run.plant.now.wall + HOUR))
    said = blocked(run.decide(), "night")
    assert said is not None
    assert said.reason == "NoConsent"


def test_a_cool_down_that_lets_it_begin_soon_is_told_before_a_priority_that_keeps_it_from_another_place() -> None:
    ask, code = endpoint("ask", [0], priority=40), endpoint("code", [1], priority=900)
    run = settled(ask, code, gpus=2)
    run.spec = spec(ask, code, overlay("one", [0], duration=60))
    run.settle(until=overlay_state("one", "done"))
    run.spec = spec(ask, code, overlay("two", 1, duration=60))
    decided = run.decide()
    said, ready_since = blocked(decided, "two"), decided.ledger.endpoints["ask"].ready_since
    assert said is not None
    assert said.reason == "CoolDown"
    assert ready_since is not None
    assert said.earliest_start == ready_since.wall + 120
    run.settle(until=overlay_state("two", "active"))
    assert run.plant.now.wall <= ready_since.wall + 150


def test_who_waits_for_a_window_that_is_late_is_told_what_keeps_that_one_and_no_slot() -> None:
    run = settled(gpus=1)
    extra, start = endpoint("extra", [0], port=9000), run.plant.now.wall + 100
    night = overlay("night", None, workload=False, sets=[extra], priority=600, start=start, duration=60)
    night = replace(night, makespan=replace(night.makespan, deadline=start + HOUR))
    run.plant.ports = {9000: PortHolder(9000, 77, "squatter")}
    lower = overlay("lower", [0], priority=5, duration=HOUR)
    run.spec = spec(night, lower)
    decided, _ = run.step()
    said = blocked(decided, "lower")
    assert said is not None
    assert said.earliest_start is not None
    run.plant.advance(500.0)
    said = blocked(run.decide(), "lower")
    assert said is not None
    assert (said.reason, said.earliest_start) == ("WindowTaken", None)
    assert f"night (due since {moment(start)} and kept waiting: PortInUse)" in said.message
    run.settle(until=overlay_state("lower", "active"))
    assert run.plant.now.wall == pytest.approx(start + HOUR, abs=1.0), "until its deadline"
