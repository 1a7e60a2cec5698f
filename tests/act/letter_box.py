"""A real HTTP server on this machine that keeps what it is sent and answers as a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class LetterBox:
    answers: list[int] = field(default_factory=list)
    """Statuses of the first answers; 200 after them."""
    silent: threading.Event = field(default_factory=threading.Event)
    """While it is set nobody gets an answer."""
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""

    @property
    def messages(self) -> list[Any]:
        return [json.loads(body) for _, _, body in self.requests]

    def told(self) -> list[tuple[str, str, str]]:
        """Change, kind and subject of every notice that came."""
        return [
            (n["change"], n["incident"]["kind"], n["incident"]["subject"]) for m in self.messages for n in m["notices"]
        ]


@contextmanager
def letter_box(*answers: int) -> Iterator[LetterBox]:
    box = LetterBox(list(answers))
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            box.requests.append((self.path, dict(self.headers), body))
            while box.silent.is_set() and not over.wait(0.05):
                pass
            try:
                self.send_response(box.answers.pop(0) if box.answers else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()
            except BrokenPipeError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    box.url = f"http://127.0.0.1:{server.server_port}/hook/canary-5f2c"
    try:
        yield box
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()
