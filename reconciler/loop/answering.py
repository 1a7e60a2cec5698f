"""What people ask of a running daemon: answered from its last tick, and durable before it is said to be done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.errors import StateError
from reconciler.journal.codec import encode
from reconciler.loop.parts import Parts
from reconciler.loop.requested import Requested, forgiving
from reconciler.loop.tick import Tick
from reconciler.plan.requests import clean_start
from reconciler.plan.status import DaemonInfo, status_data


class Answering:
    """Answers requests at the control socket."""

    def __init__(
        self,
        parts: Parts,
        requested: Requested,
        *,
        began: Instant,
        last_tick: Callable[[], Awaitable[Tick]],
        failing: Callable[[], Mapping[str, str]],
    ) -> None:
        self._parts = parts
        self._requested = requested
        self._began = began
        self._last_tick = last_tick
        """Waits for the first one."""
        self._failing = failing

    async def answer(self, op: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer one request; one that comes before the first look waits for it.

        Raises:
            StateError: no such request is known, or the daemon ended before it was done.
            UnknownName: what is asked for is about nobody.
        """
        path = str(self._parts.specs.path)
        if op == "files":
            return {"setpoints": path}
        tick = await self._last_tick()
        match op:
            case "status":
                spec, problems, now = tick.spec.spec, tick.spec.problems, self._parts.clock.now()
                return status_data(spec, tick.observed, tick.plan, tick.incidents, self._info(), problems, now=now)
            case "values":
                ledger, learnt = self._parts.journal.ledger(), tick.plan.ledger
                return {
                    "observed": encode(tick.observed),
                    "ledger": encode(replace(ledger, timings=learnt.timings, runs=learnt.runs)),
                    "incidents": [encode(i) for i in tick.incidents],
                    "daemon": encode(self._info()),
                    "setpoints": path,
                }
            case "reset":
                change, said = forgiving(self._parts.journal.ledger(), str(request["name"]), tick.observed)
                await self._requested.durably(change)
                return {"message": said}
            case "clean_start":
                names = [str(n) for n in request["endpoints"]]
                await self._requested.durably(lambda ledger, now: clean_start(ledger, names, now))
                return {"message": "begun"}
            case _:
                raise StateError(f"the daemon does not know the request {op!r}")

    def _info(self) -> DaemonInfo:
        parts = self._parts
        generation, since = parts.journal.generation(), self._began.wall
        return DaemonInfo(running=True, pid=parts.pid, since=since, generation=generation, failing=self._failing())
