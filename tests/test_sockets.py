"""What the kernel tells of sockets, by sock_diag and by its tables."""

from __future__ import annotations

import os
import socket

import pytest

from reconciler import sockets as kernel
from reconciler.sockets import BOUND, CONNECTED, LISTENING, sockets


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_kernels_two_lists_of_listeners_agree(family: socket.AddressFamily) -> None:
    """sock_diag is asked, /proc/net/tcp is what remains where there is none."""
    try:
        servers = [socket.create_server(("", 0), family=family) for _ in range(40)]
    except OSError:
        pytest.skip("no such family here")
    ours = {(s.getsockname()[1], os.fstat(s.fileno()).st_ino) for s in servers}
    assert ours <= set(kernel._ask_kernel(LISTENING))
    assert ours <= {one for table in kernel._TABLES for one in kernel._read_table(table, LISTENING)}
    for server in servers:
        server.close()


@pytest.mark.parametrize("has_sock_diag", [True, False])
def test_each_socket_is_in_the_list_of_its_state_alone(has_sock_diag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(states: int) -> None:
        raise OSError(2, "No such file or directory")

    if not has_sock_diag:
        monkeypatch.setattr(kernel, "_ask_kernel", missing)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        client.connect(server.getsockname())
        inodes = {name: os.fstat(s.fileno()).st_ino for name, s in (("server", server), ("client", client))}
        listening, connected = dict(map(reversed, sockets(LISTENING))), dict(map(reversed, sockets(CONNECTED)))
        assert listening[inodes["server"]] == server.getsockname()[1]
        assert connected[inodes["client"]] == client.getsockname()[1]
        assert inodes["client"] not in listening
        assert inodes["server"] not in connected
        assert bound.getsockname()[1] not in {port for port, _ in sockets(LISTENING | CONNECTED)}


def test_connections_that_are_over_linger_without_an_inode() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        accepted.close()  # first: TIME_WAIT is on its side
        assert client.recv(1) == b""
        port = server.getsockname()[1]
    assert (port, 0) in sockets(CONNECTED)


def test_a_kernel_that_tells_of_bound_sockets_names_them() -> None:
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if release < (6, 8):
        pytest.skip("Linux 6.8 is the first to tell")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert (bound.getsockname()[1], os.fstat(bound.fileno()).st_ino) in set(sockets(BOUND))
