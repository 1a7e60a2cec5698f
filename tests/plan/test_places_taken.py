"""Places that were somebody's a moment ago: taken by strangers, broken, wanted by others while their owner restarts."""

from __future__ import annotations

from accounting import lawful
from builders import endpoint, foreign, overlay, spec
from plant import Behaviour, Plant, Run, overlay_state

from reconciler.units import GIB


def after_one_failed_attempt(happens: dict[int, object]) -> Run:
    """One GPU, work that fails once and may be tried again, and something that happens to the GPU meanwhile."""
    plant = Plant(totals=[80 * GIB], behaviour=Behaviour(exit_codes={"work": (1, 0)}, default_run_s=100.0))
    run = Run(spec(overlay("work", [0], memory=20, retries=1)), plant)
    run.settle(until=overlay_state("work", "active"))
    plant.advance(50.0)
    plant.overrides = {i: fields for i, fields in happens.items() if isinstance(fields, dict)}
    plant.foreign = {i: found for i, found in happens.items() if isinstance(found, list)}
    return run


def test_a_second_attempt_waits_for_memory_that_a_stranger_took_meanwhile() -> None:
    run = after_one_failed_attempt({0: [foreign(900, 70 * GIB)]})
    run.settle(until=lambda plan: any(b.reason == "GpuOccupied" for b in plan.blocked))
    assert run.starts() == ["work"]
    run.plant.foreign = {}
    run.plant.advance(1.0)
    run.settle(until=overlay_state("work", "done"))
    assert run.starts() == ["work", "work"]


def test_a_second_attempt_on_memory_that_never_comes_back_is_given_up() -> None:
    run = after_one_failed_attempt({0: [foreign(900, 70 * GIB)]})
    run.settle()
    assert run.starts() == ["work"]
    assert run.ledger.overlays["work"].state == "failed"
    assert "taken by someone else" in run.ledger.overlays["work"].reason


def test_a_second_attempt_is_not_made_on_a_lost_gpu_and_no_third_one_elsewhere() -> None:
    run = after_one_failed_attempt({0: {"state": "lost"}})
    run.settle()
    assert run.starts() == ["work"]
    assert run.ledger.overlays["work"].state == "failed"
    told = "GpuLost: GPU 0, which it had leased, cannot be used any more: the driver has lost it"
    assert run.ledger.overlays["work"].reason == told


def test_the_last_provider_keeps_its_place_while_it_restarts() -> None:
    """Ready, its floor keeps the overlay out; a crash must not open the door for a whole makespan."""
    chat = endpoint("chat", [0], capabilities=("ask",), priority=10, port=8000)
    plant = Plant(totals=[80 * GIB])
    run = Run(spec(chat, floors={"ask": 1}), plant)
    run.settle()
    run.spec = spec(chat, overlay("work", [0], priority=900, evict=True), floors={"ask": 1})
    run.settle()
    assert run.ledger.overlays["work"].state == "pending"
    running = plant.current("chat")
    assert running is not None
    plant.end(running.id, 1)
    run.settle()
    assert run.ledger.overlays["work"].state == "pending"
    assert plant.is_ready("chat")
    assert run.starts() == ["chat", "chat"]


def test_an_endpoint_beside_which_it_fits_is_no_reason_to_give_up_a_place_that_other_work_still_leaves() -> None:
    chat = endpoint("chat", [0], memory=20, preemptible=False, port=8000)
    run = Run(spec(chat), Plant(totals=[80 * GIB]), watch=lawful)
    run.settle()
    rough = overlay("rough", [0], memory=40, priority=100, preemptible=True)
    run.spec = spec(chat, rough)
    run.settle(until=overlay_state("rough", "active"))
    run.spec = spec(chat, rough, overlay("final", [0], memory=50, priority=600))
    decided, _ = run.step()
    assert {n: r.state for n, r in decided.ledger.overlays.items()} == {"final": "evicting", "rough": "completing"}
    run.settle(until=overlay_state("rough", "done"))
    assert run.starts() == ["chat", "rough", "final", "rough"]
