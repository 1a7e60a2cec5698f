"""Telling an engine to sleep or to wake up: what is posted, what is believed, and when nothing is posted at all."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from msgspec.structs import replace

from reconciler.act.engine import EngineActor, Order
from reconciler.clock import SystemClock
from reconciler.errors import ActError, NotOurs
from reconciler.spec.profiles import PROFILES


@dataclass
class SleepingServer:
    """Has the calls of a vLLM in developer mode."""

    asleep: bool = False
    status: int = 200
    moves: bool = True
    """Its calls do what they say."""
    posted: list[tuple[str, str]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    hangs: bool = False
    endless: frozenset[str] = frozenset()
    """Methods whose answers never end."""
    sent: int = 0
    """Bytes of those answers."""
    port: int = 0


@pytest.fixture
def engine() -> Iterator[SleepingServer]:
    told = SleepingServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, json.dumps({"is_sleeping": told.asleep}).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", "0"))).decode()
            told.posted.append((self.path, body))
            if told.hangs:
                told.released.wait(20)
            if told.moves and told.status == 200:
                told.asleep = self.path.startswith("/sleep") or self.path == "/wake_up?tags=weights"
            self.answer(told.status, b"no" if told.status != 200 else b"")

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            if self.command in told.endless:
                self.end_headers()
                while not told.released.is_set():
                    told.sent += self.wfile.write(b" " * (1 << 16))
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    told.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield told
    told.released.set()
    server.shutdown()
    server.server_close()


def order(engine: SleepingServer, *, asleep: bool, level: int = 1) -> Order:
    way = PROFILES["vllm"].sleep_levels[level]
    return Order("one", engine.port, way.sleep if asleep else way.wake, PROFILES["vllm"].sleep_check, asleep)


def tell(wanted: Order, *, ours: bool | None = True, timeout_s: float = 10.0) -> None:
    asyncio.run(EngineActor(SystemClock()).ensure(wanted, lambda _name, _port: ours, timeout_s=timeout_s))


def test_an_engine_is_told_once_and_then_left_alone(engine: SleepingServer) -> None:
    tell(order(engine, asleep=True))
    tell(order(engine, asleep=True))
    assert engine.posted == [("/sleep?level=1", "")]
    tell(order(engine, asleep=False))
    tell(order(engine, asleep=False))
    assert engine.posted[1:] == [("/wake_up", "")]


def test_dropped_weights_are_read_again_before_the_cache_is_taken(engine: SleepingServer) -> None:
    engine.asleep = True
    tell(order(engine, asleep=False, level=2))
    paths = [path for path, _ in engine.posted]
    assert paths == ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache"]
    assert json.loads(engine.posted[1][1]) == {"method": "reload_weights"}


@pytest.mark.parametrize("ours", [False, None])
def test_nothing_is_posted_to_a_listener_that_is_not_seen_to_be_ours(engine: SleepingServer, ours: bool | None) -> None:
    with pytest.raises(NotOurs):
        tell(order(engine, asleep=True), ours=ours)
    assert engine.posted == []


def test_an_answer_that_is_no_success_is_a_failure(engine: SleepingServer) -> None:
    engine.status = 404
    with pytest.raises(ActError, match="answered 404"):
        tell(order(engine, asleep=True))
    assert not engine.asleep


def test_an_engine_that_says_yes_and_stays_awake_is_a_failure(
    engine: SleepingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reconciler.act.engine._SETTLE_S", 0.3)
    engine.moves = False
    with pytest.raises(ActError, match="awake still"):
        tell(order(engine, asleep=True))


def test_an_engine_that_does_not_answer_is_a_failure(engine: SleepingServer) -> None:
    engine.hangs = True
    with pytest.raises(ActError):
        tell(order(engine, asleep=True), timeout_s=0.5)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_answer_without_end_is_a_failure_long_before_the_time_or_the_memory_is_up(
    engine: SleepingServer, method: str
) -> None:
    engine.endless = frozenset({method})
    with pytest.raises(ActError, match=rf"{method} /\S+: the answer does not end"):
        tell(order(engine, asleep=True), timeout_s=60.0)
    engine.released.set()
    assert engine.sent < 64 << 20, "a limit of 1 MiB, and what sockets hold"


def test_nobody_on_the_port_is_a_failure(engine: SleepingServer) -> None:
    with pytest.raises(ActError, match="ConnectError"):
        tell(replace(order(engine, asleep=True), port=1))


def test_one_that_cannot_be_asked_whether_it_sleeps_is_told_every_time_and_believed(engine: SleepingServer) -> None:
    blind = replace(order(engine, asleep=True), check=None)
    engine.moves = False
    tell(blind)
    tell(blind)
    assert engine.posted == [("/sleep?level=1", "")] * 2
