"""The TCP sockets of this box as the kernel tells them: who listens, where connections linger. Standard library only.

sock_diag(7) answers from tables of its own, by state: 30 µs for the listening sockets, under a millisecond for all
connections. /proc/net/tcp walks the table of all connections, empty slots included, 4 ms and more for each family on
a small box; it is read only where the kernel lacks the former.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h; Python has no names for these
_NETLINK_SOCK_DIAG = 4
_TCPDIAG_GETSOCK = 18  # older than SOCK_DIAG_BY_FAMILY, and answers for both families from one walk of the tables
_REQUEST_DUMP = 0x301
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
_REQUEST = struct.Struct("=4x48xI4x")  # inet_diag_req: any socket, in these states
_ANSWER = struct.Struct("=4xH46x16xI")  # source port (in network order), inode: inet_diag_msg, 72 bytes
_ANSWERS_TIMEOUT_S = 1.0
_TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")

LISTENING = 1 << 10
"""States are bits, as in the kernel's net/tcp_states.h."""
CONNECTED = 0xFFF & ~(1 << 0 | 1 << 7 | LISTENING)
"""Every state that a connection passes through, the ends of past ones (TIME_WAIT and the like) included."""

BOUND = 1 << 13
"""Bound, and neither listening nor connected; told by Linux 6.8 and newer, in no answer of older ones."""


def sockets(states: int) -> Iterator[tuple[int, int]]:
    """Local port and inode (0: none any more) of every TCP socket in one of these states, IPv4 and IPv6.

    Raises:
        OSError: the kernel could not be asked.
    """
    try:
        yield from list(_ask_kernel(states))
    except OSError:
        for table in _TABLES:
            yield from _read_table(table, states)


def _ask_kernel(states: int) -> Iterator[tuple[int, int]]:
    """The same from sock_diag(7)."""
    request = _REQUEST.pack(states)
    header = _HEADER.pack(_HEADER.size + len(request), _TCPDIAG_GETSOCK, _REQUEST_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_ANSWERS_TIMEOUT_S)
        kernel.send(header + request)
        while True:
            answers = memoryview(kernel.recv(1 << 16))
            while len(answers) >= _HEADER.size:
                length, kind, *_ = _HEADER.unpack_from(answers)
                body = answers[_HEADER.size : length]
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    raise OSError(number, os.strerror(number))
                port, inode = _ANSWER.unpack_from(body)
                yield socket.ntohs(port), inode
                answers = answers[(length + 3) & ~3 :]


def _read_table(table: str, states: int) -> Iterator[tuple[int, int]]:
    """The same from proc_net(5); a kernel without IPv6 has no second table."""
    try:
        with open(table, "rb") as file:  # noqa: PTH123 - thousands of lines, read as they are
            next(file)
            lines = [line.split() for line in file]
    except FileNotFoundError:
        return
    for fields in lines:  # sl local:port remote:port state tx:rx tr:when retransmits uid timeout inode …
        if states >> int(fields[3], 16) & 1:
            yield int(fields[1][-4:], 16), int(fields[9])
