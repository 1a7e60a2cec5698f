"""Every state, agenda and time: trouble, or none."""

from __future__ import annotations

from typing import Any

import builders
import pytest
from health_box import T0, Box, asked, crash, entry, gpu, killed, overlay_record, view
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.errors import Problem
from reconciler.health.assess import assess
from reconciler.health.rules import ESCALATE_AFTER_S, LASTING_S, find
from reconciler.plan.actions import Blocked
from reconciler.plan.ledger import AgendaEntry, EndpointRecord, Quarantine
from reconciler.plan.observed import Probe, Subject

STATES = ("pending", "starting", "healthy", "unhealthy", "failed", "stopping", "stopped", "sleeping", "unknown")
A = "thinking"
NEW = EndpointRecord(A)
CRASHED = EndpointRecord(A, exits=(crash(),))
ASKED = EndpointRecord(A, exits=(crash(T0.plus(-90)), asked()))
RECOVERED = EndpointRecord(A, exits=(crash(T0.plus(-90)),), ready_since=T0.plus(-60))
COVER = entry(A)
LEAVE = entry(A, "stopping", "stopped")
PAST = entry(A, until=-1.0)
LONG_PAST = entry(A, until=-1.0 - ESCALATE_AFTER_S)
TO_COME = entry(A, start=50.0)
PAST_OF_OTHER = entry("other", until=-1.0)

W, C = "warning", "critical"

# (record, agenda) → per state the kind and severity; states left out are explained
TABLE = [
    ("first start", NEW, (), {"unhealthy": f"Unplanned {W}", "sleeping": f"Unplanned {W}", "failed": f"CrashLoop {C}"}),
    ("after an end that was asked for", ASKED, (), {
        "unhealthy": f"Unplanned {W}", "sleeping": f"Unplanned {W}", "failed": f"CrashLoop {C}"}),
    ("a crash, and ready again since", RECOVERED, (), {
        "unhealthy": f"Unplanned {W}", "sleeping": f"Unplanned {W}", "failed": f"CrashLoop {C}"}),
    ("a crash", CRASHED, (), {
        **dict.fromkeys(("pending", "starting", "stopping", "stopped", "sleeping", "unhealthy"), f"Unplanned {W}"),
        "failed": f"CrashLoop {C}"}),
    ("a crash, the agenda speaks of another", CRASHED, (PAST_OF_OTHER, entry("other")), {
        **dict.fromkeys(("pending", "starting", "stopping", "stopped", "sleeping", "unhealthy"), f"Unplanned {W}"),
        "failed": f"CrashLoop {C}"}),
    ("a crash, and an entry still to come", CRASHED, (TO_COME,), {
        **dict.fromkeys(("pending", "starting", "stopping", "stopped", "sleeping", "unhealthy"), f"Unplanned {W}"),
        "failed": f"CrashLoop {C}"}),
    ("covered", NEW, (COVER,), {
        "unhealthy": f"WrongWay {W}", "sleeping": f"WrongWay {W}", "failed": f"CrashLoop {C}"}),
    ("a crash inside an entry that expects the state", CRASHED, (COVER,), {
        "unhealthy": f"WrongWay {W}", "sleeping": f"WrongWay {W}", "failed": f"CrashLoop {C}"}),
    ("an entry that expects it to leave", NEW, (LEAVE,), {
        **dict.fromkeys(("pending", "starting", "sleeping", "unhealthy"), f"WrongWay {W}"),
        "failed": f"CrashLoop {C}"}),
    ("past the end of its entry", NEW, (PAST,), {
        **dict.fromkeys(("pending", "starting", "stopping", "stopped", "sleeping", "unhealthy"), f"Overdue {W}"),
        "failed": f"CrashLoop {C}"}),
    ("long past the end of its entry", CRASHED, (LONG_PAST,), {
        **dict.fromkeys(("pending", "starting", "stopping", "stopped", "sleeping", "unhealthy"), f"Overdue {C}"),
        "failed": f"CrashLoop {C}"}),
    ("past one entry and inside the next", NEW, (COVER, PAST), {
        "unhealthy": f"WrongWay {W}", "sleeping": f"WrongWay {W}", "failed": f"CrashLoop {C}"}),
]  # fmt: skip


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("name", "record", "agenda", "wrong"), TABLE, ids=[row[0] for row in TABLE])
def test_an_endpoint_that_should_run_is_trouble_only_where_nothing_explains_its_state(
    name: str, record: EndpointRecord, agenda: tuple, wrong: dict, state: str
) -> None:  # type: ignore[type-arg]
    box = Box(views=(view(A, state),), records=(record,), agenda=agenda)
    expected = [f"{kind}/{A}:{severity}" for kind, severity in [wrong[state].split()]] if state in wrong else []
    assert box.wrong() == expected


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("desired", ["stopped", "standby"])
@pytest.mark.parametrize("record", [NEW, CRASHED])
def test_an_endpoint_that_need_not_run_is_no_trouble(state: str, desired: str, record: EndpointRecord) -> None:
    box = Box(views=(view(A, state, desired),), records=(record,))
    assert box.wrong() == []
    assert replace(box, agenda=(COVER,)).wrong() == []


@pytest.mark.parametrize("desired", ["running", "stopped", "displaced"])
@pytest.mark.parametrize(("for_s", "wrong"), [(LASTING_S - 1, []), (LASTING_S, ["Unplanned/a:warning"])])
def test_one_that_cannot_be_told_for_a_minute_is_somebodys_to_look_at(
    desired: str, for_s: float, wrong: list[str]
) -> None:
    """As one whose shim was stopped before it recorded its end: nothing is done about it, and nobody would know."""
    record = EndpointRecord("a", state="unknown", state_since=T0.plus(-for_s))
    assert Box((view("a", "unknown", desired),), (record,)).wrong() == wrong
    before = replace(record, state="healthy")
    assert Box((view("a", "unknown", desired),), (before,)).wrong() == [], "it has only just become so"


@pytest.mark.parametrize("desired", ["running", "stopped"])
def test_one_that_sigkill_does_not_end_is_told_of_by_its_gpus_or_by_itself(desired: str) -> None:
    def wrong(ago_s: float, **changes: object) -> list[str]:
        return Box((view("a", "stopping", desired),), incarnations=(killed("a", ago_s, **changes),)).wrong()

    assert wrong(LASTING_S - 1) == []
    assert wrong(LASTING_S) == ["Unplanned/a:warning"]
    assert wrong(LASTING_S, gpus=("GPU-0",), memory_bytes=(1,)) == [], "its GPU is quarantined, with an incident"
    assert wrong(LASTING_S, phase="exited") == [], "it has ended"
    assert wrong(LASTING_S, subject=Subject("workload", "a")) == []


@pytest.mark.parametrize(
    ("state", "late"),
    [("stopping", True), ("healthy", True), ("stopped", False), ("sleeping", False), ("failed", False)],
)
def test_an_endpoint_that_does_not_stop_in_its_time_is_overdue(state: str, *, late: bool) -> None:
    box = Box(views=(view(A, state, "stopped"),), agenda=(PAST,))
    assert box.wrong() == ([f"Overdue/{A}:warning"] if late else [])


@pytest.mark.parametrize("agenda", [(), (COVER,), (PAST,)])
def test_a_hang_is_told_as_such(agenda: tuple[AgendaEntry, ...]) -> None:
    hung = view(A, "unhealthy", reason="Hung: no token for 120 s with requests running")
    assert Box(views=(hung,), agenda=agenda).wrong() == [f"Hung/{A}:warning"]


@pytest.mark.parametrize("agenda", [(), (COVER,), (PAST,)])
@pytest.mark.parametrize(
    ("overlay", "degraded"),
    [("evicting", False), ("active", False), ("completing", True), ("restoring", True), ("done", True), (None, True)],
)
@pytest.mark.parametrize(
    ("state", "severity", "else_"), [("unhealthy", "warning", None), ("failed", "critical", "CrashLoop")]
)
def test_one_that_is_not_well_on_its_way_back_from_an_overlay_makes_the_restoration_degraded(
    state: str, severity: str, else_: str | None, overlay: Any, *, degraded: bool, agenda: tuple[AgendaEntry, ...]
) -> None:
    over = () if overlay is None else (overlay_record("render", state=overlay),)
    box = Box(views=(view(A, state),), records=(replace(NEW, evicted_by="render"),), overlays=over, agenda=agenda)
    (found,) = box.wrong()
    assert (found == f"RestoreDegraded/{A}:{severity}") is degraded
    if else_ is not None and not degraded:
        assert found == f"{else_}/{A}:critical"


@st.composite
def moments(draw: st.DrawFn) -> tuple[Box, float]:
    """One endpoint, what is remembered of it, entries of the agenda for it and others, and a moment (s from T0)."""
    state = draw(st.sampled_from(STATES))
    desired = draw(st.sampled_from(["running", "running", "running", "stopped", "standby", "displaced"]))
    record = draw(st.sampled_from([NEW, CRASHED, ASKED, RECOVERED, replace(NEW, evicted_by="render")]))
    spans = draw(st.lists(st.tuples(st.integers(-500, 500), st.integers(0, 400)), max_size=3))
    entries = []
    for start, length in spans:
        states = draw(st.lists(st.sampled_from(STATES), min_size=1, max_size=4))
        entries.append(entry(draw(st.sampled_from([A, A, "other"])), *states, start=start, until=start + length))
    reason = draw(st.sampled_from(["", "GpuOccupied: pid 4711", "PortInUse: port 8080", "Hung: no token"]))
    box = Box(views=(view(A, state, desired, reason),), records=(record,), agenda=tuple(entries))
    return box, float(draw(st.integers(-600, 1000)))


@given(moments())
@settings(max_examples=1500, deadline=None, derandomize=True)
def test_25_only_an_entry_in_force_for_this_endpoint_and_state_suppresses(case: tuple[Box, float]) -> None:
    box, at_s = case
    bare = replace(box, agenda=()).wrong(at_s)
    if bare and not box.wrong(at_s):
        state, now = box.views[0].state, T0.wall + at_s
        assert any(e.endpoint == A and e.start <= now < e.until and state in e.expected_states for e in box.agenda)


@given(moments())
@settings(max_examples=500, deadline=None, derandomize=True)
def test_25_every_suppression_ends(case: tuple[Box, float]) -> None:
    box, _ = case
    end = max((e.until - T0.wall for e in box.agenda), default=0.0)
    for at_s in (end, end + 1.0, end + 1e6):
        assert bool(replace(box, agenda=()).wrong(at_s)) <= bool(box.wrong(at_s))


@pytest.mark.parametrize("state", ["stopping", "stopped", "pending", "sleeping"])
def test_a_displaced_endpoint_is_explained_by_its_overlay_until_its_entry_ends(state: str) -> None:
    box = Box(views=(view(A, state, "displaced"),), records=(replace(NEW, evicted_by="render"),))
    assert box.wrong() == []
    assert replace(box, agenda=(PAST,)).wrong() == [f"Overdue/{A}:warning"]


@pytest.mark.parametrize(
    ("at_s", "wrong"),
    [
        (-10.0, []),
        (99.9, []),
        (100.0, [f"Overdue/{A}:warning"]),
        (400.0, [f"Overdue/{A}:warning"]),
        (400.1, [f"Overdue/{A}:critical"]),
    ],
)
def test_an_entry_covers_from_its_start_to_its_end_and_not_a_moment_longer(at_s: float, wrong: list[str]) -> None:
    assert Box(views=(view(A, "pending"),), agenda=(COVER,)).wrong(at_s) == wrong


def test_an_entry_covers_the_moment_in_which_it_begins() -> None:
    box = Box(views=(view(A, "pending"),), records=(CRASHED,), agenda=(entry(A, start=0.0),))
    assert (box.wrong(-0.1), box.wrong(0.0)) == ([f"Unplanned/{A}:warning"], [])


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("GpuOccupied: pid 4711 (train.py)", "ForeignMemory"), ("PortInUse: port 8080", "PortInUse")],
)
@pytest.mark.parametrize("record", [NEW, CRASHED])
def test_what_a_stranger_blocks_is_named_after_the_stranger(reason: str, kind: str, record: EndpointRecord) -> None:
    box = Box(views=(view(A, "pending", reason=reason),), records=(record,))
    assert box.wrong() == [f"{kind}/{A}:warning"]
    assert replace(box, agenda=(COVER,)).wrong() == []


# ---------------------------------------------------------------- floors

STUCK = Blocked(Subject("endpoint", "b"), "InsufficientGpus", "its GPUs are held", transient=False)
OTHERS_STUCK = replace(STUCK, subject=Subject("overlay", "render"))


@pytest.mark.parametrize(
    ("a", "b", "box", "wrong"),
    [
        (view("a", "healthy"), view("b", "healthy"), Box(), []),
        (view("a", "healthy"), view("b", "starting"), Box(), []),
        (view("a", "healthy"), view("b", "unknown"), Box(), []),
        (view("a", "starting"), view("b", "pending"), Box(), []),
        (view("a", "healthy"), view("b", "pending"), Box(blocked=(STUCK,)), ["FloorBroken/ask:critical"]),
        (view("a", "healthy"), view("b", "pending"), Box(blocked=(OTHERS_STUCK,)), []),
        (view("a", "healthy"), view("b", "stopped", "stopped"), Box(), ["FloorBroken/ask:critical"]),
        (view("a", "healthy"), view("b", "stopped", "displaced"), Box(), ["FloorBroken/ask:critical"]),
        (view("a", "healthy"), view("b", "stopped", "displaced"), Box(agenda=(entry("b"),)), []),
        (view("a", "healthy"), view("b", "unhealthy"), Box(), ["Unplanned/b:critical"]),
        (view("a", "stopped", "stopped"), view("b", "failed"), Box(), ["CrashLoop/b:critical"]),
        (view("a", "stopping"), view("b", "unhealthy"), Box(agenda=(entry("a"),)), ["Unplanned/b:critical"]),
    ],
)
def test_a_broken_floor_has_one_incident_that_of_the_provider_if_it_has_one(a, b, box: Box, wrong: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert replace(box, views=(a, b), floors={"ask": 2}).wrong() == wrong


@pytest.mark.parametrize("first", ["healthy", "stopped"])
def test_a_floor_that_holds_or_is_explained_hides_no_other(first: str) -> None:
    a, b = view("a", first, "displaced" if first == "stopped" else "running"), view("b", "stopped", "stopped")
    facts = Box(views=(a, b), agenda=(entry("a"),), floors={"ask": 1, "code": 1}).facts()
    offers = {name: replace(facts.spec.endpoints[name], capabilities=(c,)) for name, c in (("a", "ask"), ("b", "code"))}
    found, _ = assess(replace(facts, spec=replace(facts.spec, endpoints=offers)), (), T0)
    assert [(i.kind, i.subject) for i in found] == [("FloorBroken", "code")]


@pytest.mark.parametrize(
    ("overlay", "counts"),
    [("evicting", True), ("starting", True), ("active", True), ("done", False), ("failed", False), (None, False)],
)
def test_an_endpoint_that_an_overlay_brings_counts_for_a_floor_while_its_overlay_lives(
    overlay: str | None, *, counts: bool
) -> None:
    box = Box(
        views=(view("a", "stopped", "stopped"), view("guest", "healthy")), floors={"ask": 1},
        overlays=() if overlay is None else (overlay_record("render", state=overlay),),
    )  # fmt: skip
    facts = box.facts()
    guest = facts.spec.endpoints["guest"]
    render = builders.overlay("render", sets=[guest])
    baseline = {"a": facts.spec.endpoints["a"]}
    facts = replace(facts, spec=replace(facts.spec, endpoints=baseline, overlays={"render": render}))
    found, _ = assess(facts, (), T0)
    assert (("FloorBroken", "ask") in {(i.kind, i.subject) for i in found}) is not counts


def test_who_was_not_asked_yet_is_not_late_and_who_answered_that_it_is_not_ready_is() -> None:
    """A daemon that comes after the end of what was planned knows nothing yet of what was done meanwhile."""
    starting = replace(view(A, "starting"), incarnation="i-1")
    facts = Box((starting,), agenda=(LONG_PAST,)).facts()
    assert not find(facts, T0.wall)
    refused = Probe("i-1", T0, ready=False, misses=1, failing_since=T0, ready_since=None)
    (late,) = find(replace(facts, observed=replace(facts.observed, probes={"i-1": refused})), T0.wall)
    assert (late.kind, late.severity) == ("Overdue", "critical")


# ---------------------------------------------------------------- overlays, GPUs, files


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, []),
        ({"state": "overrun"}, ["OverlayOverdue/render:warning"]),
        ({"state": "failed", "exit_code": 3, "outcome": "failed"}, ["WorkloadFailed/render:warning"]),
        ({"state": "restoring", "exit_code": -9, "outcome": "failed"}, ["WorkloadFailed/render:warning"]),
        ({"state": "completing", "exit_code": 3, "outcome": "failed"}, ["WorkloadFailed/render:warning"]),
        ({"state": "failed", "exit_code": None}, ["OverlayFailed/render:warning"]),
        ({"state": "failed", "exit_code": 0}, ["OverlayFailed/render:warning"]),
        ({"state": "done", "exit_code": 0, "outcome": "done"}, []),
        ({"state": "cancelled", "exit_code": -15, "outcome": "cancelled"}, []),
        ({"state": "restoring", "exit_code": -15, "outcome": "cancelled"}, []),
        ({"state": "starting", "exit_code": 1, "attempt": 1}, []),
        ({"state": "expired"}, []),
    ],
)
def test_an_overlay_is_trouble_when_it_failed_or_runs_too_long(changes: dict[str, object], wrong: list[str]) -> None:
    assert Box(overlays=(overlay_record("render", **changes),)).wrong() == wrong


def test_the_incident_of_an_overlay_names_the_overlay() -> None:
    found, _ = assess(Box(overlays=(overlay_record("render", state="overrun"),)).facts(), (), T0)
    assert [i.overlay for i in found] == ["render"]


def test_a_failed_overlay_is_no_trouble_any_more_once_its_file_is_gone() -> None:
    failed = overlay_record("render", state="failed", outcome="failed", exit_code=1)
    assert Box(overlays=(failed,)).wrong() == ["WorkloadFailed/render:warning"]
    assert Box(overlays=(replace(failed, placement_hash=""),)).wrong() == []


def test_a_failed_workload_is_never_suppressed_by_the_agenda() -> None:
    failed = overlay_record("render", state="restoring", outcome="failed", exit_code=1)
    assert Box(overlays=(failed,), agenda=(entry("render"), COVER)).wrong() == ["WorkloadFailed/render:warning"]


def test_lost_and_quarantined_gpus_are_one_incident_each() -> None:
    quarantine = [Quarantine(f"GPU-{n}", T0, "memory not returned") for n in (1, 2, 7)]
    box = Box(gpus=(gpu(0), gpu(1, "lost"), gpu(2), gpu(3, "unknown")), quarantines=tuple(quarantine))
    assert sorted(box.wrong()) == [
        "GpuLost/GPU-1:critical",
        "GpuQuarantined/GPU-2:warning",
        "GpuQuarantined/GPU-7:warning",
    ]


def test_gpus_that_the_driver_does_not_tell_of_are_not_lost() -> None:
    assert Box(gpus=(gpu(1, "lost"),), gpus_known=False).wrong() == []


def test_a_rejected_file_is_one_incident_however_many_problems_it_has() -> None:
    problems = (Problem("b.yaml", 2, 1, "second"), Problem("b.yaml", 1, 1, "first"), Problem("a.yaml", 0, 0, "gone"))
    box = Box(problems=problems)
    assert sorted(box.wrong()) == ["SpecRejected/a.yaml:warning", "SpecRejected/b.yaml:warning"]


# ---------------------------------------------------------------- words

BACK = replace(NEW, evicted_by="render")
GIVEN_UP = "6 ends within 600 s"

# one row per sentence that an incident can say of an endpoint or overlay
LOOK = "look at its records in run/, and whether its shim is stopped (then `kill -CONT` it)"
KILLED = "signal 9 (SIGKILL, perhaps out of memory: see `journalctl -k`)"
SENTENCES = [
    (Box((view(A, "failed", reason="Failed: gone"),)), "thinking has failed and is not started again: Failed: gone"),
    (Box((view(A, "failed", reason="Failed: gone"),), (replace(NEW, failed=GIVEN_UP),)),
     f"thinking has failed and is not started again: {GIVEN_UP}"),
    (Box((view(A, "failed", reason="Failed: gone"),), (BACK,)),
     "thinking did not come back after render: Failed: gone"),
    (Box((view(A, "failed"),), (replace(BACK, failed=GIVEN_UP),)),
     f"thinking did not come back after render: {GIVEN_UP}"),
    (Box((view(A, "unhealthy", reason="Hung: no token for 120 s"),)), "thinking does not get on: no token for 120 s"),
    (Box((view(A, "unhealthy", reason="Hung"),)), "thinking does not get on: Hung"),
    (Box((view(A, "unhealthy", reason="503"),), (BACK,)), "thinking came back after render and is unhealthy: 503"),
    (Box((view(A, "starting"),), agenda=(LEAVE,)),
     "thinking is starting, expected stopping, stopped (gives way to render)"),
    (Box((view(A, "pending", reason="CoolDown: in 3 s"),), agenda=(PAST,)),
     "thinking (gives way to render) was to be done by 2025-11-24T15:59:59+00:00 and is pending: CoolDown: in 3 s"),
    (Box((view(A, "pending"),), agenda=(LONG_PAST,)),
     "thinking (gives way to render) was to be done by 2025-11-24T15:54:59+00:00 and is pending"),
    (Box((view(A, "pending", reason="GpuOccupied: pid 4711"),)), "thinking cannot start: GpuOccupied: pid 4711"),
    (Box((view(A, "pending", reason="PortInUse: port 8080"),)), "thinking cannot start: PortInUse: port 8080"),
    (Box((view(A, "pending"),), (CRASHED,)), f"thinking ended by itself with {KILLED} and is pending"),
    (Box((view(A, "pending"),), (replace(NEW, exits=(replace(crash(), ended_for="it hung"),)),)),
     "thinking was ended because it hung and is pending"),
    (Box((view(A, "unhealthy", reason="503"),)), "thinking is unhealthy and nobody planned it: 503"),
    (Box((view(A, "sleeping"),)), "thinking is sleeping and nobody planned it"),
    (Box((view(A, "unknown", reason="its process could not be verified"),),
         (EndpointRecord(A, state="unknown", state_since=T0.plus(-90)),)),
     f"thinking is left alone, 1m30s by now: its process could not be verified; {LOOK}"),
    (Box((view(A, "stopping", reason="the kernel waits for something"),), incarnations=(killed(A, 61),)),
     "thinking was killed 1m1s ago and does not end: the kernel waits for something"),
    (Box(overlays=(overlay_record("render", state="failed", exit_code=3),)),
     "overlay render: exit code 3; `reconciler logs render` shows what it wrote"),
    (Box(overlays=(overlay_record("render", state="failed", exit_code=127, reason="the workload failed: it is odd"),)),
     "overlay render: the workload failed: it is odd; `reconciler logs render` shows what it wrote"),
    (Box(overlays=(overlay_record("render", state="failed", reason="its file is gone"),)),
     "overlay render failed: its file is gone"),
    (Box(overlays=(overlay_record("render", state="failed"),)), "overlay render failed: reason unknown"),
    (Box(overlays=(overlay_record("render", state="overrun"),)), "overlay render runs past its duration and grace"),
    (Box(gpus=(gpu(1, "lost", "Xid 79"),)), "GPU 1 (RTX 4090) is lost: Xid 79"),
    (Box(gpus=(gpu(1, "lost"),)), "GPU 1 (RTX 4090) is lost: no detail"),
    (Box(gpus=(gpu(1),), quarantines=(Quarantine("GPU-1", T0, "memory not returned"),)),
     "GPU 1 is not used: memory not returned"),
    (Box(quarantines=(Quarantine("GPU-7", T0, "memory not returned"),)), "GPU-7 is not used: memory not returned"),
    (Box(problems=(Problem("b.yaml", 2, 1, "second"), Problem("b.yaml", 1, 1, "first"))),
     "b.yaml:1:1: first (and 1 more)"),
    (Box(problems=(Problem("b.yaml", 1, 1, "first"),)), "b.yaml:1:1: first"),
    (Box((view("a", "stopped", "stopped"),), floors={"ask": 1}), "capability ask has 0 of 1 ready"),
]  # fmt: skip


@pytest.mark.parametrize(("box", "sentence"), SENTENCES, ids=[row[1] for row in SENTENCES])
def test_an_incident_says_who_what_and_why_in_one_sentence(box: Box, sentence: str) -> None:
    (incident,), _ = assess(box.facts(), (), T0)
    assert incident.message == sentence
