"""`RateLimit` and `RateLimit-Policy` on the responses to API tokens (draft-ietf-httpapi-ratelimit-headers-10)."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sso_service.http import bearer
from sso_service.services.issuing import Issuing

QUOTA_HEADERS = ("RateLimit", "RateLimit-Policy")


class QuotaHeaders:
    """The application, with the quota of the API token on each of its responses. Only used where there is a limit.

    A 401 has none of them: it must not reveal that an API token was accepted once.
    """

    def __init__(self, app: ASGIApp, issuing: Issuing) -> None:
        self._app = app
        self._issuing = issuing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/") or (secret := bearer(scope)) is None:
            await self._app(scope, receive, send)
            return

        async def send_with_quota(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] != 401:
                message["headers"] = [*message["headers"], *self._headers(secret)]
            await send(message)

        await self._app(scope, receive, send_with_quota)

    def _headers(self, secret: str) -> list[tuple[bytes, bytes]]:
        quota = self._issuing.quota(secret)
        if quota is None:
            return []
        return [
            (b"ratelimit-policy", b'"default";q=%d;w=%d' % (quota.limit, quota.window)),
            (b"ratelimit", b'"default";r=%d;t=%d' % (quota.remaining, quota.reset)),
        ]
