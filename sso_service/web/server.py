"""How uvicorn serves the application."""

import copy

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from sso_service.settings import Settings
from sso_service.web.framing import StrictProtocol


def run(settings: Settings, *, workers: int = 1, app: str = "sso_service.web.app:create_app") -> None:
    """Serves until told to stop. `app` names what makes the application, in each worker anew, from the environment."""
    # uvicorn's access log writes the whole query, and with it tokens; it stays off.
    logging_config = copy.deepcopy(LOGGING_CONFIG)
    logging_config["loggers"]["sso_service"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    uvicorn.run(
        app,
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=workers,
        access_log=False,
        log_config=logging_config,
        server_header=False,
        http=StrictProtocol,
        ws="none",
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_graceful_shutdown=10,
    )
