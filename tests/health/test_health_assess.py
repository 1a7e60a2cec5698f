"""The life of incidents: opened once, counted, recovering, resolved; and the plans that open none."""

from __future__ import annotations

import pytest
from health_box import T0, Box, Life, asked, crash, entry, gpu, overlay_record, view
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.errors import Problem
from reconciler.health.assess import REFRESH_S, STABLE_S, assess, assess_blindness
from reconciler.health.incident import Incident, IncidentKind
from reconciler.plan.ledger import EndpointRecord, Quarantine

A = "thinking"
WELL = Box(views=(view(A, "healthy"),))


def crashed(at_s: float, state: str, code: int = -9) -> Box:
    return Box(views=(view(A, state),), records=(EndpointRecord(A, exits=(crash(T0.plus(at_s), code),)),))


def recovered(at_s: float, ready_s: float) -> Box:
    record = EndpointRecord(A, exits=(crash(T0.plus(at_s)),), ready_since=T0.plus(ready_s))
    return Box(views=(view(A, "healthy"),), records=(record,))


# ---------------------------------------------------------------- what must open none


def test_the_first_start_of_the_baseline_opens_nothing() -> None:
    life = Life()
    for at, states in enumerate(
        [("pending", "pending"), ("starting", "pending"), ("starting", "starting"), ("healthy", "starting")]
    ):
        views = (view("a", states[0]), view("b", states[1], reason="WaitingForVram: not seen free yet"))
        life.look(Box(views=views, floors={"ask": 2}), float(at))
    assert life.story() == []


def test_a_planned_evict_run_restore_opens_nothing() -> None:
    life = Life()
    covered = entry(A, until=600.0)
    ended = EndpointRecord(A, exits=(asked(),), evicted_by="render")
    for at, (state, desired, overlay) in enumerate(
        [
            ("healthy", "displaced", "evicting"),
            ("stopping", "displaced", "evicting"),
            ("stopped", "displaced", "starting"),
            ("stopped", "displaced", "active"),
            ("stopped", "displaced", "completing"),
            ("pending", "running", "restoring"),
            ("starting", "running", "restoring"),
        ]
    ):
        box = Box(
            views=(view(A, state, desired), view("b", "healthy")),
            records=(ended,),
            agenda=(covered,),
            overlays=(overlay_record("render", state=overlay, evicted=(A,), exit_code=0),),
            floors={"ask": 1},
        )
        life.look(box, at * 50.0)
    life.look(replace(WELL, overlays=(overlay_record("render", state="done", exit_code=0),)), 400.0)
    assert life.story() == []


def test_a_restart_for_an_edit_opens_nothing() -> None:
    life = Life()
    before = EndpointRecord(A, exits=(crash(T0.plus(-900)),), ready_since=T0.plus(-850))
    after = EndpointRecord(A, exits=(crash(T0.plus(-900)), asked()))
    for at, (state, record) in enumerate(
        [("healthy", before), ("stopping", before), ("pending", after), ("starting", after), ("healthy", after)]
    ):
        life.look(Box(views=(view(A, state),), records=(record,), floors={"ask": 1}), float(at))
    assert life.story() == []


# ---------------------------------------------------------------- a killed endpoint


def test_a_killed_endpoint_is_exactly_one_incident_that_closes_by_itself() -> None:
    life = Life()
    life.look(WELL, 0.0)
    for at, state in ((1.0, "stopping"), (1.5, "pending"), (2.0, "starting"), (30.0, "starting")):
        (incident,) = life.look(replace(crashed(1.0, state), floors={"reasoning": 1}), at)
        assert (incident.kind, incident.state, incident.severity, incident.count) == (
            "Unplanned",
            "open",
            "critical",
            1,
        )
    assert incident.message == (
        "thinking ended by itself with signal 9 (SIGKILL, perhaps out of memory: see `journalctl -k`) and is stopping;"
        " capability reasoning has 0 of 1 ready"
    )
    (recovering,) = life.look(recovered(1.0, 40.0), 41.0)
    assert recovering.state == "recovering"
    (still,) = life.look(recovered(1.0, 40.0), 41.0 + STABLE_S - 0.1)
    assert still == recovering
    (resolved,) = life.look(recovered(1.0, 40.0), 41.0 + STABLE_S)
    assert (resolved.state, resolved.resolved_at) == ("resolved", T0.wall + 41.0 + STABLE_S)
    assert life.look(recovered(1.0, 40.0), 400.0) == ()
    assert life.story() == [
        "IncidentOpened Unplanned/thinking",
        "IncidentRecovering Unplanned/thinking",
        "IncidentResolved Unplanned/thinking",
    ]
    assert len(life.history) == 1


def test_an_endpoint_whose_engine_dies_first_is_still_one_incident() -> None:
    life = Life()
    life.look(Box(views=(view(A, "unhealthy", reason="503"),)), 0.0)
    for at, state in ((5.0, "pending"), (6.0, "starting")):
        life.look(crashed(4.0, state, code=0), at)
    assert [i.kind for i in life.incidents] == ["Unplanned"]
    assert life.story() == ["IncidentOpened Unplanned/thinking"]


def test_each_step_says_since_when_it_holds_and_is_told_with_its_subject_and_what_is_wrong_by_now() -> None:
    life = Life()
    looks = [
        (crashed(0.0, "pending"), 0.0),
        (recovered(0.0, 20.0), 20.0),
        (crashed(30.0, "pending", code=1), 30.0),
        (recovered(30.0, 50.0), 50.0),
        (recovered(30.0, 50.0), 50.0 + STABLE_S),
    ]
    steps = [life.look(box, at)[0] for box, at in looks]
    assert [i.state for i in steps] == ["open", "recovering", "open", "recovering", "resolved"]
    assert [i.since for i in steps] == [T0.plus(at) for _, at in looks]
    assert [(e.subject, e.message) for e in life.events] == [(A, i.message) for i in steps]
    assert ["signal 9" in i.message for i in steps] == [True, True, False, False, False], "the last end, not the first"


def test_one_that_was_resolved_is_history_and_not_assessed_again() -> None:
    life = Life()
    for box, at in ((crashed(0.0, "pending"), 0.0), (WELL, 1.0), (WELL, 1.0 + STABLE_S)):
        life.look(box, at)
    assert [i.state for i in life.incidents] == ["resolved"]
    assert assess(WELL.facts(), life.incidents, T0.plus(400)) == ((), ())


def test_flapping_counts_and_does_not_multiply() -> None:
    life = Life()
    for round_ in range(10):
        at = round_ * 60.0
        life.look(crashed(at, "pending"), at)
        life.look(recovered(at, at + 20), at + 20)
    (incident,) = life.incidents
    assert (incident.count, incident.state, len(life.history)) == (10, "recovering", 1)
    assert incident.opened == T0.wall
    life.look(recovered(540.0, 560.0), 560.0 + STABLE_S)
    life.look(crashed(2000.0, "pending"), 2000.0)
    assert len(life.history) == 2, "what comes back after it was resolved is a new incident"
    assert sorted(i.state for i in life.history.values()) == ["open", "resolved"]


def test_a_loop_of_crashes_that_ends_in_failed_keeps_both_open_until_someone_acts() -> None:
    life = Life()
    life.look(crashed(0.0, "pending"), 0.0)
    failed = EndpointRecord(A, exits=(crash(),), failed="6 ends within 600 s; the last with signal 9", failed_hash="h")
    for at in (10.0, 10_000.0):
        incidents = life.look(Box(views=(view(A, "failed"),), records=(failed,)), at)
        assert {(i.kind, i.state) for i in incidents} == {("Unplanned", "open"), ("CrashLoop", "open")}
    life.look(WELL, 10_100.0)
    life.look(WELL, 10_100.0 + STABLE_S)
    assert {i.state for i in life.history.values()} == {"resolved"}


# ---------------------------------------------------------------- holding


@pytest.mark.parametrize("state", ["starting", "pending", "stopping", "unknown"])
def test_an_incident_does_not_close_while_its_endpoint_is_on_its_way_or_unseen(state: str) -> None:
    life = Life()
    life.look(Box(views=(view(A, "unhealthy"),)), 0.0)
    replaced = Box(views=(view(A, state),), records=(EndpointRecord(A, exits=(asked(),)),))
    for at in (10.0, 1000.0):
        (incident,) = life.look(replaced, at)
        assert incident.state == "open"
    (incident,) = life.look(WELL, 1001.0)
    assert incident.state == "recovering"


@pytest.mark.parametrize("box", [Box(), Box(views=(view(A, "stopped", "stopped"),))], ids=["removed", "stopped"])
def test_an_incident_closes_when_its_endpoint_is_no_longer_wanted(box: Box) -> None:
    life = Life()
    life.look(Box(views=(view(A, "unhealthy"),)), 0.0)
    assert [i.state for i in life.look(box, 1.0)] == ["recovering"]
    assert [i.state for i in life.look(box, 1.0 + STABLE_S)] == ["resolved"]


def test_a_lost_gpu_stays_an_incident_while_the_driver_does_not_answer() -> None:
    life = Life()
    life.look(Box(gpus=(gpu(1, "lost"),)), 0.0)
    for at, box in ((1.0, Box(gpus_known=False)), (1000.0, Box(gpus=(gpu(1, "unknown"),)))):
        assert [i.state for i in life.look(box, at)] == ["open"]
    assert [i.state for i in life.look(Box(gpus=(gpu(1),)), 1001.0)] == ["recovering"]


def test_a_broken_floor_that_a_crash_now_explains_stays_open_beside_it() -> None:
    life = Life()
    idle = Box(views=(view(A, "stopped", "stopped"), view("b", "stopped", "stopped")), floors={"ask": 1})
    life.look(idle, 0.0)
    life.look(replace(idle, views=(view(A, "unhealthy"), view("b", "stopped", "stopped"))), 10.0)
    assert {(i.kind, i.state) for i in life.incidents} == {("FloorBroken", "open"), ("Unplanned", "open")}
    life.look(replace(idle, views=(view(A, "healthy"),)), 20.0)
    assert {i.state for i in life.incidents} == {"recovering"}


STATES = ("pending", "starting", "healthy", "unhealthy", "failed", "stopping", "stopped", "sleeping", "unknown")
OF_ENDPOINTS = (
    "Unplanned", "WrongWay", "Overdue", "Hung", "CrashLoop", "RestoreDegraded", "ForeignMemory", "PortInUse",
)  # fmt: skip
AT_REST = {
    "running": {"healthy"},
    "standby": {"healthy", "stopped", "sleeping", "pending", "failed"},
    "stopped": {"healthy", "stopped", "sleeping", "pending", "failed"},
    "displaced": {"healthy", "stopped", "sleeping", "pending", "failed"},
}


@pytest.mark.parametrize("kind", OF_ENDPOINTS)
@pytest.mark.parametrize("desired", AT_REST)
def test_trouble_with_an_endpoint_recovers_where_it_rests_as_it_is_wanted_and_nowhere_else(
    desired: str, kind: IncidentKind
) -> None:
    old = Incident(f"{kind}/{A}@1", kind, A, "warning", "away", "open", T0, T0.wall, T0.wall)
    recovering = set()
    for state in STATES:
        after, _ = assess(Box(views=(view(A, state, desired),)).facts(), (old,), T0)
        recovering |= {state for i in after if i.id == old.id and i.state == "recovering"}
    wrong = {"failed"} if desired == "displaced" else set()  # given up: that is trouble of its own
    assert recovering == AT_REST[desired] - wrong


def test_a_quarantine_that_is_lifted_stays_an_incident_until_its_gpu_is_seen_again() -> None:
    life = Life()
    life.look(Box(gpus=(gpu(1),), quarantines=(Quarantine("GPU-1", T0, "memory not returned"),)), 0.0)
    assert [i.state for i in life.look(Box(gpus=(gpu(1, "unknown"),)), 1000.0)] == ["open"]
    assert [i.state for i in life.look(Box(gpus=(gpu(0, "unknown"), gpu(1))), 1001.0)] == ["recovering"]


@pytest.mark.parametrize("kind", ["WorkloadFailed", "OverlayFailed", "OverlayOverdue", "SpecRejected"])
def test_trouble_with_a_file_or_overlay_recovers_as_soon_as_it_is_not_found(kind: IncidentKind) -> None:
    old = Incident(f"{kind}/render@1", kind, "render", "warning", "failed", "open", T0, T0.wall, T0.wall)
    (after,), _ = assess(Box().facts(), (old,), T0.plus(1))
    assert (after.id, after.state) == (old.id, "recovering")


def test_a_floor_that_nobody_asks_for_any_more_is_no_longer_broken() -> None:
    life = Life()
    box = Box(views=(view(A, "stopped", "stopped"),), floors={"ask": 1})
    assert [i.kind for i in life.look(box, 0.0)] == ["FloorBroken"]
    assert [i.state for i in life.look(replace(box, floors={}), 1.0)] == ["recovering"]


# ---------------------------------------------------------------- escalation, renewal, clocks


def test_overdue_escalates_once_and_never_falls_back() -> None:
    life = Life()
    box = Box(views=(view(A, "pending"),), agenda=(entry(A, until=100.0),))
    severities = [life.look(box, at)[0].severity for at in (150.0, 250.0, 450.0, 500.0)]
    assert severities == ["warning", "warning", "critical", "critical"]
    life.look(WELL, 510.0)
    life.look(Box(views=(view(A, "pending"),), agenda=(entry(A, until=505.0),)), 520.0)
    assert life.incidents[0].severity == "critical", "the worst it has been"
    assert life.story() == [
        "IncidentOpened Overdue/thinking",
        "IncidentEscalated Overdue/thinking",
        "IncidentRecovering Overdue/thinking",
        "IncidentReturned Overdue/thinking",
    ]
    assert life.incidents[0].overlay == "render"


def test_a_lasting_incident_changes_once_a_minute_and_not_at_each_look() -> None:
    life = Life()
    seen = {life.look(crashed(0.0, "pending"), float(at)) for at in range(int(10 * REFRESH_S))}
    assert len(seen) == 10
    assert {i.last_seen for (i,) in seen} == {T0.wall + minute * REFRESH_S for minute in range(10)}


def test_an_incident_from_before_a_reboot_still_resolves() -> None:
    """The monotonic clock starts anew; the wall clock tells how long it was calm."""
    (opened,), _ = assess(Box(views=(view(A, "unhealthy"),)).facts(), (), T0)
    (recovering,), _ = assess(WELL.facts(), (opened,), T0)
    rebooted = Instant(T0.wall + STABLE_S - 1, 20.0)
    assert assess(WELL.facts(), (recovering,), rebooted)[0][0].state == "recovering"
    assert assess(WELL.facts(), (recovering,), rebooted.plus(2))[0][0].state == "resolved"


def test_a_wall_clock_that_is_set_forward_resolves_nothing_early() -> None:
    (opened,), _ = assess(Box(views=(view(A, "unhealthy"),)).facts(), (), T0)
    assert opened.since == T0
    (recovering,), _ = assess(WELL.facts(), (opened,), T0)
    jumped = Instant(T0.wall + 86400.0, T0.mono + STABLE_S - 1)
    for at in (replace(jumped, mono=T0.mono), jumped):
        assert assess(WELL.facts(), (recovering,), at)[0][0].state == "recovering"
    assert assess(WELL.facts(), (recovering,), jumped.plus(1))[0][0].state == "resolved"


def test_a_rejected_file_recovers_when_it_is_accepted_again() -> None:
    life = Life()
    life.look(Box(problems=(Problem("overlays/a.yaml", 3, 5, "unknown key 'gpu'", "did you mean gpus?"),)), 0.0)
    assert "overlays/a.yaml:3:5: unknown key 'gpu'" in life.incidents[0].message
    life.look(Box(), 5.0)
    life.look(Box(), 5.0 + STABLE_S)
    assert [i.state for i in life.incidents] == ["resolved"]


def test_the_answer_depends_on_its_arguments_alone_and_not_on_their_order() -> None:
    box = replace(crashed(0.0, "pending"), gpus=(gpu(1, "lost"), gpu(2, "lost")), floors={"ask": 1})
    once = assess(box.facts(), (), T0)
    assert assess(box.facts(), (), T0) == once
    later = T0.plus(5)
    assert assess(box.facts(), once[0], later)[0] == assess(box.facts(), reversed(once[0]), later)[0]


def test_a_hang_and_the_restart_it_leads_to_are_one_incident() -> None:
    life = Life()
    life.look(Box(views=(view(A, "unhealthy", reason="Hung: no token for 120 s"),)), 0.0)
    for at, state in enumerate(("stopping", "pending", "starting"), 1):
        life.look(crashed(1.0, state), 60.0 * at)
    life.look(recovered(1.0, 200.0), 250.0)
    life.look(recovered(1.0, 200.0), 250.0 + STABLE_S)
    assert {i.kind for i in life.history.values()} == {"Hung"}
    assert [event.kind for event in life.events] == ["IncidentOpened", "IncidentRecovering", "IncidentResolved"]


def test_a_hang_whose_restart_the_agenda_knows_is_one_incident_still() -> None:
    life = Life()
    life.look(Box(views=(view(A, "unhealthy", reason="Hung: no token for 120 s"),)), 0.0)
    life.look(Box(views=(view(A, "sleeping"),), agenda=(entry(A),)), 10.0)
    assert life.story() == ["IncidentOpened Hung/thinking"]


def test_a_look_that_could_not_be_taken_is_one_incident_and_says_nothing_of_others() -> None:
    life = Life()
    crash_incident = life.look(crashed(0.0, "pending"), 1.0)
    blind, events = assess_blindness("box", "Too many open files", crash_incident, T0.plus(10.0))
    assert [(i.fingerprint, i.state, i.severity) for i in blind] == [
        (crash_incident[0].fingerprint, "open", crash_incident[0].severity), ("Blind/box", "open", "critical"),
    ]  # fmt: skip
    assert blind[1].message == "the daemon cannot look at the box, and nothing is done meanwhile: Too many open files"
    assert [e.kind for e in events] == ["IncidentOpened"]
    again, events = assess_blindness("box", "Too many open files", blind, T0.plus(20.0))
    assert (again, events) == (blind, ())
    life.incidents = blind
    seen = life.look(crashed(0.0, "pending"), 30.0)
    assert {i.fingerprint: i.state for i in seen} == {crash_incident[0].fingerprint: "open", "Blind/box": "recovering"}
