"""One overlay from look to look: what its file, the time and its work make of its record, at each bound."""

from __future__ import annotations

from typing import Any

import pytest
from builders import NOW, gpu, incarnation, observed, overlay, spec
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.errors import Problem
from reconciler.plan.ledger import Ledger, OverlayRecord, Span
from reconciler.plan.observed import Incarnation
from reconciler.plan.overlays import MOST_UNSTARTED, RECORD_KEPT_S, OverlayStep, advance, open_record
from reconciler.plan.situation import Situation
from reconciler.spec.spec import OverlaySpec, Source

ITEM = overlay("job", [0], duration=600.0, grace=60.0)
FRESH = open_record(ITEM, NOW.plus(-100))
RUNS = replace(FRESH, state="active", since=NOW.plus(-100), active_since=NOW.plus(-100), gpus=("GPU-00000000",))
PARTS = (Span("run", NOW.plus(-50), 30.0, 20.0),)


def look(
    record: OverlayRecord | None,
    item: OverlaySpec | None = ITEM,
    work: Incarnation | None = None,
    now: Instant = NOW,
    **seen: Any,
) -> OverlayStep | None:
    """One look at `now` at an overlay with this record, this file and this work."""
    box = observed(gpu(0), incarnations=[work] if work else [], at=now, **seen)
    files = spec(*([item] if item else []))
    ledger = Ledger("boot", overlays={"job": record} if record else {})
    return advance(Situation(files, box, ledger, now), "job")


def record_after(*arguments: Any, **seen: Any) -> OverlayRecord:
    step = look(*arguments, **seen)
    assert step is not None
    return step.record


def timed(**fields: Any) -> OverlaySpec:
    return replace(ITEM, makespan=replace(ITEM.makespan, **fields))


def work(phase: Any = "running", **fields: Any) -> Incarnation:
    return incarnation(ITEM, [0], phase=phase, started=NOW.plus(-90), **fields)


# ---------------------------------------------------------------- its file


def test_one_that_nobody_remembers_is_pending_for_what_its_file_says() -> None:
    assert record_after(None) == open_record(ITEM, NOW)
    assert look(None, None) is None


@pytest.mark.parametrize("state", ["done", "failed", "cancelled", "expired"])
def test_what_became_of_one_whose_file_is_gone_stays_in_view_for_a_day(state: Any) -> None:
    over = replace(FRESH, state=state, since=NOW)
    for after_s, kept in ((RECORD_KEPT_S, True), (RECORD_KEPT_S + 1, False)):
        assert (look(over, None, now=NOW.plus(after_s)) is not None) == kept
    assert record_after(over, None).placement_hash == "", "a file of this name asks for a new run"
    assert look(over, now=NOW.plus(2 * RECORD_KEPT_S)) is not None, "its file is there"


def test_a_live_one_whose_file_is_gone_ends_however_long_it_was_there() -> None:
    waits = replace(FRESH, since=NOW.plus(-2 * RECORD_KEPT_S))
    runs = replace(RUNS, since=NOW.plus(-2 * RECORD_KEPT_S))
    assert [(r.state, r.outcome) for r in (record_after(waits, None), record_after(runs, None, work()))] == [
        ("cancelled", None), ("completing", "cancelled"),
    ]  # fmt: skip


def test_one_whose_file_cannot_be_read_goes_on_as_it_was() -> None:
    files = replace(spec(), problems=(Problem("overlays/job.yaml", 3, 1, "what is this?"),))
    for record in (FRESH, RUNS, replace(RUNS, state="restoring")):
        step = advance(Situation(files, observed(gpu(0)), Ledger("boot", overlays={"job": record}), NOW), "job")
        assert step is not None
        assert (step.record, step.spec, step.wake) == (record, None, None)


def test_an_edit_of_who_is_more_important_holds_at_once() -> None:
    moved = replace(ITEM, priority=900, source=Source("overlays/renamed.yaml", 7, 1))
    for record in (FRESH, RUNS):
        after = record_after(record, moved)
        assert (after.priority, after.source, after.state) == (900, moved.source, record.state)


def test_other_work_under_the_same_name_is_a_new_run_which_remembers_the_parts_of_the_last() -> None:
    other = replace(ITEM, placement_hash="other")
    over = replace(FRESH, state="done", since=NOW.plus(-10), spans=PARTS)
    assert record_after(over) == over, "the same file asks for nothing"
    assert record_after(over, other) == replace(open_record(other, NOW), last_run=PARTS)
    waits = record_after(FRESH, other)
    assert (waits.placement_hash, waits.since, waits.seen) == ("other", FRESH.since, FRESH.seen), "it waits since then"
    assert [record_after(replace(RUNS, state=s), other, work()).state for s in ("active", "restoring")] == [
        "completing", "restoring",
    ]  # fmt: skip


def test_a_start_that_is_moved_to_later_asks_for_another_run_of_what_is_over() -> None:
    over = replace(FRESH, state="done", since=NOW.plus(-10))
    for start, state in ((NOW.wall + 50, "pending"), (NOW.wall, "done"), (NOW.wall - 50, "done")):
        assert record_after(over, timed(start=start)).state == state
    same = replace(over, window_start=NOW.wall + 50)
    assert record_after(same, timed(start=NOW.wall + 50)).state == "done"


def test_a_schedule_that_is_over_for_now_waits_for_its_next_window_and_has_been_there_since_it_was_first_seen() -> None:
    hourly = timed(schedule="0 * * * *", timezone="UTC")
    over = replace(FRESH, state="done", since=NOW.plus(-10), seen=NOW.plus(-9000))
    after = record_after(over, hourly)
    assert (after.state, after.window_start - NOW.wall, after.seen) == ("pending", 3600.0, NOW.plus(-9000))


# ---------------------------------------------------------------- the time


@pytest.mark.parametrize(("at", "jumped", "state"), [
    (-1.0, False, "pending"), (0.0, False, "expired"), (9.0, True, "pending"),
])  # fmt: skip
def test_one_that_has_not_begun_expires_at_its_deadline_unless_the_clock_has_just_jumped(
    at: float, jumped: bool, state: str
) -> None:
    assert record_after(FRESH, timed(deadline=NOW.wall - at), clock_jumped=jumped).state == state


@pytest.mark.parametrize(("late_s", "jumped", "state"), [
    (1200.0, False, "pending"), (1201.0, False, "expired"), (1201.0, True, "pending"),
])  # fmt: skip
def test_a_window_may_be_begun_late_by_its_starting_deadline(late_s: float, jumped: bool, state: str) -> None:
    hourly = timed(schedule="0 * * * *", timezone="UTC", starting_deadline_s=1200.0)
    waits = replace(FRESH, window_start=NOW.wall - late_s)
    assert record_after(waits, hourly, clock_jumped=jumped).state == state


@pytest.mark.parametrize("state", ["admitted", "evicting", "starting", "active", "overrun"])
def test_one_that_lives_ends_at_its_deadline_and_what_only_held_gpus_has_done_so(state: Any) -> None:
    item = timed(deadline=NOW.wall)
    held = replace(item, workload=None)
    live = replace(RUNS, state=state)
    assert [(r.state, r.outcome) for r in (record_after(live, item, work()), record_after(live, held))] == [
        ("completing", "failed"), ("completing", "done"),
    ]  # fmt: skip
    not_yet = replace(live, active_since=None)
    assert record_after(not_yet, held).outcome == "failed", "it never held them"


@pytest.mark.parametrize(
    ("on_overrun", "state", "outcome"), [("continue", "overrun", None), ("stop", "completing", "failed")]
)
def test_work_may_take_its_duration_and_grace(on_overrun: Any, state: str, outcome: str | None) -> None:
    item = timed(on_overrun=on_overrun)
    for ran_s, expected in ((659.0, ("active", None)), (660.0, (state, outcome))):
        runs = replace(RUNS, active_since=NOW.plus(-ran_s))
        after = record_after(runs, item, work())
        assert (after.state, after.outcome) == expected
    past = replace(RUNS, state="overrun", since=NOW.plus(-5), active_since=NOW.plus(-999))
    if on_overrun == "continue":
        assert record_after(past, item, work()) == past, "said once"
        assert record_after(past, timed(duration_s=2000.0), work()).state == "active", "its file allows more by now"
    assert record_after(past, timed(duration_s=None), work()).state == "overrun", "nothing bounds it any more"


def test_what_only_holds_gpus_is_done_after_its_duration_without_any_grace() -> None:
    held = replace(ITEM, workload=None)
    for ran_s, state in ((599.0, "active"), (600.0, "completing")):
        assert record_after(replace(RUNS, active_since=NOW.plus(-ran_s)), held).state == state


# ---------------------------------------------------------------- its work

STARTS = replace(RUNS, state="starting", active_since=None)


def test_it_is_active_from_the_start_of_its_work_on() -> None:
    after = record_after(STARTS, ITEM, work())
    assert (after.state, after.since, after.active_since) == ("active", NOW, NOW.plus(-90))
    assert record_after(RUNS, ITEM, work()) == RUNS
    assert record_after(STARTS, ITEM, work(attempt=1)).state == "starting", "that is another attempt's"


@pytest.mark.parametrize(("code", "outcome", "reason"), [
    (0, "done", ""), (3, "failed", "the workload failed: exit code 3"),
])  # fmt: skip
def test_the_end_of_its_work_is_the_end_of_it(code: int, outcome: str, reason: str) -> None:
    after = record_after(STARTS, ITEM, work("exited", exit_code=code))
    assert (after.state, after.outcome, after.reason, after.exit_code) == ("completing", outcome, reason, code)
    assert after.active_since == NOW.plus(-90), "it ran, though nobody saw it run"
    assert record_after(RUNS, ITEM, work("exited", exit_code=code, strays=None)) == RUNS, "not seen well enough"


def test_work_that_fails_is_tried_again_as_often_as_its_file_says() -> None:
    assert ITEM.workload is not None
    stubborn = replace(ITEM, workload=replace(ITEM.workload, retries=2))
    for attempt, state in ((0, "starting"), (1, "starting"), (2, "completing")):
        after = record_after(replace(RUNS, attempt=attempt), stubborn, work("exited", exit_code=3, attempt=attempt))
        assert after.state == state
        if state == "starting":
            assert (after.attempt, after.active_since, after.exit_code) == (attempt + 1, None, None)
            assert after.reason == f"attempt {attempt + 1} failed (exit code 3)"


def test_a_start_that_was_cut_short_is_no_try_and_is_not_repeated_for_ever() -> None:
    cut = work("vanished", pid=None)
    after = record_after(STARTS, ITEM, cut)
    assert (after.state, after.attempt, after.unstarted, after.failures) == ("starting", 1, 1, 0)
    often = replace(STARTS, attempt=MOST_UNSTARTED, unstarted=MOST_UNSTARTED)
    assert record_after(often, ITEM, replace(cut, attempt=MOST_UNSTARTED)).outcome == "failed"
    assert record_after(STARTS, ITEM, work("vanished")).outcome == "failed", "it ran, and nobody knows how it ended"


def test_work_without_a_record_is_adopted_and_not_started_a_second_time() -> None:
    after = record_after(None, ITEM, work(attempt=2))
    assert (after.state, after.attempt, after.active_since, after.gpus) == ("active", 2, NOW.plus(-90), RUNS.gpus)
    assert after.window_start == NOW.wall - 90


# ---------------------------------------------------------------- when to look again

HOURLY = timed(schedule="0 * * * *", timezone="UTC", starting_deadline_s=1200.0)
WAKES = {
    "at its start": (replace(FRESH, window_start=NOW.wall + 50), timed(start=NOW.wall + 50), 50.0),
    "at its window": (replace(FRESH, window_start=NOW.wall + 50), HOURLY, 50.0),
    "when its window is missed": (replace(FRESH, window_start=NOW.wall - 50), HOURLY, 1150.0),
    "at its deadline": (FRESH, timed(deadline=NOW.wall + 70), 70.0),
    "when its work is past its grace": (RUNS, ITEM, 560.0),
    "when it has held its GPUs for long enough": (RUNS, replace(ITEM, workload=None), 500.0),
    "at its deadline, which is first": (RUNS, timed(deadline=NOW.wall + 70), 70.0),
    "never, as nothing waits": (FRESH, ITEM, None),
    "never, as nothing bounds it": (RUNS, timed(duration_s=None), None),
    "never, as it is over": (replace(FRESH, state="done"), timed(deadline=NOW.wall + 70), None),
    "never, as it ends already": (replace(RUNS, state="completing"), ITEM, None),
}


@pytest.mark.parametrize("when", WAKES)
def test_the_time_alone_changes_it_next(when: str) -> None:
    record, item, after_s = WAKES[when]
    step = look(record, item, work() if item.workload and record.active_since else None)
    assert step is not None
    assert step.wake == (None if after_s is None else NOW.plus(after_s))


# ---------------------------------------------------------------- what it says

PAST = timed(deadline=NOW.wall)
OTHER = replace(ITEM, placement_hash="other")
SAYS = {
    "its file was removed before it began": (FRESH, None, "cancelled"),
    "its file was removed": (RUNS, None, "completing"),
    "its file was replaced by other work (on_edit: replace)": (RUNS, OTHER, "completing"),
    "its deadline passed before it could begin": (FRESH, PAST, "expired"),
    "its deadline passed": (RUNS, PAST, "completing"),
    "could not begin within 1200 s of its window": (replace(FRESH, window_start=NOW.wall - 1201), HOURLY, "expired"),
    "past its duration and grace; the work that began completes": (
        replace(RUNS, active_since=NOW.plus(-999)), ITEM, "overrun",
    ),
    "it overran its makespan (on_overrun: stop)": (
        replace(RUNS, active_since=NOW.plus(-999)), timed(on_overrun="stop"), "completing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", SAYS)
def test_it_says_why_it_is_where_it_is_and_since_when(words: str) -> None:
    record, item, state = SAYS[words]
    after = record_after(record, item, work() if record.active_since else None)
    assert (after.state, after.reason, after.since) == (state, words, NOW)


def test_it_says_nothing_where_nothing_went_wrong() -> None:
    held = replace(ITEM, workload=None)
    for item, started in ((replace(PAST, workload=None), -100), (held, -600)):
        after = record_after(replace(RUNS, active_since=NOW.plus(started), reason="before"), item)
        assert (after.state, after.outcome, after.reason, after.since) == ("completing", "done", "", NOW)
    assert record_after(STARTS, ITEM, work()).reason == ""


def test_a_start_that_was_cut_short_is_told() -> None:
    after = record_after(replace(RUNS, since=NOW.plus(-50)), ITEM, work("vanished", pid=None))
    assert after.reason == "its start was cut short before anything ran; it is made again"
    assert (after.since, after.active_since) == (NOW, None)


def test_the_start_of_its_file_is_that_of_its_window_also_after_an_edit() -> None:
    assert record_after(FRESH, timed(start=NOW.wall + 70)).window_start == NOW.wall + 70


@pytest.mark.parametrize("state", ["completing", "restoring"])
def test_one_that_ends_already_has_the_outcome_that_it_had_whatever_becomes_of_its_file(state: Any) -> None:
    ends = replace(RUNS, state=state, outcome="done", reason="")
    for item in (ITEM, OTHER, PAST, None):
        after = record_after(ends, item, work("exited", exit_code=0))
        assert (after.state, after.outcome, after.since) == (state, "done", ends.since)


def test_one_that_overruns_is_active_again_from_when_its_file_allows_more_and_then_looked_at_by_that() -> None:
    late = replace(RUNS, state="overrun", since=NOW.plus(-5), active_since=NOW.plus(-999))
    step = look(late, timed(duration_s=2000.0), work())
    assert step is not None
    assert (step.record.state, step.record.since, step.wake) == ("active", NOW, NOW.plus(2060.0 - 999.0))
