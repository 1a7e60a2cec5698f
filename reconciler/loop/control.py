"""The daemon's door: a Unix socket that answers one JSON request with one JSON line. Only the daemon's user may knock.

Requests: `status`, `values`, `reset` (name), `clean_start` (endpoints). Everything else in the program reads files.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reconciler.errors import ReconcilerError, StateError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

MAX_REQUEST = 64 << 10
ANSWER_TIMEOUT_S = 10.0

Handler = Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]


@contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """A name of `path` that fits in the 107 bytes of a Unix address, however deep the folder lies."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class ControlServer:
    """Listens on the control socket of one state directory."""

    def __init__(self, path: Path, handle: Handler) -> None:
        self._path = path
        self._handle = handle
        self._server: asyncio.Server | None = None
        self._inode: int | None = None
        """Of the socket's file, which somebody may remove."""

    async def open(self) -> None:
        """Start to listen. The caller holds the writer's lock, so what lies at the path is a dead daemon's.

        Raises:
            StateError: the socket cannot be made.
        """
        import asyncio  # a third of the time of a command that only asks

        try:
            with suppress(FileNotFoundError):
                self._path.unlink()
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            mask = os.umask(0o177)  # from the first moment nobody else can connect
            try:
                with _short_path(self._path) as address:
                    listener.bind(address)
            finally:
                os.umask(mask)
            self._inode = self._path.lstat().st_ino
            self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=MAX_REQUEST)
        except OSError as error:
            raise StateError(f"{self._path}: cannot listen: {error.strerror}") from error

    async def keep(self) -> None:
        """Listen anew if the socket is there no more; where it cannot be made, at another time."""
        try:
            is_there = self._path.lstat().st_ino == self._inode
        except OSError:
            is_there = False
        if not is_there and self._path.parent.is_dir():
            if self._server is not None:
                self._server.close()
            with suppress(StateError):
                await self.open()

    async def close(self) -> None:
        """Stop listening and take the socket away."""
        if self._server is not None:
            self._server.close()
            with suppress(FileNotFoundError):
                self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        import asyncio

        with suppress(ConnectionError, asyncio.LimitOverrunError, ValueError, TimeoutError):
            line = await asyncio.wait_for(reader.readline(), ANSWER_TIMEOUT_S)
            if line:
                writer.write(await self._answer(line) + b"\n")
                await writer.drain()
        writer.close()

    async def _answer(self, line: bytes) -> bytes:
        try:
            request = json.loads(line)
            answer: Mapping[str, Any] = {"ok": await self._handle(request["op"], request)}
        except ReconcilerError as error:
            answer = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            answer = {"error": {"code": "BadRequest", "message": f"not a request: {error}", "hint": None}}
        return json.dumps(answer, separators=(",", ":")).encode()


def ask(path: Path, op: str, **arguments: object) -> Any:
    """Put one request to the daemon; None when none listens.

    Raises:
        StateError: it did not answer.
        ReconcilerError: it refused; code, message and hint are its own.
    """
    try:
        with (
            closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)) as connection,
            _short_path(path) as address,
        ):
            connection.settimeout(ANSWER_TIMEOUT_S)
            connection.connect(address)
            connection.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline()
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except OSError as error:
        raise StateError(f"{path}: the daemon does not answer: {error}", hint="is it stopped or overloaded?") from error
    if not line:
        raise StateError(f"{path}: the daemon closed the connection without an answer")
    answer = json.loads(line)
    if "error" in answer:
        refusal = ReconcilerError(answer["error"]["message"], hint=answer["error"]["hint"])
        refusal.code = answer["error"]["code"]
        raise refusal
    return answer["ok"]
