"""What runs in a reservation is foreign, and counts once: within the claim. Strangers count beside it."""

from __future__ import annotations

import pytest
from accounting import lawful
from builders import endpoint, foreign, overlay, spec
from msgspec.structs import replace
from plant import Plant, Run, overlay_state

from reconciler.plan.ledger import Ledger
from reconciler.plan.observed import GpuProcess
from reconciler.spec.spec import EndpointSpec, Evict, OverlaySpec
from reconciler.units import GIB

LONG = 36_000.0
STRANGER, GUEST, OTHER = 70, 71, 72
"""Pids."""


def reservation(name: str = "resv", memory: int | None = 40, duration: float = LONG) -> OverlaySpec:
    return overlay(name, [0], memory=memory, duration=duration, workload=False)


def box(*items: EndpointSpec | OverlaySpec, there: tuple[GpuProcess, ...] = ()) -> Run:
    """One GPU of 80 GiB, with these strangers on it from the beginning; every decision is checked."""
    run = Run(spec(*items), Plant(totals=[80 * GIB], foreign={0: list(there)}), watch=lawful)
    pass_by(run)
    return run


def pass_by(run: Run, seconds: float = 200.0) -> None:
    """Let time go by, and do what is to be done meanwhile."""
    until = run.plant.now.mono + seconds
    for _ in range(500):
        decided, acted = run.step()
        if acted:
            continue
        wake = decided.next_wake.mono if decided.next_wake else until
        now, event = run.plant.now.mono, run.plant.next_event() or until
        if now >= until:
            return
        run.plant.advance(max(0.001, min(wake, event, until) - now))
    raise AssertionError("it does not come to rest")


def comes(run: Run, *processes: GpuProcess) -> None:
    """From now on these are what is foreign on the GPU."""
    run.plant.foreign = {0: list(processes)}
    pass_by(run, 1.0)


def crashes(run: Run, name: str) -> None:
    current = run.plant.current(name)
    assert current is not None
    run.plant.end(current.id, 1)
    pass_by(run)


@pytest.mark.parametrize("guest", [1, 38, 40, 48])
def test_an_endpoint_beside_a_reservation_is_started_again_whatever_of_its_claim_the_guest_has(guest: int) -> None:
    run = box(endpoint("e", [0], memory=30), reservation())
    comes(run, foreign(GUEST, guest * GIB))
    crashes(run, "e")
    assert run.plant.is_ready("e")


def test_what_a_guest_takes_beyond_the_claim_counts_beside_it() -> None:
    run = box(endpoint("e", [0], memory=30), reservation())
    comes(run, foreign(GUEST, 48 * GIB))
    run.spec = spec(endpoint("e", [0], memory=30), reservation(), endpoint("late", [0], memory=3, port=8001))
    pass_by(run)
    assert not run.plant.is_ready("late")
    comes(run, foreign(GUEST, 40 * GIB))
    pass_by(run)
    assert run.plant.is_ready("late")


def test_what_is_never_planned_of_a_gpu_is_not_used_on_account_of_a_guest() -> None:
    run = box(reservation())
    comes(run, foreign(GUEST, GIB))
    run.spec = spec(reservation(), endpoint("big", [0], memory=40))
    pass_by(run)
    assert run.starts() == []
    run.spec = spec(reservation(), endpoint("small", [0], memory=39))
    pass_by(run)
    assert run.plant.is_ready("small")


def test_a_guest_without_a_name_is_one_as_well() -> None:
    run = box(endpoint("e", [0], memory=30), reservation())
    comes(run, replace(foreign(GUEST, GIB), memory_bytes=None))
    run.plant.overrides = {0: {"used_bytes": 68 * GIB}}
    assert run.situation().rooms[run.plant.observe().gpus[0].uuid].foreign_bytes == 38 * GIB
    run.spec = spec(endpoint("e", [0], memory=30), reservation(), endpoint("late", [0], memory=5, port=8001))
    decided = run.decide()
    assert [a.subject.name for a in decided.actions if a.op == "start"] == ["late"]


BEFORE = foreign(STRANGER, 10 * GIB)


def test_what_had_no_name_before_the_reservation_is_a_strangers() -> None:
    run = Run(spec(reservation()), Plant(totals=[80 * GIB]), watch=lawful)
    run.plant.overrides = {0: {"used_bytes": 10 * GIB}}
    pass_by(run)
    run.spec = spec(reservation(), endpoint("big", [0], memory=31))
    assert [a.subject.name for a in run.decide().actions if a.op == "start"] == []
    run.spec = spec(reservation(), endpoint("small", [0], memory=30))
    assert [a.subject.name for a in run.decide().actions if a.op == "start"] == ["small"]


@pytest.mark.parametrize(
    "since",
    [
        (BEFORE,),
        (foreign(STRANGER, 30 * GIB),),
        (foreign(OTHER, 10 * GIB),),
        (BEFORE, foreign(GUEST, 10 * GIB)),
        (BEFORE, foreign(GUEST, 40 * GIB)),
    ],
    ids=["stays", "grows", "is started again", "and some of the guest", "and all of the guest"],
)
def test_nothing_is_started_in_what_was_promised_beside_a_stranger_who(since: tuple[GpuProcess, ...]) -> None:
    run = box(reservation(), there=(BEFORE,))
    comes(run, *since)
    held = max(10, *(p.memory_bytes // GIB for p in since if p.memory_bytes and p.pid == STRANGER), 0)
    most = 80 - 40 - held
    run.spec = spec(reservation(), endpoint("big", [0], memory=most + 1))
    pass_by(run)
    assert run.starts() == []
    run.spec = spec(reservation(), endpoint("small", [0], memory=most))
    pass_by(run)
    assert run.plant.is_ready("small")


def test_a_guest_who_stays_when_his_reservation_is_over_is_a_stranger() -> None:
    run = box(reservation(duration=500.0))
    comes(run, foreign(GUEST, 38 * GIB))
    pass_by(run, 500.0)
    assert run.ledger.overlays["resv"].state == "done"
    run.spec = spec(reservation("next"), endpoint("big", [0], memory=43))
    pass_by(run)
    assert run.starts() == []
    assert run.ledger.overlays["next"].state == "active"
    run.spec = spec(reservation("next"), endpoint("small", [0], memory=3))
    pass_by(run)
    assert run.starts() == []


def test_the_second_of_two_reservations_has_its_claim_beside_what_the_guest_of_the_first_has() -> None:
    run = box(reservation("first", 20))
    comes(run, foreign(GUEST, 30 * GIB))
    run.spec = spec(reservation("first", 20), reservation("second", 30))
    pass_by(run)
    assert run.ledger.overlays["second"].state == "active"
    items = reservation("first", 20), reservation("second", 30)
    run.spec = spec(*items, endpoint("big", [0], memory=21))
    pass_by(run)
    assert run.starts() == []
    comes(run, foreign(GUEST, 30 * GIB), foreign(OTHER, 30 * GIB))
    run.spec = spec(*items, endpoint("small", [0], memory=20))
    pass_by(run)
    assert run.plant.is_ready("small")


def test_whose_guest_stays_when_one_of_two_reservations_is_over_is_not_guessed() -> None:
    first, second = reservation("first", 20), reservation("second", 30)
    run = box(first, second)
    comes(run, foreign(GUEST, 18 * GIB))
    run.spec = spec(first, endpoint("big", [0], memory=43))
    pass_by(run)
    assert run.ledger.overlays["second"].state == "cancelled"
    assert run.starts() == []  # 20 are promised beside 18


def test_who_was_there_when_the_gpu_was_first_seen_is_no_guest() -> None:
    run = box(reservation())
    run.ledger = replace(run.ledger, leases=tuple(replace(x, strangers=None) for x in run.ledger.leases))
    run.plant.overrides = {0: {"state": "unknown"}}
    comes(run, foreign(GUEST, 38 * GIB))
    assert [x.strangers for x in run.ledger.leases] == [None]
    run.plant.overrides = {}
    run.spec = spec(reservation(), endpoint("e", [0], memory=30))
    pass_by(run)
    assert run.starts() == []


def test_work_that_was_adopted_when_its_file_asked_for_a_reservation_has_no_guest() -> None:
    run = Run(spec(overlay("resv", [0], memory=40, duration=LONG)), Plant(totals=[80 * GIB]), watch=lawful)
    run.settle(until=overlay_state("resv", "active"))
    run.ledger = Ledger()
    run.spec = spec(reservation(), endpoint("e", [0], memory=30))
    comes(run, foreign(STRANGER, 38 * GIB))
    assert run.ledger.overlays["resv"].state == "active"
    assert [x.strangers for x in run.ledger.leases] == [None]
    assert run.starts() == ["resv"]


def test_an_overlay_finds_its_place_beside_a_reservation_and_its_guest() -> None:
    run = box(reservation())
    comes(run, foreign(GUEST, 38 * GIB))
    run.spec = spec(reservation(), overlay("work", [0], memory=30, priority=1))
    run.settle(until=overlay_state("work", "done"))
    assert run.starts() == ["work"]


def test_an_endpoint_gives_way_by_sleeping_beside_a_reservation_and_its_guest() -> None:
    sleeper = endpoint("e", [0], memory=20, priority=1, evict=Evict("sleep", 1, 10 * GIB))
    run = box(sleeper, reservation())
    comes(run, foreign(GUEST, 38 * GIB))
    run.spec = spec(sleeper, reservation(), overlay("work", [0], memory=30))
    run.settle(until=overlay_state("work", "active"))
    assert [a.op for a in run.plant.history if a.subject.name == "e"] == ["start", "sleep"]


def test_an_overlay_gives_back_its_place_if_there_is_none_beside_a_guest_and_an_endpoint_that_stays_after_all() -> None:
    before, after = endpoint("e", [0], memory=30), replace(endpoint("e", [0], memory=5), process_hash="edited")
    run = box(before, reservation())
    comes(run, foreign(GUEST, 38 * GIB))
    work = overlay("work", [0], memory=30, evict=False)
    run.spec = spec(after, reservation(), work)
    run.ledger = run.decide().ledger  # and nothing is done about it
    assert run.ledger.overlays["work"].state == "evicting"
    run.spec = spec(before, reservation(), work)
    pass_by(run, 1.0)
    assert run.ledger.overlays["work"].state == "pending"
    assert run.ledger.overlays["work"].reason == "e was to leave its GPUs, and stays"


@pytest.mark.parametrize("memory", [None, 40])
def test_an_endpoint_whose_place_a_guest_has_is_told_of_the_reservation_while_it_lasts(
    memory: int | None,
) -> None:
    run = box(endpoint("e", [0], memory=60, priority=1), reservation(memory=memory))
    comes(run, foreign(GUEST, 38 * GIB))
    assert run.decide().endpoints["e"].reason == "EvictedBy: its place is held by resv"
    run.spec = spec(endpoint("e", [0], memory=60, priority=1))
    pass_by(run)
    assert run.decide().endpoints["e"].reason.startswith(f"GpuOccupied: GPU 0: 38GiB held by pid {GUEST}")


def test_strangers_are_noted_once_however_much_a_guest_takes_and_gives_back() -> None:
    run = box(reservation(), there=(BEFORE,))
    before = run.ledger.leases
    assert before[0].strangers is not None
    assert before[0].strangers.processes == ((STRANGER, 10 * GIB),)
    for size in (1, 38, 5):
        comes(run, BEFORE, foreign(GUEST, size * GIB))
        assert run.ledger.leases == before
