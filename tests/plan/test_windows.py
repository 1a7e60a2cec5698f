"""Windows to come: what is kept for them, when room is made, and who is told what."""

from __future__ import annotations

from dataclasses import replace

from builders import NOW, endpoint, observed, overlay, spec
from builders import gpu as gpu_of
from hypothesis import given
from hypothesis import strategies as st
from plant import Plant, Run, overlay_state
from worlds import examples

from reconciler.plan.actions import Blocked, Plan
from reconciler.plan.ledger import Ledger
from reconciler.plan.planner import plan
from reconciler.spec.spec import EndpointSpec, OverlaySpec, WholeGpu

HOUR = 3600.0


def settled(*items: EndpointSpec, gpus: int = 1) -> Run:
    """A box on which the baseline is ready."""
    run = Run(spec(*items), Plant(totals=[80 << 30] * gpus))
    run.settle()
    return run


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
    said = blocked(run.decide(), "ask")
    assert said is not None
    assert said.reason == "Held"
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


@st.composite
def rivals(draw: st.DrawFn, gpus: int) -> list[OverlaySpec]:
    """Lower and equal overlays of every kind, now and later."""
    made = []
    for index in range(draw(st.integers(1, 4))):
        start = draw(st.sampled_from([None, 100.0, 900.0, 1700.0, 2500.0]))
        deadline = draw(st.sampled_from([None, None, 1500.0, 3000.0]))
        made.append(
            overlay(
                f"r{index}",
                draw(st.one_of(st.integers(1, gpus), st.lists(st.integers(0, gpus - 1), min_size=1, unique=True))),
                memory=draw(st.sampled_from([None, 20, 40])),
                priority=draw(st.sampled_from([100, 600])),
                start=None if start is None else NOW.wall + start,
                deadline=None if deadline is None else NOW.wall + 2600 + deadline,
                duration=draw(st.sampled_from([100.0, 600.0, 3000.0])),
                on_overrun=draw(st.sampled_from(["continue", "stop"])),
                workload=draw(st.sampled_from([True, True, False])),
                retries=draw(st.integers(0, 1)),
            )
        )
    return made


@given(st.data())
@examples(60)
def test_an_admitted_reservation_is_never_delayed_by_a_lower_or_equal_one(data: st.DataObject) -> None:
    gpus = data.draw(st.integers(1, 4))
    base = [endpoint(f"e{i}", [i], memory=data.draw(st.sampled_from([None, 30])), priority=40) for i in range(gpus)]
    run = settled(*base, gpus=gpus)
    start = NOW.wall + data.draw(st.sampled_from([600.0, 2000.0]))
    night = overlay(
        "night", data.draw(st.integers(1, gpus)), memory=data.draw(st.sampled_from([None, 40])),
        priority=600, start=start, duration=600,
    )  # fmt: skip
    run.spec = spec(*base, night)
    decided, _ = run.step()
    assert blocked(decided, "night").reason == "NotYet"  # type: ignore[union-attr]
    run.plant.advance(data.draw(st.sampled_from([0.0, 50.0])))
    added = data.draw(rivals(gpus))
    run.plant.behaviour.run_s = {o.name: data.draw(st.sampled_from([50.0, 500.0, 9000.0])) for o in added}
    run.plant.behaviour.exit_codes = {o.name: data.draw(st.sampled_from([(0,), (1,)])) for o in added}
    run.spec = spec(*base, night, *added)
    run.settle(until=lambda p: p.ledger.overlays["night"].active_since is not None)
    since = run.ledger.overlays["night"].active_since
    assert since is not None
    # Of one that shares its GPU, and ends just then, the memory is seen back first.
    slack = 0.0 if isinstance(night.memory, WholeGpu) else run.plant.behaviour.memory_return_s
    assert start <= since.wall <= start + slack
