"""The start gate: while an engine loads on a GPU, nothing starts, stops, sleeps, wakes up or is killed there.

Engines measure free memory while they load. So neither does one begin to load where memory is still coming back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from builders import endpoint, overlay, spec
from msgspec.structs import replace
from plant import Behaviour, Plant, Run, overlay_state

from reconciler.plan.actions import Action, Plan
from reconciler.plan.ledger import Ledger
from reconciler.plan.observed import Incarnation
from reconciler.spec.spec import EndpointSpec, Evict, Health, OverlaySpec, Stop
from reconciler.units import GIB

SLEEP = Evict("sleep", 1, 10 * GIB)
QUICK = Stop(drain_s=0.0)


@dataclass
class Gated(Plant):
    """A plant that refuses what the gate has to keep out."""

    were_ready: set[str] = field(default_factory=set)
    ending: frozenset[str | None] = frozenset()
    """Who is to end by the decision that is carried out: whether it measures rightly is no matter any more."""
    doubtful: frozenset[str] = frozenset()
    """Endpoints of which nobody can tell whether they load, or that should have by now."""
    forgotten: dict[str, tuple[float, Action]] = field(default_factory=dict)
    """Calls of a daemon that died: the engines are busy with them all the same."""

    def act(self, decided: Plan) -> list[Action]:
        self.ending = frozenset(a.incarnation for a in decided.actions if a.op in ("stop", "drain", "kill"))
        self.doubtful = frozenset(n for n, v in decided.endpoints.items() if v.state in ("unhealthy", "unknown"))
        return super().act(decided)

    def forget_calls(self) -> None:
        """The daemon dies: nobody hears what its calls are answered."""
        self.forgotten |= self.called
        self.called, self.answered = {}, []

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        for name, (at, action) in list(self.forgotten.items()):
            if at <= self.now.mono:
                del self.forgotten[name]
                if action.op not in self.behaviour.failing and any(i.id == name for i in self.incarnations):
                    (self.asleep.add if action.op == "sleep" else self.asleep.discard)(name)

    def next_event(self) -> float | None:
        ends = [at for at, _ in self.forgotten.values() if at > self.now.mono]
        return min([*ends, *([e] if (e := super().next_event()) is not None else [])], default=None)

    def _carry_out(self, action: Action) -> bool:
        self.were_ready |= {n for n, at in self.ready_at.items() if self.now.mono >= at}
        before = list(self.incarnations), dict(self.called)
        beside = [(i, self._busy_with(i)) for i in before[0] if i.subject != action.subject]
        predecessor = [(i, self._busy_with(i)) for i in before[0] if i.subject == action.subject and not i.alive]
        done = super()._carry_out(action)
        if (self.incarnations, self.called) != before:  # not what is under way already
            brings = action.op in ("start", "start_workload", "wake")
            kept_out = {"loads", "wakes"} | ({"may load", "ends", "lingers", "falls asleep"} if brings else set())
            kept_out |= {"falls asleep"} if action.op == "sleep" else set()
            for other, what in (*beside, *predecessor):
                shared = set(other.gpus) & set(action.gpus)
                assert not (shared and what in kept_out), f"{action.op} {action.subject} where {other.id} {what}"
        return done

    def _busy_with(self, one: Incarnation) -> str | None:
        calls = {**self.forgotten, **self.called}
        if one.id in calls:
            return "wakes" if calls[one.id][1].op == "wake" else "falls asleep"
        if one.id in self.frees_at:
            return "lingers"
        if not one.alive:
            return None
        if one.stop is not None and one.stop.signalled is not None:
            return "ends"
        if one.phase == "exited":
            return "ends" if one.id in self.ending else None
        if one.subject.kind == "workload" or one.id in self.were_ready | self.ending:
            return None
        return "may load" if one.subject.name in self.doubtful else "loads"


def sharing(name: str, *gpus: int, **fields: object) -> EndpointSpec:
    """One that takes a part of each of its GPUs."""
    given: dict[str, object] = {"memory": 20, "stop": QUICK, **fields}
    return endpoint(name, gpus or (0,), **given)  # type: ignore[arg-type]


def begun(*items: EndpointSpec | OverlaySpec, plant: Gated | None = None) -> Run:
    return Run(spec(*items), plant or Gated())


def ready_in_order(run: Run) -> list[tuple[str, float]]:
    """Who was started, and when it was ready, in seconds from the beginning."""
    began = run.plant.now.mono
    run.settle()
    at = run.plant.ready_at
    return [(i.subject.name, at[i.id] - began) for i in sorted(run.plant.incarnations, key=lambda i: i.started.mono)]


def test_who_waits_for_another_to_load_says_for_whom():
    run = Run(
        spec(endpoint("first", [0], priority=3, memory=10), endpoint("second", [0], priority=2, memory=10)),
        Plant(totals=[80 * GIB]),
    )
    run.step()
    seen = run.decide().endpoints
    assert (seen["first"].state, seen["second"].state) == ("starting", "pending")
    assert seen["second"].reason == "its set point is running; first loads there first"
    run.settle()
    assert run.decide().endpoints["second"].reason == ""


def test_two_that_come_up_at_once_on_one_gpu_load_one_after_the_other_and_elsewhere_at_once() -> None:
    order = ready_in_order(begun(sharing("a"), sharing("b", priority=600), sharing("c", 1)))
    assert order == [("b", 40.0), ("c", 40.0), ("a", 80.0)]


def test_gangs_that_overlap_on_one_gpu_take_turns() -> None:
    order = ready_in_order(begun(*(sharing(name, i, i + 1) for i, name in enumerate("abc"))))
    assert order == [("a", 40.0), ("b", 80.0), ("c", 120.0)]


def test_one_that_fails_while_it_measures_does_not_keep_the_other_from_loading() -> None:
    """The other waits until the memory is back; and while the one is not to be tried again yet, its turn has come."""
    plant = Gated(behaviour=Behaviour(load_s=150.0, crashes=frozenset({"bad"})))
    run = begun(sharing("bad", priority=900), sharing("good"), plant=plant)
    decided = run.settle(until=lambda p: p.endpoints["good"].state == "healthy")
    assert [e.exit_code for e in decided.ledger.endpoints["bad"].exits] == [1, 1]
    assert run.starts()[:3] == ["bad", "bad", "good"], "at once the first time; then it waits, and the other does not"


@pytest.mark.parametrize("remembers", [True, False], ids=["its journal is there", "its journal is gone"])
def test_a_daemon_that_comes_in_the_middle_of_a_load_waits_for_it(remembers: bool) -> None:
    run = begun(sharing("a", priority=600), sharing("b"))
    run.step()
    run.plant.advance(20.0)
    assert run.starts() == ["a"]
    new = Run(run.spec, run.plant, run.ledger if remembers else Ledger())
    new.settle()
    assert run.starts() == ["a", "b"]
    assert [at - run.plant.incarnations[0].started.mono for at in sorted(run.plant.ready_at.values())] == [40.0, 80.0]


@pytest.mark.parametrize("call", ["sleep", "wake"])
def test_a_daemon_that_comes_while_an_engine_is_told_to_sleep_or_wake_starts_nobody_beside_it(call: str) -> None:
    """It is told again: whether the call of the daemon that died arrived, nobody knows."""
    plant, sleeper, job = Gated(), sharing("a", memory=60, evict=SLEEP), overlay("job", [0], memory=60, duration=60.0)
    run = begun(sleeper, plant=plant)
    run.settle()
    run.spec = spec(sleeper, job)
    run.settle(until=lambda _: [c.op for _, c in plant.called.values()] == [call])
    plant.forget_calls()
    run.spec = spec(sleeper, job, sharing("b", memory=10))
    run.settle()
    assert plant.is_ready("a")
    assert plant.is_ready("b")
    assert run.starts().count("a") == 1, "it slept and woke up"


@pytest.mark.parametrize("evict", [SLEEP, Evict()], ids=["it sleeps", "it stops"])
def test_who_wakes_up_and_who_starts_on_one_gpu_take_turns(evict: Evict) -> None:
    """Two give way to one overlay and come back together: one wakes up where the other is started."""
    run = begun(sharing("a", memory=35, evict=SLEEP), sharing("b", memory=35, evict=evict))
    run.settle()
    run.spec = spec(*run.spec.endpoints.values(), overlay("job", [0], memory=60, duration=60.0))
    run.settle(until=overlay_state("job", "done"))
    assert run.plant.is_ready("a")
    assert run.plant.is_ready("b")


def test_nobody_is_told_to_sleep_beside_one_that_loads() -> None:
    sleeper, other = sharing("a", memory=50, evict=SLEEP), sharing("b", priority=900, memory=20)
    run = begun(sleeper)
    run.settle()
    run.spec = spec(sleeper, other)
    run.step()
    run.spec = spec(sleeper, other, overlay("job", [0], memory=50))
    run.settle(until=overlay_state("job", "active"))
    assert [(a.op, a.subject.name) for a in run.plant.history] == [
        ("start", "a"), ("start", "b"), ("sleep", "a"), ("start_workload", "job"),
    ]  # fmt: skip
    assert run.plant.is_ready("b")


def test_nobody_wakes_up_where_another_is_being_stopped() -> None:
    sleeper, other = sharing("a", memory=50, evict=SLEEP), sharing("b", memory=10)
    run = begun(sleeper, other, plant=Gated(behaviour=Behaviour(stop_s=20.0, run_s={"job": 60.0})))
    run.settle()
    run.spec = spec(sleeper, other, overlay("job", [0], memory=60, priority=550, duration=60.0))
    run.settle(until=overlay_state("job", "active"))
    run.plant.advance(59.0)
    run.spec = spec(sleeper, replace(other, state="stopped"), *run.spec.overlays.values())
    run.settle()
    assert [a.op for a in run.plant.history if a.subject.name == "a"] == ["start", "sleep", "wake"]
    assert run.stops() == ["b"]


def test_what_a_leader_left_behind_is_not_killed_beside_one_that_loads() -> None:
    run = begun(sharing("a"))
    run.settle()
    run.spec = spec(sharing("a"), sharing("b"))
    run.step()
    left = run.plant.current("a")
    assert left is not None
    gone = {"phase": "exited", "exit_code": -9, "exited": run.plant.now, "strays": (99,)}
    run.plant._change(left.id, lambda i: replace(i, **gone))  # type: ignore[arg-type]
    del run.plant.ready_at[left.id]
    assert run.starts() == ["a", "b"]
    run.settle()
    assert run.stops() == ["a"]
    assert run.plant.is_ready("a")
    assert run.plant.is_ready("b")


@pytest.mark.parametrize("stops", [False, True], ids=["it is late", "it ends"])
def test_who_cannot_be_ended_as_one_of_its_gpus_is_not_seen_keeps_others_off_the_rest(stops: bool) -> None:
    """Late, it may load yet; ending, its memory comes back in the middle of the other's load."""
    late = sharing("late", 0, 1, priority=900, health=Health(startup_s=60.0))
    plant = Gated(behaviour=Behaviour(load_s=90.0, stop_s=50.0))
    run = begun(late, plant=plant)
    run.settle(until=lambda p: p.endpoints["late"].state == ("stopping" if stops else "starting"))
    plant.overrides[1] = {"state": "unknown"}
    run.spec = spec(late, sharing("other", 0))
    run.settle(until=lambda p: "other" in run.starts() or p.now.mono >= plant.now.mono + 200)
    assert not plant._busy_with(plant.incarnations[0])
    plant.overrides.clear()
    run.settle(until=lambda p: p.endpoints["other"].state == "healthy")


def test_one_that_is_stuck_keeps_nobody_from_ending_and_from_loading_no_longer_than_twice_its_deadline() -> None:
    """It cannot be ended: one of its GPUs is not seen, or who it is cannot be verified."""
    for unseen in (True, False):
        stuck, other = sharing("stuck", 0, 1, health=Health(startup_s=60.0)), sharing("other", 0)
        plant = Plant(behaviour=Behaviour(load_s=9000.0))
        run = Run(spec(stuck), plant)
        run.step()
        plant.behaviour.load_s = 40.0
        if unseen:
            plant.overrides[1] = {"state": "unknown"}
        else:
            plant._change(plant.incarnations[0].id, lambda i: replace(i, phase="unknown"))
        run.spec = spec(stuck, other)
        began = plant.now.mono
        run.settle(until=lambda _, run=run: "other" in run.starts())  # type: ignore[misc]
        assert plant.now.mono - began == pytest.approx(120.0, abs=1.0)
        run.settle(until=lambda p: p.endpoints["other"].state == "healthy")
        run.spec = spec(stuck, replace(other, state="stopped"))
        run.settle(until=lambda p: p.endpoints["other"].state == "stopped")
        assert run.stops() == ["other"]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_to_those_that_share_gpus_the_gate_holds(seed: int) -> None:
    """Overlays come and go; engines crash, leave processes behind and hang; GPUs and identities are not seen."""
    rnd = Random(seed)
    count = rnd.choice([1, 2, 3])

    def gpus() -> list[int]:
        return sorted(rnd.sample(range(count), rnd.randint(1, count)))

    found = [
        endpoint(
            name, gpus(), memory=rnd.choice([10, 20, 30]), priority=rnd.choice([100, 200, 300]),
            evict=rnd.choice([Evict(), SLEEP, Evict("sleep", 2)]), stop=Stop(drain_s=rnd.choice([0.0, 15.0])),
            health=Health(startup_s=rnd.choice([60.0, 900.0]), unhealthy_for_s=30.0),
        )
        for name in "abcde"[: rnd.randint(2, 5)]
    ]  # fmt: skip
    jobs = [
        overlay(
            f"job{i}", gpus(), memory=rnd.choice([None, 20, 40, 60]), priority=rnd.choice([250, 400]), duration=99.0
        )
        for i in range(3)
    ]
    behaviour = Behaviour(
        load_s=rnd.choice([20.0, 40.0, 70.0]), stop_s=rnd.choice([2.0, 20.0]),
        failing=frozenset(call for call in ("sleep", "wake") if rnd.random() < 0.15),
        crashes=frozenset(e.name for e in found if rnd.random() < 0.1),
    )  # fmt: skip
    plant = Gated([80 * GIB] * count, behaviour=behaviour)
    run, live = begun(*found, plant=plant), list[OverlaySpec]()
    for _ in range(8):
        living = [i for i in plant.incarnations if i.alive and i.phase in ("running", "unknown")]
        victim, index = rnd.choice([*living, None]), rnd.randrange(len(found))
        match rnd.choice(["over", "over", "cancel", "die", "crash", "orphan", "unverified", "hang", "blind", "edit"]):
            case "over" if jobs:
                live.append(jobs.pop())
            case "cancel" if live:
                live.pop(rnd.randrange(len(live)))
            case "die":
                plant.forget_calls()
            case "blind":
                gpu = rnd.randrange(count)
                plant.overrides = {} if plant.overrides else {gpu: {"state": "unknown"}}
            case "edit":
                found[index] = replace(found[index], process_hash=str(seed), state=rnd.choice(["running", "stopped"]))
            case "crash" if victim is not None:
                plant.ends_at[victim.id] = (plant.now.mono, 1)
                plant.advance(0.0)
            case "orphan" if victim is not None:
                gone = {"phase": "exited", "exit_code": -9, "exited": plant.now, "strays": (99,)}
                plant._change(victim.id, lambda i, gone=gone: replace(i, **gone))  # type: ignore[misc]
                plant.ready_at.pop(victim.id, None)
            case "unverified" if victim is not None:
                phase = "unknown" if victim.phase == "running" else "running"
                plant._change(victim.id, lambda i, phase=phase: replace(i, phase=phase))  # type: ignore[misc]
            case "hang" if victim is not None:
                plant.misses[victim.id] = (9, plant.now.mono)
        run.spec = spec(*found, *live)
        for _ in range(rnd.choice([1, 2, 10, 40])):
            decided, acted = run.step()
            moments = [plant.next_event(), decided.next_wake.mono if decided.next_wake else None]
            due = min((m for m in moments if m is not None), default=None)
            if not acted and due is not None:
                plant.advance(max(0.001, due - plant.now.mono))
