"""How uvicorn serves the application."""

import os
import signal
import tempfile
from importlib.util import find_spec

import uvicorn

from sso_service import logs
from sso_service.settings import Settings, SettingsError


def run(settings: Settings, *, workers: int = 1, app: str = "sso_service.web.app:create_app") -> None:
    """Serves until told to stop. `app` names what makes the application, in each worker anew, from the environment.

    Raises `SettingsError` if something is not installed.
    """
    if settings.tracing and not (find_spec("opentelemetry") and find_spec("opentelemetry.sdk")):
        raise SettingsError("SSO_TRACING needs OpenTelemetry: pip install 'sso-service[tracing]'")
    # A single process would, when all is answered, end by SIGTERM itself, and leave behind what it made. So it ends as
    # after Ctrl-C, which uvicorn takes for a good end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # In memory where that is possible: so counting never waits for a disk, and nobody clears it away as old.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a directory of ours is made there
    with tempfile.TemporaryDirectory(prefix="sso-metrics-", dir=memory, ignore_cleanup_errors=True) as metrics:
        # Where all workers count. It is read when `prometheus_client` is imported, which the application does.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics
        uvicorn.run(
            app,
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=workers,
            access_log=False,  # it writes the whole query, and with it tokens; ours does not
            log_config=logs.config(settings.log_format),
            server_header=False,
            ws="none",
            forwarded_allow_ips=settings.trusted_proxies,
            timeout_graceful_shutdown=10,
        )
        del os.environ["PROMETHEUS_MULTIPROC_DIR"]
