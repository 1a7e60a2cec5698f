# ruff: noqa: PTH104, PTH123 - without site-packages and pathlib it starts in a few milliseconds
"""Endpoint, job or bystander in miniature, which leaves behind what a test has to know.

usage: stub.py ROOT endpoint|job|bystander NAME [PORT] [--gib N] [--stubborn] [--for S] [--load S]

ROOT/births     a line at each start: NAME, pid, start ticks
ROOT/twins      a line at each start while another of that name, or of its tree, lived
ROOT/signals    a line for each signal that came: NAME, pid, signal
ROOT/ends       a line at each orderly end of a job: NAME, pid

An endpoint answers every question with 200, and sleeps and wakes up as vLLM does at level 2. A stubborn one ignores
what it is asked, and leaves a grandchild in a session of its own behind.
"""

import fcntl
import os
import signal
import socket
import sys
import time

NOTED = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT,
)  # fmt: skip


def note(root: str, file: str, *words: object) -> None:
    fd = os.open(f"{root}/{file}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.write(fd, (" ".join(map(str, words)) + "\n").encode())
    os.close(fd)


def ticks() -> str:
    with open("/proc/self/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def hold(gib: float) -> None:
    for index in filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")):
        path = f"{os.environ['RECONCILER_SIM_DIR']}/gpus/{index}/{os.getpid()}-{ticks()}"
        with open(f"{path}.new", "w") as file:
            file.write(str(int(gib * (1 << 30))))
        os.rename(f"{path}.new", path)


def serve(root: str, name: str, port: int, gib: float) -> None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(16)
    asleep = False
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(10.0)  # who asks may be slow on a busy box; one that was killed is gone at once
            try:
                method, path = connection.recv(4096).decode().split(" ")[:2]
                if method == "POST":
                    asleep = path.startswith("/sleep") or (asleep and "kv_cache" not in path)
                    note(root, "naps", name, os.getpid(), path)
                    hold(1.0 if asleep else gib)
                body = f'{{"is_sleeping": {str(asleep).lower()}}}'
                head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                connection.sendall(f"{head}Connection: close\r\n\r\n{body}".encode())
            except (OSError, ValueError):
                continue


def main() -> None:
    root, kind, name, *rest = sys.argv[1:]
    alone = os.open(f"{root}/{name}.alone", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note(root, "twins", name, os.getpid())
    stubborn = "--stubborn" in rest

    def heard(number: int, _: object) -> None:
        note(root, "signals", name, os.getpid(), signal.Signals(number).name)
        if kind != "bystander" and not stubborn:
            sys.exit(0)

    for number in NOTED:
        signal.signal(number, heard)
    note(root, "births", name, os.getpid(), ticks())
    gib = float(rest[rest.index("--gib") + 1])
    hold(gib)
    if stubborn and os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            note(root, "births", f"{name}/stray", os.getpid(), ticks())
            while True:
                time.sleep(3600)
        os._exit(0)
    if kind == "endpoint":
        time.sleep(float(rest[rest.index("--load") + 1]) if "--load" in rest else 0)
        serve(root, name, int(rest[0]), gib)
    if kind == "job":
        time.sleep(float(rest[rest.index("--for") + 1]))
        note(root, "ends", name, os.getpid())
    parent = os.getppid()
    while kind == "bystander" and os.getppid() == parent:
        time.sleep(1)


if __name__ == "__main__":
    main()
