"""Who listens on which TCP port, as the kernel says."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h; Python has no names for these
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
_REQUEST = struct.Struct("=BBBBI48x")  # family, protocol, extensions, padding, states, any socket
_ANSWER = struct.Struct("=4xH46x16xI")  # source port (in network order), inode: inet_diag_msg, 72 bytes
_LISTEN = 10
_ANSWERS_TIMEOUT_S = 1.0


def listening(ports: Collection[int]) -> dict[int, frozenset[int]]:
    """Inodes of the sockets that listen on each of `ports`; ports that nobody listens on are left out.

    A socket that is bound and does not listen yet (vLLM while it loads) is not here: nobody can connect to it.
    sock_diag(7) walks the listening sockets alone, 30 µs; /proc/net/tcp walks the table of all connections, empty slots
    included, 10 ms on a small box. The latter only where the kernel lacks the former.

    Raises:
        OSError: neither could be read; unknown.
    """
    if not ports:
        return {}
    try:
        pairs = [pair for family in (socket.AF_INET, socket.AF_INET6) for pair in _ask_kernel(family)]
    except OSError:
        pairs = [pair for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6") for pair in _read_table(table)]
    found: dict[int, set[int]] = {}
    for port, inode in pairs:
        if port in ports:
            found.setdefault(port, set()).add(inode)
    return {port: frozenset(inodes) for port, inodes in found.items()}


def _ask_kernel(family: int) -> Iterator[tuple[int, int]]:
    """Port and inode of every listening TCP socket of one family (sock_diag(7))."""
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << _LISTEN)
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0)
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


def _read_table(table: str) -> Iterator[tuple[int, int]]:
    """The same from proc_net(5); a kernel without IPv6 has no second table."""
    try:
        with open(table, "rb") as file:  # noqa: PTH123 - thousands of lines, read as they are
            lines = [line.split() for line in file if b" 0A " in line]
    except FileNotFoundError:
        return
    for fields in lines:  # sl local:port remote:port state tx:rx tr:when retransmits uid timeout inode …
        if fields[3] == b"0A":
            yield int(fields[1][-4:], 16), int(fields[9])


def holders(inodes: Collection[int], pids: Iterable[int]) -> Iterator[int]:
    """Those of `pids` that hold one of the sockets `inodes`.

    Raises:
        PermissionError: nobody seen so far does, and the descriptors of one of `pids` may not be seen.
    """
    links = {f"socket:[{inode}]" for inode in inodes}
    forbidden: PermissionError | None = None
    held = False
    for pid in pids:
        try:
            names = os.listdir(f"/proc/{pid}/fd")  # noqa: PTH208 - as in identity: called for many
            for name in names:
                with suppress(FileNotFoundError, ProcessLookupError):
                    if os.readlink(f"/proc/{pid}/fd/{name}") in links:  # noqa: PTH115
                        held = True
                        yield pid
                        break
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError as error:
            forbidden = error
    if forbidden is not None and not held:
        raise forbidden


def every_pid() -> list[int]:
    """All pids of this namespace, as of now."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
