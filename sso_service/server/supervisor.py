"""Run the application on uvicorn: in this process, or in several workers that a supervisor restarts."""

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

from sso_service.errors import SettingsError
from sso_service.observability import logs
from sso_service.server.descriptors import backlog, raise_limit
from sso_service.server.listening import UNIX, listen, name_of
from sso_service.settings import Settings

log = logging.getLogger(__name__)


def run(
    settings: Settings,
    listeners: Sequence[socket.socket] = (),
    *,
    workers: int = 1,
    app: str = "sso_service.web.app:create_app",
) -> None:
    """Serve until a signal stops the process, on the bound `listeners`, or on host and port of the settings.

    `app` names the factory of the application. Each worker calls it, and it reads the settings from the environment.
    Raises `SettingsError` if a package that a setting needs is not installed, or `CannotListen`.
    """
    if settings.tracing and not (find_spec("opentelemetry") and find_spec("opentelemetry.sdk")):
        raise SettingsError("SSO_TRACING needs the extra tracing; in the checkout: pip install '.[server,tracing]'")
    listeners = listeners or listen(settings)
    trusted = settings.trusted_proxies
    # In memory where possible: counting never waits for a disk, and no clean-up job deletes the files as old.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # nosec B108 # noqa: S108 - a private directory
    with tempfile.TemporaryDirectory(prefix="sso-metrics-", dir=memory, ignore_cleanup_errors=True) as metrics:
        # All workers count in this directory. `prometheus_client` reads the variable when it is imported, so nothing
        # here may import it, not even indirectly: uvicorn gets the application and the protocol by their names.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics
        config = uvicorn.Config(
            app,
            factory=True,
            http="sso_service.server.protocol:Protocol",
            workers=workers,
            access_log=False,  # uvicorn's contains whole queries with login tokens; `web.observed` logs without them
            log_config=logs.config(settings.log_format),
            server_header=False,
            ws="none",
            # Clients of the unix socket are proxies: the mode of the socket decides which users may connect.
            forwarded_allow_ips=trusted if trusted == "*" else f"{trusted},{UNIX}",
            backlog=backlog(raise_limit()),
            timeout_graceful_shutdown=10,
        )
        log.info("Listening on %s", ", ".join(map(name_of, listeners)))
        started = _serve(config, list(listeners))
        del os.environ["PROMETHEUS_MULTIPROC_DIR"]
    if not started:
        sys.exit(STARTUP_FAILURE)


def _serve(config: uvicorn.Config, listeners: list[socket.socket]) -> bool:
    """Serve until a signal arrives. Return whether the application started."""
    if config.workers > 1:
        Supervisor(config, listeners).run()
        return True
    # After SIGTERM, uvicorn answers the open requests and then raises the signal again. The default handler would end
    # the process at once and leave the metrics directory behind, so SIGTERM ends it like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):
        server.run(listeners)
    return server.started


class Supervisor(Multiprocess):
    """Starts workers, replaces those that die, and on SIGHUP replaces each in turn while the others serve."""

    def terminate_all(self) -> None:
        """Stop the workers."""
        # If the listeners stayed open here, the kernel would accept connections that no worker answers any more.
        for listener in self.sockets:
            listener.close()
        super().terminate_all()
