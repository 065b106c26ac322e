"""The service's client for integrations and frontends: `SSOClient`, and `AsyncSSOClient` for async code.

Needs the extra `sso-service[client]` and nothing of the server. Both clients are the same but for the `await`: a
`_Call` says what is asked, `_read` and `_lost` say what the answer, or that there is none, means.

A login token that nobody uses is worth nothing after five minutes, so creating one again does no harm: `create_token`
and `login_url` try again while the service is away. Consuming again would turn a login whose answer was lost into
"already used", and revoking again into "used by somebody": `consume` and `revoke` are never repeated, and say
`OutcomeUnknown` when the request may have arrived and no answer came.
"""

import json
import random
import re
import ssl
import time
from types import TracebackType
from typing import Any, Generic, Self, TypeVar
from urllib.parse import unquote_plus, urlsplit

import httpx
import msgspec
from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception, stop_before_delay

Answer = TypeVar("Answer")

_CREATE = "/v1/sso_tokens"

_KEEP_ALIVE = 2.0
"""Seconds for which an idle connection is kept. Servers close theirs after 5 (uvicorn) or more: a request that meets
the closing on its way would be lost with its outcome unknown, and a person would have to get a new link for it."""

_SHORTEST_WAIT, _LONGEST_WAIT = 0.1, 2.0
"""Seconds before something is tried again, if the service does not say for how long it wants to be left alone."""

_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class SSOError(Exception):
    """What the service, or the way to it, did not let be done. Never holds an API token or a login token.

    `code` and `message` are the service's, `status` is that of its answer (None: there was none), `details` say more
    where there is more, and `retry_after` is the number of seconds for which the service asks to be left alone, if so.
    """

    def __init__(
        self,
        code: str,
        message: str,
        status: int | None = None,
        details: dict[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(code, message, status, details, retry_after)  # all of them: it can be pickled
        self.code = code
        self.message = message
        self.status = status
        self.details = details or {}
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"


class InvalidAPIToken(SSOError):
    """401: the API token is unknown, revoked or expired."""


class InsufficientScope(SSOError):
    """403: the API token is good, but not for this."""

    @property
    def required_scope(self) -> str:
        """The scope that it lacks."""
        return self.details.get("required_scope", "")


class InvalidParameter(SSOError):
    """422: something that was given is missing, or breaks a rule."""

    @property
    def field(self) -> str:
        """What was given: `email`, `first_name`, `last_name` or `token`."""
        return self.details.get("field", "")

    @property
    def rule(self) -> str:
        """What it breaks: `required`, `type`, `max_length`, `email` or `characters`."""
        return self.details.get("rule", "")


class UserDisabled(SSOError):
    """403: the person was disabled by an operator."""


class RoleNotAllowed(SSOError):
    """403: the person's role is above what the API token may sign in."""


class TokenRefused(SSOError):
    """A login token is good for nothing, or not for this person any more."""


class TokenInvalid(TokenRefused):
    """422: not a login token, forged, or another account's."""


class TokenExpired(TokenRefused):
    """410: genuine, and its time is over."""


class TokenConsumed(TokenRefused):
    """410: genuine, and used before."""


class NoAccess(TokenRefused):
    """403: genuine, but its user is disabled or no longer in the account. It was not consumed."""


class Unavailable(SSOError):
    """503, or no connection, or no answer to what does no harm if it is done twice: try again later."""


class OutcomeUnknown(SSOError):
    """503, or no answer: it may have been done, or not. A person needs a new link, since nobody can tell any more."""


class UnexpectedAnswer(OutcomeUnknown):
    """What answered is not the service: a proxy's page, a redirect (never followed), or something else at that URL."""


_KINDS: dict[str, type[SSOError]] = {
    "missing_token": InvalidAPIToken,
    "insufficient_scope": InsufficientScope,
    "parameter_missing": InvalidParameter,
    "parameter_invalid": InvalidParameter,
    "user_disabled": UserDisabled,
    "role_not_allowed": RoleNotAllowed,
    "token_invalid": TokenInvalid,
    "token_expired": TokenExpired,
    "token_consumed": TokenConsumed,
    "no_access": NoAccess,
    "unavailable": Unavailable,
    "overloaded": Unavailable,
    "outcome_unknown": OutcomeUnknown,
}


class Created(msgspec.Struct, frozen=True):
    """A new login token (43 characters), and whether its user was created for it."""

    token: str
    user_created: bool

    def __repr__(self) -> str:
        return f"Created(token=<hidden>, user_created={self.user_created})"  # what is logged is no login


class User(msgspec.Struct, frozen=True):
    """A person."""

    id: int
    email: str
    first_name: str
    last_name: str


class Login(msgspec.Struct, frozen=True):
    """Who signed in, to which account, and what they may do there (`section:action` each).

    `expires_at` (Unix seconds) is when the token would have expired. `ref` is its name in the service's records.
    """

    user: User
    account_id: int
    role: str
    permissions: tuple[str, ...]
    expires_at: int
    ref: str


class Verification(msgspec.Struct, frozen=True):
    """What a login token is good for. If it is not `active`, there is a `reason` and nothing of the rest.

    The reason is `malformed`, `bad_signature`, `expired`, `consumed` or `no_access`. The rest is as in `Login`.
    """

    active: bool
    ref: str
    reason: str | None = None
    user: User | None = None
    account_id: int | None = None
    role: str | None = None
    permissions: tuple[str, ...] = ()
    expires_at: int | None = None


class _Revoked(msgspec.Struct, frozen=True):
    revoked: bool


class _Told(msgspec.Struct, frozen=True):
    code: str
    message: str
    details: dict[str, str] = {}


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Told


class _Call(Generic[Answer]):
    """A request, what its answer is read as, and whether it may be done only once."""

    def __init__(self, path: str, body: dict[str, str], answer: type[Answer], *, once: bool = False) -> None:
        self.path = path
        self.body = body
        self.answer = answer
        self.once = once


def _create(email: str, first_name: str, last_name: str) -> _Call[Created]:
    return _Call(_CREATE, {"email": email, "first_name": first_name, "last_name": last_name}, Created)


def _verify(token: str) -> _Call[Verification]:
    return _Call(f"{_CREATE}/verify", {"token": token}, Verification)


def _consume(token: str) -> _Call[Login]:
    return _Call(f"{_CREATE}/consume", {"token": token}, Login, once=True)


def _revoke(token: str) -> _Call[_Revoked]:
    return _Call(f"{_CREATE}/revoke", {"token": token}, _Revoked, once=True)


def _read(call: _Call[Answer], response: httpx.Response) -> Answer:
    """What the service answered. Raises the `SSOError` that it answered."""
    status = response.status_code
    try:
        if response.is_success:
            return msgspec.json.decode(response.content, type=call.answer)
        told = msgspec.json.decode(response.content, type=_ErrorBody).error
    except _UNDECODABLE:
        # Nothing of the answer is repeated: whoever wrote it may have put the request into it.
        message = f"Something that is not the service answered with status {status}."
        raise UnexpectedAnswer("unexpected_answer", message, status, None, _retry_after(response)) from None
    # A failure that we do not know may have happened before or after the thing was done.
    kind = _KINDS.get(told.code, OutcomeUnknown if status >= 500 else SSOError)
    raise kind(told.code, told.message, status, told.details, _retry_after(response))


def _retry_after(response: httpx.Response) -> float | None:
    """The seconds in `Retry-After` (RFC 9110 section 10.2.3). A date, which the service never sends, is ignored."""
    value = response.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"[0-9]{1,9}", value) else None


# Without a connection (of our own, or through a proxy that made none) nothing was sent.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


def _lost(call: _Call[Any], error: httpx.HTTPError) -> SSOError:
    """What it means that there is no answer, because of `error`."""
    why = type(error).__name__
    if call.once and not isinstance(error, _NOT_SENT):
        message = f"The request may have arrived, but there was no answer ({why}). It may have been done or not."
        return OutcomeUnknown("outcome_unknown", message)
    return Unavailable("unavailable", f"The service cannot be reached, or does not answer ({why}).")


def _may_pass(error: BaseException) -> bool:
    """True if the service, or a proxy before it, is away for the moment."""
    return isinstance(error, Unavailable) or (isinstance(error, SSOError) and error.status in {502, 503, 504})


def _wait(state: RetryCallState) -> float:
    """Seconds until the next attempt: as long as the service asks for, or longer each time.

    And up to half as long again, so that those who were turned away together do not come back together.
    """
    error = state.outcome.exception() if state.outcome else None
    seconds = error.retry_after if isinstance(error, SSOError) else None
    if seconds is None:
        seconds = min(_SHORTEST_WAIT * 2 ** (state.attempt_number - 1), _LONGEST_WAIT)
    return max(seconds, _SHORTEST_WAIT) * random.uniform(1, 1.5)  # nosec B311 # noqa: S311 - nothing that anyone must not guess


def _split_studio_url(url: str) -> tuple[str, str]:
    """What stands before and behind `sso=TOKEN` when that is added to a URL. Raises `ValueError`.

    What browsers read in another way than they write is refused, as is a name before the host: either can make a person
    who looks at the URL, or a check of it, see another host than the one that the token is sent to.
    """
    if " " in url or not url.isprintable():
        raise ValueError("the Studio URL has blanks or control characters in it")
    parts = urlsplit(url)
    _ = parts.port  # raises ValueError if it is none
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or "\\" in parts.netloc:
        raise ValueError("the Studio URL must be absolute, with http or https and a host, without a user name")
    if any(unquote_plus(each.partition("=")[0]) == "sso" for each in parts.query.split("&")):
        raise ValueError("the Studio URL has a parameter sso already")
    before, sign, fragment = url.partition("#")
    joint = "?" if "?" not in before else "&" if parts.query else ""
    return before + joint, sign + fragment


def _http_options(api_token: str, ssl_context: ssl.SSLContext | None) -> dict[str, Any]:
    """The arguments of httpx's clients that both kinds have."""
    return {
        "headers": {"Authorization": f"Bearer {api_token}", "Accept": "application/json"},
        "follow_redirects": False,  # the API token is for the service and for nobody that it, or a proxy, names
        "limits": httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=_KEEP_ALIVE),
        "verify": True if ssl_context is None else ssl_context,
    }


class _Settings:
    """What both clients do before they send something."""

    def __init__(self, service_url: str, api_token: str, timeout: float, retry_for: float) -> None:
        if timeout <= 0 or retry_for < 0:
            raise ValueError("timeout must be more than 0 seconds, and retry_for 0 or more")
        if not re.fullmatch(r"[!-~]+", api_token):
            raise ValueError("the API token is empty, or has characters in it that none has")
        try:
            url = httpx.URL(service_url)
        except httpx.InvalidURL:
            raise ValueError("the service URL is not a URL") from None
        # With a user name in it, httpx would send that in place of the API token.
        if url.scheme not in {"http", "https"} or not url.host or url.userinfo or {"?", "#"} & {*service_url}:
            raise ValueError("the service URL must be absolute, with http or https, and without user name or query")
        self._service_url = str(url).rstrip("/")
        self._timeout = timeout
        self._retry_for = retry_for
        self._retry_options: dict[str, Any] = {
            "retry": retry_if_exception(_may_pass),
            "wait": _wait,
            # Who is asked to wait for longer than that is told so at once, by `retry_after` of the error.
            "stop": stop_before_delay(retry_for),
            "reraise": True,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._service_url!r})"

    def _deadline(self) -> float:
        return time.monotonic() + max(self._retry_for, self._timeout)

    def _post(self, call: _Call[Any], deadline: float | None) -> dict[str, Any]:
        """The arguments of httpx's `post` for `call`."""
        left = self._timeout if deadline is None else deadline - time.monotonic()
        return {
            "url": self._service_url + call.path,
            # Escaped to ASCII, so that a lone surrogate is the service's to refuse and not an error of encoding here.
            "content": json.dumps(call.body).encode("ascii"),
            "headers": {"Content-Type": "application/json"},
            "timeout": min(self._timeout, max(left, _SHORTEST_WAIT)),
        }


class SSOClient(_Settings):
    """A client of the service at `service_url`, with an API token of the scope that its methods need.

    One client serves all threads and keeps connections; use it as a context manager, or `close` it. `timeout` is the
    number of seconds that connecting, and each wait for the answer, may take. `create_token` and `login_url` try again
    for about `retry_for` seconds in all. `ssl_context` is for a service whose certificate is of a private authority.
    `transport` replaces the network, for tests.

    Every method raises `SSOError`, by its subclass. Raises `ValueError` for a URL or an API token that cannot be one.
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
    ) -> None:
        super().__init__(service_url, api_token, timeout, retry_for)
        self._http = httpx.Client(transport=transport, **_http_options(api_token, ssl_context))

    def create_token(self, *, email: str, first_name: str, last_name: str) -> Created:
        """A login token for a person, who becomes a user if need be. Scope `write:sso`; repeated while it fails."""
        call = _create(email, first_name, last_name)
        created: Created = Retrying(**self._retry_options)(self._ask, call, self._deadline())
        return created

    def login_url(self, studio_url: str, *, email: str, first_name: str, last_name: str) -> str:
        """`studio_url` with a new login token added to its query, otherwise as it is. Scope `write:sso`; repeated.

        Whoever has the URL's host gets the token, so it must not be one that a request may name freely. Raises
        `ValueError`, before anything is asked for, if it is not an absolute http(s) URL or has a parameter `sso`.
        """
        before, behind = _split_studio_url(studio_url)
        created = self.create_token(email=email, first_name=first_name, last_name=last_name)
        return f"{before}sso={created.token}{behind}"

    def verify(self, token: str) -> Verification:
        """What a login token is good for, or why not. Consumes nothing. Scope `verify:sso`; never repeated."""
        return self._ask(_verify(token))

    def consume(self, token: str) -> Login:
        """The login that a token is good for, once. Scope `verify:sso`; never repeated.

        Raises `TokenRefused`, by its subclass; `OutcomeUnknown` if it may have been consumed.
        """
        return self._ask(_consume(token))

    def revoke(self, token: str) -> bool:
        """True if an unused login token was taken back, False if it was used before. Scope `write:sso`; never repeated.

        Raises `TokenInvalid`, `TokenExpired`; `OutcomeUnknown` if it may have been taken back.
        """
        return self._ask(_revoke(token)).revoked

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, call: _Call[Answer], deadline: float | None = None) -> Answer:
        try:
            response = self._http.post(**self._post(call, deadline))
        except httpx.HTTPError as error:
            raise _lost(call, error) from error
        return _read(call, response)


class AsyncSSOClient(_Settings):
    """`SSOClient` for async code. A client belongs to the event loop that uses it first."""

    def __init__(
        self,
        service_url: str,
        api_token: str,
        *,
        timeout: float = 5.0,
        retry_for: float = 10.0,
        ssl_context: ssl.SSLContext | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(service_url, api_token, timeout, retry_for)
        self._http = httpx.AsyncClient(transport=transport, **_http_options(api_token, ssl_context))

    async def create_token(self, *, email: str, first_name: str, last_name: str) -> Created:
        """As `SSOClient.create_token`."""
        call = _create(email, first_name, last_name)
        created: Created = await AsyncRetrying(**self._retry_options)(self._ask, call, self._deadline())
        return created

    async def login_url(self, studio_url: str, *, email: str, first_name: str, last_name: str) -> str:
        """As `SSOClient.login_url`."""
        before, behind = _split_studio_url(studio_url)
        created = await self.create_token(email=email, first_name=first_name, last_name=last_name)
        return f"{before}sso={created.token}{behind}"

    async def verify(self, token: str) -> Verification:
        """As `SSOClient.verify`."""
        return await self._ask(_verify(token))

    async def consume(self, token: str) -> Login:
        """As `SSOClient.consume`. Who cancels it does not know either whether the token was consumed."""
        return await self._ask(_consume(token))

    async def revoke(self, token: str) -> bool:
        """As `SSOClient.revoke`. Who cancels it does not know either whether the token was taken back."""
        return (await self._ask(_revoke(token))).revoked

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _ask(self, call: _Call[Answer], deadline: float | None = None) -> Answer:
        try:
            response = await self._http.post(**self._post(call, deadline))
        except httpx.HTTPError as error:
            raise _lost(call, error) from error
        return _read(call, response)
