"""Connections whose client does not read, or whose data is not read, take little memory of the kernel."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import pytest

from sso_service.server.listening import listen
from sso_service.settings import Settings

MIB = 1024 * 1024


@pytest.fixture(params=["a port", "a passed socket", "a passed socket on IPv6"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    with ExitStack() as stack:
        if request.param == "a port":
            [listening] = listen(Settings(port=0))
            listening.listen()
        else:
            family, host = (socket.AF_INET6, "::1") if "IPv6" in request.param else (socket.AF_INET, "127.0.0.1")
            try:
                passed = socket.create_server((host, 0), family=family)
            except OSError:
                pytest.skip("this machine has no IPv6")
            [listening] = listen(Settings(), fd=passed.detach())
        yield stack.enter_context(closing(listening))


def bytes_accepted_by(sender: socket.socket) -> int:
    """Return how many bytes the kernel takes although the other side reads none."""
    sender.settimeout(0.2)
    sent = 0
    with suppress(TimeoutError):
        while sent < 20 * MIB:
            sent += sender.send(bytes(65536))
    return sent


def test_the_kernel_keeps_little_of_what_neither_side_reads(listener: socket.socket) -> None:
    with socket.socket(listener.family) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.connect(listener.getsockname()[:2])
        connection, _ = listener.accept()
        with connection:
            assert bytes_accepted_by(connection) < MIB / 2
            assert bytes_accepted_by(client) < MIB / 2
