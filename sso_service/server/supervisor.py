"""How uvicorn serves the application."""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from sso_service import logs
from sso_service.errors import SettingsError
from sso_service.settings import Settings
from sso_service.web.listening import UNIX, listen, name_of

log = logging.getLogger(__name__)


def run(
    settings: Settings,
    listeners: Sequence[socket.socket] = (),
    *,
    workers: int = 1,
    app: str = "sso_service.web.app:create_app",
) -> None:
    """Serves until told to stop, on `listeners`, which are bound, or else on host and port of the settings.

    `app` names what makes the application, in each worker anew, from the environment. Raises `SettingsError` if
    something is not installed, or `CannotListen`.
    """
    if settings.tracing and not (find_spec("opentelemetry") and find_spec("opentelemetry.sdk")):
        raise SettingsError("SSO_TRACING needs OpenTelemetry: pip install 'sso-service[tracing]'")
    listeners = listeners or listen(settings)
    trusted = settings.trusted_proxies
    # In memory where that is possible: so counting never waits for a disk, and nobody clears it away as old.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # nosec B108 # noqa: S108 - we make our own there
    with tempfile.TemporaryDirectory(prefix="sso-metrics-", dir=memory, ignore_cleanup_errors=True) as metrics:
        # Where all workers count. It is read when `prometheus_client` is imported, so nothing that does is imported
        # here: uvicorn knows application and protocol by their names.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics
        config = uvicorn.Config(
            app,
            factory=True,
            http="sso_service.web.protocol:Protocol",
            workers=workers,
            access_log=False,  # it writes the whole query, and with it tokens; ours does not
            log_config=logs.config(settings.log_format),
            server_header=False,
            ws="none",
            # Whoever may open the unix socket is a proxy; the mode of the socket says who may.
            forwarded_allow_ips=trusted if trusted == "*" else f"{trusted},{UNIX}",
            timeout_graceful_shutdown=10,
        )
        log.info("Listening on %s", ", ".join(map(name_of, listeners)))
        started = _serve(config, list(listeners))
        del os.environ["PROMETHEUS_MULTIPROC_DIR"]
    if not started:
        sys.exit(STARTUP_FAILURE)


def _serve(config: uvicorn.Config, listeners: list[socket.socket]) -> bool:
    """Whether it came to serving."""
    if config.workers > 1:
        Supervisor(config, listeners).run()
        return True
    # A single process would, when all is answered, end by SIGTERM itself, and leave behind what it made. So it ends as
    # after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):
        server.run(listeners)
    return server.started


class Supervisor(Multiprocess):
    """Starts workers, replaces those that die, and on SIGHUP each in turn, without a moment in which nobody serves."""

    def terminate_all(self) -> None:
        # Left open here, they would take connections when no worker does any more, and answer none.
        for listener in self.sockets:
            listener.close()
        super().terminate_all()
