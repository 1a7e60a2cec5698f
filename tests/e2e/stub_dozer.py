"""A model server with sleep calls of its own making: power states instead of levels, and a cache to warm when it wakes.

usage: stub_dozer.py MODEL --port N --gib N [--can-doze] [--refuse FILE]
While FILE holds the name of a call ("suspended", "running" or "warm"), that call is answered with 500.
"""

import argparse
import http.server
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

RESIDUE_GIB = 0.5


def hold(gib: float) -> None:
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    for index in filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")):
        folder = Path(os.environ["RECONCILER_SIM_DIR"], "gpus", index)
        draft = folder / f".{os.getpid()}-{ticks}"
        draft.write_text(str(int(gib * (1 << 30))))
        draft.rename(folder / f"{os.getpid()}-{ticks}")


class Power:
    """What it is doing, and who may tell it to do something else."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.state = "running"

    def told(self, method: str, address: str, body: bytes) -> tuple[int, dict[str, Any]]:
        url = urlsplit(address)
        match method, url.path:
            case "GET", "/up":
                return 200, {}
            case "GET", "/power" if self.options.can_doze:
                return 200, {"power": {"state": self.state}}
            case "PUT", "/power" if self.options.can_doze:
                return self.move(parse_qs(url.query)["to"][0] if url.query else json.loads(body)["to"])
            case "POST", "/warm" if self.options.can_doze and self.state == "cold":
                return self.move("warm")
        return 404, {}

    def move(self, to: str) -> tuple[int, dict[str, Any]]:
        refused = self.options.refuse
        if refused is not None and refused.exists() and to in refused.read_text().split():
            return 500, {"accepted": False}
        hold(RESIDUE_GIB if to == "suspended" else self.options.gib)
        self.state = {"running": "cold", "warm": "running"}.get(to, to)
        return 202, {"accepted": True}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--gib", type=float, required=True)
    parser.add_argument("--can-doze", action="store_true")
    parser.add_argument("--refuse", type=Path)
    options = parser.parse_args()
    power = Power(options)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            status, said = power.told(self.command, self.path, body)
            page = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        do_GET = do_PUT = do_POST = answer  # noqa: N815 - so http.server has them

        def log_message(self, *_: object) -> None:
            return

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    hold(options.gib)
    http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
