"""Moments as people here read and write them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import typer
from desk import Desk

from reconciler.cli.local_time import LOCAL
from reconciler.cli.values import Moment


@pytest.fixture
def in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as abroad:
        abroad.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("in_berlin")
def test_each_moment_has_the_offset_of_its_own_day() -> None:
    for month, offset in ((1, 1), (7, 2)):
        noon = datetime(2027, month, 15, 12, tzinfo=UTC)
        local = datetime.fromtimestamp(noon.timestamp(), LOCAL)
        assert local.hour == 12 + offset
        assert local.utcoffset() == timedelta(hours=offset)
        assert local.timestamp() == noon.timestamp()


@pytest.mark.usefixtures("in_berlin")
def test_the_hour_that_comes_twice_is_two_moments() -> None:
    for hour in range(4):  # 2027-10-31: 03:00 becomes 02:00 at 01:00 UTC
        moment = datetime(2027, 10, 31, hour, 30, tzinfo=UTC)
        local = moment.astimezone(LOCAL)
        assert local.hour == (hour + 2 if hour < 1 else hour + 1)
        assert local.timestamp() == moment.timestamp()


@pytest.mark.usefixtures("in_berlin")
def test_a_time_that_clocks_are_set_forward_over_is_none() -> None:
    with pytest.raises(typer.BadParameter, match="does not exist here: clocks are set forward over it"):
        Moment.parse("2027-03-28T02:30:00")
    assert Moment.parse("2027-03-28T03:30:00").wall == datetime(2027, 3, 28, 1, 30, tzinfo=UTC).timestamp()
    assert Moment.parse("2027-03-28T02:30:00+01:00").wall == datetime(2027, 3, 28, 1, 30, tzinfo=UTC).timestamp()


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59", "2200-01-01", "1970-12-31", "9999-12-31T23:59:59Z"])
def test_a_moment_beyond_what_can_be_planned_for_is_refused_as_one(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a time to plan for"):
        Moment.parse(text)


def test_a_plan_tells_of_windows_after_a_change_of_clocks_by_the_clocks_of_then(desk: Desk) -> None:
    year = datetime.now(UTC).year + 1
    for name, month in (("winter", 1), ("summer", 7)):
        desk.write(
            f"overlays/{name}.yaml",
            f"version: 1\ngpus: 1\nworkload: {{command: [sleep, '9']}}\n"
            f'makespan: {{start: "{year}-{month:02}-15T12:00:00Z", duration: 1h}}\n',
        )
    told = desk.run("plan", env={"TZ": "America/New_York", "PATH": "/usr/bin:/bin"}).stdout
    assert f"not before ~{year}-01-15 07:00:00" in told
    assert f"not before ~{year}-07-15 08:00:00" in told
