"""The client for async code."""

import ssl
from typing import Self

import httpx
from tenacity import AsyncRetrying

from sso_service.client import calls
from sso_service.client.base import BaseClient, http_options
from sso_service.client.calls import Call, Result, read_response, without_response
from sso_service.client.links import split_studio_url
from sso_service.client.models import Created, Login, Verification


class AsyncSSOClient(BaseClient):
    """`SSOClient` for async code. A client belongs to the event loop that uses it first.

    Use it as an async context manager, or call `aclose`.
    """

    def __init__(
        self,
        service_url: str,
        api_token: str,
        *,
        timeout: float = 5.0,
        retry_for: float = 10.0,
        ssl_context: ssl.SSLContext | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        allow_http: bool = False,
    ) -> None:
        super().__init__(service_url, api_token, timeout, retry_for, allow_http=allow_http)
        self._http = httpx.AsyncClient(transport=transport, **http_options(service_url, api_token, ssl_context))

    async def create_token(self, *, email: str, first_name: str, last_name: str) -> Created:
        """See `SSOClient.create_token`."""
        call = calls.create(email, first_name, last_name)
        created: Created = await AsyncRetrying(**self._retry_options)(self._send, call, self._deadline())
        return created

    async def login_url(self, studio_url: str, *, email: str, first_name: str, last_name: str) -> str:
        """See `SSOClient.login_url`."""
        before, after = split_studio_url(studio_url, allow_http=self._allow_http)
        created = await self.create_token(email=email, first_name=first_name, last_name=last_name)
        return f"{before}sso={created.token}{after}"

    async def verify(self, token: str) -> Verification:
        """See `SSOClient.verify`."""
        return await self._send(calls.verify(token))

    async def consume(self, token: str) -> Login:
        """See `SSOClient.consume`. After a cancellation the outcome is unknown."""
        return await self._send(calls.consume(token))

    async def revoke(self, token: str) -> bool:
        """See `SSOClient.revoke`. After a cancellation the outcome is unknown."""
        return (await self._send(calls.revoke(token))).revoked

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _send(self, call: Call[Result], deadline: float | None = None) -> Result:
        try:
            response = await self._http.post(**self._request_options(call, deadline))
        except httpx.HTTPError as error:
            raise without_response(call, error) from error
        return read_response(call, response)
