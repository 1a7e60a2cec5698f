"""The answer of `status`, key by key, from decisions of the real planner."""

from __future__ import annotations

import json

from builders import NOW, endpoint, foreign, gpu, incarnation, observed, overlay, spec, uuid
from msgspec import Struct
from msgspec.structs import replace

from reconciler.errors import Problem
from reconciler.plan.ledger import AgendaEntry, EndpointRecord, Exit, Ledger, Quarantine
from reconciler.plan.observed import GpuProcess, Subject
from reconciler.plan.planner import plan
from reconciler.plan.status import DaemonInfo, iso, status_data
from reconciler.units import GIB

FRESH = Ledger(boot_id="boot")
DAEMON = DaemonInfo(True, 77, NOW.wall - 60, 3)


class Trouble(Struct, frozen=True):
    id: str = "Unplanned/a@1"
    kind: str = "Unplanned"
    subject: str = "a"
    severity: str = "warning"
    message: str = "a is away"
    state: str = "open"
    opened: float = NOW.wall
    last_seen: float = NOW.wall
    count: int = 1
    resolved_at: float | None = None
    overlay: str | None = None


def told(of, seen, ledger=FRESH, *, incidents=(), daemon=DAEMON, problems=()):
    data = status_data(of, seen, plan(of, seen, ledger, NOW), incidents, daemon, problems)
    assert json.loads(json.dumps(data)) == data  # nothing in it that JSON cannot hold, or would change
    return data


def held_by(run, size, pid=4001):
    return (GpuProcess(pid, size, run.subject, "me", "VLLM::EngineCore"),)


def healthy_box():
    thinking = endpoint("thinking", [0, 1], priority=900, capabilities=("chat", "reasoning"), port=8080)
    run = incarnation(thinking, [0, 1], pid=4000)
    on = [gpu(i, used=70 * GIB, processes=held_by(run, 70 * GIB, 4001 + i)) for i in (0, 1)]
    return thinking, observed(*on, gpu(2), gpu(3), incarnations=[run])


def test_what_is_tried_and_does_not_get_done_is_the_reason_that_is_given():
    thinking, seen = endpoint("thinking", [0]), observed(gpu(0))
    why = "its start failed 3 times: already running; tried again in 4s"
    trying = replace(DAEMON, failing={"endpoint/thinking": why, "workload/other": "its start failed"})
    (told_of,) = told(spec(thinking), seen, daemon=trying)["endpoints"]
    assert (told_of["state"], told_of["reason"]) == ("pending", why)
    assert {"type": "ActionFailed", "status": "true", "reason": why} in told_of["conditions"]


def test_an_endpoint_has_every_key_of_the_contract_and_its_true_values():
    thinking, seen = healthy_box()
    (told_of,) = told(spec(thinking), seen)["endpoints"]
    assert told_of == {
        "name": "thinking", "state": "healthy", "gpus": [0, 1], "pid": 4000, "port": 8080, "model": "m",
        "uptime_seconds": 3600.0, "desired": "running", "priority": 900, "capabilities": ["chat", "reasoning"],
        "url": "http://127.0.0.1:8080", "memory_mib": 140 * 1024, "restarts": 0, "reason": told_of["reason"],
        "scheduled": None, "conditions": [],
    }  # fmt: skip


def test_the_answer_has_the_parts_of_the_contract_and_names_the_daemon():
    thinking, seen = healthy_box()
    data = told(spec(thinking), seen, incidents=[Trouble()])
    assert {"endpoints", "gpus", "overlays", "capabilities", "incidents", "daemon"} <= set(data)
    assert data["daemon"] == {"running": True, "pid": 77, "since": iso(NOW.wall - 60), "generation": 3}
    assert data["incidents"][0]["kind"] == "Unplanned"
    assert data["incidents"][0]["opened"] == "2026-11-23T21:00:00Z"
    without = told(spec(thinking), seen, daemon=None)["daemon"]
    assert without == {"running": False, "pid": None, "since": None, "generation": None}


def test_a_gpu_shows_planned_memory_and_foreign_processes():
    thinking, seen = healthy_box()
    tenant = foreign(99, 5 * GIB)
    seen = replace(seen, gpus=(*seen.gpus[:3], gpu(3, used=5 * GIB, processes=(tenant,))))
    gpus = told(spec(thinking), seen)["gpus"]
    assert set(gpus[0]) >= {
        "index", "uuid", "name", "state", "memory_total_mib", "memory_used_mib", "memory_planned_mib", "processes",
    }  # fmt: skip
    assert [g["memory_planned_mib"] for g in gpus] == [79 * 1024, 79 * 1024, 0, 0]
    assert gpus[3]["processes"] == [
        {"pid": 99, "owner": None, "user": "someone", "command": "python train.py", "memory_mib": 5 * 1024}
    ]
    assert gpus[0]["processes"][0]["owner"] == "thinking"


def test_memory_that_could_not_be_seen_is_null_and_not_zero():
    thinking, seen = healthy_box()
    run = seen.incarnations[0]
    blind = replace(seen.gpus[0], used_bytes=None, processes=None)
    silent = replace(seen.gpus[0], processes=(GpuProcess(4001, None, run.subject, "me", "x"),))
    for one in (blind, silent):
        data = told(spec(thinking), replace(seen, gpus=(one, *seen.gpus[1:])))
        assert data["endpoints"][0]["memory_mib"] is None
    data = told(spec(thinking), replace(seen, gpus=(blind, *seen.gpus[1:])))
    assert data["gpus"][0]["memory_used_mib"] is None


def test_a_live_overlay_shows_its_gpus_its_victims_and_when_it_should_end():
    low, render = endpoint("low", [0], priority=30), overlay("render", 1, duration=600.0)
    run = incarnation(low, [0])
    of, seen = spec(low, render), observed(gpu(0), incarnations=[run])
    decided = plan(of, seen, Ledger(boot_id="boot"), NOW)
    data = status_data(of, seen, decided, (), DAEMON)
    (told_of,) = data["overlays"]
    assert set(told_of) >= {
        "name", "state", "priority", "gpus", "start", "end", "deadline", "evicted", "pid", "exit_code", "reason",
    }  # fmt: skip
    assert (told_of["name"], told_of["state"], told_of["gpus"], told_of["evicted"]) == (
        "render",
        "evicting",
        [0],
        ["low"],
    )
    assert (told_of["pid"], told_of["exit_code"], told_of["deadline"]) == (None, None, None)
    assert told_of["end"] == iso(NOW.wall + 600)
    victim = data["endpoints"][0]
    assert victim["scheduled"]["overlay"] == "render"
    assert set(victim["scheduled"]) == {"expected_states", "until", "reason", "overlay"}
    assert {"type": "EvictedBy", "status": "true", "reason": "render"} in victim["conditions"]


def test_what_is_told_later_than_it_was_seen_has_lasted_until_then():
    thinking, seen = healthy_box()
    of, later = spec(thinking, overlay("job", 1)), NOW.plus(5.0)
    decided = plan(of, seen, FRESH, NOW)
    before = status_data(of, seen, decided, (), DAEMON)
    data = status_data(of, seen, decided, (), DAEMON, now=later)
    assert data["endpoints"][0]["uptime_seconds"] == 3605.0
    assert [data["overlays"][0]["makespan"][0][key] for key in ("actual_seconds", "over")] == [5.0, False]
    assert data["node"] == before["node"], "seen when it was seen"
    entry = AgendaEntry("thinking", ("stopped",), NOW.wall - 60, later.wall - 1, "it is edited", None)
    decided = replace(decided, ledger=replace(decided.ledger, agenda=(entry,)))
    assert status_data(of, seen, decided, (), DAEMON)["endpoints"][0]["scheduled"] is not None
    assert status_data(of, seen, decided, (), DAEMON, now=later)["endpoints"][0]["scheduled"] is None


def test_an_overlay_that_waits_says_what_for():
    full, job = endpoint("full", [0], priority=900), overlay("job", 1, priority=100)
    data = told(spec(full, job), observed(gpu(0), incarnations=[incarnation(full, [0])]))
    assert data["overlays"][0]["state"] == "pending"
    assert data["overlays"][0]["reason"]
    assert data["overlays"][0]["gpus"] == []


def test_only_unplanned_ends_are_restarts():
    thinking, seen = healthy_box()
    ends = tuple(Exit(f"e{n}", NOW.plus(-4000 + n), 1, planned) for n, planned in enumerate((True, False, False)))
    ledger = Ledger(boot_id="boot", endpoints={"thinking": EndpointRecord("thinking", "healthy", exits=ends)})
    assert told(spec(thinking), seen, ledger)["endpoints"][0]["restarts"] == 2


def test_a_capability_counts_its_ready_providers_against_its_floor():
    thinking, seen = healthy_box()
    spare = endpoint("spare", 1, capabilities=("chat",), state="standby")
    data = told(spec(thinking, spare, floors={"chat": 1, "vision": 0}), seen)
    assert {c["name"]: c for c in data["capabilities"]}["chat"] == {
        "name": "chat", "ready": 1, "min_available": 1, "endpoints": ["spare", "thinking"],
    }  # fmt: skip
    assert {c["name"]: c["endpoints"] for c in data["capabilities"]}["vision"] == []


def test_an_agenda_entry_that_is_over_schedules_nothing():
    thinking, seen = healthy_box()
    for until, scheduled in ((NOW.wall - 1, False), (NOW.wall + 60, True)):
        decided = plan(spec(thinking), seen, Ledger(boot_id="boot"), NOW)
        entry = AgendaEntry("thinking", ("stopped",), NOW.wall - 100, until, "because", None)
        decided = replace(decided, ledger=replace(decided.ledger, agenda=(entry,)))
        told_of = status_data(spec(thinking), seen, decided, (), DAEMON)["endpoints"][0]
        assert (told_of["scheduled"] is not None) == scheduled


def test_a_quarantined_gpu_is_called_so_with_its_reason():
    thinking, seen = healthy_box()
    quarantine = Quarantine(uuid(3), NOW, "its memory did not come back")
    shown = told(spec(thinking), seen, Ledger(boot_id="boot", quarantines={uuid(3): quarantine}))["gpus"][3]
    assert (shown["state"], shown["detail"]) == ("quarantined", "its memory did not come back")


def test_problems_say_that_a_daemon_keeps_the_last_good_version():
    thinking, seen = healthy_box()
    problem = Problem("overlays/x.yaml", 3, 1, "unknown key", None)
    part = told(spec(thinking), seen, problems=(problem,))["spec"]
    assert part["in_force"] == "last good"
    assert part["problems"] == [
        {"file": "overlays/x.yaml", "line": 3, "column": 1, "message": "unknown key", "hint": None}
    ]
    assert told(spec(thinking), seen)["spec"]["in_force"] == "current"
    assert told(spec(thinking), seen, daemon=None, problems=(problem,))["spec"]["in_force"] == "current"


def test_an_endpoint_that_the_files_forgot_is_still_shown_while_it_runs():
    _, seen = healthy_box()
    data = told(spec(endpoint("other", [3], port=1)), seen)
    shown = {e["name"]: e for e in data["endpoints"]}["thinking"]
    assert (shown["pid"], shown["port"], shown["model"], shown["priority"]) == (4000, 8080, None, None)


def test_a_set_point_that_changed_under_a_running_endpoint_is_a_condition():
    _, seen = healthy_box()
    edited = endpoint("thinking", [0, 1], model="newer", port=8080)
    shown = told(spec(edited), seen)["endpoints"][0]
    assert "SpecChangePending" in [c["type"] for c in shown["conditions"]]


def test_an_overlay_of_a_foreign_subject_name_counts_no_memory_of_an_endpoint():
    twin = endpoint("twin", [0], memory=20)
    run = incarnation(twin, [0])
    job = GpuProcess(5000, 9 * GIB, Subject("workload", "twin"), "me", "job")
    on = gpu(0, used=29 * GIB, processes=(*held_by(run, 20 * GIB), job))
    assert told(spec(twin), observed(on, incarnations=[run]))["endpoints"][0]["memory_mib"] == 20 * 1024


def test_an_overlay_that_waits_for_a_slot_ends_so_long_after_the_slot():
    thinking, seen = healthy_box()
    later = overlay("later", [3], start=NOW.wall + 600, duration=600.0)
    job = overlay("job", [3], duration=300.0)
    first = plan(spec(thinking, later), seen, FRESH, NOW)
    of = spec(thinking, later, job)
    decided = plan(of, seen, first.ledger, NOW)
    (slot,) = [b.earliest_start for b in decided.blocked if b.subject == Subject("workload", "job")]
    shown = {o["name"]: o for o in told(of, seen, first.ledger)["overlays"]}
    assert slot is not None
    assert slot > NOW.wall + 1200
    assert shown["job"]["end"] == iso(slot + 300)
    assert shown["later"]["end"] == iso(NOW.wall + 1200)


def test_an_overlay_that_waits_and_is_told_no_beginning_has_no_end():
    thinking, seen = healthy_box()
    polite = overlay("polite", list(range(4)), evict=False)
    (shown,) = told(spec(thinking, polite), seen)["overlays"]
    assert shown["state"] == "pending"
    assert shown["end"] is None
