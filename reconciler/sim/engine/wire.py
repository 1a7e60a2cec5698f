"""HTTP/1.1 as far as probes and completions need it: one connection's bytes to requests, answers to bytes."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qsl

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed"}
REASONS |= {500: "Internal Server Error", 503: "Service Unavailable"}
MAX_REQUEST = 4 << 20


class Request:
    """One request."""

    def __init__(self, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        self.method, self.headers, self.body = method, headers, body
        self.path, _, query = target.partition("?")
        self.query = dict(parse_qsl(query))

    def document(self) -> dict[str, Any] | None:
        """The JSON object in the body; None when there is none."""
        with suppress(ValueError):
            document = json.loads(self.body)
            return document if isinstance(document, dict) else None
        return None


class Connection:
    """One client."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)  # noqa: FBT003
        self.sock = sock
        self.fd = sock.fileno()
        self.inbox = self.outbox = b""
        self.busy = False
        """A request was taken and is not answered: the next one waits."""
        self.last = False
        """Close once the outbox is empty."""

    def receive(self) -> bool:
        """Take in what came; False when the client is gone."""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.inbox += data
        return bool(data) and len(self.inbox) <= MAX_REQUEST

    def send(self) -> bool:
        """Send what goes; False when the client is gone or has got its last answer."""
        try:
            self.outbox = self.outbox[self.sock.send(self.outbox) :] if self.outbox else b""
        except BlockingIOError:
            return True
        except OSError:
            return False
        return bool(self.outbox) or not self.last

    def next_request(self) -> Request | None:
        """The next complete request, unless the one before is not answered."""
        head, end, rest = self.inbox.partition(b"\r\n\r\n")
        if self.busy or not end:
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        announced = headers.get("content-length", "")
        length = int(announced) if announced.isdecimal() else 0
        if len(rest) < length:
            return None
        self.inbox = rest[length:]
        method, target, *version = [*first.split(" "), "", ""][:3]
        self.last = headers.get("connection", "").lower() == "close" or version != ["HTTP/1.1"]
        self.busy = True
        return Request(method, target, headers, rest[:length])

    def answer(self, status: int, body: bytes = b"", kind: str = "application/json") -> None:
        """The whole answer to the request in hand."""
        head = f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        if self.last:
            head += "connection: close\r\n"
        self.outbox += head.encode() + b"\r\n" + body
        self.busy = False

    def open_stream(self) -> None:
        """Begin an answer that comes in pieces."""
        self.outbox += b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

    def close_stream(self, *documents: object) -> None:
        """Send the pieces, and end the answer."""
        for text in (*(json.dumps(document) for document in documents), "[DONE]"):
            piece = f"data: {text}\n\n".encode()
            self.outbox += f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
        self.outbox += b"0\r\n\r\n"
        self.busy = False
