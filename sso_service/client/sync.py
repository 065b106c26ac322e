"""The blocking client."""

import ssl
from typing import Self

import httpx
from tenacity import Retrying

from sso_service.client import calls
from sso_service.client.base import BaseClient, http_options
from sso_service.client.calls import Call, Result, read_response, without_response
from sso_service.client.links import split_studio_url
from sso_service.client.models import Created, Login, Verification


class SSOClient(BaseClient):
    """A client of the service at `service_url`. The API token needs the scope that a method names.

    A client is safe to share between threads and keeps connections. Use it as a context manager, or call `close`.
    `timeout` is the number of seconds that connecting, and each wait for the response, may take. `create_token` and
    `login_url` retry for about `retry_for` seconds in total. `ssl_context` is for a service whose certificate comes
    from a private authority. `transport` replaces the network in tests. `allow_http` permits URLs with http, for the
    service and the Studio. Otherwise they must have https, or lead to this machine.

    Every method raises a subclass of `SSOError`. Raises `ValueError` if the URL, the API token or a time is invalid.
    """

    def __init__(
        self,
        service_url: str,
        api_token: str,
        *,
        timeout: float = 5.0,
        retry_for: float = 10.0,
        ssl_context: ssl.SSLContext | None = None,
        transport: httpx.BaseTransport | None = None,
        allow_http: bool = False,
    ) -> None:
        super().__init__(service_url, api_token, timeout, retry_for, allow_http=allow_http)
        self._http = httpx.Client(transport=transport, **http_options(service_url, api_token, ssl_context))

    def create_token(self, *, email: str, first_name: str, last_name: str) -> Created:
        """Create a login token for a person, and a user if there is none. Scope `write:sso`; retried on failure."""
        call = calls.create(email, first_name, last_name)
        created: Created = Retrying(**self._retry_options)(self._send, call, self._deadline())
        return created

    def login_url(self, studio_url: str, *, email: str, first_name: str, last_name: str) -> str:
        """Return `studio_url` with a new login token in its query. Scope `write:sso`; retried on failure.

        The URL's host gets the token, so an unchecked request parameter must not determine it. Raises `ValueError`,
        before a token is created, unless the URL is absolute with https (see `allow_http`) and has no parameter `sso`.
        """
        before, after = split_studio_url(studio_url, allow_http=self._allow_http)
        created = self.create_token(email=email, first_name=first_name, last_name=last_name)
        return f"{before}sso={created.token}{after}"

    def verify(self, token: str) -> Verification:
        """Return the state of a login token without consuming it. Scope `verify:sso`; never retried."""
        return self._send(calls.verify(token))

    def consume(self, token: str) -> Login:
        """Consume a login token and return the login. Scope `verify:sso`; never retried.

        Raises a subclass of `TokenRefused`, or `OutcomeUnknown` if the token may have been consumed.
        """
        return self._send(calls.consume(token))

    def revoke(self, token: str) -> bool:
        """Revoke an unused login token. Return False if it was used before. Scope `write:sso`; never retried.

        Raises `TokenInvalid` or `TokenExpired`, or `OutcomeUnknown` if the token may have been revoked.
        """
        return self._send(calls.revoke(token)).revoked

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, call: Call[Result], deadline: float | None = None) -> Result:
        try:
            response = self._http.post(**self._request_options(call, deadline))
        except httpx.HTTPError as error:
            raise without_response(call, error) from error
        return read_response(call, response)
