"""Ports for whoever binds them later, or again and again."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle

_FIRST, _EACH, _WORKERS = 20_000, 1_000, 12
"""Below what the kernel gives to clients (32,768 and up, ip(7)): none of them takes one of ours by chance meanwhile."""


def _mine() -> Iterator[int]:
    """Those of this one of xdist's workers, each once before one comes again: no two tests have the same."""
    worker = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0) % _WORKERS
    own = range(_FIRST + worker * _EACH, _FIRST + (worker + 1) * _EACH)
    begin = os.getpid() * 7 % _EACH  # two runs of the suite on one machine rarely begin at the same
    return cycle([*own[begin:], *own[:begin]])


_PORTS = _mine()


def free_port() -> int:
    """One that nobody holds."""
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("there is always another one")


def free_ports(count: int) -> list[int]:
    """So many, all different."""
    return [free_port() for _ in range(count)]
