"""Why an overlay does not get the place of others: each rule by itself and together, in words, with what would help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from accounting import settled
from builders import NOW, endpoint, overlay, spec
from msgspec.structs import replace
from plant import Run, overlay_state

from reconciler.plan.actions import Blocked
from reconciler.spec.spec import EndpointSpec, OverlaySpec

ASK = endpoint("ask", [0], priority=100, capabilities=("ask",))
SMALL = replace(endpoint("ask", [0], memory=30, priority=100), preemptible=False)
LOW = overlay("low", [0], memory=30, priority=50, duration=9000.0)
HOLDS = overlay("holds", [0], memory=15, priority=40, duration=9000.0, workload=False)
PLACE = "it would need the place of"


def work(**fields: Any) -> OverlaySpec:
    return overlay("work", [0], **fields)


def blocked(run: Run, *items: EndpointSpec | OverlaySpec, floors: Mapping[str, int] | None = None) -> Blocked | None:
    """What is said of the work beside these."""
    run.spec = spec(*items, floors=floors)
    return next((b for b in run.decide().blocked if b.subject.name == "work"), None)


ONE_RULE = {
    "NoConsent": (ASK, work(evict=False), {}, f"{PLACE} ask, and may not evict", "set allow_baseline_eviction: true"),
    "PriorityTooLow": (
        replace(ASK, priority=600), work(priority=600), {},
        f"{PLACE} ask, whose priority is not lower than 600", "give it a priority above that of ask (600)",
    ),
    "NotPreemptible": (
        replace(ASK, preemptible=False), work(), {},
        f"{PLACE} ask, which may not be displaced", "set preemptible: true on ask",
    ),
    "FloorWouldBreak": (
        ASK, work(), {"ask": 1},
        "without ask fewer providers would be ready than have to be (ask: 1)", "lower min_available, or add a provider",
    ),
    "FloorWouldBreak, for what it requires itself": (
        ASK, work(requires=("ask",)), {}, "without ask nothing would offer ask", "add a provider",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", ONE_RULE)
def test_one_rule_alone_is_named_with_whom_it_protects_and_what_would_help(rule: str) -> None:
    item, asks, floors, message, hint = ONE_RULE[rule]
    said = blocked(settled(ASK, floors=floors), item, asks, floors=floors)
    assert said is not None
    assert (said.reason, said.message, said.alternatives) == (rule.partition(",")[0], message, (hint,))
    assert said.transient == (rule == "NotPreemptible"), "that passes without an edit once it ends"


def test_a_cool_down_is_named_first_for_it_passes() -> None:
    run = settled(ASK)
    now = run.plant.now.wall
    tired = replace(run.ledger.endpoints["ask"], evictions=tuple(now - s for s in (50, 40, 30, 20, 10, 5)))
    run.ledger = replace(run.ledger, endpoints={"ask": tired})
    said = blocked(run, ASK, work())
    assert said is not None
    assert (said.reason, said.message) == ("CoolDown", "ask was evicted 6 times within the hour (at most 3)")
    assert (said.alternatives, said.transient) == (("wait, or `reconciler reset ask`",), True)


def test_of_several_rules_all_are_named_with_a_hint_for_each() -> None:
    said = blocked(settled(ASK), replace(ASK, preemptible=False), work(evict=False))
    assert said is not None
    assert said.reason == "NoConsent"
    assert said.message == f"{PLACE} ask, and may not evict; and ask may not be displaced"
    assert said.alternatives == ("set allow_baseline_eviction: true", "set preemptible: true on ask")
    assert not said.transient


def test_of_a_floor_only_those_are_named_that_offer_what_would_be_missing() -> None:
    other = endpoint("code", [1], priority=40, capabilities=("code",))
    floors = {"ask": 1, "code": 0}
    said = blocked(settled(ASK, other, gpus=2, floors=floors), ASK, other, overlay("work", [0, 1]), floors=floors)
    assert said is not None
    assert said.message == "without ask fewer providers would be ready than have to be (ask: 1)"


def test_a_pin_to_a_gpu_that_is_not_there_is_named_beside_those_that_are() -> None:
    said = blocked(settled(ASK, gpus=2), ASK, overlay("work", [0, 7]))
    assert said is not None
    assert said.message == "it is pinned to GPU 7; those of this node are 0, 1"


@pytest.mark.parametrize(
    ("fault", "code", "why", "hint"),
    [
        ("unknown", "GpuUnknown", "it cannot be read at the moment", "wait: it is read again and again"),
        ("lost", "GpuLost", "the driver has lost it", "reset GPU 0 (`nvidia-smi --gpu-reset -i 0`), or reboot"),
    ],
)
def test_why_a_gpu_cannot_be_used_is_told_in_words_where_the_driver_says_nothing(
    fault: str, code: str, why: str, hint: str
) -> None:
    run = settled(ASK)
    run.plant.overrides = {0: {"state": fault}}
    said = blocked(run, ASK, work())
    assert said is not None
    assert (said.reason, said.message) == (code, f"GPU 0 cannot be used: {why}")
    assert said.alternatives[0].startswith(hint)


FIRM = {
    "wait for low to end, or make the work of low preemptible": (LOW,),
    "wait for holds to end": (HOLDS,),
    "wait for holds, low to end": (LOW, HOLDS),
    "set preemptible: true on ask, and wait for low to end, or make the work of low preemptible": (SMALL, LOW),
    "set preemptible: true on ask, and wait for holds, low to end": (SMALL, LOW, HOLDS),
}


@pytest.mark.parametrize("hint", FIRM)
def test_of_those_that_may_not_be_displaced_each_has_its_own_way_out(hint: str) -> None:
    items = FIRM[hint]
    run = settled(*(i for i in items if isinstance(i, EndpointSpec)))
    for count in range(1, len(items) + 1):
        run.spec = spec(*items[:count])
        run.settle(until=lambda p: all(r.state == "active" for r in p.ledger.overlays.values()))
    said = blocked(run, *items, work())
    assert said is not None
    names = ", ".join(sorted(item.name for item in items))
    assert (said.message, said.alternatives) == (f"{PLACE} {names}, which may not be displaced", (hint,))


def test_work_that_may_be_displaced_gives_way_if_it_is_less_important_and_those_behind_it_may_as_well() -> None:
    polite = overlay("low", [0], priority=50, duration=9000.0, preemptible=True)
    run = settled()
    run.spec = spec(polite)
    run.settle(until=overlay_state("low", "active"))
    assert blocked(run, polite, work()) is None
    equal = blocked(run, replace(polite, priority=600), work(priority=600))
    assert equal is not None
    assert equal.reason == "PriorityTooLow"
    behind = replace(ASK, priority=40)
    run = settled(behind)
    run.spec = spec(behind, polite)
    run.settle(until=overlay_state("low", "active"))
    for item, asks, reason in (
        (behind, work(evict=False), "NoConsent"),
        (replace(behind, priority=600), work(priority=600), "PriorityTooLow"),
        (replace(behind, preemptible=False), work(), "NotPreemptible"),
    ):
        said = blocked(run, item, polite, asks)
        assert said is not None
        assert said.reason == reason
    assert blocked(run, behind, polite, work()) is None


def test_who_is_behind_displaced_work_counts_only_as_long_as_it_is_to_run() -> None:
    polite = overlay("low", [0], priority=50, duration=9000.0, preemptible=True)
    behind = replace(ASK, priority=40)
    run = settled(behind)
    run.spec = spec(behind, polite)
    run.settle(until=overlay_state("low", "active"))
    shy = work(evict=False)
    assert (said := blocked(run, behind, polite, shy)) is not None
    assert said.reason == "NoConsent"
    assert blocked(run, replace(behind, state="stopped"), polite, shy) is None
    assert blocked(run, polite, shy) is None, "it is in no file any more"


def test_nobody_is_displaced_of_whom_something_is_not_seen() -> None:
    gang = endpoint("gang", [0, 1], priority=40)
    run = settled(gang, gpus=2)
    assert blocked(run, gang, work()) is None
    run.plant.overrides[1] = {"state": "unknown"}
    assert (said := blocked(run, gang, work())) is not None
    assert said.reason == "GpuUnknown", "one of its GPUs"
    run = settled(ASK)
    run.plant.incarnations = [replace(i, phase="unknown") for i in run.plant.incarnations]
    assert (said := blocked(run, ASK, work())) is not None
    assert said.reason == "GpuUnknown", "itself"


def test_a_window_may_have_the_place_of_whom_an_overlay_keeps_stopped_until_then() -> None:
    run = settled(ASK)
    brief = overlay("sets", None, workload=False, sets=(replace(ASK, state="stopped"),), duration=600.0)
    run.spec = spec(ASK, brief)
    run.settle(until=overlay_state("sets", "active"))
    assert (said := blocked(run, ASK, brief, work(start=NOW.wall + 7200.0))) is not None
    assert said.reason == "NotYet"


def test_a_window_may_not_have_the_place_of_whom_a_lasting_overlay_protects() -> None:
    lasting = overlay("sets", None, workload=False, sets=(replace(ASK, preemptible=False),), duration=9000.0)
    run = settled(ASK)
    run.spec = spec(ASK, lasting)
    run.settle(until=overlay_state("sets", "active"))
    assert (said := blocked(run, ASK, lasting, work(start=NOW.wall + 7200.0, priority=700))) is not None
    assert said.reason == "NotPreemptible"
