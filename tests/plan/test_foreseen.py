"""Who is where at a moment to come, as windows, refusals and returns go by it."""

from __future__ import annotations

from collections.abc import Mapping

from accounting import settled, starts
from builders import endpoint, overlay, spec, uuid
from msgspec.structs import replace
from plant import Run, overlay_state

from reconciler.errors import Problem
from reconciler.plan.actions import Blocked
from reconciler.spec.spec import EndpointSpec, Evict, OverlaySpec

HOUR = 3600.0
FIRST = endpoint("first", [1], priority=800)
SECOND = endpoint("second", [0], priority=700)
STRONG = overlay("strong", [0], priority=900, duration=300.0)


def told(run: Run, *items: EndpointSpec | OverlaySpec, name: str = "night") -> Blocked:
    """What is said of a window to come beside these."""
    run.spec = spec(*items)
    (found,) = [b for b in run.decide().blocked if b.subject.name == name]
    return found


def displaced(*endpoints: EndpointSpec, by: OverlaySpec = STRONG, gpus: int = 2) -> Run:
    run = settled(*endpoints, gpus=gpus)
    run.spec = spec(*endpoints, by)
    run.settle(until=overlay_state(by.name, "active"))
    return run


def night(run: Run, after: float = HOUR, **fields: object) -> OverlaySpec:
    return overlay("night", [0], start=run.plant.now.wall + after, priority=600, **fields)  # type: ignore[arg-type]


def test_a_place_is_foreseen_for_whom_an_overlay_displaced_whatever_is_wrong_with_others() -> None:
    run = displaced(FIRST, SECOND)
    stopped, absent = replace(FIRST, state="stopped"), endpoint("first", [7], priority=800)
    aside = overlay("aside", None, workload=False, priority=900, sets=(stopped,), duration=9 * HOUR)
    for others in ((FIRST,), (stopped,), (absent,), (FIRST, aside), ()):
        said = told(run, *others, SECOND, STRONG, night(run))
        assert said.reason == "PriorityTooLow", others
        assert "second" in said.message


def test_a_stopped_or_failed_endpoint_has_no_place_in_time_to_come() -> None:
    run = settled(replace(SECOND, state="stopped"), gpus=1)
    assert told(run, replace(SECOND, state="stopped"), night(run)).reason == "NotYet"
    run.plant.behaviour.crashes = frozenset({"second"})
    run.spec = spec(SECOND)
    run.settle()
    assert run.ledger.endpoints["second"].failed
    assert told(run, SECOND, night(run)).reason == "NotYet"


def test_an_endpoint_that_has_no_place_now_may_have_none_then() -> None:
    """The second waits for the first, and the third for a GPU that this box has not: both are in nobody's way."""
    first, third = replace(FIRST, gpus=SECOND.gpus), endpoint("third", [7], priority=900)
    run = settled(first, SECOND, third, gpus=1)
    said = told(run, first, SECOND, third, night(run))
    assert said.reason == "PriorityTooLow"
    assert "second" not in said.message


def test_work_whose_file_cannot_be_read_is_not_foreseen_to_end() -> None:
    run = displaced(by=STRONG)
    later = night(run)
    assert told(run, STRONG, later).reason == "NotYet"
    run.spec = replace(spec(later), problems=(Problem("overlays/strong.yaml", 1, 1, "what is this?"),))
    (said,) = [b for b in run.decide().blocked if b.subject.name == "night"]
    assert said.reason != "NotYet"


def test_work_that_is_being_ended_is_foreseen_to_be_gone_soon() -> None:
    run = displaced(by=STRONG, gpus=1)
    run.spec = spec()
    run.step()
    assert run.ledger.overlays["strong"].state not in ("active", "done")
    assert told(run, night(run, 5.0)).reason == "NotYet", "though its grace would last longer"


def test_a_window_may_begin_the_moment_at_which_work_is_predicted_to_end() -> None:
    run = displaced(by=STRONG, gpus=1)
    active = run.ledger.overlays["strong"].active_since
    assert active is not None
    end = active.wall + 300.0 - run.plant.now.wall
    assert told(run, STRONG, night(run, end)).reason == "NotYet"
    assert told(run, STRONG, night(run, end - 1.0)).reason != "NotYet"


# ---------------------------------------------------------------- returns


def back(run: Run) -> Mapping[str, tuple[str, ...]]:
    """Who is foreseen to come back, and where to."""
    return {a.subject.name: a.gpus for a in starts(run.decide()) if a.cause.kind == "restore"}


def test_one_that_cannot_come_back_keeps_no_other_from_it() -> None:
    both = overlay("both", [0, 1], priority=900, duration=300.0)
    run = displaced(FIRST, SECOND, by=both)
    assert back(run) == {"first": (uuid(1),), "second": (uuid(0),)}
    run.spec = spec(replace(FIRST, state="stopped"), SECOND, both)
    assert back(run) == {"second": (uuid(0),)}
    run.spec = spec(FIRST, SECOND, both)
    run.plant.overrides[1] = {"healthy": False, "detail": "fell off the bus"}
    assert back(run) == {"second": (uuid(0),)}


def test_all_who_sleep_for_it_are_woken_once_it_is_over() -> None:
    sleepers = [endpoint(f"e{i}", [i], memory=70, priority=700, evict=Evict("sleep")) for i in range(2)]
    both = overlay("both", [0, 1], memory=60, priority=900, duration=300.0)
    run = displaced(*sleepers, by=both)
    woken = [a.subject.name for a in run.decide().actions if a.op == "wake" and a.cause.kind == "restore"]
    assert sorted(woken) == ["e0", "e1"]


def test_whom_an_overlay_has_run_elsewhere_comes_back_to_its_own_place() -> None:
    elsewhere = replace(SECOND, gpus=FIRST.gpus)
    run = displaced(SECOND, by=overlay("moved", None, workload=False, priority=900, sets=(elsewhere,)))
    run.settle(
        until=lambda _: run.plant.is_ready("second") and [i.gpus for i in run.plant.incarnations] == [(uuid(1),)]
    )
    assert back(run) == {"second": (uuid(0),)}


LONG = overlay("long", [0], memory=20, priority=900, duration=2 * HOUR)


def beside(run: Run, on: int, after: float | None = None, **fields: object) -> OverlaySpec:
    """Small work that may displace nobody, and that nothing ends in time."""
    start = None if after is None else run.plant.now.wall + after
    return overlay("shy", [on], memory=10, priority=100, evict=False, start=start, duration=9 * HOUR, **fields)  # type: ignore[arg-type]


def test_a_window_before_a_return_may_not_put_it_off() -> None:
    run = displaced(SECOND, by=LONG)
    said = told(run, SECOND, LONG, beside(run, 0, HOUR), name="shy")
    assert said.reason == "WindowTaken"
    assert "second (which is to be back" in said.message


def test_work_begins_beside_one_that_comes_back_to_a_part_of_a_gpu_whatever_comes_back_to_others() -> None:
    part = endpoint("part", [1], memory=30, priority=650)
    wide = overlay("wide", [0, 1], memory=60, priority=900, duration=2 * HOUR)
    run = displaced(SECOND, part, by=wide)
    run.spec = spec(SECOND, part, wide, beside(run, 1))
    assert "shy" in {a.subject.name for a in starts(run.decide())}
    assert told(run, SECOND, part, wide, beside(run, 0), name="shy").reason == "WindowTaken"


def test_one_that_is_back_by_then_hides_no_return_that_comes_later() -> None:
    short = overlay("short", [1], memory=20, priority=900, duration=600.0)
    first = replace(FIRST, priority=700)
    run = displaced(first, SECOND, by=LONG)
    run.spec = spec(first, SECOND, LONG, short)
    run.settle(until=overlay_state("short", "active"))
    said = told(run, first, SECOND, LONG, short, beside(run, 0, HOUR), name="shy")
    assert said.reason == "WindowTaken"
    assert "second" in said.message
