"""The OpenAPI document, and functions to compare requests and responses with it."""

import json
from typing import Any

import jsonschema_rs

from sso_service.web.openapi import document

Json = dict[str, Any]
DOCUMENT: Json = json.loads(json.dumps(document()))
SCHEMAS: dict[str, Json] = DOCUMENT["components"]["schemas"]
OPERATIONS = {
    (method.upper(), path): operation for path, item in DOCUMENT["paths"].items() for method, operation in item.items()
}
LOGIN = "/{path}"
SIGN_OUTS = ("/logout", "/sso/sign-out-everywhere")


def resolve(value: Json) -> Json:
    """Return the target of a reference, or `value` if it is not a reference."""
    if "$ref" not in value:
        return value
    target = DOCUMENT
    for name in value["$ref"].removeprefix("#/").split("/"):
        target = target[name]
    return target


def validator(schema: Json, *, closed: bool = False) -> jsonschema_rs.Draft202012Validator:
    """Return a validator for a schema of the document that checks formats. `closed`: undocumented fields are errors."""
    schemas = {
        name: {**each, "additionalProperties": False} if closed and "properties" in each else each
        for name, each in SCHEMAS.items()
    }
    components = {**DOCUMENT["components"], "schemas": schemas}
    return jsonschema_rs.Draft202012Validator({**schema, "components": components}, validate_formats=True)


def codes(response: Json) -> list[str]:
    """Return the error codes that a documented response can have."""
    match response.get("content", {}).get("application/json"):
        case {"schema": {"allOf": [_, {"properties": {"error": {"properties": {"code": {"enum": found}}}}}]}}:
            return list(found)
    return []
