"""Free TCP ports on loopback."""

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """Return a port on 127.0.0.1 that no socket uses.

    It is below the ports that the kernel assigns to outgoing connections, so that none of these takes it before the
    server that is meant for it listens, or while this server restarts.
    """
    for port in random.sample(range(15_000, 32_000), 1000):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
