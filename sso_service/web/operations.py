"""`/healthz` and `/readyz`, for whoever keeps the service running."""

from starlette.requests import Request
from starlette.responses import Response

from sso_service.service import Service
from sso_service.web.errors import RETRY_AFTER, json_response


async def healthz(request: Request) -> Response:
    """The process answers. It says nothing about the database: restarting us would not bring that back."""
    return json_response({"status": "ok"})


class Readyz:
    """Whether this node should get requests: keys, database, schema, clocks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def get(self, request: Request) -> Response:
        """200, or 503 with what is wrong."""
        problems = await self._service.problems()
        if problems:
            return json_response({"status": "not ready", "problems": problems}, 503, {"Retry-After": RETRY_AFTER})
        return json_response({"status": "ready"})
