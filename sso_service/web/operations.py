"""`/healthz`, `/readyz` and `/metrics`, for whoever keeps the service running."""

from hmac import compare_digest

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from sso_service.metrics import Gauges, exposition
from sso_service.service import NotAuthenticated, Service
from sso_service.settings import Settings
from sso_service.web.errors import RETRY_AFTER, json_response
from sso_service.web.requests import bearer


async def healthz(request: Request) -> Response:
    """The process answers. It says nothing about the database: restarting us would not bring that back."""
    return json_response({"status": "ok"})


class Readyz:
    """Whether this node should get requests: keys, database, schema, clocks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def get(self, request: Request) -> Response:
        """200, or 503; with what is wrong, for those who may know."""
        problems = (await self._service.condition()).problems
        if not problems:
            return json_response({"status": "ready"})
        content: dict[str, object] = {"status": "not ready"}
        if _may_know(request, self._service.settings):
            content["problems"] = problems
        return json_response(content, 503, {"Retry-After": RETRY_AFTER})


class Metrics:
    """What Prometheus asks for: counters of all workers of this node, and its condition."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def get(self, request: Request) -> Response:
        """The metrics, for those who may know. Raises `NotAuthenticated`."""
        if not _may_know(request, self._service.settings):
            raise NotAuthenticated
        condition = await self._service.condition()
        gauges = Gauges(
            {
                "sso_ready": not condition.problems,
                "sso_signing_key_age_seconds": condition.signing_key_age,
                "sso_clock_difference_seconds": condition.clock_difference,
                "sso_consumed_rows": self._service.consumed_rows,
            }
        )
        headers = {"Content-Type": CONTENT_TYPE_LATEST, "Cache-Control": "no-store"}
        return Response(exposition(gauges), headers=headers)


def _may_know(request: Request, settings: Settings) -> bool:
    given = bearer(request.scope) or ""
    return not settings.metrics_token or compare_digest(given.encode(), settings.metrics_token.encode())
