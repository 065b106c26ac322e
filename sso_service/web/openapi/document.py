"""The OpenAPI 3.1 document, whose schemas are JSON Schema 2020-12.

It is assembled from `operations.py`, from the structs in `web/schemas.py`, and from the meaning and status of each
error code in `problems.py`.
"""

import json
from collections.abc import Sequence

from msgspec import Struct

from sso_service import __version__
from sso_service.problems import ENTRIES
from sso_service.web.openapi.components import (
    HEADERS,
    SECURITY_SCHEMES,
    Json,
    error_reference,
    example,
    header_references,
    reference,
    schemas,
)
from sso_service.web.openapi.operations import HOST, HTML, JSON, OPERATIONS, Operation, Response
from sso_service.web.quota import QUOTA_HEADERS

_ABOUT = """\
One-time login tokens that sign the users of an intranet in to a Studio. The intranet requests a login token for an \
e-mail address and sends the browser to any Studio URL with `?sso=TOKEN`. The service consumes the login token, signs \
the user in, and redirects to the clean URL. Login tokens are valid for 5 minutes by default, and exactly one \
redemption of a login token ever succeeds.

Errors are JSON: `code` is for programs and never changes, `message` is for people. The API token is checked before \
the body, so an unauthorized client learns nothing about its body. `HEAD` is supported wherever `GET` is. Unknown \
fields and parameters are ignored. Caches may keep this document and its page, and no other response.

Tutorials, guides for each language and proxy, and explanations are in `sso_service/docs/` of the source: start with \
`index.md`. `scripts/docs` builds them as a site."""

_TAGS = {
    "Integrations": "For intranets, and for Studio frontends with their own sessions. Every operation needs an API "
    "token: `Authorization: Bearer wf_live_...`. An API token belongs to an account. Login tokens of other accounts "
    "are answered exactly like forged ones. A platform API token, which the command line creates, verifies and "
    "consumes login tokens of all accounts.",
    "Browsers": "Signing in and out. The session is the signed cookie `studio_session`, valid for 12 hours by default. "
    "User, role and membership are read at each request, so a change takes effect immediately.",
    "Operators": "For reverse proxies, load balancers, monitoring, and the authors of clients.",
}

_FORM = "application/x-www-form-urlencoded"
_BODY_SIZE = "At most 16 KiB."
# Headers that `problems.api_problem` adds because they depend on the error.
_ADDED_HEADERS = {"rate_limited": ("Retry-After",), "method_not_allowed": ("Allow",)}


def document() -> Json:
    """Return the document."""
    codes = {code for each in OPERATIONS for code in (*each.errors, *each.page_errors)} | {"method_not_allowed"}
    components = schemas(_bodies(), codes)
    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, components)
    return {
        "openapi": "3.1.1",
        "info": {"title": "sso-service", "version": __version__, "description": _ABOUT},
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": components,
            "headers": HEADERS,
            "responses": {"MethodNotAllowed": _error(["method_not_allowed"], page=False)},
            "securitySchemes": SECURITY_SCHEMES,
        },
    }


def _bodies() -> list[type[Struct]]:
    """Return the structs of all operations, each once, in order."""
    found: dict[type[Struct], None] = {}
    for operation in OPERATIONS:
        if operation.body:
            found[operation.body] = None
        for response in operation.responses.values():
            found |= dict.fromkeys(response.bodies)
    return list(found)


def _operation(operation: Operation, components: dict[str, Json]) -> Json:
    described: Json = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": operation.description,
    }
    if operation.parameters:
        described["parameters"] = list(operation.parameters)
    if operation.scope:
        described["security"] = [{"api_token": [operation.scope.value]}]
    elif operation.security:
        described["security"] = list(operation.security)
    sample = operation.sample
    if operation.scope and operation.body:
        body = _json((operation.body,), components)
        described["requestBody"] = {"required": True, "description": _BODY_SIZE, "content": body}
        sample = _api_sample(operation.path, body[JSON]["example"])
    elif operation.body:
        content = {_FORM: {"schema": reference(operation.body)}}
        described["requestBody"] = {"required": True, "description": _BODY_SIZE, "content": content}
    responses = {status: _response(each, components) for status, each in operation.responses.items()}
    responses |= _errors(operation.errors, page=False) | _errors(operation.page_errors, page=True)
    if operation.scope:
        quota = header_references({name: name for name in QUOTA_HEADERS})
        for status in responses.keys() - {401}:
            responses[status]["headers"] = responses[status].get("headers", {}) | quota
    responses[405] = {"$ref": "#/components/responses/MethodNotAllowed"}
    described["responses"] = {str(status): responses[status] for status in sorted(responses)}
    described["x-codeSamples"] = [{"lang": "Shell", "label": "curl", "source": f"curl {sample}"}]
    return described


def _api_sample(path: str, body: Json) -> str:
    return (
        f'-s {HOST}{path} \\\n  -H "Authorization: Bearer $API_TOKEN" \\\n'
        f"  -H 'Content-Type: {JSON}' \\\n  -d '{json.dumps(body)}'"
    )


def _json(bodies: Sequence[type[Struct]], components: dict[str, Json]) -> Json:
    """Return content in JSON that one of `bodies` describes, with an example of the first."""
    schema = reference(bodies[0]) if len(bodies) == 1 else {"oneOf": [reference(body) for body in bodies]}
    return {JSON: {"schema": schema, "example": example(schema, components)}}


def _response(response: Response, components: dict[str, Json]) -> Json:
    described: Json = {"description": response.description}
    if response.headers:
        described["headers"] = header_references(response.headers)
    if response.bodies:
        described["content"] = _json(response.bodies, components)
    elif response.media_type:
        kind = "object" if response.media_type == JSON else "string"
        described["content"] = {response.media_type: {"schema": {"type": kind}}}
    if response.links:
        described["links"] = dict(response.links)
    return described


def _errors(codes: Sequence[str], *, page: bool) -> dict[int, Json]:
    """Return the responses for error codes by status."""
    by_status: dict[int, list[str]] = {}
    for code in codes:
        entry = ENTRIES[code]
        by_status.setdefault(entry.page_status if page else entry.status, []).append(code)
    return {status: _error(of_status, page=page) for status, of_status in by_status.items()}


def _error(codes: Sequence[str], *, page: bool) -> Json:
    """Return a response with one of the errors `codes`: JSON, or with `page` also HTML."""
    content: Json = {JSON: {"schema": error_reference(codes)}}
    if page:
        content[HTML] = {"schema": {"type": "string"}}
    described: Json = {
        "description": "\n".join(f"- `{code}`: {ENTRIES[code].meaning}" for code in codes),
        "content": content,
    }
    sent = {name for code in codes for name in (*ENTRIES[code].headers, *_ADDED_HEADERS.get(code, ()))}
    headers = {name: name for name in HEADERS if name in sent}
    if page and "Retry-After" in headers:
        headers["Retry-After"] = "RetryLogin"
    if headers:
        described["headers"] = header_references(headers)
    return described
