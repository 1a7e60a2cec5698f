"""The executor tells when a failed operation may be tried again, and nothing of one that is being tried."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from reconciler.clock import Instant
from reconciler.errors import ActError
from reconciler.loop.executor import RETRY_INITIAL_S, Executor
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
        await executor.walk(plan)
        await asyncio.sleep(0)
        assert executor.next_retry() == 100.0 + RETRY_INITIAL_S
        now[0] += RETRY_INITIAL_S
        await executor.walk(plan)
        await asyncio.sleep(0)
        assert tries == ["i-1", "i-1"]
        assert executor.next_retry() is None
        gate.set()
        await asyncio.sleep(0.01)
        assert executor.next_retry() == now[0] + 2 * RETRY_INITIAL_S
        await executor.close()

    asyncio.run(story())
