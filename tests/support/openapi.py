"""The OpenAPI document, as the tests compare it."""

import json
from typing import Any

from sso_service.database.transactions import Database
from sso_service.permissions import Role, Scope
from sso_service.web.openapi import document
from tests.support import administration
from tests.support.data import ACCOUNT
from tests.support.databases import changing

Json = dict[str, Any]
DOCUMENT: Json = json.loads(json.dumps(document()))
OPERATIONS = {
    (method.upper(), path): operation for path, item in DOCUMENT["paths"].items() for method, operation in item.items()
}
LOGIN = "/{path}"
SIGN_OUTS = ("/logout", "/sso/sign-out-everywhere")


def make_api_token(database: Database, *scopes: Scope, max_role: Role | None = None) -> str:
    with changing(database) as connection:
        _, secret = administration.create_api_token(
            connection, account_id=ACCOUNT, name="x", scopes=frozenset(scopes), now=1, max_role=max_role
        )
    return secret
