"""What begins before a window leaves it the providers beside whom it can displace its victims, and no more."""

from __future__ import annotations

from typing import Any

import pytest
from accounting import settled
from builders import endpoint, overlay, spec
from msgspec.structs import replace
from plant import Run

from reconciler.plan.actions import Blocked
from reconciler.plan.ledger import Timings
from reconciler.spec.spec import EndpointSpec, OverlaySpec

HOUR = 3600.0
LOAD_S = 300.0
CHAT = tuple(endpoint(f"e{i}", [i], priority=40, capabilities=("chat",)) for i in range(3))


def box(*endpoints: EndpointSpec, floors: dict[str, int]) -> Run:
    """Every one of them ready for long, and slow to load, as history has it."""
    run = settled(*endpoints, gpus=len(endpoints), floors=floors)
    run.plant.advance(HOUR)
    learnt = {e.name: Timings(load_s=LOAD_S, drain_s=0.0, stop_s=2.0) for e in endpoints}
    run.ledger = replace(run.ledger, timings=learnt)
    return run


def told(run: Run, *items: EndpointSpec | OverlaySpec, floors: dict[str, int], name: str = "work") -> str:
    """Why it does not begin, once all the others of these have been seen; empty: it does."""
    run.spec = spec(*(i for i in items if i.name != name), floors=floors)
    run.ledger = replace(run.decide().ledger, timings=run.ledger.timings)
    run.spec = spec(*items, floors=floors)
    found: list[Blocked] = [b for b in run.decide().blocked if b.subject.name == name and b.reason != "NotYet"]
    return found[0].reason if found else ""


def window(run: Run, on: int, after: float, **fields: Any) -> OverlaySpec:
    return overlay(f"night{on}", [on], start=run.plant.now.wall + after, **fields)


def work(run: Run, on: int, over_by: float, **fields: Any) -> OverlaySpec:
    """It is ended after so many seconds, and has given its place back within a minute of that, whatever it does."""
    return overlay("work", [on], priority=500, deadline=run.plant.now.wall + over_by, duration=60.0, **fields)


@pytest.mark.parametrize(("after", "reason"), [(700.0, "FloorWouldBreak"), (1000.0, "")])
def test_work_counts_until_the_one_that_it_displaces_has_loaded_again(after: float, reason: str) -> None:
    one, two, _ = CHAT
    run = box(one, two, floors={"chat": 1})
    items = (one, two, window(run, 0, after), work(run, 1, 500.0))
    assert told(run, *items, floors={"chat": 1}) == reason


def test_a_window_that_opens_too_late_to_count_hides_none_that_opens_earlier() -> None:
    run = box(*CHAT, floors={"chat": 2})
    late = window(run, 0, 5 * HOUR, priority=900)
    soon = window(run, 1, 700.0, deadline=run.plant.now.wall + 1500.0)
    assert told(run, *CHAT, late, soon, work(run, 2, 500.0), floors={"chat": 2}) == "FloorWouldBreak"
    assert told(run, *CHAT, late, work(run, 2, 500.0), floors={"chat": 2}) == ""


def test_a_window_is_not_kept_from_its_place_by_one_that_is_over_by_then() -> None:
    one, two, _ = CHAT
    run = box(one, two, floors={"chat": 1})
    early, late = window(run, 0, HOUR), window(run, 1, 3 * HOUR, priority=500)
    assert told(run, one, two, early, late, floors={"chat": 1}, name="night1") == ""
    beside = window(run, 1, HOUR, priority=500)
    assert told(run, one, two, early, beside, floors={"chat": 1}, name="night1") == "FloorWouldBreak"


@pytest.mark.parametrize(("after", "reason"), [(400.0, "FloorWouldBreak"), (700.0, "")])
def test_what_work_requires_is_to_be_there_beside_a_window_for_as_long_as_it_has_its_place(
    after: float, reason: str
) -> None:
    one, two, _ = CHAT
    run = box(one, two, floors={})
    asks = work(run, 1, 500.0, requires=("chat",))
    assert told(run, one, two, window(run, 0, after), asks, floors={}) == reason


def test_one_provider_is_enough_for_what_is_required() -> None:
    run = box(*CHAT, floors={})
    asks = work(run, 2, 500.0, requires=("chat",))
    assert told(run, *CHAT, window(run, 0, 400.0), asks, floors={}) == ""
    needy = window(run, 0, 400.0, requires=("chat",))
    assert told(run, *CHAT, needy, work(run, 2, 500.0), floors={}) == ""


def test_what_a_window_requires_stays_beside_its_victims() -> None:
    one, two, _ = CHAT
    run = box(one, two, floors={})
    needy = window(run, 0, 400.0, requires=("chat",))
    assert told(run, one, two, needy, work(run, 1, 500.0), floors={}) == "FloorWouldBreak"
    assert told(run, one, two, window(run, 0, 400.0), work(run, 1, 500.0), floors={}) == ""
