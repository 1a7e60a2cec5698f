"""The page that Prometheus reads, on a loopback port, while the set points ask for one.

It answers from the last tick on the loop's own thread: nothing is observed for it, and nothing runs between scrapes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from reconciler.loop.tick import Tick
from reconciler.plan.actions import Event

if TYPE_CHECKING:
    from reconciler.metrics.exposition import Exposition

HOST = "127.0.0.1"
REQUEST_TIMEOUT_S = 5.0
MAX_HEAD = 16 << 10
"""Bytes of a request's head; a scrape has some hundred."""


class MetricsPage:
    """A face of the daemon: nothing at all until a port is set."""

    def __init__(self) -> None:
        self._port: int | None = None
        self._server: asyncio.Server | None = None
        self._exposition: Exposition | None = None

    async def show(self, tick: Tick) -> Sequence[Event]:
        """Take the tick over and follow an edit of the port; one that is taken is told once and tried at each tick."""
        port = tick.spec.spec.metrics_port
        if port is None and self._port is None:
            return ()
        events = await self._follow(port) if port != self._port or self._server is None else ()
        if self._exposition is not None:
            self._exposition.take(tick)
        return events

    async def close(self) -> None:
        """Stop to listen."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _follow(self, port: int | None) -> Sequence[Event]:
        before, self._port = self._port, port
        await self.close()
        if port is None:
            self._exposition = None
            return [Event("MetricsClosed", "metrics", "the page of metrics is closed", "setpoint")]
        if self._exposition is None:
            from reconciler.metrics.exposition import Exposition

            self._exposition = Exposition()
        try:
            self._server = await asyncio.start_server(self._serve, HOST, port, limit=MAX_HEAD)
        except OSError as error:
            reason = f"no page of metrics: {HOST}:{port}: {error.strerror or error}"
            return [Event("MetricsFailed", "metrics", reason, "setpoint")] if before != port else ()
        return [Event("MetricsServed", "metrics", f"http://{HOST}:{port}/metrics", "setpoint")]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                writer.write(self._answer(head))
                await writer.drain()
        writer.close()

    def _answer(self, head: str) -> bytes:
        method, path, *_ = [*head.split("\r\n", 1)[0].split(), "", ""]
        if self._exposition is None or path.partition("?")[0] != "/metrics":
            return _response("404 Not Found", "text/plain", b"metrics are at /metrics\n")
        if method != "GET":
            return _response("405 Method Not Allowed", "text/plain", b"GET alone\n")
        accepts = [line.partition(":")[2] for line in head.lower().split("\r\n") if line.startswith("accept:")]
        kind, body = self._exposition.text(",".join(accepts))
        return _response("200 OK", kind, body)


def _response(status: str, kind: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
