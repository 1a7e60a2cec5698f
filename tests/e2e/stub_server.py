"""A model server in miniature: holds memory on its GPUs, answers /health, leaves what its arguments say behind.

usage: stub_server.py PORT [--gib N] [--ready-after S] [--not-while F] [--stray-file F] [--shared-memory NAME]
                      [--worker-file F] [--exit-code N] [--api-key K] [--header H]
With --not-while it loads for as long as that file exists. With --worker-file not it but a child holds the memory, in a
session of its own and deaf to SIGTERM, as an engine behind an API server, and adds its pid to that file; one that finds
memory taken ends with 9. The last two mean nothing to it.
"""

import argparse
import http.server
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

STRAY = """
import os, signal, sys, time
os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(sys.argv[1], "w") as f:
    f.write(str(os.getpid()))
while True:
    time.sleep(3600)
"""


def hold(gib: float) -> None:
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    for index in filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")):
        folder = Path(os.environ["RECONCILER_SIM_DIR"], "gpus", index)
        (folder / f"{os.getpid()}-{ticks}").write_text(str(int(gib * (1 << 30))))


def work(gib: float, file: str) -> None:
    """Become the engine behind the server."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for index in filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")):
        if list(Path(os.environ["RECONCILER_SIM_DIR"], "gpus", index).glob("[0-9]*")):
            os._exit(9)
    hold(gib)
    with Path(file).open("a") as f:
        f.write(f"{os.getpid()}\n")
    while True:
        signal.pause()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = b"ok"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--ready-after", type=float, default=0.0)
    parser.add_argument("--not-while", type=Path)
    parser.add_argument("--stray-file")
    parser.add_argument("--shared-memory")
    parser.add_argument("--worker-file")
    parser.add_argument("--exit-code", type=int, default=0)
    parser.add_argument("--api-key")
    parser.add_argument("--header")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(options.exit_code))
    if options.worker_file is None:
        hold(options.gib)
    elif os.fork() == 0:
        work(options.gib, options.worker_file)
    if options.stray_file:
        subprocess.Popen([sys.executable, "-c", STRAY, options.stray_file])
    with suppress(FileExistsError):  # of its predecessor
        if options.shared_memory:
            shared = Path("/dev/shm", options.shared_memory).open("x+b")  # noqa: SIM115 - for as long as this runs
            shared.write(bytes(1 << 20))
            shared.flush()
    time.sleep(options.ready_after)
    while options.not_while is not None and options.not_while.exists():
        time.sleep(0.05)
    http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
