"""A port is free only when a server could really take it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from ports import free_port

from reconciler.act import ports
from reconciler.act.ports import prove_free
from reconciler.errors import PortInUse
from reconciler.sockets import CONNECTED


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield made


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "127.0.0.9"])
def test_a_listener_on_any_address_takes_the_port(taken: socket.socket, address: str) -> None:
    taken.bind((address, free_port()))
    taken.listen()
    with pytest.raises(PortInUse, match="listens"):
        prove_free(taken.getsockname()[1])


@pytest.fixture
def on_ipv6() -> Iterator[socket.socket]:
    try:
        made = socket.socket(socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 on this box")
    with made:
        try:
            made.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 on this box")
        yield made


def test_a_listener_on_ipv6_alone_takes_the_port(on_ipv6: socket.socket) -> None:
    on_ipv6.listen()
    with pytest.raises(PortInUse, match="listens"):
        prove_free(on_ipv6.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "127.0.0.9"])
def test_a_port_bound_by_a_server_that_still_loads_is_taken(taken: socket.socket, address: str) -> None:
    """vLLM binds with SO_REUSEADDR before it loads; a probe with SO_REUSEADDR alone would succeed."""
    taken.bind((address, free_port()))
    port = taken.getsockname()[1]
    with pytest.raises(PortInUse, match="does not listen yet"):
        prove_free(port)
    taken.close()
    prove_free(port)


@pytest.mark.usefixtures("on_ipv6")
@pytest.mark.parametrize("address", ["::1", "::"])
def test_a_port_bound_on_ipv6_alone_is_taken(address: str) -> None:
    with socket.socket(socket.AF_INET6) as loading:
        loading.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        loading.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        loading.bind((address, free_port()))
        with pytest.raises(PortInUse, match="does not listen yet"):
            prove_free(loading.getsockname()[1])


def test_connections_that_linger_after_a_server_do_not_take_the_port(taken: socket.socket) -> None:
    taken.bind(("127.0.0.1", free_port()))
    taken.listen()
    port = taken.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as client:
        accepted, _ = taken.accept()
        accepted.close()  # first, so that TIME_WAIT is on the server's side
        assert client.recv(1) == b""
    taken.close()
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))  # it does linger
    prove_free(port)


def test_proving_leaves_the_port_free(taken: socket.socket) -> None:
    taken.bind(("127.0.0.1", free_port()))
    port = taken.getsockname()[1]
    taken.close()
    prove_free(port)
    prove_free(port)
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_a_server_that_still_loads_takes_the_port_also_where_connections_of_an_earlier_one_linger(
    taken: socket.socket,
) -> None:
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if release < (6, 8):
        pytest.skip("an older kernel does not tell the two apart")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        accepted.close()
        assert client.recv(1) == b""
        address = server.getsockname()
    taken.bind(address)
    with pytest.raises(PortInUse, match="does not listen yet"):
        prove_free(address[1])


@pytest.mark.parametrize("lingering", [True, False])
def test_where_the_kernel_tells_of_no_bound_sockets_only_connections_of_the_past_speak_for_a_port(
    taken: socket.socket, monkeypatch: pytest.MonkeyPatch, lingering: bool
) -> None:
    port = free_port()
    taken.bind(("127.0.0.1", port))
    of_the_past = [(port, 1)] if lingering else []
    monkeypatch.setattr(ports, "sockets", lambda states: of_the_past if states == CONNECTED else [])
    if lingering:
        prove_free(port)
    else:
        with pytest.raises(PortInUse, match="has bound it and does not listen yet"):
            prove_free(port)
