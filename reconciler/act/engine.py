"""Telling an engine to sleep or to wake up, by its own HTTP calls on the loopback.

The calls have no authentication, and a port outlives its process: nothing is posted before the listener was seen to be
the incarnation's own. httpx is imported with the first call: most boxes never make one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from reconciler.clock import Clock
from reconciler.errors import ActError, NotOurs
from reconciler.spec.engines import HOST
from reconciler.spec.profiles import EngineCall, SleepCheck

if TYPE_CHECKING:
    from reconciler.http import httpx

_ANSWER_LIMIT_BYTES = 1 << 20
"""Answers to these calls are some hundred bytes; one that never ends must not fill the memory."""
_SETTLE_S, _LOOK_S = 5.0, 0.1
"""How long an engine may take, after its calls returned, to say that it sleeps or is awake; and the pace of asking."""


class Order(Struct, frozen=True):
    """What one engine is to be told."""

    incarnation: str
    port: int
    calls: tuple[EngineCall, ...]
    check: SleepCheck | None
    """How it is asked whether it sleeps; None: it cannot be."""
    asleep: bool
    """What it shall say then."""


class EngineActor:
    """Makes engines sleep and wake up."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def ensure(self, order: Order, owns: Callable[[str, int], bool | None], *, timeout_s: float) -> None:
        """Have the engine sleep, or be awake; returns once it says so.

        1. The listener is not seen to be the incarnation's own: refused, nothing is posted.
        2. It says that it is so already: nothing to do.
        3. Otherwise: its calls in order, each answered as it should before the next; then it is asked until it says so.

        Raises:
            NotOurs: 1.
            ActError: a call failed or timed out, or it does not say so afterwards.
        """
        from reconciler.http import httpx

        if owns(order.incarnation, order.port) is not True:  # 1
            raise NotOurs(f"who listens on port {order.port} is not seen to be {order.incarnation}; nothing was posted")
        try:
            async with (
                asyncio.timeout(timeout_s),
                httpx.AsyncClient(
                    base_url=f"http://{HOST}:{order.port}",
                    trust_env=False,
                    verify=False,  # plain HTTP on the loopback, and loading the certificates costs 20 ms
                    timeout=timeout_s,
                    headers={"accept-encoding": "identity"},  # what is unpacked may be a thousand times what came
                ) as client,
            ):
                if await _says(client, order.check) == order.asleep:  # 2
                    return
                for call in order.calls:  # 3
                    await _tell(client, call)
                await self._settle(client, order)
        except TimeoutError as error:
            raise ActError(f"port {order.port}: its engine did not answer within {timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise ActError(f"port {order.port}: {type(error).__name__} {error}".rstrip()) from error

    async def _settle(self, client: httpx.AsyncClient, order: Order) -> None:
        if order.check is None:
            return
        deadline = self._clock.now().plus(_SETTLE_S)
        while await _says(client, order.check) != order.asleep:
            if self._clock.now().mono >= deadline.mono:
                raise ActError(f"port {order.port}: it answered, and is {'awake' if order.asleep else 'asleep'} still")
            await self._clock.sleep(_LOOK_S)


async def _tell(client: httpx.AsyncClient, call: EngineCall) -> None:
    headers = {"content-type": "application/json"} if call.body is not None else {}
    status, body = await _answer(client, call.method, call.path, content=call.body, headers=headers)
    if wrong := call.lacks(status, body):
        raise ActError(f"{call.method} {call.path} {wrong}: {body[:200].decode(errors='replace')}")


async def _says(client: httpx.AsyncClient, check: SleepCheck | None) -> bool | None:
    """Whether it sleeps, by its own word; None: it does not say."""
    if check is None:
        return None
    status, body = await _answer(client, "GET", check.path)
    return check.read(body) if 200 <= status < 300 else None


async def _answer(client: httpx.AsyncClient, method: str, path: str, **request: Any) -> tuple[int, bytes]:
    """Status and body; when all of it has to be there whoever calls has bounded."""
    body = bytearray()
    async with client.stream(method, path, **request) as response:
        async for part in response.aiter_raw():
            body += part
            if len(body) > _ANSWER_LIMIT_BYTES:
                raise ActError(f"{method} {path}: the answer does not end")
    return response.status_code, bytes(body)
