"""Walks the ready frontier of a plan: starts each operation once, and tells the loop when one is over.

Operations are idempotent and keyed by what they are about, so a plan that still shows one in flight starts nothing
twice. One that failed is tried again later, after a wait that doubles; the plan decides whether it is still wanted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import assert_never

from msgspec import Struct

from reconciler.act.process import Launch, ProcessActor
from reconciler.clock import Clock
from reconciler.errors import ReconcilerError
from reconciler.plan.actions import WAITS, Action, Event, Plan
from reconciler.spec.spec import Stop
from reconciler.units import counted, format_duration

STARTS, ENDS = ("start", "start_workload"), ("stop", "stop_workload")
RETRY_INITIAL_S = 1.0
RETRY_MAX_S = 60.0

Key = tuple[str, str]
"""What an operation is about: its kind, and the incarnation (or, for a start, the subject)."""


class _Failure(Struct, frozen=True):
    """How often an action has failed in a row, and until when it is let be."""

    action: Action
    message: str
    count: int
    not_before: float
    """Monotonic seconds."""


class Executor:
    """Carries out actions through `act`, each as a task of the running event loop."""

    def __init__(
        self,
        actor: ProcessActor,
        clock: Clock,
        *,
        launch_of: Callable[[Action], Launch],
        stop_of: Callable[[Action], Stop],
        call_engine: Callable[[Action], Awaitable[None]],
        called: Callable[[Action, str | None], None],
        report: Callable[[Sequence[Event]], None],
        wake: Callable[[], None],
    ) -> None:
        self._actor = actor
        self._clock = clock
        self._launch_of = launch_of
        self._stop_of = stop_of
        self._call_engine = call_engine
        self._called = called
        """Told of each sleep and wake that is over, and of what was wrong."""
        self._report = report
        self._wake = wake
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._stops: dict[Key, Stop] = {}
        self._failures: dict[Key, _Failure] = {}

    def due(self, plan: Plan) -> tuple[Action, ...]:
        """The ready actions that are to begin now: neither under way nor too early to be tried again.

        One under way with other settings counts, too: a stop whose grace was edited.
        """
        # a drain of nobody in particular is waited for only: the ledger, not a record of its end, says since when
        waits = [a.id for a in plan.actions if a.op in WAITS or (a.op == "drain" and a.incarnation is None)]
        frontier: dict[Key, Action] = {}
        for action in plan.actions:
            if action.ready and action.id not in waits:
                frontier.setdefault(key_of(action), action)
        self._failures = {k: f for k, f in self._failures.items() if k in frontier}
        return tuple(action for key, action in frontier.items() if self._is_due(key, action))

    def _is_due(self, key: Key, action: Action) -> bool:
        if key in self._tasks:
            return action.op in ENDS and self._stops.get(key) != self._stop_of(action)
        failure = self._failures.get(key)
        return failure is None or self._clock.now().mono >= failure.not_before

    async def walk(self, due: Sequence[Action]) -> bool:
        """Begin these; returns once the starts among them were carried out.

        Whether there were any. Of one that was carried out nobody else is told: whoever walks looks again.

        Starts take milliseconds and are waited for, so that the next look sees them. Ends take as long as they take.
        Ends under way that no plan asks for any more are left to finish: a signal cannot be taken back.
        """
        begun = [(action, self._begin(action)) for action in due]
        if starts := [task for action, task in begun if action.op in STARTS]:
            await asyncio.wait(starts)
        return bool(starts)

    def next_retry(self) -> float | None:
        """Monotonic seconds at which a failed operation that is not under way again may be tried again."""
        waiting = (f.not_before for key, f in self._failures.items() if key not in self._tasks)
        return min(waiting, default=None)

    def failing(self) -> dict[str, str]:
        """Kind and name of who an operation does not get done for → what went wrong, and when it is tried again."""
        told = {}
        for key, failure in self._failures.items():
            subject, op = failure.action.subject, failure.action.op.removesuffix("_workload")
            times = "" if failure.count == 1 else f" {counted(failure.count, 'time')}"
            why = failure.message.removeprefix(f"{subject}: ")
            again_s = max(0.0, failure.not_before - self._clock.now().mono)
            again = "it is tried again now" if key in self._tasks else f"tried again in {format_duration(again_s)}"
            told[f"{subject.kind}/{subject.name}"] = f"its {op} failed{times}: {why}; {again}"
        return told

    @property
    def busy(self) -> bool:
        """Whether any operation is under way."""
        return bool(self._tasks)

    async def close(self) -> None:
        """Let go of what is under way; records make the next daemon go on where this one stopped."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _begin(self, action: Action) -> asyncio.Task[None]:
        """Its task, which has not run yet."""
        key = key_of(action)
        if running := self._tasks.get(key):
            running.cancel()  # its settings were edited: the new grace counts from the same signal
        if action.op in ENDS:
            self._stops[key] = self._stop_of(action)
        task = asyncio.create_task(self._run(key, action), name=f"{action.op} {action.subject}")
        self._tasks[key] = task
        return task

    async def _run(self, key: Key, action: Action) -> None:
        started = False
        try:
            await self._carry_out(action)
            self._failures.pop(key, None)
            started = action.op in STARTS
        except (ReconcilerError, OSError) as error:  # the latter: no descriptors are left, say
            count = self._failures[key].count + 1 if key in self._failures else 1
            wait = min(RETRY_MAX_S, RETRY_INITIAL_S * 2.0 ** (count - 1))
            message = getattr(error, "message", str(error))
            self._failures[key] = _Failure(action, message, count, self._clock.now().mono + wait)
            self._report([_event(f"act.{action.op}.failed", action, message)])
        finally:
            if self._tasks.get(key) is asyncio.current_task():
                del self._tasks[key]
                self._stops.pop(key, None)
                if not started:
                    self._wake()

    async def _carry_out(self, action: Action) -> None:
        incarnation = action.incarnation or ""
        match action.op:
            case "start" | "start_workload":
                await self._actor.ensure_started(self._launch_of(action))
            case "drain":
                await self._actor.ensure_drain_requested(incarnation)
            case "stop" | "stop_workload":
                await self._actor.ensure_stopped(incarnation, self._stop_of(action))
            case "kill":
                await self._actor.ensure_killed(incarnation)
            case "sleep" | "wake":
                problem: str | None = None
                try:
                    await self._call_engine(action)
                except ReconcilerError as error:  # not tried again: the plan ends it, or starts it afresh
                    problem = error.message
                self._called(action, problem)
            case "wait_memory" | "wait_ready" | "wait_end":
                return
            case _:
                assert_never(action.op)


def told(due: Sequence[Action]) -> list[Event]:
    """What is to be known of these before any of it begins, and all at once: many commits take their time."""
    return [_event(f"act.{action.op}", action, action.reason) for action in due if action.op != "drain"]


def _event(kind: str, action: Action, message: str) -> Event:
    return Event(kind, action.subject.name, message, str(action.cause))


def key_of(action: Action) -> Key:
    """What an action is about; two actions with one key are the same operation."""
    if action.op in STARTS:
        return ("start", f"{action.subject.kind}/{action.subject.name}")
    family = {"drain": "drain", "sleep": "nap", "wake": "nap"}.get(action.op, "end")
    return (family, action.incarnation or action.subject.name)
