"""Telling an engine to sleep or to wake up, by its own HTTP calls on the loopback.

The calls have no authentication, and a port outlives its process: nothing is posted before the listener was seen to be
the incarnation's own. httpx is imported with the first call: most boxes never make one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reconciler.clock import Clock
from reconciler.errors import ActError, NotOurs
from reconciler.spec.engines import HOST
from reconciler.spec.profiles import EngineCall, SleepCheck

if TYPE_CHECKING:
    from reconciler.http import httpx

_SETTLE_S, _LOOK_S = 5.0, 0.1
"""How long an engine may take, after its calls returned, to say that it sleeps or is awake; and the pace of asking."""


@dataclass(frozen=True, slots=True)
class Order:
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
    response = await client.request(call.method, call.path, content=call.body, headers=headers)
    if wrong := call.lacks(response.status_code, response.content):
        raise ActError(f"{call.method} {call.path} {wrong}: {response.text[:200]}")


async def _says(client: httpx.AsyncClient, check: SleepCheck | None) -> bool | None:
    """Whether it sleeps, by its own word; None: it does not say."""
    if check is None:
        return None
    response = await client.get(check.path)
    return check.read(response.content) if response.is_success else None
