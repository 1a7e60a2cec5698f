"""Proving that a TCP port is free, by binding it."""

from __future__ import annotations

import errno
import os
import socket

from reconciler.errors import ActError, PortInUse
from reconciler.sockets import BOUND, CONNECTED, sockets


def prove_free(port: int) -> None:
    """Show that a server may take `port` on loopback and on every other address, of IPv4 and IPv6 alike.

    One socket for every address of both conflicts with whoever has bound any of them. Outcomes:
    1. A plain bind succeeds: free.
    2. It fails, and a bind with SO_REUSEADDR fails too: someone listens.
    3. Only the bind with SO_REUSEADDR succeeds: someone bound the port and does not listen yet, as vLLM does for all of
       its load: taken. Or connections of an earlier server linger there (TIME_WAIT and the like; engines bind with
       SO_REUSEADDR themselves): free. Where the kernel does not tell of the former, they are taken for the reason.

    Raises:
        PortInUse: someone holds it.
        ActError: it cannot be bound for another reason (a privileged port), or the kernel cannot be asked for 3.
    """
    try:
        _bind(port, reuse=False).close()  # 1
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise ActError(f"port {port} cannot be bound: {error.strerror}") from error
    else:
        return
    try:
        probe = _bind(port, reuse=True)
    except OSError:
        raise _taken(port, "someone listens there") from None  # 2
    with probe:
        if _has_bound_it(probe, port):  # 3
            raise _taken(port, "someone has bound it and does not listen yet")


def _taken(port: int, detail: str) -> PortInUse:
    return PortInUse(
        f"port {port} is in use: {detail}", port=port, hint=f"`ss -ltnp sport = :{port}` names the listener"
    )


def _bind(port: int, *, reuse: bool) -> socket.socket:
    """A socket bound on every address, to be closed by the caller."""
    try:
        return _bind_on(socket.AF_INET6, "::", port, reuse=reuse)
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
        return _bind_on(socket.AF_INET, "0.0.0.0", port, reuse=reuse)  # noqa: S104 - proof, not service


def _bind_on(family: socket.AddressFamily, address: str, port: int, *, reuse: bool) -> socket.socket:
    probe = socket.socket(family, socket.SOCK_STREAM)
    try:
        if reuse:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # IPv4 as well
        probe.bind((address, port))
    except OSError:
        probe.close()
        raise
    return probe


def _has_bound_it(probe: socket.socket, port: int) -> bool:
    """Whether a socket that does not listen holds the port of `probe`, too, and not merely connections of the past."""
    try:
        bound = {inode for taken, inode in sockets(BOUND) if taken == port}
        if os.fstat(probe.fileno()).st_ino in bound:  # so this kernel tells of such sockets
            return len(bound) > 1
        return not any(taken == port for taken, _ in sockets(CONNECTED))
    except OSError as error:
        raise ActError(f"port {port}: the kernel does not tell who holds it: {error.strerror or error}") from error
