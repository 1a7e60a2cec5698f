"""Forks processes of the program that are filtered (`stopper`): what they import was imported here once.

Reads a JSON line {"argv", "log"} for each, answers with its pid once it is filtered; ends with its input.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress

import httpx  # noqa: F401 - warm
import psutil  # noqa: F401 - warm
import pynvml  # noqa: F401 - warm
import stopper
import watchfiles  # noqa: F401 - warm

from reconciler.cli import daemon, main, wiring  # noqa: F401 - warm
from reconciler.loop import daemon as loop  # noqa: F401 - warm
from reconciler.metrics import page  # noqa: F401 - warm
from reconciler.sim import driver  # noqa: F401 - warm


def become(argv: list[str], log: str, told: int) -> None:
    """In the child: a process like any that a shell starts, but filtered. Never returns."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null, out = os.open("/dev/null", os.O_RDWR), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, fd in enumerate((null, out, out)):
        os.dup2(fd, number)
    for fd in (null, out):
        os.close(fd)
    sys.argv = ["reconciler", *argv]
    stopper.install()
    os.close(told)  # no call that the filter asks about
    main.main()


def reap(*_: object) -> None:
    """Collect whatever ended: daemons, and orphans of theirs."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def serve() -> None:
    signal.signal(signal.SIGCHLD, reap)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans stay below the test
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        hears, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(hears)
            try:
                become(order["argv"], order["log"], told)
            finally:
                os._exit(70)
        os.close(told)
        os.read(hears, 1)  # ends when the child has closed its end, or is gone
        os.close(hears)
        print(child, flush=True)


if __name__ == "__main__":
    serve()
