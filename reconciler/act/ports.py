"""Proving that a TCP port is free, by binding it."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from reconciler.errors import ActError, PortInUse

_WAYS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"))  # noqa: S104 - proof, not service
_LISTEN = "0A"


def prove_free(port: int) -> None:
    """Show that a server may take `port` on loopback and on every address.

    Outcomes, for each address:
    1. A plain bind succeeds: free.
    2. It fails, and a bind with SO_REUSEADDR fails too: someone listens.
    3. Only the bind with SO_REUSEADDR succeeds: free, if connections of an earlier server linger there (TIME_WAIT and
       the like; engines bind with SO_REUSEADDR themselves). If there are none, someone bound the port and does not
       listen yet, as vLLM does for all of its load: taken.

    Raises:
        PortInUse: someone holds it.
        ActError: it cannot be bound for another reason (a privileged port).
    """
    for family, address in _WAYS:
        if _binds(family, address, port, reuse=False):  # 1
            continue
        if not _binds(family, address, port, reuse=True):  # 2
            raise _taken(port, "someone listens there")
        if not _lingers(port):  # 3
            raise _taken(port, "someone has bound it and does not listen yet")


def _taken(port: int, detail: str) -> PortInUse:
    return PortInUse(
        f"port {port} is in use: {detail}", port=port, hint=f"`ss -ltnp sport = :{port}` names the listener"
    )


def _binds(family: socket.AddressFamily, address: str, port: int, *, reuse: bool) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if reuse:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind((address, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        if family == socket.AF_INET6 and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return True  # a box without IPv6: nobody can be there
        raise ActError(f"port {port} cannot be bound on {address}: {error.strerror}") from error
    return True


def _lingers(port: int) -> bool:
    """Whether connections of an earlier server remain on this local port (proc_net(5): state and local address)."""
    wanted = f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text("ascii").splitlines()[1:]
        except FileNotFoundError:
            continue
        for line in lines:
            fields = line.split()
            if fields[1].endswith(wanted) and fields[3] != _LISTEN:
                return True
    return False
