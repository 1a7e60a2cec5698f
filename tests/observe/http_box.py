"""A real HTTP server in this process whose answers a test decides, and which remembers who asked what."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = tuple[int, bytes] | Callable[[BaseHTTPRequestHandler], None]


@dataclass
class HttpBox:
    """What it answers, and what it was asked."""

    answers: dict[str, Answer] = field(default_factory=lambda: {"/health": (200, b"")})
    asked: list[str] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    released: threading.Event = field(default_factory=threading.Event)
    """Hanging answers wait for it."""
    close_after_answer: bool = False
    _server: ThreadingHTTPServer | None = None

    def start(self, port: int = 0) -> HttpBox:
        box = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                box.connections += 1

            def do_GET(self) -> None:
                box.asked.append(self.path)
                answer = box.answers.get(self.path, (404, b""))
                if callable(answer):
                    answer(self)
                    return
                reply(self, *answer)
                if box.close_after_answer:
                    self.close_connection = True  # without saying so: as uvicorn does with idle connections

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 64

            def handle_error(self, request: object, client_address: object) -> None:
                pass

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def hang(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer when the test is over."""
        self.released.wait(60)
        handler.close_connection = True

    def stop(self) -> None:
        self.released.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
