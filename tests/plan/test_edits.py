"""Edits of what runs, beside overlays that come in the same look: who leaves for which place, and who may have the old
one."""

from __future__ import annotations

from random import Random

import pytest
from accounting import settled
from builders import claim, endpoint, overlay, spec, uuid
from msgspec.structs import replace
from plant import Run, describe, overlay_state

from reconciler.plan.actions import Plan
from reconciler.spec.spec import EndpointSpec, OverlaySpec


def waits_for(decided: Plan, start: str, gone: str) -> bool:
    """Whether a start comes after the memory of somebody is seen free."""
    actions = {a.id: a for a in decided.actions}

    def after(number: int) -> bool:
        action = actions[number]
        return (action.op == "wait_memory" and action.subject.name == gone) or any(after(n) for n in action.needs)

    return any(after(a.id) for a in decided.actions if a.op in ("start", "start_workload") and a.subject.name == start)


def comes_to_rest_on(run: Run, gpu: int) -> bool:
    """Whether all work gets done, and one endpoint alone is there in the end, on this GPU."""
    last = run.settle()
    is_done = all(record.state == "done" for record in last.ledger.overlays.values())
    return is_done and [i.gpus for i in run.plant.incarnations] == [(uuid(gpu),)]


CODE = endpoint("code", [1], priority=10, port=8001)
EDITED = replace(CODE, gpus=claim([0]) or CODE.gpus)
FIRST = overlay("first", [0], priority=1000)
POLITE = overlay("polite", 1, priority=5, evict=False)


def test_work_that_is_given_the_old_place_of_one_displaced_from_its_new_place_waits_until_it_is_gone() -> None:
    run = settled(CODE, gpus=2)
    run.spec = spec(EDITED, FIRST, POLITE)
    decided = run.decide()
    assert {n: r.gpus for n, r in decided.ledger.overlays.items()} == {"first": (uuid(0),), "polite": (uuid(1),)}
    assert decided.ledger.overlays["first"].evicted == ("code",)
    assert waits_for(decided, "polite", "code"), describe(decided)
    assert comes_to_rest_on(run, 0)


def test_one_displaced_from_its_new_place_stays_in_the_old_one_if_nobody_else_has_it() -> None:
    run = settled(CODE, gpus=2)
    run.spec = spec(EDITED, FIRST)
    run.settle(until=overlay_state("first", "active"))
    assert run.stops() == []
    assert [b.reason for b in run.decide().blocked] == ["EditWaits"]
    run.settle()
    assert [i.gpus for i in run.plant.incarnations] == [(uuid(0),)]


def test_work_in_the_old_place_of_one_whose_edit_is_taken_back_before_anything_happened_gets_it_all_the_same() -> None:
    run = settled(CODE, gpus=2)
    run.spec = spec(EDITED, FIRST, POLITE)
    run.ledger = run.decide().ledger
    run.spec = spec(CODE, FIRST, POLITE)
    assert comes_to_rest_on(run, 1)


def test_work_to_which_a_place_was_leased_looks_for_another_if_the_edit_that_frees_it_is_taken_back() -> None:
    run = settled(CODE, gpus=2)
    run.spec = spec(EDITED, POLITE)
    run.ledger = run.decide().ledger
    assert run.ledger.overlays["polite"].gpus == (uuid(1),)
    run.spec = spec(CODE, POLITE)
    last = run.settle()
    assert run.stops() == []
    assert last.ledger.overlays["polite"].state == "done"
    assert [a.gpus for a in run.plant.history if a.op == "start_workload"] == [(uuid(0),)]


def test_two_that_change_places_do_so_if_one_of_them_is_displaced_and_the_others_old_place_is_leased() -> None:
    low, high = endpoint("low", [1], priority=10, port=8001), endpoint("high", [0], priority=20, port=8002)
    run = settled(low, high, gpus=2)
    run.spec = spec(replace(low, gpus=high.gpus), replace(high, gpus=low.gpus), overlay("work", 1, priority=15))
    decided = run.decide()
    assert decided.ledger.overlays["work"].gpus == (uuid(0),)
    assert waits_for(decided, "work", "high")
    assert waits_for(decided, "high", "low")
    last = run.settle()
    assert last.ledger.overlays["work"].state == "done"
    assert {i.subject.name: i.gpus for i in run.plant.incarnations} == {"low": (uuid(0),), "high": (uuid(1),)}


def test_nobody_is_stopped_for_a_place_to_which_another_is_being_started_again() -> None:
    chat, code = endpoint("chat", [0], priority=30, port=8001), endpoint("code", [1], priority=10, port=8002)
    run = settled(chat, code, gpus=2)
    run.plant.end(run.plant.incarnations[0].id, 1)
    assert run.plant.current("chat") is None
    run.spec = spec(chat, replace(code, gpus=claim([0]) or code.gpus))
    last = run.settle()
    assert run.stops() == []
    assert [b.reason for b in last.blocked] == ["EditWaits"]


def test_an_endpoint_is_not_started_on_the_lease_of_an_overlay_that_had_it_otherwise_and_is_over() -> None:
    code = endpoint("code", 2, priority=10, port=8001)
    run = settled(code, gpus=3)
    run.spec = spec(code, overlay("small", 1, sets=[replace(code, gpus=claim([2]) or code.gpus)]))
    run.step()
    run.spec = spec(code)
    decided = run.decide()
    assert decided.ledger.overlays["small"].state == "completing"
    assert [len(a.gpus) for a in decided.actions if a.op == "start"] in ([], [2])
    run.settle()
    assert [len(i.gpus) for i in run.plant.incarnations] == [2]


def test_nobody_is_foreseen_to_return_to_where_the_overlays_own_version_of_another_goes_on_running() -> None:
    chat, code = endpoint("chat", [0], priority=30, port=8001), endpoint("code", 1, priority=20, port=8002)
    pinned = replace(code, gpus=claim([0]) or code.gpus)
    run = settled(chat, code, gpus=2)
    run.spec = spec(chat, code, overlay("swap", [1], priority=1000, sets=[pinned]))
    run.settle(until=overlay_state("swap", "completing"))
    decided = run.decide()
    assert not [a for a in decided.actions if a.op == "start" and a.subject.name == "chat"]
    run.settle()
    assert run.starts().count("code") == 2, "it runs where it is as the files have it, and is left there"


# ---------------------------------------------------------------- many boxes

PLACES = (1, 1, 2, [0], [1], [0, 1])


def claims(draw: Random, gpus: int) -> int | list[int]:
    return draw.choice([c for c in (*PLACES, [gpus - 1]) if isinstance(c, int) or max(c) < gpus])


def memory(draw: Random) -> float | int | None:
    return draw.choice([None, None, None, 40, 20, 0.5])


def arrivals(draw: Random, gpus: int, edited: list[EndpointSpec]) -> list[OverlaySpec]:
    """Up to three overlays; a third of them set an endpoint otherwise."""
    found = []
    for index in range(draw.randint(1, 3)):
        sets = []
        if draw.random() < 0.35:
            target = draw.choice(edited)
            other = replace(target, gpus=claim(claims(draw, gpus)) or target.gpus)
            sets = [replace(target, state="stopped") if draw.random() < 0.6 else other]
        found.append(
            overlay(
                f"o{index}", claims(draw, gpus), memory=memory(draw), priority=draw.choice([5, 15, 25, 1000]),
                evict=draw.random() < 0.7, sets=sets,
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize("block", range(4))
def test_edits_and_overlays_of_one_look_or_taken_back_in_the_next_break_no_rule_and_no_overlay_fails(
    block: int,
) -> None:
    for number in range(block * 40, block * 40 + 40):
        draw = Random(number)
        gpus = draw.choice([2, 2, 3, 4])
        before = [
            endpoint(
                f"e{i}", claims(draw, gpus), memory=memory(draw), priority=draw.choice([10, 20, 30]),
                preemptible=draw.random() < 0.85, port=8000 + i,
            )
            for i in range(draw.randint(1, 3))
        ]  # fmt: skip
        run = settled(*before, gpus=gpus)
        edited = [replace(e, gpus=claim(claims(draw, gpus)) or e.gpus) if draw.random() < 0.7 else e for e in before]
        coming = arrivals(draw, gpus, edited)
        run.spec = spec(*edited, *coming)
        run.step()
        if draw.random() < 0.3:
            run.spec = spec(*before, *coming)
        elif draw.random() < 0.2:
            run.spec = spec(*edited, *coming[1:])
        last = run.settle()
        failed = {n: r.reason for n, r in last.ledger.overlays.items() if r.state == "failed"}
        assert not failed, f"box {number}: {failed}"
