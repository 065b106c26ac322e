"""How uvicorn serves the application."""

import asyncio
import copy
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import uvicorn
from uvicorn.config import LOGGING_CONFIG, STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from sso_service.settings import Settings
from sso_service.web.listening import listen, name_of
from sso_service.web.protocol import UNIX, Protocol

log = logging.getLogger(__name__)


def run(
    settings: Settings,
    listeners: Sequence[socket.socket] | None = None,
    *,
    workers: int = 1,
    app: str = "sso_service.web.app:create_app",
) -> None:
    """Serves until told to stop, on `listeners`, which are bound, or else on host and port of the settings.

    `app` names what makes the application, in each worker anew, from the environment. Raises `CannotListen`.
    """
    listeners = listeners or listen(settings)
    # uvicorn's access log writes the whole query, and with it tokens; it stays off.
    logging_config = copy.deepcopy(LOGGING_CONFIG)
    logging_config["loggers"]["sso_service"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    trusted = settings.trusted_proxies
    config = uvicorn.Config(
        app,
        factory=True,
        http=Protocol,
        workers=workers,
        access_log=False,
        log_config=logging_config,
        server_header=False,
        ws="none",
        # Whoever may open the unix socket is a proxy; the mode of the socket says who may.
        forwarded_allow_ips=trusted if trusted == "*" else f"{trusted},{UNIX}",
        timeout_graceful_shutdown=10,
    )
    log.info("Listening on %s", ", ".join(map(name_of, listeners)))
    if workers > 1:
        Supervisor(config, list(listeners)).run()
        return
    server = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):
        server.run(list(listeners))
    if not server.started:
        sys.exit(STARTUP_FAILURE)


class Supervisor(Multiprocess):
    """Starts workers, replaces those that die, and on SIGHUP each in turn, without a moment in which nobody serves."""

    def terminate_all(self) -> None:
        # Left open here, they would take connections when no worker does any more, and answer none.
        for listener in self.sockets:
            listener.close()
        super().terminate_all()


def drain_first(seconds: float, begin: Callable[[], None]) -> None:
    """Lets SIGTERM call `begin`, and stop uvicorn only `seconds` later. Of the event loop that serves."""
    stop = signal.getsignal(signal.SIGTERM)
    if not seconds or not callable(stop):
        return
    loop = asyncio.get_running_loop()

    def leave() -> None:
        begin()
        loop.call_later(seconds, stop, signal.SIGTERM, None)

    loop.add_signal_handler(signal.SIGTERM, leave)
