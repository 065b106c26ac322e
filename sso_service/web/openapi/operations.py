"""The operations of the service as data. `document.py` renders them as OpenAPI."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from msgspec import Struct

from sso_service.characters import CONTROLS
from sso_service.permissions import Scope
from sso_service.web.openapi.components import HEADERS, Json
from sso_service.web.requests import FORM_COOKIE
from sso_service.web.schemas import (
    EXAMPLE_TARGET,
    EXAMPLE_TOKEN,
    ActiveToken,
    Healthy,
    InactiveToken,
    LoginForm,
    LoginToken,
    LoginTokenBody,
    NewToken,
    NotReady,
    PersonBody,
    Ready,
    RevokedToken,
    SessionBody,
    TokenBody,
)

JSON = "application/json"
HTML = "text/html"

HOST = "https://studio.example"
"""The host in the samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A response that is not an error.

    Its body is one of the structs in `bodies`, as JSON. A response with other content has a `media_type` instead.
    `headers` maps HTTP names to names in `components.HEADERS`, `links` maps names to OpenAPI links.
    """

    description: str
    bodies: tuple[type[Struct], ...] = ()
    media_type: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A method of a path, and its responses except 405, which every path has.

    `errors` are codes in `problems.ENTRIES`, with the status for API clients. `page_errors` have the status for
    browsers: they are pages, or JSON if `Accept` names JSON and not HTML. An operation with a `scope` needs an API
    token, and its body is JSON; other bodies are forms. `security` lists alternatives. `sample` holds the arguments of
    a curl command; it is empty where `document.py` makes it from the example of the body.
    """

    method: str
    path: str
    id: str
    tag: str
    summary: str
    description: str
    responses: Mapping[int, Response]
    sample: str = ""
    errors: tuple[str, ...] = ()
    page_errors: tuple[str, ...] = ()
    scope: Scope | None = None
    body: type[Struct] | None = None
    parameters: tuple[Json, ...] = ()
    security: tuple[Json, ...] = ()


# --- shared parts ----------------------------------------------------------------------------------------------------

_UNAVAILABLE = ("unavailable", "overloaded")
_UNKNOWN = (*_UNAVAILABLE, "outcome_unknown")
_API_ERRORS = (
    "missing_token",
    "insufficient_scope",
    "request_timeout",
    "payload_too_large",
    "rate_limited",
    "invalid_json",
    "parameter_missing",
    "parameter_invalid",
)
_LOGIN_ERRORS = ("token_invalid", "token_expired", "token_consumed", "no_access", "not_a_navigation", *_UNKNOWN)

_OPTIONAL: Json = {}
_SESSION: Json = {"studio_session": []}
_METRICS_TOKEN: Json = {"metrics_token": []}

_RETRY = {"Retry-After": "Retry-After"}
_ENDED = {"Set-Cookie": "EndedCookie"}
_REDIRECT = Response(
    description="Signed in. Redirects to the same path and query without `sso`.",
    headers={"Location": "Location", "Set-Cookie": "SessionCookie"},
)
_QUESTION = Response(
    description="A page that asks first: another user is signed in, or `SSO_CONFIRM_LOGIN` is on. The login token was "
    "not consumed. The form of the page is sent to `/sso/confirm`.",
    headers={"Set-Cookie": "FormCookie"},
    media_type=HTML,
)
_SIGNED_OUT = {
    200: Response(description="Signed out. A page, if `Accept` names `text/html`.", headers=_ENDED, media_type=HTML),
    204: Response(description="Signed out.", headers=_ENDED),
}


def _parameter(place: str, name: str, description: str, schema: Json, *, required: bool = False) -> Json:
    return {"in": place, "name": name, "description": description, "required": required, "schema": schema}


_PATH = _parameter(
    "path",
    "path",
    "Any path that is not one of the service's own, up to its end, with all slashes: `client/123/t/42/posts`. OpenAPI "
    "has no notation for this, so the pattern describes one segment. A path below `/client` must be "
    "`/client/{account}`, `/client/{account}/t/{team}` or `/client/{account}/t/{team}/{section}...`, with the account "
    "of the login token.",
    {"type": "string", "pattern": rf"^[^/\\;%{CONTROLS}]+$", "not": {"enum": [".", ".."]}, "examples": ["start"]},
    required=True,
)
_SSO = _parameter(
    "query",
    "sso",
    "The login token. All other parameters are kept, in order, byte for byte. If repeated, the request has no valid "
    "login token.",
    msgspec.json.schema(LoginToken),
    required=True,
)
_UNREAD = ({**_PATH, "schema": {"type": "string", "minLength": 1}}, {**_SSO, "schema": {"type": "string"}})
_SAME_ORIGIN = _parameter(
    "header",
    "Sec-Fetch-Site",
    "Sent by browsers. Without it, `Origin` must be the service's own.",
    {"type": "string", "enum": ["same-origin"]},
)
_SAME_ORIGIN_OPTION = "-H 'Sec-Fetch-Site: same-origin'"


def _original_path(name: str, proxy: str) -> Json:
    return _parameter(
        "header", name, f"The original path, as {proxy}.", {"type": "string", "examples": [EXAMPLE_TARGET]}
    )


def _link(operation: str, description: str, **target: Json) -> Json:
    return {"operationId": operation, "description": description, **target}


_TOKEN_IN_BODY: Json = {"requestBody": {"token": "$response.body#/token"}}  # nosec B105 # a location, not a token
_LINKS = {
    "signIn": _link("signIn", "Where to send the browser.", parameters={"sso": "$response.body#/token"}),
    "verify": _link("verifyToken", "Whether the login token signs in.", **_TOKEN_IN_BODY),
    "consume": _link("consumeToken", "For a frontend with its own sessions.", **_TOKEN_IN_BODY),
    "revoke": _link("revokeToken", "If the login token is not needed.", **_TOKEN_IN_BODY),
}

# --- for integrations ------------------------------------------------------------------------------------------------

_INTEGRATIONS = (
    Operation(
        method="post",
        path="/v1/sso_tokens",
        id="createToken",
        tag="Integrations",
        summary="Issue a login token",
        description="An unknown address becomes a user with the role `editor` in the API token's account. A user of "
        "another account is added as `editor`. A member keeps role and name.\n\n"
        "A retry is harmless, also after `503`: each call issues another login token, an unused one expires after 5 "
        "minutes, and no user is created twice.",
        scope=Scope.WRITE_SSO,
        body=PersonBody,
        responses={
            201: Response(description="The login token. Keep it out of logs.", bodies=(NewToken,), links=_LINKS)
        },
        errors=(*_API_ERRORS, "user_disabled", "role_not_allowed", *_UNKNOWN),
    ),
    Operation(
        method="post",
        path="/v1/sso_tokens/verify",
        id="verifyToken",
        tag="Integrations",
        summary="Verify a login token",
        description="Reports whether the login token signs in, without consuming it. It may be repeated. The response "
        "is `200` in both cases and describes the present state: only consuming signs a user in.",
        scope=Scope.VERIFY_SSO,
        body=TokenBody,
        responses={
            200: Response(
                description="`active` reports whether the login token signs in.", bodies=(ActiveToken, InactiveToken)
            )
        },
        errors=(*_API_ERRORS, *_UNAVAILABLE),
    ),
    Operation(
        method="post",
        path="/v1/sso_tokens/consume",
        id="consumeToken",
        tag="Integrations",
        summary="Redeem a login token, once",
        description="For frontends with their own sessions. Exactly one call for a login token is answered with "
        "`200`, and only after the consumption is durable.\n\n"
        "A repetition is answered with `410`. So after `outcome_unknown`, or without a response, the login token may "
        "be used: get a new one.",
        scope=Scope.VERIFY_SSO,
        body=LoginTokenBody,
        responses={200: Response(description="This call consumed the login token.", bodies=(ActiveToken,))},
        errors=(*_API_ERRORS, "token_invalid", "no_access", "token_consumed", "token_expired", *_UNKNOWN),
    ),
    Operation(
        method="post",
        path="/v1/sso_tokens/revoke",
        id="revokeToken",
        tag="Integrations",
        summary="Revoke a login token",
        description="Consumes the login token without signing in. It may be repeated; the second response is `false`.",
        scope=Scope.WRITE_SSO,
        body=LoginTokenBody,
        responses={200: Response(description="The login token cannot be used from now on.", bodies=(RevokedToken,))},
        errors=(*_API_ERRORS, "token_invalid", "token_expired", *_UNKNOWN),
    ),
)

# --- for browsers ----------------------------------------------------------------------------------------------------

_BROWSERS = (
    Operation(
        method="get",
        path="/{path}",
        id="signIn",
        tag="Browsers",
        summary="Sign in with a login link",
        description="Consumes the login token, sets the session cookie and redirects to the clean URL. A second use is "
        "refused. A browser that is signed in already, as the same user in the same account, is redirected all the "
        "same (back button, double click).\n\n"
        "Only a person's navigation consumes. A prefetch (`Sec-Purpose`, `Purpose`, `X-Moz`) is answered with an empty "
        "`503`. `Sec-Fetch-Dest`, where it is sent, must be `document`, or `iframe` if embedding is on. The service's "
        "own paths ignore `sso`. Errors are pages in German or English, or JSON if `Accept` names JSON and not HTML.",
        parameters=(_PATH, _SSO),
        security=(_OPTIONAL, _SESSION),
        responses={200: _QUESTION, 303: _REDIRECT},
        errors=("not_found",),
        page_errors=("bad_path", *_LOGIN_ERRORS),
        sample=f"-i -c cookies '{HOST}{EXAMPLE_TARGET}?chromeless=1&sso={EXAMPLE_TOKEN}'",
    ),
    Operation(
        method="head",
        path="/{path}",
        id="previewSignIn",
        tag="Browsers",
        summary="Answer a link preview",
        description="Does not read or consume the login token.",
        parameters=_UNREAD,
        responses={
            200: Response(description="No cookie and no `Location`."),
            404: Response(description="The query has no `sso`."),
        },
        sample=f"-I '{HOST}{EXAMPLE_TARGET}?sso={EXAMPLE_TOKEN}'",
    ),
    Operation(
        method="options",
        path="/{path}",
        id="signInMethods",
        tag="Browsers",
        summary="List the methods of a login link",
        description="Does not read or consume the login token.",
        parameters=_UNREAD,
        responses={204: Response(description="`Allow` lists the methods.", headers={"Allow": "Allow"})},
        errors=("not_found",),
        sample=f"-i -X OPTIONS '{HOST}{EXAMPLE_TARGET}?sso={EXAMPLE_TOKEN}'",
    ),
    Operation(
        method="post",
        path="/sso/confirm",
        id="confirmSignIn",
        tag="Browsers",
        summary="Confirm a sign-in",
        description="Receives the form of the page that asks first. It signs in like a login link and consumes the "
        "login token, in the browser that showed the page and within 5 minutes.",
        parameters=(_SAME_ORIGIN, _parameter("cookie", FORM_COOKIE, "Set by the page.", {"type": "string"})),
        security=(_OPTIONAL, _SESSION),
        body=LoginForm,
        responses={200: _QUESTION, 303: _REDIRECT},
        errors=("request_timeout", "payload_too_large"),
        page_errors=(*_LOGIN_ERRORS, "cross_origin", "form_invalid"),
        sample=f"-i -b cookies {HOST}/sso/confirm {_SAME_ORIGIN_OPTION} \\\n"
        f"  -d token={EXAMPLE_TOKEN} -d target={EXAMPLE_TARGET} -d replaces=0 -d form=...",
    ),
    Operation(
        method="get",
        path="/session",
        id="getSession",
        tag="Browsers",
        summary="Get the session",
        description="The user who is signed in, and the user's present role and permissions.",
        security=(_SESSION,),
        responses={200: Response(description="A user is signed in.", bodies=(SessionBody,))},
        errors=("not_signed_in", *_UNAVAILABLE),
        sample=f"-s -b cookies {HOST}/session",
    ),
    Operation(
        method="post",
        path="/logout",
        id="signOut",
        tag="Browsers",
        summary="Sign out",
        description="Ends the session of this browser. It may be repeated, and needs no session.",
        parameters=(_SAME_ORIGIN,),
        responses=_SIGNED_OUT,
        errors=("cross_origin",),
        sample=f"-i -b cookies -c cookies -X POST {HOST}/logout {_SAME_ORIGIN_OPTION}",
    ),
    Operation(
        method="post",
        path="/sso/sign-out-everywhere",
        id="signOutEverywhere",
        tag="Browsers",
        summary="Sign out everywhere",
        description="Ends all sessions and outstanding login links of the user in the account of the session. Other "
        "accounts are not affected. It may be repeated, and needs no session.",
        parameters=(_SAME_ORIGIN,),
        responses=_SIGNED_OUT,
        errors=("cross_origin", *_UNKNOWN),
        sample=f"-i -b cookies -c cookies -X POST {HOST}/sso/sign-out-everywhere {_SAME_ORIGIN_OPTION}",
    ),
)

# --- for operators ---------------------------------------------------------------------------------------------------

_OPERATORS = (
    Operation(
        method="get",
        path="/auth",
        id="authenticate",
        tag="Operators",
        summary="Forward authentication",
        description="For a reverse proxy that asks before it passes a request to a Studio. At least one of the two "
        "headers is required, at most 16 in all, and each must be a path that the user's role may view. The proxy must "
        "remove the header that it does not set, and every incoming `X-Studio-*`.",
        parameters=(
            _original_path("X-Original-URI", "nginx is configured to send it"),
            _original_path("X-Forwarded-Uri", "Caddy and Traefik send it"),
        ),
        security=(_SESSION,),
        responses={
            204: Response(
                description="Pass the request, with these headers.",
                headers={name: name for name in HEADERS if name.startswith("X-Studio-")},
            )
        },
        errors=("not_signed_in", "no_access", *_UNAVAILABLE),
        sample=f"-i -b cookies {HOST}/auth -H 'X-Original-URI: {EXAMPLE_TARGET}'",
    ),
    Operation(
        method="get",
        path="/healthz",
        id="health",
        tag="Operators",
        summary="Liveness",
        description="Does not check the database, because a restart of the process would not repair it.",
        responses={200: Response(description="The process responds.", bodies=(Healthy,))},
        sample=f"-s {HOST}/healthz",
    ),
    Operation(
        method="get",
        path="/readyz",
        id="readiness",
        tag="Operators",
        summary="Readiness",
        description="Checks signing keys, database, schema and clocks.",
        security=(_OPTIONAL, _METRICS_TOKEN),
        responses={
            200: Response(description="This node should get requests.", bodies=(Ready,)),
            503: Response(description="This node should not get requests.", bodies=(NotReady,), headers=_RETRY),
        },
        sample=f"-s {HOST}/readyz",
    ),
    Operation(
        method="get",
        path="/metrics",
        id="metrics",
        tag="Operators",
        summary="Metrics for Prometheus",
        description="Covers all workers of this node.",
        security=(_OPTIONAL, _METRICS_TOKEN),
        responses={200: Response(description="The Prometheus text format.", media_type="text/plain")},
        errors=("missing_token",),
        sample=f"-s {HOST}/metrics",
    ),
    Operation(
        method="get",
        path="/openapi.json",
        id="openapi",
        tag="Operators",
        summary="This document",
        description="OpenAPI 3.1.",
        responses={200: Response(description="The document as JSON.", media_type=JSON)},
        sample=f"-s {HOST}/openapi.json",
    ),
    Operation(
        method="get",
        path="/docs",
        id="docs",
        tag="Operators",
        summary="This document as a page",
        description="Runs no scripts and loads nothing.",
        responses={200: Response(description="The document as HTML.", media_type=HTML)},
        sample=f"-s {HOST}/docs",
    ),
)

OPERATIONS = (*_INTEGRATIONS, *_BROWSERS, *_OPERATORS)
