"""The executor begins each operation once, tells when a failed one may be tried again, and takes edits of a stop."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.errors import ActError
from reconciler.loop.executor import RETRY_INITIAL_S, Executor, told
from reconciler.plan.actions import Action, Cause
from reconciler.plan.observed import Subject
from reconciler.spec.spec import Stop

STOP = Action(
    1, (), "stop", Subject("endpoint", "chat"), (), "asked", Cause("request"), 30.0, (0.0, 1.0), ready=True,
    incarnation="i-1",
)  # fmt: skip


def test_an_operation_that_is_tried_again_is_not_due_while_it_lasts() -> None:
    """Else the loop would look again every millisecond for as long as a process that no signal ends lives on."""

    async def story() -> None:
        now, tries = [100.0], []
        gate = asyncio.Event()

        async def ensure_stopped(incarnation: str, _stop: Stop) -> None:
            tries.append(incarnation)
            if len(tries) > 1:
                await gate.wait()
            raise ActError("it does not end")

        actor: Any = SimpleNamespace(ensure_stopped=ensure_stopped)
        clock: Any = SimpleNamespace(now=lambda: Instant(now[0], now[0]))
        unused: Any = None
        executor = Executor(
            actor, clock, launch_of=unused, stop_of=lambda _: Stop(), call_engine=unused, called=unused,
            report=lambda _: None, wake=lambda: None,
        )  # fmt: skip
        plan: Any = SimpleNamespace(actions=(STOP,))
        await executor.walk(executor.due(plan))
        await asyncio.sleep(0)
        assert executor.next_retry() == 100.0 + RETRY_INITIAL_S
        now[0] += RETRY_INITIAL_S
        await executor.walk(executor.due(plan))
        await asyncio.sleep(0)
        assert tries == ["i-1", "i-1"]
        assert executor.next_retry() is None
        gate.set()
        await asyncio.sleep(0.01)
        assert executor.next_retry() == now[0] + 2 * RETRY_INITIAL_S
        await executor.close()

    asyncio.run(story())


def executor_of(actor: object, **own: Any) -> Executor:
    made: dict[str, Any] = {
        "launch_of": None, "stop_of": lambda _: Stop(), "call_engine": None, "called": None,
        "report": lambda _: None, "wake": lambda: None,
    }  # fmt: skip
    clock: Any = SimpleNamespace(now=lambda: Instant(100.0, 100.0))
    anybody: Any = actor
    return Executor(anybody, clock, **{**made, **own})


def plan_of(*actions: Action) -> Any:
    return SimpleNamespace(actions=actions)


async def settled(executor: Executor) -> None:
    for _ in range(100):
        if not executor.busy:
            return
        await asyncio.sleep(0.01)
    pytest.fail("it is still at work")


def test_a_failed_operation_is_not_begun_again_before_its_time_and_forgotten_when_no_plan_wants_it() -> None:
    async def story() -> None:
        tries: list[str] = []

        async def ensure_killed(incarnation: str) -> None:
            tries.append(incarnation)
            raise ActError("not permitted")

        reports: list[str] = []
        executor = executor_of(
            SimpleNamespace(ensure_killed=ensure_killed), report=lambda events: reports.extend(e.kind for e in events)
        )
        kill = replace(STOP, op="kill")
        for _ in range(3):
            await executor.walk(executor.due(plan_of(kill)))
            await settled(executor)
        assert tries == ["i-1"]
        assert reports == ["act.kill.failed"]
        who = f"{STOP.subject.kind}/{STOP.subject.name}"
        assert executor.failing() == {who: "its kill failed: not permitted; tried again in 1s"}
        await executor.walk(executor.due(plan_of()))
        assert executor.next_retry() is None
        assert executor.failing() == {}
        await executor.walk(executor.due(plan_of(kill)))
        await settled(executor)
        assert tries == ["i-1", "i-1"]

    asyncio.run(story())


def test_what_is_due_is_told_before_any_of_it_begins_and_is_not_due_while_it_lasts() -> None:
    async def story() -> None:
        ended: list[str] = []
        gate = asyncio.Event()

        async def ensure_killed(incarnation: str) -> None:
            ended.append(incarnation)
            await gate.wait()

        executor = executor_of(SimpleNamespace(ensure_killed=ensure_killed))
        kills = [replace(STOP, op="kill", id=number, incarnation=f"i-{number}") for number in (1, 2)]
        twice = replace(kills[0], id=3)
        drain = replace(STOP, op="drain", id=4, incarnation="i-4", ready=False)
        due = executor.due(plan_of(*kills, twice, drain))
        assert due == tuple(kills), "one operation for each that it is about"
        assert [(event.kind, event.message) for event in told(due)] == [("act.kill", kill.reason) for kill in kills]
        await asyncio.sleep(0)
        assert not ended
        await executor.walk(due)
        await asyncio.sleep(0)
        assert ended == ["i-1", "i-2"]
        assert executor.due(plan_of(*kills)) == ()
        gate.set()
        await settled(executor)

    asyncio.run(story())


@pytest.mark.parametrize("problem", [None, ActError("its port is taken")], ids=["started", "not started"])
def test_of_a_start_the_walk_itself_tells_and_the_loop_is_woken_only_for_one_that_failed(
    problem: ActError | None,
) -> None:
    async def story() -> None:
        async def ensure_started(_launch: object) -> None:
            await asyncio.sleep(0)
            if problem is not None:
                raise problem

        wakes: list[str] = []
        executor = executor_of(
            SimpleNamespace(ensure_started=ensure_started), launch_of=lambda _: None, wake=lambda: wakes.append("")
        )
        assert await executor.walk(executor.due(plan_of(replace(STOP, op="start", incarnation=None))))
        assert not executor.busy
        assert wakes == ([] if problem is None else [""])
        assert not await executor.walk(executor.due(plan_of()))

    asyncio.run(story())


def test_an_edited_stop_replaces_the_one_under_way_and_an_unedited_one_does_not() -> None:
    async def story() -> None:
        stops: list[Stop] = []
        wanted = [Stop(grace_s=60.0)]
        gate = asyncio.Event()

        async def ensure_stopped(_incarnation: str, stop: Stop) -> None:
            stops.append(stop)
            await gate.wait()

        wakes: list[str] = []
        executor = executor_of(
            SimpleNamespace(ensure_stopped=ensure_stopped), stop_of=lambda _: wanted[0], wake=lambda: wakes.append("")
        )
        for grace_s in (60.0, 60.0, 5.0, 5.0):
            wanted[0] = Stop(grace_s=grace_s)
            await executor.walk(executor.due(plan_of(STOP)))
            await asyncio.sleep(0.01)
        assert stops == [Stop(grace_s=60.0), Stop(grace_s=5.0)]
        assert executor.busy
        assert wakes == [], "the one that was replaced is no operation that is over"
        gate.set()
        await settled(executor)
        assert wakes == [""]

    asyncio.run(story())


@pytest.mark.parametrize("op", ["sleep", "wake"])
@pytest.mark.parametrize("problem", [None, "it answered with status 500"])
def test_an_engine_is_called_once_and_what_came_of_it_is_told(op: Any, problem: str | None) -> None:
    async def story() -> None:
        told: list[tuple[str, str | None]] = []

        async def call_engine(_action: Action) -> None:
            if problem is not None:
                raise ActError(problem)

        def called(action: Action, wrong: str | None) -> None:
            told.append((action.op, wrong))

        executor = executor_of(None, call_engine=call_engine, called=called)
        await executor.walk(executor.due(plan_of(replace(STOP, op=op))))
        await settled(executor)
        assert told == [(op, problem)]
        assert executor.next_retry() is None, "the plan ends it, or starts it afresh"

    asyncio.run(story())


def test_a_walk_returns_once_its_starts_were_carried_out_and_waits_for_nothing_else() -> None:
    async def story() -> None:
        done: list[str] = []
        gate = asyncio.Event()

        async def ensure_started(launch: str) -> None:
            await asyncio.sleep(0.02)
            done.append(launch)

        async def ensure_drain_requested(incarnation: str) -> None:
            await gate.wait()
            done.append(incarnation)

        def launch_of(action: Action) -> Any:
            return action.subject.name

        actor = SimpleNamespace(ensure_started=ensure_started, ensure_drain_requested=ensure_drain_requested)
        executor = executor_of(actor, launch_of=launch_of)
        start = replace(STOP, id=2, op="start", incarnation=None, subject=Subject("endpoint", "new"))
        later = replace(start, id=3, ready=False, subject=Subject("endpoint", "later"))
        waits = replace(start, id=4, op="wait_memory", subject=Subject("endpoint", "waiting"))
        await executor.walk(executor.due(plan_of(replace(STOP, op="drain"), start, later, waits)))
        assert done == ["new"]
        assert executor.busy
        await executor.close()
        assert done == ["new"], "a drain that the daemon let go of is the next one's"

    asyncio.run(story())
