"""The sockets on which the service listens: a port, a unix socket, or sockets that the parent process has opened."""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from sso_service.errors import CannotListen
from sso_service.settings import Settings

UNIX = "unix"
"""The client's name on a connection through a unix socket, which has no address."""
_FIRST_PASSED = 3
"""The number of the first socket that systemd passes: SD_LISTEN_FDS_START of sd_listen_fds(3)."""
_BUFFER = 64 * 1024
"""Bytes that the kernel may keep for a TCP connection in each direction. Twice the largest head; most responses fit.

Linux doubles the number for its own records. By itself it would keep up to 4 MiB of responses that a client does not
read, and 6 MiB or more of requests that are not read yet. A few hundred clients could use up the kernel's memory for
all connections of the machine, or that of a container.
"""
_UDS_MODE = 0o660
"""Clients of the unix socket are trusted like a proxy, so only the service's user and the file's group may connect."""


def listen(
    settings: Settings,
    *,
    uds: Path | None = None,
    fd: int | None = None,
    environ: Mapping[str, str] = MappingProxyType({}),
) -> list[socket.socket]:
    """Return the bound sockets to serve on.

    In this order: the unix socket `uds`, the descriptor `fd`, the sockets that systemd passes by LISTEN_FDS in
    `environ` (sd_listen_fds(3)), host and port of the settings. Raises `CannotListen`.
    """
    if uds is not None:
        return [_unix(uds)]
    if fd is not None:
        return [_passed(fd)]
    if environ.get("LISTEN_PID") == str(os.getpid()):  # otherwise the sockets are for the parent process
        return [_passed(_FIRST_PASSED + number) for number in range(int(environ.get("LISTEN_FDS", "1")))]
    return [_port(settings.host, settings.port)]


def _limit_buffers(listener: socket.socket) -> None:
    """Limit the kernel's buffers of the connections that the TCP socket `listener` will accept: they inherit these."""
    with suppress(OSError):  # a system that allows less
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)


def name_of(listener: socket.socket) -> str:
    """Return the address of a listening socket for the log."""
    address = listener.getsockname()
    if not isinstance(address, tuple):
        return f"unix:{address}"
    return f"http://{f'[{address[0]}]' if ':' in address[0] else address[0]}:{address[1]}"


def _port(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _limit_buffers(listener)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise CannotListen(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def _unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket() and not _is_in_use(path):
            path.unlink()  # left behind by a service that was killed
        listener.bind(str(path))
        path.chmod(_UDS_MODE)
    except OSError as error:
        listener.close()
        raise CannotListen(f"cannot listen on {path}: {error.strerror or error}") from error
    return listener


def _is_in_use(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def _passed(fd: int) -> socket.socket:
    try:
        listener = socket.socket(fileno=fd)  # detects the address family
        listens = listener.type == socket.SOCK_STREAM and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise CannotListen(f"file descriptor {fd}: {error.strerror}") from error
    if not listens:  # for example because of `Accept=yes` in the .socket unit
        raise CannotListen(f"file descriptor {fd} is not a listening socket")
    if listener.family != socket.AF_UNIX:
        _limit_buffers(listener)
    return listener
