"""Asking endpoints over HTTP whether they are ready and busy: one question, one answer. `prober` keeps asking.

With the client of the standard library, imported on first use: most commands never ask. httpx, which calls engines and
notifiers, costs as much again for each question, and for each endpoint a TLS context that plain HTTP has no use for.
"""

from __future__ import annotations

import errno
import io
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from msgspec import Struct

from reconciler.clock import Clock
from reconciler.spec.profiles import SleepCheck

if TYPE_CHECKING:
    from http.client import HTTPResponse
    from socket import socket

HEALTH_LIMIT_BYTES = 64 << 10
PAGE_LIMIT_BYTES = 16 << 20
"""vLLM's page is some 100 KiB; a page that never ends must not fill the memory."""

PROGRESS_PACE_S = 15.0
"""The slowest: seldom enough for a page of 100 KiB to cost nothing."""
PROGRESS_READINGS = 8
"""So many readings in the time after which a frozen counter is a hang."""

_NO_SOCKET = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EADDRNOTAVAIL)
_SAFE = "!#$%&'()*+,/:;=?@[]~"
"""Stands as it is in a request: whoever wrote the path has quoted what he means to be quoted."""

OwnsListener = Callable[[str, int], bool | None]
"""Whether the socket that listens on a port belongs to an incarnation's own processes; None: could not be seen."""


class ProbeTarget(Struct, frozen=True):
    """Whom to ask, and how."""

    incarnation: str
    port: int
    health_path: str
    busy_metrics: tuple[str, ...]
    """Metric names whose sum is the number of requests running and waiting; empty: the engine does not say."""
    interval_s: float
    timeout_s: float
    failures: int
    """Misses in a row after which it no longer counts as ready."""
    starting: bool
    """It was never ready: a refused connection is what to expect, and readiness is waited for."""
    busy: bool = False
    """Count the requests in flight too (while draining)."""
    running_metrics: tuple[str, ...] = ()
    progress_metrics: tuple[str, ...] = ()
    """With both, a page of metrics is read now and then: a hung engine still answers that it is healthy."""
    hung_s: float = 120.0
    """For how long a frozen counter is none."""
    load_path: str | None = None
    """Where its server tells the requests that it took and has not answered: an engine that stood still before they
    came was never told of them, and shows nothing at work. None: it does not tell."""
    metrics_path: str = "/metrics"
    sleep_check: SleepCheck | None = None
    """How to ask whether it sleeps: an engine that does still answers that it is healthy. None: it never sleeps."""
    host: str = "127.0.0.1"
    """Only loopback by default: engines have calls without authentication."""


class Answer(Struct, frozen=True):
    """What one question brought."""

    ready: bool | None
    """None: the question could not be put (no socket left); it says nothing of the endpoint."""
    busy: int | None = None
    sleeping: bool | None = None
    detail: str = ""
    running: int | None = None
    progress: int | None = None
    """Counter of work done; None: not asked now, or not told."""
    counted: bool = True
    """False: `busy` says nothing, because nobody asked or the page did not come; True with None: there is no figure."""


class Connection:
    """A kept connection to one target. One question at a time."""

    def __init__(self, target: ProbeTarget, clock: Clock) -> None:
        from http.client import HTTPConnection, HTTPException

        self._clock = clock
        self._failures = (HTTPException, OSError)
        self._connection = HTTPConnection(target.host, target.port)  # none is made before the first question
        self._connection.response_class = self._answer  # type: ignore[assignment] # called like the class that it makes
        self._deadline = clock.now()
        self._progress_due = clock.now()

    def ask(self, target: ProbeTarget, owns: OwnsListener | None = None) -> Answer:
        """Whether `target` is ready, whether it sleeps, and how many requests it has, if `target.busy`.

        1. 200 on the health path → ready. 2. Any other status, a refusal, a timeout → not ready.
        3. `owns` says that the listener is somebody else's → not ready, whatever was answered: of two servers started
           on one port the loser stays alive without ever listening (realities: measured on vLLM 0.32).
        4. No socket to ask with → None.
        """
        try:
            status, _ = self._get(target, target.health_path, HEALTH_LIMIT_BYTES)
        except self._failures as error:
            if isinstance(error, OSError) and error.errno in _NO_SOCKET:
                return Answer(ready=None, detail=f"could not ask: {errno.errorcode[error.errno]}", counted=False)  # 4
            return Answer(ready=False, detail=_describe(error, target))  # 2
        if status != 200:
            return Answer(ready=False, detail=f"{target.health_path} answered {status}")  # 2
        if owns is not None and owns(target.incarnation, target.port) is False:
            return Answer(ready=False, detail=f"another process listens on port {target.port}")  # 3
        watched = bool(target.running_metrics and target.progress_metrics and not target.starting)
        watched = watched and self._clock.now().mono >= self._progress_due.mono
        counts = target.busy and bool(target.busy_metrics)
        page = self._page(target, target.metrics_path) if counts or watched else None
        if watched and page is not None:
            self._progress_due = self._clock.now().plus(min(PROGRESS_PACE_S, target.hung_s / PROGRESS_READINGS))
        told = page if watched else None
        return Answer(  # 1
            ready=True,
            busy=sum_metrics(page, target.busy_metrics) if counts and page is not None else None,
            running=self._at_work(target, told) if told is not None else None,
            progress=sum_metrics(told, target.progress_metrics) if told is not None else None,
            sleeping=self._sleeping(target),
            counted=target.busy and (page is not None or not target.busy_metrics),
        )

    def close(self) -> None:
        """Drop the connection."""
        self._connection.close()

    def _at_work(self, target: ProbeTarget, page: bytes) -> int | None:
        """Requests that run by the engine's word; where that is none, those that its server has not answered."""
        running = sum_metrics(page, target.running_metrics)
        if running != 0 or target.load_path is None:
            return running
        told = self._page(target, target.load_path)
        try:
            load = json.loads(told)["server_load"] if told else 0
        except (ValueError, TypeError, KeyError):
            return running
        return load if isinstance(load, int) else running

    def _sleeping(self, target: ProbeTarget) -> bool | None:
        check = target.sleep_check
        return check.read(self._page(target, check.path)) if check is not None else None

    def _page(self, target: ProbeTarget, path: str) -> bytes | None:
        """What a healthy target has to say besides; None when it does not answer: it has just said that it is well."""
        try:
            status, page = self._get(target, path, PAGE_LIMIT_BYTES)
        except self._failures:
            return None
        return page if status == 200 else None

    def _get(self, target: ProbeTarget, path: str, limit_bytes: int) -> tuple[int, bytes]:
        """Status and body; a body above the limit or past the deadline counts as a timeout.

        The timeout is that of the whole answer, in however many pieces it comes. A connection on which anything went
        wrong is not used again.
        """
        self._deadline = self._clock.now().plus(target.timeout_s)
        try:
            with self._request(target, quote(path, safe=_SAFE)) as response:
                return response.status, self._body(response, limit_bytes)
        except BaseException:
            self._connection.close()
            raise

    def _answer(self, sock: socket, **options: Any) -> HTTPResponse:
        """One of which the head, too, has to come in time: a server may send a byte of it now and then for ever."""
        from http.client import HTTPResponse

        response = HTTPResponse(sock, **options)
        response.fp = io.BufferedReader(_InTime(response.fp.detach(), sock, self._left_s))
        return response

    def _left_s(self) -> float:
        return -self._clock.now().since(self._deadline)

    def _body(self, response: HTTPResponse, limit_bytes: int) -> bytes:
        body = bytearray()
        while part := response.read1():
            body += part
            if len(body) > limit_bytes:
                raise TimeoutError("the answer does not end")
        if response.length:
            raise ConnectionResetError(f"the connection ended {response.length} bytes before the answer")
        return bytes(body)

    def _request(self, target: ProbeTarget, path: str) -> HTTPResponse:
        """The beginning of an answer; asked again where the server had dropped the kept connection.

        It may do so at the very moment of asking (uvicorn does after 5 s of silence): that is no miss.
        """
        connection = self._connection
        kept = connection.sock is not None
        connection.timeout = target.timeout_s
        if kept:
            connection.sock.settimeout(target.timeout_s)
        try:
            connection.request("GET", path)
            return connection.getresponse()
        except (ConnectionResetError, BrokenPipeError):  # of the former is what says that no answer came at all
            if not kept:
                raise
        connection.close()
        connection.request("GET", path)
        return connection.getresponse()


class _InTime(io.RawIOBase):
    """What comes from a socket, as long as there is time left."""

    def __init__(self, raw: io.RawIOBase, sock: socket, left_s: Callable[[], float]) -> None:
        self._raw, self._sock, self._left_s = raw, sock, left_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._left_s()
        if left_s <= 0:
            raise TimeoutError("the answer does not end")
        self._sock.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def sum_metrics(page: bytes, names: tuple[str, ...]) -> int | None:
    """The sum of all samples of `names` in a Prometheus text page; None unless every name is there with a number."""
    if not names:
        return None
    total = 0.0
    missing = set(names)
    wanted = tuple(name.encode() for name in names)
    for line in page.splitlines():
        if not line.startswith(wanted):  # most of some thousand lines end here
            continue
        labels_at = line.find(b"{")
        name = line[:labels_at] if labels_at >= 0 else line.split(None, 1)[0]
        if name not in wanted:
            continue
        try:
            # after the last brace: label values may hold spaces. A timestamp may follow the value.
            value = float(line[line.rfind(b"}") + 1 if labels_at >= 0 else len(name) :].split()[0])
        except (ValueError, IndexError):
            return None
        if not math.isfinite(value):
            return None
        missing.discard(name.decode())
        total += value
    return None if missing else round(total)


def _describe(error: Exception, target: ProbeTarget) -> str:
    if isinstance(error, ConnectionRefusedError):
        return f"connection refused on port {target.port}"
    if isinstance(error, TimeoutError):
        return f"{target.health_path} did not answer within {target.timeout_s:g} s"
    return f"{target.health_path}: {str(error) or type(error).__name__}"
