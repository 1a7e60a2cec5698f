"""Health over whole runs of the real planner on a virtual clock: what it planned is no incident, the rest is one."""

from __future__ import annotations

import pytest
from builders import endpoint, foreign, overlay, spec
from msgspec.structs import replace
from plant import Behaviour, Plant, Run

from reconciler.health.assess import STABLE_S, assess
from reconciler.health.facts import Facts
from reconciler.health.incident import Incident
from reconciler.plan.actions import Plan
from reconciler.plan.naps import called
from reconciler.plan.planner import plan
from reconciler.spec.spec import EndpointSpec, Evict, OverlaySpec, Stop
from reconciler.units import GIB

THINKING = endpoint("thinking", 4, priority=900, capabilities=("reasoning",))
ASK = endpoint("ask", 1, priority=40, capabilities=("chat",))


class Watch:
    """Assesses each decision as the loop does, and keeps the story."""

    def __init__(self) -> None:
        self.incidents: tuple[Incident, ...] = ()
        self.story: list[str] = []

    def __call__(self, run: Run, plan: Plan) -> None:
        facts = Facts(run.spec, plan.endpoints, plan.ledger, run.plant.observe(), (), plan.blocked)
        unresolved = [i for i in self.incidents if i.state != "resolved"]
        self.incidents, events = assess(facts, unresolved, run.plant.now)
        self.story += [f"{e.kind} {e.cause}" for e in events]

    def since(self) -> list[str]:
        """The story since the last time this was asked."""
        told, self.story = self.story, []
        return told


def box(*items: EndpointSpec | OverlaySpec, behaviour: Behaviour | None = None) -> tuple[Run, Watch]:
    watch = Watch()
    plant = Plant(totals=[80 * GIB] * 6, behaviour=behaviour or Behaviour())
    return Run(spec(*items, floors={"reasoning": 1}), plant, watch=watch), watch


def settled() -> tuple[Run, Watch]:
    """A baseline that has been up long enough to be displaced."""
    run, watch = box(THINKING, ASK)
    run.settle()
    run.plant.advance(600)
    run.settle()
    assert watch.since() == [], "the initial start of the baseline is no incident"
    return run, watch


def test_a_planned_evict_run_restore_of_the_planner_is_no_incident() -> None:
    run, watch = settled()
    run.spec = spec(THINKING, ASK, overlay("render", 2), floors={"reasoning": 1})
    run.settle()
    assert run.ledger.overlays["render"].state == "done"
    assert "ask" in run.stops()
    assert run.plant.is_ready("ask")
    assert watch.story == []


@pytest.mark.parametrize("said", [True, False])
def test_one_that_was_woken_and_not_asked_since_is_no_incident(said: bool) -> None:
    """A busy box decides between the answer to the wake-up call and the next one to whether it sleeps."""
    ask = endpoint("ask", 1, memory=60, priority=40, evict=Evict("sleep", 1, 10 * GIB), stop=Stop(drain_s=0.0))
    run, watch = box(THINKING, ask)
    run.settle()
    run.plant.advance(600)
    run.settle()
    run.spec = spec(THINKING, ask, overlay("render", 2, memory=60), floors={"reasoning": 1})
    run.settle(until=lambda p: any(a.op == "wake" and a.ready for a in p.actions))
    run.plant.advance(run.plant.behaviour.wake_s)
    (answered,) = run.plant.answered
    run.ledger, _ = called(run.ledger, answered, None, run.plant.now)
    run.plant.answered = []
    watch.since()
    for _ in range(3):
        seen, asked = run.plant.observe(), run.plant.now.plus(-1.0)
        stale = {name: replace(p, at=asked, sleeping=said) for name, p in seen.probes.items()}
        decided = plan(run.spec, replace(seen, probes=stale), run.ledger, run.plant.now)
        assert decided.endpoints["ask"].state == "sleeping"
        watch(run, decided)
        run.ledger = decided.ledger
        run.plant.advance(0.25)
    run.settle()
    assert run.plant.is_ready("ask")
    assert not [entry for entry in run.ledger.agenda if entry.endpoint == "ask"]
    assert watch.since() == []


def test_a_restart_for_an_edit_is_no_incident() -> None:
    run, watch = settled()
    edited = endpoint("thinking", 4, priority=900, model="another", capabilities=("reasoning",))
    run.spec = spec(edited, ASK, floors={"reasoning": 1})
    run.settle()
    assert "thinking" in run.stops()
    assert run.plant.is_ready("thinking")
    assert watch.story == []


def test_a_crash_after_an_edit_is_an_incident_at_once_however_long_the_edit_was_to_take() -> None:
    run, watch = settled()
    run.plant.behaviour.crashes = frozenset({"thinking"})
    run.spec = spec(replace(THINKING, process_hash="worse"), ASK, floors={"reasoning": 1})
    run.settle(until=lambda plan: plan.ledger.endpoints["thinking"].streak > 0)
    assert run.ledger.endpoints["thinking"].failed is None
    assert run.ledger.agenda == (), "the edit was planned, and what follows its crash is not"
    assert watch.since() == ["IncidentOpened Unplanned/thinking"]
    run.plant.behaviour.crashes = frozenset()
    run.settle()
    assert watch.since() == ["IncidentRecovering Unplanned/thinking"]


def test_a_crash_on_the_way_back_from_an_overlay_is_an_incident() -> None:
    run, watch = settled()
    run.spec = spec(THINKING, ASK, overlay("render", 2), floors={"reasoning": 1})
    run.settle(until=lambda plan: plan.ledger.overlays["render"].state == "active")
    run.plant.behaviour.crashes = frozenset({"ask"})
    run.settle(until=lambda plan: plan.ledger.endpoints["ask"].streak > 0)
    assert run.ledger.endpoints["ask"].evicted_by == "render"
    assert watch.since() == ["IncidentOpened Unplanned/ask"]
    run.plant.behaviour.crashes = frozenset()
    run.settle()
    assert run.ledger.overlays["render"].state == "done"
    assert watch.since() == ["IncidentRecovering Unplanned/ask"]


def test_one_that_crashed_as_it_was_to_give_way_comes_back_as_planned() -> None:
    run, watch = settled()
    run.spec = spec(THINKING, ASK, overlay("render", 2), floors={"reasoning": 1})
    run.ledger = run.decide().ledger  # it is to give way, and was not yet asked to
    current = run.plant.current("ask")
    assert current is not None
    run.plant.advance(1)
    run.plant.end(current.id, 1)
    run.settle()
    assert not run.ledger.endpoints["ask"].exits[-1].planned
    assert run.ledger.overlays["render"].state == "done"
    assert run.plant.is_ready("ask")
    assert watch.story == []


def test_a_killed_endpoint_is_one_incident_that_closes_by_itself() -> None:
    run, watch = settled()
    current = run.plant.current("thinking")
    assert current is not None
    run.plant.end(current.id, -9)
    run.settle()
    assert run.plant.is_ready("thinking")
    assert watch.since() == ["IncidentOpened Unplanned/thinking", "IncidentRecovering Unplanned/thinking"]
    run.plant.advance(STABLE_S)
    run.settle()
    assert watch.since() == ["IncidentResolved Unplanned/thinking"]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("off_s", [20.0, 3600.0])
@pytest.mark.parametrize("while_", ["first load", "ready", "edit", "displaced", "way back"])
def test_a_box_that_goes_down_whatever_it_is_about_is_no_incident(while_: str, off_s: float, recorded: bool) -> None:
    render = overlay("render", 2, retries=1)
    run, watch = box(THINKING, ASK) if while_ == "first load" else settled()
    if while_ == "edit":
        run.spec = spec(THINKING, replace(ASK, process_hash="edited"), floors={"reasoning": 1})
    elif while_ in ("displaced", "way back"):
        run.spec = spec(THINKING, ASK, render, floors={"reasoning": 1})
        run.settle(until=lambda p: p.ledger.overlays["render"].state == "active")
    if while_ == "way back":
        run.settle(until=lambda p: p.ledger.overlays["render"].state == "restoring")
    if while_ in ("first load", "edit", "way back"):
        run.settle(until=lambda p: p.endpoints["ask"].state == "starting")
        assert [entry for entry in run.ledger.agenda if entry.endpoint == "ask"], "it is on its way, as planned"
    run.plant.reboot(off_s, recorded=recorded)
    run.settle()
    assert run.plant.is_ready("thinking")
    assert run.plant.is_ready("ask")
    assert watch.since() == []


def test_a_crash_that_was_told_before_the_box_went_down_is_over_once_the_endpoint_is_back() -> None:
    run, watch = settled()
    current = run.plant.current("ask")
    assert current is not None
    run.plant.end(current.id, 1)
    run.step()
    assert watch.since() == ["IncidentOpened Unplanned/ask"]
    run.plant.reboot(300.0)
    run.step()
    assert watch.since() == [], "it is not back yet"
    run.settle()
    assert watch.since() == ["IncidentRecovering Unplanned/ask"]


def test_an_endpoint_killed_while_an_overlay_displaces_another_is_one_incident() -> None:
    run, watch = settled()
    run.spec = spec(THINKING, ASK, overlay("render", 2), floors={"reasoning": 1})
    run.settle(until=lambda plan: plan.ledger.overlays["render"].state == "active")
    current = run.plant.current("thinking")
    assert current is not None
    run.plant.end(current.id, -9)
    run.settle()
    assert run.ledger.overlays["render"].state == "done"
    assert [line for line in watch.story if "Opened" in line] == ["IncidentOpened Unplanned/thinking"]


def test_a_workload_that_fails_is_an_incident_and_the_restoration_is_none() -> None:
    run, watch = settled()
    run.plant.behaviour.exit_codes = {"render": (3,)}
    run.spec = spec(THINKING, ASK, overlay("render", 2), floors={"reasoning": 1})
    run.settle()
    assert run.ledger.overlays["render"].state == "failed"
    assert run.plant.is_ready("ask")
    assert watch.story == ["IncidentOpened WorkloadFailed/render"]


def test_an_overlay_that_overruns_is_overdue_until_it_ends() -> None:
    run, watch = settled()
    run.plant.behaviour.run_s = {"render": 5000.0}
    run.spec = spec(THINKING, ASK, overlay("render", 2, duration=600.0, grace=60.0), floors={"reasoning": 1})
    run.settle()
    assert run.ledger.overlays["render"].state == "done"
    about_overlay = [line for line in watch.story if line.endswith("/render")]
    assert about_overlay[0] == "IncidentOpened OverlayOverdue/render"
    assert len([line for line in about_overlay if "Opened" in line]) == 1
    assert {i.state for i in watch.incidents if i.subject == "render"} <= {"recovering", "resolved"}


def test_one_that_a_stranger_keeps_from_coming_back_is_told_soon_after_the_work_ended_however_long_it_was_to_take() -> (
    None
):
    run, watch = settled()
    run.plant.behaviour.run_s = {"render": 60.0}
    run.spec = spec(THINKING, ASK, overlay("render", 2, duration=8 * 3600.0), floors={"reasoning": 1})
    run.settle(until=lambda p: p.ledger.overlays["render"].state == "completing")
    run.plant.foreign = {index: [foreign(99, 70 * GIB)] for index in range(6)}
    over = run.plant.now.wall
    while not watch.story:
        run.step()
        run.plant.advance(5.0)
        assert run.plant.now.wall - over < 600.0, "nobody is told"
    (incident,) = [i for i in watch.incidents if i.state == "open"]
    assert (incident.kind, incident.subject) == ("Overdue", "ask")
    assert "python train.py" in incident.message
    assert run.plant.now.wall - over > 60.0, "its way back has its time"


def test_one_whose_place_other_work_has_meanwhile_is_away_as_planned_until_that_is_over() -> None:
    ask = endpoint("ask", [0], priority=40)
    watch = Watch()
    plant = Plant(totals=[80 * GIB], behaviour=Behaviour(run_s={"short": 100.0, "long": 2900.0}))
    run = Run(spec(ask), plant, watch=watch)
    run.settle()
    run.plant.advance(600.0)
    run.settle()
    watch.since()
    short = overlay("short", [0], memory=20, duration=100.0)
    run.spec = spec(ask, short)
    run.settle(until=lambda p: p.ledger.overlays["short"].state == "active")
    run.spec = spec(ask, short, overlay("long", [0], memory=20, duration=3000.0))
    run.settle(until=lambda p: [p.ledger.overlays[n].state for n in ("short", "long")] == ["done", "active"])
    (entry,) = run.ledger.agenda
    assert (entry.overlay, entry.reason) == ("long", "its place is held by long")
    run.settle()
    assert run.plant.is_ready("ask")
    assert watch.since() == []


def test_many_that_come_back_to_one_gpu_one_after_the_other_have_the_time_of_their_turns() -> None:
    names = ("a", "b", "c", "d", "e")
    items = [endpoint(name, [0], memory=15, priority=40) for name in names]
    watch = Watch()
    plant = Plant(totals=[80 * GIB], behaviour=Behaviour(load_s=100.0))
    run = Run(spec(*items), plant, watch=watch)
    run.settle()
    run.plant.advance(600.0)
    run.settle()
    watch.since()
    run.spec = spec(*items, overlay("render", [0]))
    run.settle()
    assert all(run.plant.is_ready(name) for name in names)
    assert watch.since() == []


def test_foreign_memory_that_keeps_the_baseline_down_is_named_for_each_endpoint() -> None:
    run, watch = box(THINKING, ASK)
    run.plant.foreign = {index: [foreign(99, 70 * GIB)] for index in range(6)}
    for _ in range(5):
        run.step()
        run.plant.advance(10)
    assert sorted(watch.since()) == ["IncidentOpened ForeignMemory/ask", "IncidentOpened ForeignMemory/thinking"]
    run.plant.foreign = {}
    run.settle()
    assert {i.state for i in watch.incidents} == {"recovering"}


def test_an_endpoint_that_never_comes_up_ends_as_a_crash_loop() -> None:
    run, watch = box(THINKING, ASK, behaviour=Behaviour(crashes=frozenset({"ask"})))
    run.settle()
    assert [line for line in watch.story if "Opened" in line] == [
        "IncidentOpened Unplanned/ask",
        "IncidentOpened CrashLoop/ask",
    ]
    assert not [line for line in watch.story if "thinking" in line]
