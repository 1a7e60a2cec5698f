"""A model server in miniature that notes when its first line ran, and when it was asked to end.

usage: stub.py NOTES PORT [--gib N]

NOTES gets one line per event: what, pid, nanoseconds of CLOCK_BOOTTIME.
"""

import os, sys, time  # noqa: E401, I001 - nothing may come before the note


def note(what: str) -> None:
    line = f"{what} {os.getpid()} {time.clock_gettime_ns(time.CLOCK_BOOTTIME)}\n"
    with open(sys.argv[1], "a") as notes:  # noqa: PTH123 - pathlib would have to be imported first
        notes.write(line)


note("first")

import signal  # noqa: E402
import socketserver  # noqa: E402


def hold(gib: float) -> None:
    """Allocate on the simulated node: an entry in the ledger of each GPU that was handed over."""
    with open("/proc/self/stat") as stat:  # noqa: PTH123
        ticks = stat.read().rpartition(")")[2].split()[19]
    for index in filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")):
        entry = os.path.join(os.environ["RECONCILER_SIM_DIR"], "gpus", index, f"{os.getpid()}-{ticks}")  # noqa: PTH118
        with open(entry, "w") as file:  # noqa: PTH123
            file.write(str(int(gib * (1 << 30))))


class Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while self.rfile.readline() not in (b"\r\n", b""):
            pass
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def end(*_: object) -> None:
    note("sigterm")
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    if "--gib" in sys.argv:
        hold(float(sys.argv[sys.argv.index("--gib") + 1]))
    Server(("127.0.0.1", int(sys.argv[2])), Answer).serve_forever()
