"""The shared parts of the document: JSON Schemas from structs, headers, and security schemes."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from sso_service.http import ErrorBody, ErrorFields
from sso_service.permissions import Role, Scope
from sso_service.problems import RETRY_AFTER
from sso_service.web.requests import SESSION_COOKIE

Json = dict[str, Any]

# --- schemas ---------------------------------------------------------------------------------------------------------

_SCHEMAS = "#/components/schemas/"

_ERROR_FIELDS: dict[str, Json] = {
    "code": {"description": "The error, for programs."},
    "message": {"description": "The error, in English."},
    "details": {
        "description": "Only with `parameter_missing`, `parameter_invalid` and `insufficient_scope`.",
        "properties": {
            "field": {"type": "string", "description": "The field that breaks a rule."},
            "rule": {"type": "string", "enum": ["required", "type", "max_length", "characters", "email"]},
            "required_scope": {"type": "string", "enum": list(Scope)},
        },
    },
}


def schemas(bodies: Iterable[type[Struct]], codes: Collection[str]) -> dict[str, Json]:
    """Return the schemas of `bodies`, of the structs in their fields, and of an error with one of `codes`."""
    _, components = msgspec.json.schema_components([*bodies, ErrorBody], ref_template=f"{_SCHEMAS}{{name}}")
    for component in components.values():
        # msgspec describes a field with a default as optional, because a decoder accepts its absence. Only responses
        # have defaults here, and an encoder always sends them, except `UNSET`, which the schema does not list.
        if fields := component.get("properties"):
            required = component.get("required", ())
            component["required"] = [name for name in fields if name in required or "default" in fields[name]]
            for field in fields.values():
                field.pop("default", None)
    components[Role.__name__] |= {"type": "string", "enum": list(Role)}
    error = components[ErrorFields.__name__]["properties"]
    for name, description in _ERROR_FIELDS.items():
        error[name] |= description
    error["code"]["enum"] = sorted(codes)
    return components


def reference(body: type[Struct]) -> Json:
    """Return a reference to the schema of a struct."""
    return {"$ref": f"{_SCHEMAS}{body.__name__}"}


def error_reference(codes: Collection[str]) -> Json:
    """Return the schema of an error whose code is one of `codes`."""
    narrowed = {"properties": {"error": {"properties": {"code": {"enum": list(codes)}}}}}
    return {"allOf": [reference(ErrorBody), narrowed]}


def example(schema: Json, components: dict[str, Json]) -> Any:
    """Return an example of what `schema` describes, made of the examples of its parts."""
    if "examples" in schema:
        return schema["examples"][0]
    if "$ref" in schema:
        return example(components[schema["$ref"].removeprefix(_SCHEMAS)], components)
    if "oneOf" in schema:
        return example(schema["oneOf"][0], components)
    if "properties" in schema:
        return {name: example(field, components) for name, field in schema["properties"].items()}
    return schema["const"] if "const" in schema else schema["enum"][0]


# --- headers ---------------------------------------------------------------------------------------------------------


def _header(description: str, *, required: bool = True, **schema: Any) -> Json:
    return {"description": description, "required": required, "schema": {"type": "string", **schema}}


HEADERS = {
    "Location": _header("Path and query to redirect to, on this host."),
    "SessionCookie": _header("The session. Absent if the browser has this session already.", required=False),
    "FormCookie": _header("Binds the page to this browser, for 5 minutes."),
    "EndedCookie": _header("Ends the session of this browser."),
    "Retry-After": _header("Seconds to wait before a retry.", pattern="^[0-9]+$", examples=[RETRY_AFTER]),
    "RetryLogin": _header(
        "Seconds to wait before a retry. Absent from the response to a prefetch.", required=False, pattern="^[0-9]+$"
    ),
    "RateLimit-Policy": _header(
        "The requests that the API token may make in each worker, and within how many seconds. Only with "
        "`SSO_RATE_LIMIT`.",
        required=False,
        pattern='^"default";q=[0-9]+;w=[0-9]+$',
        examples=['"default";q=100;w=60'],
    ),
    "RateLimit": _header(
        "The requests that are left in the worker that answered, and the seconds until there are more. Only with "
        "`SSO_RATE_LIMIT`.",
        required=False,
        pattern='^"default";r=[0-9]+;t=[0-9]+$',
        examples=['"default";r=50;t=30'],
    ),
    "WWW-Authenticate": _header("`Bearer` (RFC 6750).", const="Bearer"),
    "Allow": _header("The methods that this path supports.", examples=["POST"]),
    "X-Studio-User": _header("Id of the user.", pattern="^[1-9][0-9]*$"),
    "X-Studio-Email": _header("E-mail address of the user, in ASCII.", format="email"),
    "X-Studio-Account": _header("Id of the account of the session.", pattern="^[1-9][0-9]*$"),
    "X-Studio-Role": _header("The user's role in this account.", enum=list(Role)),
}


def header_references(names: Mapping[str, str]) -> Json:
    """Return references to headers, from HTTP names to names in `HEADERS`."""
    return {name: {"$ref": f"#/components/headers/{component}"} for name, component in names.items()}


# --- security schemes ------------------------------------------------------------------------------------------------

SECURITY_SCHEMES = {
    "api_token": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "wf_live_ and 43 characters",
        "description": "An API token. `write:sso` issues and revokes login tokens, `verify:sso` verifies and consumes "
        "them. With `write:sso`, its holder can sign in as any user up to its `max_role`.",
    },
    "metrics_token": {
        "type": "http",
        "scheme": "bearer",
        "description": "`SSO_METRICS_TOKEN`. If it is not set, clients on the same machine need none, and others are "
        "refused. Without authorization `/readyz` does not list the problems.",
    },
    "studio_session": {
        "type": "apiKey",
        "in": "cookie",
        "name": SESSION_COOKIE,
        "description": "The session cookie, which signing in sets.",
    },
}
