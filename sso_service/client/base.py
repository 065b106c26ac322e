"""Settings, HTTP options and retries that the two clients share."""

import json
import random
import re
import ssl
import time
from typing import Any

import httpx
from tenacity import RetryCallState, retry_if_exception, stop_before_delay

from sso_service.client.calls import Call
from sso_service.client.errors import SSOError, Unavailable
from sso_service.client.links import check_scheme, is_loopback

_KEEP_ALIVE = 2.0
"""Seconds for which an idle connection is kept: less than the 5 (uvicorn) or more of servers. The outcome of a request
that is sent while the server closes the connection would be unknown, and its user would need a new link."""

_SHORTEST_WAIT, _LONGEST_WAIT = 0.1, 2.0
"""Seconds before a retry, if the service does not send `Retry-After`."""


class BaseClient:
    """A service URL, an API token, time-outs and the policy for retries. Raises `ValueError` if one is invalid."""

    def __init__(
        self, service_url: str, api_token: str, timeout: float, retry_for: float, *, allow_http: bool = False
    ) -> None:
        if timeout <= 0 or retry_for < 0:
            raise ValueError("timeout must be more than 0 seconds, and retry_for 0 or more")
        if not re.fullmatch(r"[!-~]+", api_token):
            raise ValueError("the API token is empty or contains characters that no API token has")
        try:
            url = httpx.URL(service_url)
        except httpx.InvalidURL:
            raise ValueError("the service URL is not a URL") from None
        # httpx would send a user name in the URL as the credentials, in place of the API token.
        if url.scheme not in {"http", "https"} or not url.host or url.userinfo or {"?", "#"} & {*service_url}:
            raise ValueError("the service URL must be absolute, with http or https, and without user name or query")
        check_scheme(url.scheme, url.host, "service URL", allow_http=allow_http)
        self._allow_http = allow_http
        self._service_url = str(url).rstrip("/")
        self._timeout = timeout
        self._retry_for = retry_for
        self._retry_options: dict[str, Any] = {
            "retry": retry_if_exception(_is_temporary),
            "wait": _wait,
            # If the service asks for a longer wait than `retry_for`, the error is raised at once, with `retry_after`.
            "stop": stop_before_delay(retry_for),
            "reraise": True,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._service_url!r})"

    def _deadline(self) -> float:
        """Return the monotonic time at which the last attempt of a call that starts now must end."""
        return time.monotonic() + max(self._retry_for, self._timeout)

    def _request_options(self, call: Call[Any], deadline: float | None) -> dict[str, Any]:
        """Return the arguments of httpx's `post` for `call`."""
        left = self._timeout if deadline is None else deadline - time.monotonic()
        return {
            "url": self._service_url + call.path,
            # Escaped to ASCII, so that the service refuses a lone surrogate instead of an encoding error here.
            "content": json.dumps(call.body).encode("ascii"),
            "headers": {"Content-Type": "application/json"},
            "timeout": min(self._timeout, max(left, _SHORTEST_WAIT)),
        }


def http_options(service_url: str, api_token: str, ssl_context: ssl.SSLContext | None) -> dict[str, Any]:
    """Return the arguments that both of httpx's clients get."""
    url = httpx.URL(service_url)
    return {
        # A proxy that `HTTP_PROXY` names would get the API token unencrypted over the network, on the way to this
        # machine. With https it only passes on what it cannot read.
        "trust_env": url.scheme == "https" or not is_loopback(url.host),
        "headers": {"Authorization": f"Bearer {api_token}", "Accept": "application/json"},
        "follow_redirects": False,  # no server that a response names may get the API token
        "limits": httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=_KEEP_ALIVE),
        "verify": True if ssl_context is None else ssl_context,
    }


def _is_temporary(error: BaseException) -> bool:
    """Return whether the service, or a proxy in front of it, is unavailable for the moment."""
    return isinstance(error, Unavailable) or (isinstance(error, SSOError) and error.status in {502, 503, 504})


def _wait(state: RetryCallState) -> float:
    """Return the seconds until the next attempt: those of `Retry-After`, or twice as many after each attempt.

    A random part of up to a half is added, so that clients that failed together do not retry together.
    """
    error = state.outcome.exception() if state.outcome else None
    seconds = error.retry_after if isinstance(error, SSOError) else None
    if seconds is None:
        seconds = min(_SHORTEST_WAIT * 2 ** (state.attempt_number - 1), _LONGEST_WAIT)
    # The factor is not secret, so it does not need cryptographic randomness.
    return max(seconds, _SHORTEST_WAIT) * random.uniform(1, 1.5)  # nosec B311 # noqa: S311 - see above
