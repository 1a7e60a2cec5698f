"""The daemon's door answers every request with one line, whatever it is asked, and lets nobody else in."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from reconciler.errors import ReconcilerError, StateError
from reconciler.loop import control
from reconciler.loop.control import MAX_REQUEST, ControlServer, ask


async def _handle(op: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
    if op == "refuse":
        refusal = StateError("not now", hint="later")
        refusal.code = "NotNow"
        raise refusal
    return {"op": op, "name": request["name"]}


def _served(path: Path, story: Callable[[], Awaitable[Any]]) -> Any:
    async def serve() -> Any:
        server = ControlServer(path, _handle)
        await server.open()
        try:
            return await asyncio.wait_for(story(), 20)
        finally:
            await server.close()

    return asyncio.run(serve())


async def _line(path: Path, sent: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(sent)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


def test_a_request_is_answered_and_a_refusal_keeps_its_code_and_hint(path: Path) -> None:
    async def story() -> None:
        assert await asyncio.to_thread(ask, path, "status", name="chat") == {"op": "status", "name": "chat"}
        with pytest.raises(ReconcilerError, match="not now") as refused:
            await asyncio.to_thread(ask, path, "refuse")
        assert (refused.value.code, refused.value.hint) == ("NotNow", "later")

    _served(path, story)


@pytest.mark.parametrize(
    "sent", [b"{\n", b"[]\n", b"3\n", b'{"op": "status"}\n', b'{"name": "no op"}\n', b"\xff\n", b"[" * 60_000 + b"\n"]
)
def test_what_is_no_request_is_told_so_and_the_next_one_is_answered(path: Path, sent: bytes) -> None:
    async def story() -> None:
        assert json.loads(await _line(path, sent))["error"]["code"] == "BadRequest"
        assert (await asyncio.to_thread(ask, path, "status", name="chat"))["op"] == "status"

    _served(path, story)


@pytest.mark.parametrize("sent", [b"", b"x" * (MAX_REQUEST + 1) + b"\n"], ids=["nothing", "too long"])
def test_who_says_nothing_or_too_much_is_left_without_an_answer(path: Path, sent: bytes) -> None:
    async def story() -> None:
        with suppress(ConnectionError):  # hung up on while it still talked
            assert await _line(path, sent) == b""
        assert (await asyncio.to_thread(ask, path, "status", name="chat"))["op"] == "status"

    _served(path, story)


def test_who_connects_and_falls_silent_is_hung_up_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "ANSWER_TIMEOUT_S", 0.05)

    async def story() -> None:
        reader, writer = await asyncio.open_unix_connection(str(path))
        assert await reader.read() == b""
        writer.close()

    _served(path, story)


def test_a_dead_daemons_socket_is_replaced_by_a_private_one_that_goes_with_its_daemon(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert ask(path, "status") is None

    async def story() -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (await asyncio.to_thread(ask, path, "status", name="chat"))["op"] == "status"

    _served(path, story)
    assert not path.exists()
    assert ask(path, "status") is None


def test_the_end_of_a_daemon_whose_socket_was_removed_is_no_error(path: Path) -> None:
    async def story() -> None:
        path.unlink()

    _served(path, story)
    assert not path.exists()


def test_a_state_directory_deeper_than_a_socket_address_is_served(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()

    async def story() -> Any:
        return await asyncio.to_thread(ask, deep / "control.sock", "status", name="chat")

    assert _served(deep / "control.sock", story)["name"] == "chat"


def test_a_socket_that_cannot_be_made_is_named_and_what_stands_there_stays(path: Path) -> None:
    path.mkdir()
    (path / "kept").touch()

    async def story() -> None:
        pytest.fail("it was opened")

    with pytest.raises(StateError, match=r"control\.sock: cannot listen"):
        _served(path, story)
    assert (path / "kept").exists()


def test_a_daemon_that_hangs_up_or_does_not_answer_is_an_error_of_the_asker(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as listener, monkeypatch.context() as hurried:
        hurried.setattr(control, "ANSWER_TIMEOUT_S", 0.05)
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(StateError, match="does not answer"):
            ask(path, "status")

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    async def story() -> None:
        path.unlink()
        server = await asyncio.start_unix_server(hang_up, str(path))
        with pytest.raises(StateError, match="without an answer"):
            await asyncio.to_thread(ask, path, "status")
        server.close()

    asyncio.run(story())


def test_a_socket_that_was_removed_or_exchanged_is_made_again_and_one_that_is_there_is_not(path: Path) -> None:
    async def answered() -> bool:
        return await asyncio.to_thread(ask, path, "status", name="chat") is not None

    async def story() -> None:
        server = ControlServer(path, _handle)
        await server.open()
        inode = path.stat().st_ino
        await server.keep()
        assert path.stat().st_ino == inode
        path.unlink()
        assert not await answered()
        await server.keep()
        assert await answered()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.unlink()
        path.write_text("something else")
        await server.keep()
        assert await answered()
        await server.close()

    asyncio.run(story())
