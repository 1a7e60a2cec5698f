"""Giving way by sleeping: chosen where it frees enough, verified in NVML, and undone by waking up."""

from __future__ import annotations

import pytest
from builders import endpoint, foreign, overlay, spec, uuid
from msgspec.structs import replace
from plant import Behaviour, Plant, Run, names, overlay_state

from reconciler.health.assess import Facts, assess
from reconciler.health.incident import Incident
from reconciler.plan.actions import Plan
from reconciler.plan.ledger import Timings
from reconciler.plan.naps import called
from reconciler.plan.planner import plan
from reconciler.spec.spec import EndpointSpec, Evict, Health, OverlaySpec, Spec, Stop
from reconciler.units import GIB

SLEEP = Evict("sleep", 1, 10 * GIB)
QUICK = Stop(drain_s=0.0)


def sleeper(name: str = "ask", gpus: tuple[int, ...] = (0,), **fields: object) -> EndpointSpec:
    given: dict[str, object] = {"memory": 60, "priority": 100, "evict": SLEEP, "stop": QUICK, **fields}
    return endpoint(name, gpus, **given)  # type: ignore[arg-type]


def render(**fields: object) -> OverlaySpec:
    return overlay("render", **{"gpus": [0], "memory": 60, **fields})  # type: ignore[arg-type]


def warm(*items: EndpointSpec, plant: Plant | None = None) -> Run:
    """A box on which the endpoints have been ready for ten minutes."""
    run = Run(spec(*items), plant or Plant())
    run.settle()
    run.plant.advance(600)
    run.settle()
    return run


def add(run: Run, *items: OverlaySpec) -> None:
    run.spec = spec(*run.spec.endpoints.values(), *items)


def ops(run: Run, name: str) -> list[str]:
    return [a.op for a in run.plant.history if a.subject.name == name]


def test_an_endpoint_gives_way_by_sleeping_and_returns_by_waking_with_the_same_process() -> None:
    run = warm(sleeper())
    pid = run.plant.current("ask")
    add(run, render())
    decided = run.settle(until=overlay_state("render", "active"))
    assert decided.endpoints["ask"].state == "sleeping"
    assert decided.endpoints["ask"].desired == "displaced"
    run.settle()
    assert run.plant.current("ask") == pid
    assert run.plant.is_ready("ask")
    assert not run.plant.asleep
    assert ops(run, "ask") == ["start", "sleep", "wake"]
    assert run.ledger.endpoints["ask"].nap is None
    assert run.ledger.overlays["render"].state == "done"


def test_those_that_sleep_are_foreseen_to_wake_once_all_that_keeps_their_places_is_over() -> None:
    run = warm(sleeper("a", (0,)), sleeper("b", (1,)), endpoint("c", [2], priority=10))
    add(run, render(gpus=[0, 1, 2]))
    run.settle(until=overlay_state("render", "active"))
    decided = run.decide()
    assert [decided.endpoints[n].state for n in "ab"] == ["sleeping", "sleeping"]
    begins = [a for a in decided.actions if a.op in ("wake", "start")]
    assert sorted((a.op, a.subject.name, a.gpus) for a in begins) == [
        ("start", "c", (uuid(2),)), ("wake", "a", (uuid(0),)), ("wake", "b", (uuid(1),)),
    ]  # fmt: skip
    (over,) = [a for a in decided.actions if a.op == "wait_memory" and a.subject.name == "render"]
    assert all(over.id in a.needs and a.cause.overlay == "render" for a in begins)


def test_the_work_begins_only_after_the_engine_sleeps_and_nvml_shows_its_memory_free() -> None:
    run = warm(sleeper())
    run.plant.residue = 30 * GIB  # it says that it sleeps, and keeps far more than a residue
    add(run, render())
    decided = run.settle(until=lambda p: p.endpoints["ask"].state == "sleeping")
    assert "start_workload render" not in names(a for a in decided.actions if a.ready)
    run.settle(until=overlay_state("render", "active"))
    assert ops(run, "ask") == ["start", "sleep", "stop"], "a sleep that frees too little becomes a stop"
    run.settle()
    assert run.plant.is_ready("ask")


def test_a_failed_sleep_becomes_a_stop() -> None:
    run = warm(sleeper(), plant=Plant(behaviour=Behaviour(failing=frozenset({"sleep"}))))
    add(run, render())
    run.settle()
    assert ops(run, "ask") == ["start", "sleep", "stop", "start"]
    assert run.ledger.overlays["render"].state == "done"
    assert run.plant.is_ready("ask")


def test_a_failed_wake_becomes_a_restart() -> None:
    run = warm(sleeper(), plant=Plant(behaviour=Behaviour(failing=frozenset({"wake"}))))
    add(run, render())
    run.settle()
    assert ops(run, "ask") == ["start", "sleep", "wake", "stop", "start"]
    assert run.plant.is_ready("ask")
    assert run.ledger.overlays["render"].state == "done"


def test_one_that_failed_to_wake_is_stopped_and_not_woken_again_before_its_stop_is_on_record() -> None:
    run = warm(sleeper(), plant=Plant(behaviour=Behaviour(failing=frozenset({"wake"}))))
    looked: list[tuple[str, ...]] = []

    def look_once_more(run: Run, decided: Plan) -> None:
        if any(a.op == "stop" and a.ready and a.subject.name == "ask" for a in decided.actions):
            again = plan(run.spec, run.plant.observe(), decided.ledger, run.plant.now)
            looked.append(tuple(a.op for a in again.actions if a.ready and a.subject.name == "ask"))

    run.watch = look_once_more
    add(run, render())
    run.settle()
    assert looked
    assert set(looked) == {("stop",)}


@pytest.mark.parametrize("call", ["sleep", "wake"])
def test_what_failed_is_named_wherever_somebody_looks_until_it_is_over(call: str) -> None:
    """In its state while it is stopped, in the incident, and of its last end."""
    run = warm(sleeper(stop=Stop(drain_s=900.0)), plant=Plant(behaviour=Behaviour(failing=frozenset({call}))))
    current = run.plant.current("ask")
    assert current is not None
    reasons: list[str] = []
    incidents: tuple[Incident, ...] = ()

    def watch(run: Run, decided: Plan) -> None:
        nonlocal incidents
        view = decided.endpoints["ask"]
        reasons.extend([view.reason] if view.state == "stopping" else [])
        facts = Facts(run.spec, decided.endpoints, decided.ledger, run.plant.observe(), (), decided.blocked)
        incidents, _ = assess(facts, incidents, decided.now)
        if current.id in run.plant.asleep:
            run.plant.busy[current.id] = 3  # queued: an engine that sleeps finishes nothing

    run.watch = watch
    add(run, render())
    run.settle()
    problem = f"it could not {call}: POST answered 500"
    assert reasons
    assert all(problem in reason for reason in reasons), reasons
    (end,) = run.ledger.endpoints["ask"].exits
    assert (end.planned, end.ended_for) == (True, problem)
    if call == "wake":
        assert [(i.kind, problem in i.message) for i in incidents] == [("WrongWay", True)]
        assert "drain" not in ops(run, "ask"), "who sleeps finishes no request"
    else:
        assert not incidents, "that it gives way was planned, and it did"


def test_one_that_breaks_before_it_is_told_to_sleep_stops() -> None:
    run = warm(sleeper(stop=Stop(drain_s=900.0), health=Health(hung_s=60.0)))
    current = run.plant.current("ask")
    assert current is not None
    run.plant.busy[current.id] = 1
    add(run, render())
    run.settle(until=lambda p: any(a.op == "drain" and a.ready for a in p.actions))
    run.plant.frozen[current.id] = run.plant.now.mono
    run.plant.advance(60.0)
    decided = run.decide()
    action = next(a for a in decided.actions if a.subject.name == "ask")
    assert action.op == "stop", "told to sleep, it would not answer; and what is in flight cannot finish"
    assert "it stops: Hung: " in action.reason


@pytest.mark.parametrize(
    ("evict", "host", "work", "level"),
    [
        (SLEEP, 64 * GIB, {}, 1),
        (SLEEP, 13 * GIB, {}, 2),
        (SLEEP, None, {}, 2),
        (Evict("sleep", 2, 10 * GIB), 64 * GIB, {}, 2),
        (Evict("sleep", 1), 63 * GIB, {}, 2),
        (SLEEP, 64 * GIB, {"duration": 8 * 3600.0}, 2),
        (SLEEP, 64 * GIB, {"memory": None}, None),
        (SLEEP, 64 * GIB, {"memory": 78}, None),
        (Evict("stop"), 64 * GIB, {}, None),
    ],
    ids=[
        "host memory has room",
        "host memory lacks",
        "host memory unknown is no room",
        "always level 2",
        "weights unknown count as all that was planned",
        "too long to park weights",
        "the whole GPU leaves no room for a residue",
        "too much for a residue beside it",
        "stop is asked for",
    ],
)
def test_the_level_follows_from_host_memory_makespan_and_what_is_left_beside_it(
    evict: Evict, host: int | None, work: dict[str, object], level: int | None
) -> None:
    run = warm(sleeper(evict=evict), plant=Plant(host_bytes=host))
    add(run, render(**work))
    decided = run.decide()
    nap = decided.ledger.endpoints["ask"].nap
    assert (nap.level if nap else None) == level
    first = next(a for a in decided.actions if a.subject.name == "ask")
    assert first.op == ("stop" if level is None else "sleep")
    assert "evict render" in str(first.cause)


def test_plan_says_why_it_sleeps_as_it_does_or_stops() -> None:
    def told(work: dict[str, object], **fields: object) -> str:
        run = warm(sleeper(**fields), plant=Plant(host_bytes=13 * GIB))
        add(run, render(**work))
        decided = run.decide()
        action = next(a for a in decided.actions if a.subject.name == "ask")
        if action.op == "sleep":
            assert decided.endpoints["ask"].reason == action.reason
        else:  # the next decision sees a stop under way, and no more why
            assert [e.message for e in decided.events if e.kind == "evicted"] == [action.reason]
        return action.reason

    small = Evict("sleep", 1, 8 * GIB)
    assert told({}, evict=small) == (
        "gives way to render, asleep at level 1 (8GiB of weights in host memory, 13GiB available)"
    )
    assert told({}) == (
        "gives way to render, asleep at level 2 (weights dropped; 10GiB of weights and 4GiB for everybody else "
        "do not fit in the 13GiB of host memory available)"
    )
    assert told({"duration": 4 * 3600.0}, evict=small) == (
        "gives way to render, asleep at level 2 (weights dropped; host memory holds no weights for longer than 2h)"
    )
    assert told({"memory": None}) == (
        "gives way to render; it stops: a whole GPU is asked for, and asleep it keeps 1.5GiB of it"
    )
    assert told({"memory": 78}) == (
        "gives way to render; it stops: 78GiB is asked for, and asleep it keeps 1.5GiB of 79GiB"
    )
    assert told({}, evict=Evict("stop")) == "gives way to render"


@pytest.mark.parametrize(
    ("sleep_s", "wake_s", "level"),
    [
        ({}, {}, 1),
        ({1: 30.0}, {1: 39.9}, 1),
        ({1: 30.0}, {1: 41.0}, 2),
        ({1: 30.0, 2: 30.0}, {1: 41.0, 2: 41.0}, None),
    ],
)
def test_what_was_measured_decides_whether_sleeping_pays(
    sleep_s: dict[int, float], wake_s: dict[int, float], level: int | None
) -> None:
    run = warm(sleeper())
    run.ledger = replace(run.ledger, timings={"ask": Timings(60.0, 0.0, 10.0, sleep_s, wake_s)})
    add(run, render())
    decided = run.decide()
    nap = decided.ledger.endpoints["ask"].nap
    assert (nap.level if nap else None) == level
    if level is None:
        action = next(a for a in decided.actions if a.subject.name == "ask")
        assert action.reason == (
            "gives way to render; it stops: level 1 takes 1m11s there and back, a stop and a load 1m10s; "
            "level 2 takes 1m11s there and back, a stop and a load 1m10s"
        )
    elif sleep_s:
        calls = [a for a in decided.actions if a.op in ("sleep", "wake")]
        assert [round(a.expected[1] - a.expected[0], 1) for a in calls][:1] == [sleep_s.get(level, 1.8)]


def test_what_is_left_of_host_memory_for_everybody_else_is_a_set_point() -> None:
    run = warm(sleeper(), plant=Plant(host_bytes=13 * GIB))
    run.spec = replace(run.spec, node=replace(run.spec.node, host_reserve_bytes=3 * GIB))
    base = run.spec.node
    add(run, render())
    run.spec = replace(run.spec, node=base)
    nap = run.decide().ledger.endpoints["ask"].nap
    assert nap is not None
    assert nap.level == 1


def test_two_that_would_park_more_than_host_memory_holds_do_not_both() -> None:
    run = warm(sleeper("a", (0,)), sleeper("b", (1,)), plant=Plant(host_bytes=20 * GIB))
    add(run, render(gpus=[0, 1]))
    decided = run.decide()
    levels = [nap.level for n in ("a", "b") if (nap := decided.ledger.endpoints[n].nap) is not None]
    assert levels == [1, 2]


@pytest.mark.parametrize(("size", "starts"), [(27, True), (29, False)])
def test_what_one_that_sleeps_keeps_is_nobody_elses(size: int, starts: bool) -> None:
    """79 GiB less 50 of the work leave 29, and 1.5 of them are the residue's."""
    run = warm(sleeper())
    add(run, render(memory=50))
    run.settle(until=overlay_state("render", "active"))
    add(run, render(memory=50), overlay("late", [0], memory=size, priority=600))
    decided = run.decide()
    assert ("start_workload late" in names(a for a in decided.actions if a.ready)) == starts
    assert decided.endpoints["ask"].state == "sleeping"


def test_requests_in_flight_are_finished_before_it_sleeps_but_no_longer_than_the_drain() -> None:
    run = warm(sleeper(stop=Stop(drain_s=20.0)))
    current = run.plant.current("ask")
    assert current is not None
    run.plant.busy[current.id] = 1
    add(run, render())
    began = run.plant.now
    decided = run.settle(until=lambda p: any(a.op == "sleep" and a.ready for a in p.actions))
    assert 20 <= decided.now.since(began) < 21
    run = warm(sleeper(stop=Stop(drain_s=20.0)))
    add(run, render())
    began = run.plant.now
    decided = run.settle(until=lambda p: any(a.op == "sleep" and a.ready for a in p.actions))
    assert decided.now.since(began) < 1, "nothing is in flight"


def test_an_overlay_withdrawn_while_requests_finish_leaves_the_endpoint_untouched() -> None:
    run = warm(sleeper(stop=Stop(drain_s=20.0)))
    current = run.plant.current("ask")
    assert current is not None
    run.plant.busy[current.id] = 1
    add(run, render())
    run.settle(until=lambda p: any(a.op == "drain" and a.ready for a in p.actions))
    run.spec = spec(*run.spec.endpoints.values())
    run.settle()
    assert ops(run, "ask") == ["start"]
    assert run.ledger.endpoints["ask"].nap is None


def test_an_overlay_withdrawn_while_the_engine_falls_asleep_wakes_it_once_it_sleeps() -> None:
    run = warm(sleeper())
    add(run, render())
    run.step()
    run.plant.advance(0.5)
    run.spec = spec(*run.spec.endpoints.values())
    run.settle()
    assert ops(run, "ask") == ["start", "sleep", "wake"]
    assert run.plant.is_ready("ask")
    assert not run.plant.asleep


def test_one_that_was_woken_is_looked_at_again_at_once_until_it_is_seen_awake() -> None:
    """The engine may have been asked just before its call returned, and has nothing new to say afterwards."""
    run = warm(sleeper())
    add(run, render())
    run.settle(until=lambda _: bool(run.plant.called) and run.ledger.endpoints["ask"].nap.waking is not None)  # type: ignore[union-attr]
    run.plant.advance(run.plant.behaviour.wake_s)
    nap = run.ledger.endpoints["ask"].nap
    assert nap is not None
    run.ledger, _ = called(run.ledger, run.plant.answered[0], None, run.plant.now)
    seen = run.plant.observe()
    earlier = run.plant.now.plus(-0.001)
    stale = {name: replace(probe, at=earlier) for name, probe in seen.probes.items()}
    decided = plan(run.spec, replace(seen, probes=stale), run.ledger, run.plant.now)
    assert decided.ledger.endpoints["ask"].nap is not None
    assert decided.next_wake is not None
    assert decided.next_wake.since(run.plant.now) <= 0.25
    assert plan(run.spec, seen, run.ledger, run.plant.now).ledger.endpoints["ask"].nap is None


def test_an_answer_from_before_it_was_told_to_sleep_does_not_make_the_sleep_a_stop() -> None:
    """A busy engine says that it is well, and its page on whether it sleeps does not come in time."""
    run = warm(sleeper())
    add(run, render())
    run.settle(until=lambda _: bool(run.plant.called))
    run.plant.advance(run.plant.behaviour.sleep_s)
    before = run.plant.now.plus(-0.001)
    run.ledger, _ = called(run.ledger, run.plant.answered[0], None, run.plant.now)
    run.plant.answered = []
    seen = run.plant.observe()
    silent = {name: replace(p, sleeping=False, sleeping_at=before) for name, p in seen.probes.items()}
    run.ledger = plan(run.spec, replace(seen, probes=silent), run.ledger, run.plant.now).ledger
    run.settle(until=overlay_state("render", "active"))
    assert ops(run, "ask") == ["start", "sleep"]


def test_nothing_sleeps_and_wakes_on_one_gpu_at_a_time() -> None:
    """Two share a GPU; the one that has to give way for the second overlay waits until the other is awake."""
    seen: list[tuple[str, ...]] = []

    def watch(run: Run, decided: Plan) -> None:
        busy = [a for _, a in run.plant.called.values()]
        fresh = [a for a in decided.actions if a.ready and a.op in ("sleep", "wake", "start", "stop")]
        kinds = {(a.subject.name, a.op) for a in (*busy, *fresh) if uuid(0) in a.gpus}
        seen.append(tuple(sorted(op for _, op in kinds)))

    big = sleeper("a", memory=35)
    other = sleeper("b", memory=35)
    run = warm(big, other)
    run.watch = watch
    add(run, render(memory=40, duration=60.0))
    run.settle(until=overlay_state("render", "active"))
    run.settle()
    assert all(len(kinds) <= 1 for kinds in seen), seen
    assert any("sleep" in kinds for kinds in seen)
    assert any("wake" in kinds for kinds in seen)


def test_one_that_sleeps_by_a_strangers_hand_is_woken() -> None:
    run = warm(sleeper())
    current = run.plant.current("ask")
    assert current is not None
    run.plant.asleep.add(current.id)
    run.settle()
    assert ops(run, "ask") == ["start", "wake"]
    assert run.plant.is_ready("ask")
    assert not run.plant.asleep


def test_it_sleeps_on_while_a_stranger_holds_the_memory_it_had() -> None:
    run = warm(sleeper())
    add(run, render())
    run.settle(until=overlay_state("render", "active"))
    run.plant.foreign[0] = [foreign(7, 15 * GIB)]
    run.spec = spec(*run.spec.endpoints.values())
    run.plant.foreign[0] = [foreign(7, 40 * GIB)]
    decided = run.settle()
    assert decided.endpoints["ask"].state == "sleeping"
    assert "wake" not in ops(run, "ask")
    assert [b.reason for b in decided.blocked if b.subject.name == "ask"] == ["GpuOccupied"]
    run.plant.foreign.clear()
    run.settle()
    assert ops(run, "ask")[-1] == "wake"
    assert run.plant.is_ready("ask")


def test_one_that_sleeps_and_is_wanted_no_more_is_stopped() -> None:
    run = warm(sleeper())
    add(run, render())
    run.settle(until=overlay_state("render", "active"))
    base: Spec = run.spec
    run.spec = spec(sleeper(state="stopped"), *base.overlays.values())
    run.settle(until=lambda p: p.endpoints["ask"].state == "stopped")
    assert ops(run, "ask") == ["start", "sleep", "stop"]


def test_a_daemon_that_died_between_telling_and_noting_tells_again() -> None:
    run = warm(sleeper())
    add(run, render())
    run.step()
    run.plant.called.clear()  # the call was lost with the daemon
    run.settle(until=overlay_state("render", "active"))
    assert ops(run, "ask") == ["start", "sleep", "sleep"]


def test_nothing_is_told_to_sleep_again_on_a_gpu_that_fell_silent() -> None:
    run = warm(sleeper())
    add(run, render())
    run.step()
    run.plant.called.clear()  # the call was lost with the daemon
    run.plant.overrides[0] = {"state": "unknown"}
    assert "sleep" not in [a.op for a in run.decide().actions]
    run.settle()
    assert ops(run, "ask") == ["start", "sleep"]
    run.plant.overrides.clear()
    run.settle(until=overlay_state("render", "active"))
    assert ops(run, "ask") == ["start", "sleep", "sleep"]


def test_unknown_is_not_asleep() -> None:
    run = warm(sleeper())
    add(run, render())
    run.plant.overrides[0] = {"state": "unknown"}
    run.settle()
    assert ops(run, "ask") == ["start"]
    assert run.ledger.overlays["render"].state == "pending"


def test_who_sleeps_while_a_second_overlay_has_its_place_is_away_on_account_of_that_one() -> None:
    ask = sleeper()
    run = warm(ask, plant=Plant(totals=[80 * GIB]))
    first, second = overlay("first", [0], memory=30, duration=300.0), overlay("second", [0], memory=30, duration=900.0)
    run.plant.behaviour.run_s = {"first": 290.0, "second": 890.0}
    run.spec = spec(ask, first)
    run.settle(until=overlay_state("first", "active"))
    run.spec = spec(ask, first, second)
    last = run.settle(until=overlay_state("first", "done"))
    assert last.endpoints["ask"].state == "sleeping", "its way back waits for nobody any more"
    assert last.endpoints["ask"].reason == "EvictedBy: its place is held by second"
    (entry,) = last.ledger.agenda
    assert (entry.overlay, entry.reason) == ("second", "its place is held by second")
    assert last.now.wall + 500 < entry.until
    run.settle()
    assert run.plant.is_ready("ask")
    assert run.starts().count("ask") == 1


def test_maintenance_of_one_that_sleeps_for_another_overlay_begins_once_its_process_is_gone() -> None:
    run = warm(sleeper())
    add(run, render())
    run.settle(until=overlay_state("render", "active"))
    sets = [replace(sleeper(), state="stopped")]
    mend = overlay("mend", None, priority=50, duration=900.0, workload=False, sets=sets)
    add(run, render(), mend)
    run.settle(until=overlay_state("mend", "active"))
    assert run.plant.current("ask") is None
