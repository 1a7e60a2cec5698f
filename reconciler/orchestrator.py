"""The face for programs: the same wiring as the command line's, as a Python object."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

from msgspec import Struct

from reconciler.cli import converging, wiring
from reconciler.clock import SystemClock
from reconciler.journal.reader import read_agenda
from reconciler.plan.actions import Plan
from reconciler.plan.agenda import AgendaTracker
from reconciler.plan.ledger import EndpointState


class EndpointStatus(Struct, frozen=True):
    """How one endpoint stands."""

    name: str
    state: EndpointState
    gpus: tuple[int, ...]
    """Indices in NVML order."""
    pid: int | None
    port: int | None
    model: str | None
    uptime_seconds: float | None


class CleanStartResult(Struct, frozen=True):
    """How a clean start ended."""

    ok: bool
    message: str
    endpoints: tuple[EndpointStatus, ...]


class Orchestrator:
    """One box, by its set points and state directory. Works beside a running daemon, and without one.

    Args:
        setpoints: the set-point file; None: as the command line finds it
        state_dir: the state directory; None: as the command line finds it
        simulate: a simulated node (`4x80GiB`) in the place of the driver
    """

    def __init__(
        self, setpoints: str | Path | None = None, *, state_dir: str | Path | None = None, simulate: str | None = None
    ) -> None:
        self._options = wiring.Options(
            setpoints=None if setpoints is None else Path(setpoints),
            state_dir=None if state_dir is None else Path(state_dir),
            simulate=simulate,
        )

    @property
    def agenda(self) -> AgendaTracker:
        """The agenda in force now, read from the state directory; no daemon is asked."""
        path = wiring.state_dir(self._options).journal
        return AgendaTracker(read_agenda(path) if path.exists() else (), SystemClock().now().wall)

    async def status(self) -> tuple[EndpointStatus, ...]:
        """Every endpoint as it stands now.

        Raises:
            ReconcilerError: the files are wrong, or there is no driver.
        """
        data = await asyncio.to_thread(wiring.status, self._options)
        return tuple(_endpoint(item) for item in data["endpoints"])

    async def plan(self) -> Plan:
        """What would be done now, and why. Changes nothing.

        Raises:
            ReconcilerError: the files are wrong, or there is no driver.
        """
        return (await asyncio.to_thread(wiring.look, self._options)).plan

    async def clean_start(
        self, endpoints: Collection[str] = (), *, timeout_seconds: float | None = None
    ) -> CleanStartResult:
        """End these endpoints' processes (all, when none are named), see their memory free, and start them afresh.

        Foreign processes are never touched.

        Raises:
            ReconcilerError: an endpoint is unknown, the files are wrong, or there is no driver.
        """
        outcome = await converging.converging(
            self._options, "clean_start", endpoints=tuple(endpoints), timeout_s=timeout_seconds
        )
        return CleanStartResult(outcome.ok, outcome.message, await self.status())


def _endpoint(item: dict[str, Any]) -> EndpointStatus:
    return EndpointStatus(
        name=item["name"],
        state=item["state"],
        gpus=tuple(item["gpus"]),
        pid=item["pid"],
        port=item["port"],
        model=item["model"],
        uptime_seconds=item["uptime_seconds"],
    )
