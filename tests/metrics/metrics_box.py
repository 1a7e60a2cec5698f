"""Ticks of a box, as the daemon hands them to its faces."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.health.incident import Incident
from reconciler.loop.specs import SpecInForce
from reconciler.loop.tick import Tick
from reconciler.plan.actions import EndpointView
from reconciler.plan.ledger import AgendaEntry, EndpointRecord, Ledger
from reconciler.plan.observed import Gpu, Observed
from reconciler.plan.planner import plan
from reconciler.spec.load import SourceText, resolve

T0 = Instant(1_764_000_000.0, 5000.0)
TEXT = "version: 1\nnotify: {phone: {command: [page]}}\ncapabilities: {}\nendpoints: {}\n"
PORT_TEXT = "version: 1\nmetrics: {{port: {port}}}\n"
GPU = Gpu(0, "GPU-0", "A100", "ok", 80 << 30, 1 << 30, (), "", healthy=True, at=T0)


def entry(name: str, *states: Any) -> AgendaEntry:
    return AgendaEntry(name, states, T0.wall - 10, T0.wall + 100, "gives way to render", "render")


def incident(opened: float) -> Incident:
    name = f"Unplanned/chat@{int(opened)}"
    return Incident(name, "Unplanned", "chat", "critical", "away", "open", T0, opened, opened)


def tick(
    states: dict[str, Any],
    *,
    after: float = 0.0,
    desired: Any = "running",
    agenda: Sequence[AgendaEntry] = (),
    records: Sequence[EndpointRecord] = (),
    incidents: Sequence[Incident] = (),
    text: str = TEXT,
) -> Tick:
    """A tick `after` seconds, with these endpoints in these states whatever the spec says."""
    spec = resolve(SourceText("setpoints.yaml", text), (), hostname="box", read_env_file=lambda _: b"")
    now = Instant(T0.wall + after, T0.mono + after)
    observed = Observed(now, "boot", (replace(GPU, at=now),), ())
    decided = plan(spec, observed, Ledger(boot_id="boot"), now)
    ledger = replace(decided.ledger, agenda=tuple(agenda), endpoints={r.name: r for r in records})
    views = {name: EndpointView(name, state, desired, "", None, ()) for name, state in states.items()}
    return Tick(
        SpecInForce(spec, (), {}),
        observed,
        replace(decided, ledger=ledger, endpoints=views),
        tuple(incidents),
        idle=True,
    )


async def scrape(
    port: int, path: str = "/metrics", *, method: str = "GET", accept: str = "text/plain"
) -> tuple[int, str, str]:
    """Status, head and body of one request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: box\r\nAccept: {accept}\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return int(head.split()[1]), head, body
