r"""`/openapi.json` and `/docs`: what the service answers, for programs and for people, from one document.

The document is OpenAPI 3.1 (so its schemas are JSON Schema 2020-12), built from the tables below when the application
starts, and encoded once. What is not said of each operation anew: the words for each error code, and the answer to a
method that a path does not know.
"""

import html
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

import email_validator
import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response

from sso_service.people import EMAIL_LENGTH, NAME_LENGTH
from sso_service.permissions import Role, Scope, permissions
from sso_service.web.errors import RETRY_AFTER
from sso_service.web.pages import style_source

Json = dict[str, Any]

# --- words -----------------------------------------------------------------------------------------------------------

_ABOUT = """\
One-time login tokens that an intranet puts in front of a web studio. The intranet asks for a token for a person's \
e-mail address and sends the browser to any Studio address with `?sso=TOKEN`. The service consumes the token, signs \
the person in, and redirects to the clean address. Tokens are good for 5 minutes unless configured otherwise, and \
exactly one redemption of a token ever succeeds.

Errors are JSON: `code` is for programs and never changes, `message` is for people. The API token is checked before \
the body: who may not ask is told nothing about what they sent. `HEAD` is answered wherever `GET` is. Unknown fields \
and parameters are ignored. Caches may keep this document and its page, and nothing else."""

_TAGS = {
    "Integrations": "For an intranet, and for Studio frontends that keep sessions of their own. All of it needs an API "
    "token: `Authorization: Bearer wf_live_...`. An API token belongs to an account, and another account's login "
    "tokens are answered exactly like forged ones. A platform API token, made on the command line, verifies and "
    "consumes for all accounts.",
    "Browsers": "Signing in and out. The session is the cookie `studio_session`, signed, for 12 hours unless "
    "configured otherwise; user, role and membership are read anew at each request, so a change counts at once.",
    "Operators": "For reverse proxies, load balancers, and whoever writes a client.",
}

_CODES = {  # nosec B105 # texts about tokens, no tokens
    "bad_path": "The path could be read in two ways (`..`, `//`, `;`, `\\`, encoded `/`, `.` or `%`, control "
    "characters). Nothing was consumed.",
    "cross_origin": "The request does not come from a page of this origin: it has neither `Sec-Fetch-Site: "
    "same-origin` nor the right `Origin`.",
    "form_invalid": "The page was open for more than 5 minutes, or this is the answer to another question. Nothing "
    "was consumed.",
    "insufficient_scope": "The API token is good, but lacks the scope in `details.required_scope`.",
    "invalid_json": "The body is not a JSON object in UTF-8.",
    "method_not_allowed": "This path knows other methods; `Allow` lists them.",
    "missing_token": "There is no API token, or one that is unknown, revoked or expired.",
    "no_access": "The person may not go there: they are disabled, or not in the account, or the path is not one that "
    "they may see. Nothing was consumed.",
    "not_a_navigation": "The request is not for a browser's window (`Sec-Fetch-Dest`). Nothing was consumed.",
    "not_found": "There is nothing at this path without `sso` in the query.",
    "not_signed_in": "There is no session, or it has ended: expired, signed out, user disabled or removed.",
    "outcome_unknown": "The database gave no clear answer: it may have been done or not. Get a new login token.",
    "overloaded": "More is waiting than can be done in time. Nothing was done; repeat it after `Retry-After` seconds.",
    "parameter_invalid": "`details.field` breaks the rule `details.rule`: `type`, `max_length`, `characters` or "
    "`email`.",
    "parameter_missing": "`details.field` is absent, null or blank; `details.rule` is `required`.",
    "payload_too_large": "The body is over 16 KiB. The connection is closed.",
    "rate_limited": "The API token is used more often than `SSO_RATE_LIMIT` allows. Nothing was done; repeat it after "
    "`Retry-After` seconds.",
    "request_timeout": "The body took longer than 10 seconds. The connection is closed.",
    "role_not_allowed": "The person's role is above the `max_role` of the API token.",
    "token_consumed": "The login token was used before, or taken back.",
    "token_expired": "The time of the login token is over.",
    "token_invalid": "This is no login token of ours, or one of another account.",
    "unavailable": "Database or signing keys cannot be used now. Nothing was done; repeat it after `Retry-After` "
    "seconds.",
    "user_disabled": "The person was disabled by an operator.",
}

# --- schemas ---------------------------------------------------------------------------------------------------------


def _object(**properties: Json) -> Json:
    """An object that has all of these, and may get more some day."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


_CONTROL = r"\u0000-\u001f\u007f-\u009f"
_BLANK = r" \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_NOT_BLANK = rf"^[^{_CONTROL}]*[^{_CONTROL}{_BLANK}][^{_CONTROL}]*$"
_ANYTHING_BUT_BLANK = rf"[^\t-\r\u001c-\u001f\u0085{_BLANK}]"

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
# Letters and digits of ASCII, and whatever is beyond: an international domain may be spelt as it is read.
_LETTER = r"[^\u0000-@\[-`{-\u007f]"
_ALPHANUMERIC = r"[^\u0000-/:-@\[-`{-\u007f]"
_HYPHEN_TOO = r"[^\u0000-,./:-@\[-`{-\u007f]"
_LABEL = f"{_ALPHANUMERIC}(?:{_HYPHEN_TOO}{{0,61}}{_ALPHANUMERIC})?"
_TOP_LABEL = f"(?:{_ALPHANUMERIC}{_HYPHEN_TOO}{{0,61}})?{_LETTER}"


def _in_any_case(name: str) -> str:
    return "".join(f"[{letter}{letter.upper()}]" for letter in name)


# Reserved domains (RFC 6761), and labels that look like Punycode and are not (RFC 5890 section 2.3.1).
_RESERVED = "|".join(_in_any_case(name) for name in sorted(email_validator.SPECIAL_USE_DOMAIN_NAMES) if "." not in name)
_NO_DOMAIN = rf"[@.](?:(?:{_RESERVED})$|[^xX].--|[xX][^nN]--)"

_NAME: Json = {"type": "string", "minLength": 1, "maxLength": NAME_LENGTH, "pattern": _NOT_BLANK}
_ID: Json = {"type": "integer", "minimum": 1, "maximum": 2**32 - 1}
_EXAMPLE_TOKEN = "cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA"  # nosec B105 # noqa: S105 - a public test vector

_LOGIN_TOKEN = _ref("schemas", "LoginToken")
_REF: Json = {
    "type": "string",
    "pattern": "^[0-9a-f]{12}$",
    "description": "A name for the token that may stand in logs: the first 12 hex digits of its SHA-256.",
    "examples": ["d2d61bd6a15c"],
}
_WHO = {
    "user": _object(
        id={**_ID, "examples": [3]},
        email={"type": "string", "format": "email", "examples": ["jane.doe@example.com"]},
        first_name={"type": "string", "examples": ["Jane"]},
        last_name={"type": "string", "examples": ["Doe"]},
    ),
    "account_id": {**_ID, "description": "The account that the session is for.", "examples": [123]},
    "role": {"type": "string", "enum": list(Role), "description": "Their role in this account."},
    "permissions": {
        "type": "array",
        "items": {"type": "string", "enum": permissions(Role.ADMIN)},
        "uniqueItems": True,
        "description": "What the role may do, sorted.",
        "examples": [permissions(Role.EDITOR)],
    },
}
_ACTIVE = _object(
    active={"type": "boolean", "const": True},
    ref=_REF,
    **_WHO,
    expires_at={"type": "integer", "description": "Unix seconds.", "examples": [1900000000]},
)

_SCHEMAS: dict[str, Json] = {
    "LoginToken": {
        "type": "string",
        "pattern": "^[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]$",
        "description": "A login token: 43 characters that are safe in URLs.",
        "examples": [_EXAMPLE_TOKEN],
    },
    "Person": _object(
        email={
            "type": "string",
            "format": "idn-email",
            "maxLength": EMAIL_LENGTH,
            "pattern": rf"^{_ATOM}(?:\.{_ATOM})*@(?:{_LABEL}\.)+{_TOP_LABEL}$",
            "allOf": [{"pattern": "^[^@]{1,64}@"}],
            "not": {"pattern": _NO_DOMAIN},
            "description": "Who the person is; case does not matter. ASCII before the `@`; the domain may be "
            "international or internal (`.local`, `.internal`, `.corp`, `.test`). Blanks around it are dropped.",
            "examples": ["jane.doe@example.com"],
        },
        first_name={
            **_NAME,
            "description": "Not blank, no control characters. Used only if the person is new.",
            "examples": ["Jane"],
        },
        last_name={**_NAME, "description": "Likewise.", "examples": ["Doe"]},
    ),
    "NewToken": _object(
        token=_LOGIN_TOKEN,
        user_created={"type": "boolean", "description": "Whether the person was unknown.", "examples": [True]},
    ),
    "TokenToUse": _object(token=_LOGIN_TOKEN),
    "TokenToVerify": _object(
        token={
            "type": "string",
            "pattern": _ANYTHING_BUT_BLANK,
            "description": "Any text that is not blank: whether it is a login token is what the answer says.",
            "examples": [_EXAMPLE_TOKEN],
        }
    ),
    "Active": {"title": "A token that works", **_ACTIVE},
    "Inactive": {
        "title": "A token that does not work",
        **_object(
            active={"type": "boolean", "const": False},
            ref=_REF,
            reason={
                "type": "string",
                "enum": ["malformed", "bad_signature", "expired", "consumed", "no_access"],
                "description": "Why not. To the API token of an account, other accounts' tokens are `bad_signature`.",
            },
        ),
    },
    "Revoked": _object(
        revoked={
            "type": "boolean",
            "description": "`false`: it was consumed before, so somebody may have got in, or it was taken back.",
            "examples": [True],
        }
    ),
    "Session": _object(**_WHO),
    "Healthy": _object(status={"type": "string", "const": "ok"}),
    "Ready": _object(status={"type": "string", "const": "ready"}),
    "NotReady": _object(
        status={"type": "string", "const": "not ready"},
        problems={
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"enum": ["node", "keys", "database", "clock"]},
            "additionalProperties": {"type": "string"},
            "description": "What is wrong, by subject: `keys`, `database` or `clock`; `node` if it was told to stop.",
            "examples": [{"database": "connection refused"}],
        },
    )
    | {"required": ["status"]},  # what is wrong is not for everybody
    "Error": _object(
        error={
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string", "enum": sorted(_CODES), "description": "What is wrong, for programs."},
                "message": {"type": "string", "description": "What is wrong, in English."},
                "details": {
                    "type": "object",
                    "description": "Only with `parameter_missing`, `parameter_invalid` and `insufficient_scope`.",
                    "properties": {
                        "field": {"type": "string", "description": "The field that is wrong."},
                        "rule": {"enum": ["required", "type", "max_length", "characters", "email"]},
                        "required_scope": {"enum": list(Scope)},
                    },
                },
            },
        }
    ),
    "LoginForm": _object(
        token=_LOGIN_TOKEN,
        target={"type": "string", "description": "Path and query to go on to.", "examples": ["/client/123/t/42/posts"]},
        replaces={"type": "string", "pattern": "^[0-9]+$", "description": "Whom it signs out; `0`: nobody."},
        form={"type": "string", "description": "Signed by the page, for this browser, token and target."},
    ),
}


def _example(schema: Json) -> Any:
    """An example of what `schema` describes, from those of its parts."""
    if "$ref" in schema:
        return _example(_SCHEMAS[schema["$ref"].rpartition("/")[2]])
    if "examples" in schema:
        return schema["examples"][0]
    if "properties" in schema:
        return {name: _example(each) for name, each in schema["properties"].items()}
    return schema["const"] if "const" in schema else schema["enum"][0]


# --- parts of operations ---------------------------------------------------------------------------------------------


def _header(description: str, *, required: bool = True, **schema: Any) -> Json:
    return {"description": description, "required": required, "schema": {"type": "string", **schema}}


_HEADERS = {
    "Location": _header("Path and query to go on to, on this host."),
    "SessionCookie": _header("The session; none if the browser had the same one already.", required=False),
    "FormCookie": _header("What binds the page to this browser, for 5 minutes."),
    "EndedCookie": _header("Ends the session of this browser."),
    "Retry-After": _header("Seconds after which it makes sense to repeat.", pattern="^[0-9]+$", examples=[RETRY_AFTER]),
    "RetryLogin": _header("Likewise. A prefetch is answered without.", required=False, pattern="^[0-9]+$"),
    "WWW-Authenticate": _header("`Bearer` (RFC 6750).", const="Bearer"),
    "Allow": _header("The methods that this path knows.", examples=["POST"]),
    "X-Studio-User": _header("Who is signed in: the user's id.", pattern="^[1-9][0-9]*$"),
    "X-Studio-Email": _header("Their e-mail address, in ASCII.", format="email"),
    "X-Studio-Account": _header("The id of the account of the session.", pattern="^[1-9][0-9]*$"),
    "X-Studio-Role": _header("Their role in this account.", enum=list(Role)),
}


def _headers(**names: str) -> Json:
    return {name.replace("_", "-"): _ref("headers", header) for name, header in names.items()}


def _answer(description: str, schema: str | Json | None = None, *, headers: Json | None = None) -> Json:
    """An answer in JSON, or without content."""
    answer: Json = {"description": description}
    if headers:
        answer["headers"] = headers
    if schema:
        referred = _ref("schemas", schema) if isinstance(schema, str) else schema
        first = referred["oneOf"][0] if "oneOf" in referred else referred
        answer["content"] = {"application/json": {"schema": referred, "example": _example(first)}}
    return answer


_HTML: Json = {"text/html": {"schema": {"type": "string"}}}


def _errors(status: int, codes: Sequence[str], *, page: bool) -> Json:
    """An answer that is one of these errors; with `page`, for people, unless `Accept` names JSON and not HTML."""
    schema = {
        "allOf": [
            _ref("schemas", "Error"),
            {"properties": {"error": {"properties": {"code": {"enum": list(codes)}}}}},
        ]
    }
    answer: Json = {
        "description": "\n".join(f"- `{code}`: {_CODES[code]}" for code in codes),
        "content": {"application/json": {"schema": schema}, **(_HTML if page else {})},
    }
    if headers := {
        401: _headers(WWW_Authenticate="WWW-Authenticate") if "missing_token" in codes else {},
        405: _headers(Allow="Allow"),
        429: _headers(Retry_After="Retry-After"),
        503: _headers(Retry_After="RetryLogin" if page else "Retry-After"),
    }.get(status):
        answer["headers"] = headers
    return answer


def _operation(
    name: str,
    tag: str,
    summary: str,
    description: str,
    *,
    answers: Mapping[int, Json],
    errors: Mapping[int, Sequence[str]],
    sample: str,
    page: Sequence[int] = (),
    **others: Any,
) -> Json:
    """An operation. `page` lists the statuses whose errors may be a page; `sample` is what to give to curl."""
    responses = {
        **answers,
        **{status: _errors(status, codes, page=status in page) for status, codes in errors.items()},
        405: _ref("responses", "MethodNotAllowed"),
    }
    return {
        "operationId": name,
        "tags": [tag],
        "summary": summary,
        "description": description,
        **others,
        "responses": {str(status): responses[status] for status in sorted(responses)},
        "x-codeSamples": [{"lang": "Shell", "label": "curl", "source": "curl " + sample}],
    }


_HOST = "https://studio.example"
_UNAVAILABLE = ("unavailable", "overloaded")
_UNCLEAR = (*_UNAVAILABLE, "outcome_unknown")


def _call(
    name: str,
    summary: str,
    description: str,
    *,
    path: str,
    scope: Scope,
    body: str,
    answers: Mapping[int, Json],
    errors: Mapping[int, Sequence[str]],
) -> Json:
    """A POST of JSON with an API token."""
    example = _example(_SCHEMAS[body])
    common: dict[int, tuple[str, ...]] = {
        401: ("missing_token",),
        403: ("insufficient_scope",),
        408: ("request_timeout",),
        413: ("payload_too_large",),
        429: ("rate_limited",),
        400: ("invalid_json",),
        422: ("parameter_missing", "parameter_invalid"),
    }
    sample = (
        f'-s {_HOST}{path} \\\n  -H "Authorization: Bearer $API_TOKEN" \\\n'
        f"  -H 'Content-Type: application/json' \\\n  -d '{json.dumps(example)}'"
    )
    return _operation(
        name,
        "Integrations",
        summary,
        description,
        security=[{"api_token": [scope.value]}],
        requestBody={
            "required": True,
            "description": "At most 16 KiB.",
            "content": {"application/json": {"schema": _ref("schemas", body), "example": example}},
        },
        answers=answers,
        errors={**common, **{status: (*common.get(status, ()), *codes) for status, codes in errors.items()}},
        sample=sample,
    )


def _parameter(place: str, name: str, description: str, *, required: bool = False, **schema: Any) -> Json:
    return {"in": place, "name": name, "description": description, "required": required, "schema": schema}


_PATH = _parameter(
    "path",
    "path",
    "Any path that is not one of the service's own, to the end, with all its slashes: `client/123/t/42/posts`. OpenAPI "
    "cannot say so; what the pattern describes is one segment. A path below `/client` must be "
    "`/client/{account}`, `/client/{account}/t/{team}` or `/client/{account}/t/{team}/{section}...`, of the token's "
    "account.",
    required=True,
    type="string",
    pattern=rf"^[^/\\;%{_CONTROL}]+$",
    **{"not": {"enum": [".", ".."]}},
    examples=["start"],
)
_SSO = _parameter(
    "query",
    "sso",
    "The login token. All other parameters are kept, in order, byte for byte. Two of it are none.",
    required=True,
    **_LOGIN_TOKEN,
)
_UNREAD = [{**_PATH, "schema": {"type": "string", "minLength": 1}}, {**_SSO, "schema": {"type": "string"}}]
_SAME_ORIGIN = _parameter(
    "header",
    "Sec-Fetch-Site",
    "Browsers send it. Where it is missing, `Origin` must be the service's own.",
    type="string",
    enum=["same-origin"],
)
_SESSION: list[Json] = [{"studio_session": []}]
_METRICS_TOKEN: list[Json] = [{}, {"metrics_token": []}]
_REDIRECT = _answer(
    "Signed in: on to the same path and query without `sso`.",
    headers=_headers(Location="Location", Set_Cookie="SessionCookie"),
)
_QUESTION = {
    **_answer(
        "A page that asks first: somebody else is signed in, or the service is set to ask for a click before each "
        "login. Nothing was consumed; its form goes to `/sso/confirm`.",
        headers=_headers(Set_Cookie="FormCookie"),
    ),
    "content": _HTML,
}
_REFUSED = {
    401: ("token_invalid", "token_expired", "token_consumed"),
    403: ("no_access", "not_a_navigation"),
    503: _UNCLEAR,
}
_SIGNED_OUT = {
    200: {
        "description": "Signed out, as a page, where `Accept` names `text/html`.",
        "headers": _headers(Set_Cookie="EndedCookie"),
        "content": _HTML,
    },
    204: _answer("Signed out.", headers=_headers(Set_Cookie="EndedCookie")),
}


def _link(operation: str, description: str, **target: Any) -> Json:
    return {"operationId": operation, "description": description, **target}


_TO_TOKEN = {"requestBody": {"token": "$response.body#/token"}}  # nosec B105 # says where it is
_LINKS = {
    "signIn": _link("signIn", "Where to send the browser.", parameters={"sso": "$response.body#/token"}),
    "verify": _link("verifyToken", "What it is good for.", **_TO_TOKEN),
    "consume": _link("consumeToken", "For a frontend of one's own.", **_TO_TOKEN),
    "revoke": _link("revokeToken", "Not needed after all.", **_TO_TOKEN),
}

# --- operations ------------------------------------------------------------------------------------------------------

_OPERATIONS: dict[str, dict[str, Json]] = {
    "/v1/sso_tokens": {
        "post": _call(
            "createToken",
            "A login token for a person",
            "An unknown address becomes a user with the role `editor` in the API token's account; a user of another "
            "account is added as `editor`; a member keeps role and name.\n\n"
            "It may be repeated without harm, also after `503`: each call gives another token, one that nobody uses is "
            "worth nothing after 5 minutes, and nobody is created twice.",
            path="/v1/sso_tokens",
            scope=Scope.WRITE_SSO,
            body="Person",
            answers={201: {**_answer("The token. Keep it out of logs.", "NewToken"), "links": _LINKS}},
            errors={403: ("user_disabled", "role_not_allowed"), 503: _UNCLEAR},
        )
    },
    "/v1/sso_tokens/verify": {
        "post": _call(
            "verifyToken",
            "What a token is good for",
            "It consumes nothing and may be repeated. The answer is `200` whether or not the token works, and says "
            "what holds now: only consuming tells who gets in.",
            path="/v1/sso_tokens/verify",
            scope=Scope.VERIFY_SSO,
            body="TokenToVerify",
            answers={
                200: _answer(
                    "`active` says whether the token works.",
                    {"oneOf": [_ref("schemas", "Active"), _ref("schemas", "Inactive")]},
                )
            },
            errors={503: _UNAVAILABLE},
        )
    },
    "/v1/sso_tokens/consume": {
        "post": _call(
            "consumeToken",
            "Redeem a token, once",
            "For frontends that keep sessions of their own. Exactly one call for a token is answered with `200`, "
            "whatever happens, and then it is durable.\n\n"
            "A repetition is answered with `410`. So after `outcome_unknown`, or no answer at all, the token may have "
            "been used up: get a new one.",
            path="/v1/sso_tokens/consume",
            scope=Scope.VERIFY_SSO,
            body="TokenToUse",
            answers={200: _answer("The token was consumed by this call.", "Active")},
            errors={
                403: ("no_access",),
                410: ("token_consumed", "token_expired"),
                422: ("token_invalid",),
                503: _UNCLEAR,
            },
        )
    },
    "/v1/sso_tokens/revoke": {
        "post": _call(
            "revokeToken",
            "Take back a token",
            "It consumes the token for nobody. It may be repeated; the second answer is `false`.",
            path="/v1/sso_tokens/revoke",
            scope=Scope.WRITE_SSO,
            body="TokenToUse",
            answers={200: _answer("Nobody can use the token from now on.", "Revoked")},
            errors={410: ("token_expired",), 422: ("token_invalid",), 503: _UNCLEAR},
        )
    },
    "/{path}": {
        "get": _operation(
            "signIn",
            "Browsers",
            "Sign in with a token",
            "Consumes the token, sets the session cookie and redirects to the clean address. A second use is refused, "
            "but who is signed in already, as the same user in the same account, is led on all the same (back button, "
            "double click).\n\n"
            "Only a person's navigation consumes: prefetching (`Sec-Purpose`, `Purpose`, `X-Moz`) is answered with an "
            "empty `503`, and where browsers send `Sec-Fetch-Dest` it has to be `document` (or `iframe`, if embedding "
            "is on). The service's own paths ignore `sso`. Errors are pages in German or English, or JSON if `Accept` "
            "names it and not HTML.",
            parameters=[_PATH, _SSO],
            security=[{}, *_SESSION],
            answers={200: _QUESTION, 303: _REDIRECT},
            errors={400: ("bad_path",), 404: ("not_found",), **_REFUSED},
            page=(400, 401, 403, 503),
            sample=f"-i -c cookies '{_HOST}/client/123/t/42/posts?chromeless=1&sso={_EXAMPLE_TOKEN}'",
        ),
        "head": _operation(
            "previewSignIn",
            "Browsers",
            "Nothing, for link previews",
            "Looks at no token and consumes nothing.",
            parameters=_UNREAD,
            answers={200: _answer("No cookie and no `Location`."), 404: _answer("There is no `sso` in the query.")},
            errors={},
            sample=f"-I '{_HOST}/client/123/t/42/posts?sso={_EXAMPLE_TOKEN}'",
        ),
        "options": _operation(
            "signInMethods",
            "Browsers",
            "The methods of a login link",
            "Looks at no token and consumes nothing.",
            parameters=_UNREAD,
            answers={204: _answer("`Allow` lists them.", headers=_headers(Allow="Allow"))},
            errors={404: ("not_found",)},
            sample=f"-i -X OPTIONS '{_HOST}/client/123/t/42/posts?sso={_EXAMPLE_TOKEN}'",
        ),
    },
    "/sso/confirm": {
        "post": _operation(
            "confirmSignIn",
            "Browsers",
            "Answer the question",
            "The form of the page that asks first. It signs in as a login link does, in the browser that was asked "
            "and within 5 minutes, and consumes the token.",
            parameters=[_SAME_ORIGIN, _parameter("cookie", "studio_form", "Set by the page.", type="string")],
            security=[{}, *_SESSION],
            requestBody={
                "required": True,
                "description": "At most 16 KiB.",
                "content": {"application/x-www-form-urlencoded": {"schema": _ref("schemas", "LoginForm")}},
            },
            answers={200: _QUESTION, 303: _REDIRECT},
            errors={
                **_REFUSED,
                403: (*_REFUSED[403], "cross_origin", "form_invalid"),
                408: ("request_timeout",),
                413: ("payload_too_large",),
            },
            page=(401, 403, 503),
            sample=f"-i -b cookies {_HOST}/sso/confirm -H 'Sec-Fetch-Site: same-origin' \\\n"
            f"  -d token={_EXAMPLE_TOKEN} -d target=/client/123/t/42/posts -d replaces=0 -d form=...",
        )
    },
    "/session": {
        "get": _operation(
            "getSession",
            "Browsers",
            "Who is signed in",
            "With what they may do now.",
            security=_SESSION,
            answers={200: _answer("Somebody is signed in.", "Session")},
            errors={401: ("not_signed_in",), 503: _UNAVAILABLE},
            sample=f"-s -b cookies {_HOST}/session",
        )
    },
    "/logout": {
        "post": _operation(
            "signOut",
            "Browsers",
            "Sign out",
            "Ends the session of this browser. It may be repeated, and needs no session.",
            parameters=[_SAME_ORIGIN],
            answers=_SIGNED_OUT,
            errors={403: ("cross_origin",)},
            sample=f"-i -b cookies -c cookies -X POST {_HOST}/logout -H 'Sec-Fetch-Site: same-origin'",
        )
    },
    "/sso/sign-out-everywhere": {
        "post": _operation(
            "signOutEverywhere",
            "Browsers",
            "Sign out everywhere",
            "Ends all sessions of whoever is signed in. It may be repeated, and needs no session.",
            parameters=[_SAME_ORIGIN],
            answers=_SIGNED_OUT,
            errors={403: ("cross_origin",), 503: _UNCLEAR},
            sample=f"-i -b cookies -c cookies -X POST {_HOST}/sso/sign-out-everywhere -H 'Sec-Fetch-Site: same-origin'",
        )
    },
    "/auth": {
        "get": _operation(
            "authenticate",
            "Operators",
            "Forward authentication",
            "A reverse proxy asks this before it hands on a request. Every occurrence of both headers must be a path "
            "that the role may see, and there must be one. The proxy has to clear the header that it does not set, and "
            "every `X-Studio-*` that comes in.",
            parameters=[
                _parameter(
                    "header",
                    name,
                    f"The path that was asked for, as {proxy} it.",
                    type="string",
                    examples=["/client/123/t/42/posts"],
                )
                for name, proxy in (
                    ("X-Original-URI", "nginx is told to send"),
                    ("X-Forwarded-Uri", "Caddy and Traefik send"),
                )
            ],
            security=_SESSION,
            answers={
                204: _answer(
                    "Let it pass, with these headers.",
                    headers=_headers(
                        X_Studio_User="X-Studio-User",
                        X_Studio_Email="X-Studio-Email",
                        X_Studio_Account="X-Studio-Account",
                        X_Studio_Role="X-Studio-Role",
                    ),
                )
            },
            errors={401: ("not_signed_in",), 403: ("no_access",), 503: _UNAVAILABLE},
            sample=f"-i -b cookies {_HOST}/auth -H 'X-Original-URI: /client/123/t/42/posts'",
        )
    },
    "/healthz": {
        "get": _operation(
            "health",
            "Operators",
            "Whether the process answers",
            "It says nothing about the database: a restart would not bring that back.",
            answers={200: _answer("It does.", "Healthy")},
            errors={},
            sample=f"-s {_HOST}/healthz",
        )
    },
    "/readyz": {
        "get": _operation(
            "readiness",
            "Operators",
            "Whether this node should get requests",
            "Looks at signing keys, database, its schema, and clocks.",
            security=_METRICS_TOKEN,
            answers={
                200: _answer("It should.", "Ready"),
                503: _answer("It should not.", "NotReady", headers=_headers(Retry_After="Retry-After")),
            },
            errors={},
            sample=f"-s {_HOST}/readyz",
        )
    },
    "/metrics": {
        "get": _operation(
            "metrics",
            "Operators",
            "Metrics for Prometheus",
            "Of all workers of this node.",
            security=_METRICS_TOKEN,
            answers={
                200: {
                    "description": "In Prometheus' text format.",
                    "content": {"text/plain": {"schema": {"type": "string"}}},
                }
            },
            errors={401: ("missing_token",)},
            sample=f"-s {_HOST}/metrics",
        )
    },
    "/openapi.json": {
        "get": _operation(
            "openapi",
            "Operators",
            "This document",
            "OpenAPI 3.1.",
            answers={
                200: {"description": "As JSON.", "content": {"application/json": {"schema": {"type": "object"}}}},
            },
            errors={},
            sample=f"-s {_HOST}/openapi.json",
        )
    },
    "/docs": {
        "get": _operation(
            "docs",
            "Operators",
            "This document as a page",
            "Without scripts, and without requests to anywhere.",
            answers={200: {"description": "As HTML.", "content": _HTML}},
            errors={},
            sample=f"-s {_HOST}/docs",
        )
    },
}


# --- the document ----------------------------------------------------------------------------------------------------


def document() -> Json:
    """The OpenAPI document."""
    return {
        "openapi": "3.1.1",
        "info": {"title": "sso-service", "version": _version(), "description": _ABOUT},
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "paths": _OPERATIONS,
        "components": {
            "schemas": _SCHEMAS,
            "headers": _HEADERS,
            "responses": {"MethodNotAllowed": _errors(405, ("method_not_allowed",), page=False)},
            "securitySchemes": {
                "api_token": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "wf_live_ and 43 characters",
                    "description": "An API token, made on the command line. `write:sso` issues login tokens and takes "
                    "them back, `verify:sso` verifies and consumes them. Whoever has one with `write:sso` can sign in "
                    "as anybody up to its `max_role`.",
                },
                "metrics_token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "`SSO_METRICS_TOKEN`, if one is set. Without it `/readyz` only says whether.",
                },
                "studio_session": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": "studio_session",
                    "description": "The session cookie that signing in sets.",
                },
            },
        },
    }


def _version() -> str:
    try:
        return version("sso-service")
    except PackageNotFoundError:  # run from a source tree that nobody has installed
        return "unknown"


_templates = Environment(
    loader=PackageLoader("sso_service.web", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(content: Json) -> tuple[str, str]:
    """The OpenAPI document `content` as HTML, and the Content-Security-Policy to send with it.

    The page loads nothing and runs nothing. Its style is in it, and the policy lets exactly this style through, by its
    digest (CSP level 3, section 2.3.1), so that not even a mistake in the escaping could add another.
    """
    style = files("sso_service.web").joinpath("templates/docs.css").read_text()
    policy = f"default-src 'none'; style-src {style_source(style)}; base-uri 'none'; form-action 'none'; "
    rendered = _templates.get_template("docs.html").render(
        api=_inlined(content, content),
        style=style,
        markdown=_markdown,
        phrase=lambda status: HTTPStatus(int(status)).phrase,
    )
    return rendered, policy + "frame-ancestors 'none'"


def _inlined(value: Any, content: Json) -> Any:
    """`value` with what its references refer to in their place."""
    match value:
        case {"$ref": str(reference), **others}:
            found: Any = content
            for name in reference.removeprefix("#/").split("/"):
                found = found[name]
            return _inlined({**found, **others}, content)
        case dict():
            return {name: _inlined(each, content) for name, each in value.items()}
        case list():
            return [_inlined(each, content) for each in value]
    return value


def _markdown(text: str) -> str:
    """HTML for the little Markdown that the document uses: paragraphs, lists, and code between backticks."""
    blocks = []
    for block in text.split("\n\n"):
        marked = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(block))
        items = marked.removeprefix("- ").split("\n- ")
        blocks.append("".join(f"<li>{item}</li>" for item in items) if block.startswith("- ") else f"<p>{marked}</p>")
    return "".join(f"<ul>{block}</ul>" if block.startswith("<li>") else block for block in blocks)


Endpoint = Callable[[Request], Awaitable[Response]]


def openapi_endpoints() -> tuple[Endpoint, Endpoint]:
    """The endpoints of `/openapi.json` and `/docs`."""
    content = document()
    encoded = msgspec.json.encode(content)
    rendered, policy = page(content)
    common = {"Cache-Control": "public, max-age=300", "X-Content-Type-Options": "nosniff"}
    for_people = {
        **common,
        "Content-Security-Policy": policy,
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
    }

    async def openapi(_: Request) -> Response:
        return Response(encoded, headers=common, media_type="application/json")

    async def docs(_: Request) -> Response:
        return Response(rendered, headers=for_people, media_type="text/html")

    return openapi, docs
