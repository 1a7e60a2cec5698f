"""A year of cron windows on the virtual clock, over both changes of the clocks, against instants worked out here."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from builders import endpoint, observed, overlay, spec
from builders import gpu as gpu_of
from msgspec.structs import replace
from plant import Plant, Run

from reconciler.clock import Instant
from reconciler.plan.ledger import Ledger
from reconciler.plan.planner import plan
from reconciler.spec.spec import OverlaySpec

DAYS = [date(2026, 1, 1) + timedelta(days=i) for i in range(365)]


def scheduled(schedule: str, zone: str, **fields: float) -> OverlaySpec:
    """Work of a minute on one GPU, again and again."""
    made = overlay("nightly", 1, duration=60.0)
    return replace(made, makespan=replace(made.makespan, schedule=schedule, timezone=zone, **fields))


def first_valid(day: date, at: time, zone: str) -> float:
    """The instant at which the clocks on the wall first show this time or, where it is skipped, the next one there is.

    Worked out by walking through UTC, at last minute by minute: no rule of `zoneinfo` about folds and gaps
    is leant on.
    """
    wanted = datetime.combine(day, at)
    utc = wanted.replace(tzinfo=UTC) - timedelta(hours=15)
    end = utc + timedelta(hours=45)
    while utc < end:
        local = utc.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
        if local.date() == day and local >= wanted:
            return utc.timestamp()
        utc += timedelta(minutes=1 if wanted - local <= timedelta(hours=2) else 15)
    raise AssertionError(f"{day} {at} never comes in {zone}")


def year_of_starts(item: OverlaySpec, zone: str) -> list[float]:
    """Epoch seconds at which the work really began, of every run of the year 2026 in that zone."""
    begin = datetime(2026, 1, 1, tzinfo=ZoneInfo(zone)).timestamp()
    end = datetime(2027, 1, 1, tzinfo=ZoneInfo(zone)).timestamp()
    run = Run(spec(item), Plant(totals=[80 << 30], now=Instant(begin - 1, 1000.0)))
    run.plant.behaviour.default_run_s = 60.0
    run.settle(until=lambda p: p.now.wall >= end, max_steps=8000)
    return [i for i in run.plant.begun if i < end]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York"])
@pytest.mark.parametrize("at", [time(1, 30), time(2, 30), time(22, 0)])
def test_a_year_of_nightly_windows_begins_once_a_day_at_the_first_valid_instant(zone: str, at: time) -> None:
    starts = year_of_starts(scheduled(f"{at.minute} {at.hour} * * *", zone), zone)
    assert starts == [first_valid(day, at, zone) for day in DAYS]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York"])
def test_weekdays_are_those_of_the_time_zone(zone: str) -> None:
    starts = year_of_starts(scheduled("0 22 * * 1-5", zone), zone)
    assert starts == [first_valid(day, time(22, 0), zone) for day in DAYS if day.weekday() < 5]


def test_what_was_missed_is_caught_up_with_once_within_the_starting_deadline_and_not_after_it() -> None:
    item = scheduled("0 * * * *", "Europe/Berlin", starting_deadline_s=1200.0)
    noon = datetime(2026, 6, 1, 12, 0, tzinfo=UTC).timestamp()
    ledger = plan(spec(item), observed(gpu_of(0)), Ledger(), Instant(noon - 1, 100.0)).ledger
    assert ledger.overlays["nightly"].window_start == noon

    late = Instant(noon + 1100, 100.0 + 1101)
    caught = plan(spec(item), observed(gpu_of(0, at=late), at=late), ledger, late)
    assert caught.ledger.overlays["nightly"].state == "starting"
    assert [a.op for a in caught.actions if a.op.startswith("start")] == ["start_workload"]

    too_late = Instant(noon + 5 * 3600 + 1300, 100.0 + 5 * 3600 + 1301)
    missed = plan(spec(item), observed(gpu_of(0, at=too_late), at=too_late), ledger, too_late)
    assert missed.ledger.overlays["nightly"].state == "expired"
    assert not missed.actions
    again = plan(spec(item), observed(gpu_of(0, at=too_late), at=too_late), missed.ledger, too_late)
    assert again.ledger.overlays["nightly"].state == "pending"
    assert again.ledger.overlays["nightly"].window_start == noon + 6 * 3600, (
        "the five in between are not caught up with"
    )


def test_of_several_missed_windows_the_last_is_caught_up_with_within_its_starting_deadline() -> None:
    item = scheduled("0 * * * *", "Europe/Berlin", starting_deadline_s=2.5 * 3600)
    noon = datetime(2026, 6, 1, 12, 0, tzinfo=UTC).timestamp()
    run = Run(spec(item), Plant(totals=[80 << 30], now=Instant(noon - 1, 100.0)))
    run.step()
    run.plant.advance(1 + 5 * 3600 + 600)  # nobody looked meanwhile
    assert run.step()[0].ledger.overlays["nightly"].state == "expired"
    run.settle(until=lambda p: p.now.wall >= noon + 6 * 3600)
    assert [at - noon for at in run.plant.begun] == [5 * 3600 + 600, 6 * 3600]


def test_a_window_that_begins_at_the_very_moment_of_the_look_is_the_last_one_due() -> None:
    item = scheduled("0 * * * *", "Europe/Berlin", starting_deadline_s=2.5 * 3600)
    noon = datetime(2026, 6, 1, 12, 0, tzinfo=UTC).timestamp()
    run = Run(spec(item), Plant(totals=[80 << 30], now=Instant(noon - 1, 100.0)))
    run.step()
    run.plant.advance(1 + 5 * 3600)
    assert [run.step()[0].ledger.overlays["nightly"].window_start - noon for _ in range(2)] == [0, 5 * 3600]


def test_an_hourly_window_that_had_no_place_for_its_hour_does_not_cost_the_one_after_it() -> None:
    hog, item = overlay("hog", 1, duration=4000.0), scheduled("0 * * * *", "Europe/Berlin", starting_deadline_s=3600.0)
    noon = datetime(2026, 6, 1, 12, 0, tzinfo=UTC).timestamp()
    run = Run(spec(hog), Plant(totals=[80 << 30], now=Instant(noon - 300, 100.0)))
    run.plant.behaviour.run_s = {"hog": 4000.0, "nightly": 60.0}
    run.settle(until=lambda p: "hog" in run.starts())
    run.spec = spec(hog, item)
    run.settle(until=lambda p: p.now.wall >= noon + 2 * 3600)
    assert [at - noon for at in run.plant.begun[1:]] == [3700 + 1, 2 * 3600]


def test_a_nightly_window_frees_its_gpu_by_the_start_every_night_and_the_endpoint_is_back_every_morning() -> None:
    ask = endpoint("ask", 1, priority=40)
    item = scheduled("30 2 * * *", "Europe/Berlin")
    begin = datetime(2026, 3, 26, tzinfo=UTC).timestamp()
    run = Run(spec(ask), Plant(totals=[80 << 30], now=Instant(begin, 1000.0)))
    run.settle()
    run.spec = spec(ask, item)
    run.plant.behaviour.default_run_s = 60.0
    run.settle(until=lambda p: p.now.wall >= begin + 6 * 86400, max_steps=2000)
    days = [date(2026, 3, 26) + timedelta(days=i) for i in range(6)]
    assert run.plant.begun == [first_valid(day, time(2, 30), "Europe/Berlin") for day in days]
    assert run.plant.is_ready("ask")


def test_between_two_windows_of_a_schedule_nothing_slips_in_that_may_not_be_over_by_the_next() -> None:
    item = scheduled("0 * * * *", "Europe/Berlin")
    noon = datetime(2026, 6, 1, 12, 0, tzinfo=UTC).timestamp()
    run = Run(spec(item, overlay("hog", 1, priority=5)), Plant(totals=[80 << 30], now=Instant(noon - 300, 100.0)))
    run.plant.behaviour.run_s = {"hog": 40_000.0, "nightly": 60.0}
    run.settle(until=lambda p: p.now.wall >= noon + 2 * 3600, max_steps=100)
    assert [at - noon for at in run.plant.begun] == [0, 3600, 2 * 3600]
