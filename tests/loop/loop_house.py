"""A daemon over a box that is looked at by a double: it sees what it is told, and nothing is started."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from reconciler.clock import SystemClock
from reconciler.errors import ActError
from reconciler.journal.journal import Journal
from reconciler.journal.layout import StateDir
from reconciler.loop.control import ask
from reconciler.loop.daemon import Daemon
from reconciler.loop.parts import Parts
from reconciler.loop.specs import SpecKeeper
from reconciler.observe.snapshot import ObserveOptions
from reconciler.plan.actions import Event
from reconciler.plan.observed import Gpu, Incarnation, Observed

DEADLINE_S = 20.0
SETPOINTS = """\
version: 1
policy: {resync: 1h}
endpoints:
  chat: {engine: custom, command: [serve], gpus: [0], port: 8080, state: stopped}
"""


class Eyes:
    """Sees two idle GPUs, and counts its looks; it can be made to hold one."""

    def __init__(self) -> None:
        self.looks = 0
        self.asked: list[ObserveOptions] = []
        self.before_look: Callable[[], None] = lambda: None
        self.incarnations: tuple[Incarnation, ...] = ()

    def observe(self, _: object, options: ObserveOptions) -> Observed:
        self.before_look()
        self.looks += 1
        self.asked.append(options)
        now = SystemClock().now()
        gpus = tuple(Gpu(i, f"GPU-{i}", "A", "ok", 80 << 30, 0, (), "", healthy=True, at=now) for i in (0, 1))
        return Observed(now, "boot", gpus, self.incarnations)

    def watches(self) -> Mapping[int, str]:
        return {}

    def probe_now(self, incarnations: Collection[str]) -> None:
        pytest.fail(f"nobody is there to ask: {incarnations}")

    def owns_listener(self, *_: object) -> bool | None:
        return None

    def close(self) -> None:
        pass


class Actor:
    """Starts nothing, and notes when it was asked to start something, in monotonic seconds."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def warm(self) -> None:
        pass

    async def ensure_started(self, _: object) -> None:
        self.asked.append(SystemClock().now().mono)
        raise ActError("there is no disk space left")


class Leftovers:
    """Counts when shared memory was looked at."""

    def __init__(self) -> None:
        self.followed = 0
        self.cleared: list[frozenset[str]] = []

    async def follow(self, _observed: Observed) -> None:
        self.followed += 1

    async def clear(self, ended: frozenset[str]) -> tuple[Event, ...]:
        self.cleared.append(ended)
        return ()


class House:
    """One state directory, its files, and a daemon that is never asked to start anything."""

    def __init__(self, root: Path) -> None:
        self.setpoints = root / "setpoints.yaml"
        self.setpoints.write_text(SETPOINTS)
        self.state = StateDir(root / "state")
        self.state.ensure()
        self.clock = SystemClock()
        self.journal = Journal.open(self.state.journal, self.clock)
        self.eyes, self.actor = Eyes(), Actor()
        self.leftovers = Leftovers()

    def run(self, story: Callable[[Daemon], Awaitable[None]]) -> None:
        async def live() -> None:
            unused: Any = None
            actor: Any = self.actor
            leftovers: Any = self.leftovers
            daemon = Daemon(
                Parts(
                    state=self.state, clock=self.clock, journal=self.journal,
                    specs=SpecKeeper(self.setpoints, {}, transform=None), actor=actor, engines=unused,
                    eyes=lambda _wake: self.eyes, inherited={}, simulated={}, pid=os.getpid(),
                    leftovers=leftovers,
                )
            )  # fmt: skip
            running = asyncio.create_task(daemon.run())
            try:
                await asyncio.wait_for(story(daemon), DEADLINE_S)
            finally:
                daemon.stop()
                await asyncio.wait_for(running, DEADLINE_S)

        asyncio.run(live())

    async def ask(self, op: str, **arguments: object) -> Any:
        for _ in range(400):
            answer = await asyncio.to_thread(ask, self.state.control_socket, op, **arguments)
            if answer is not None:
                return answer
            await asyncio.sleep(0.01)
        pytest.fail("nobody listens")

    async def kinds(self, *awaited: str) -> list[str]:
        """Kinds of all events, once those awaited are among them."""
        for _ in range(1000):
            found = [event.kind for event in self.journal.events()]
            if set(awaited) <= set(found):
                return found
            await asyncio.sleep(0.01)
        pytest.fail(f"not told: {awaited}; {found}")
