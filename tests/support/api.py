"""Requests to the API for integrations, and its errors."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from sso_service.database import open_database
from sso_service.database.transactions import Database
from sso_service.key_directory import KeyDirectory
from sso_service.permissions import Role, Scope
from sso_service.services.node import Node
from sso_service.settings import read_settings
from sso_service.web.app import create_app
from tests.support import administration
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE
from tests.support.databases import changing

T = TypeVar("T")
LIMIT = 16 * 1024
WRITE = frozenset({Scope.WRITE_SSO})
VERIFY = frozenset({Scope.VERIFY_SSO})


class Refusal(NamedTuple):
    """The status, code and details of an error response."""

    status: int
    code: str
    details: dict[str, str] | None = None


MISSING_TOKEN = Refusal(401, "missing_token")
TOO_LARGE = Refusal(413, "payload_too_large")
INVALID_JSON = Refusal(400, "invalid_json")
UNAVAILABLE = Refusal(503, "unavailable")
OUTCOME_UNKNOWN = Refusal(503, "outcome_unknown")
TOKEN_CONSUMED = Refusal(410, "token_consumed")
TOKEN_EXPIRED = Refusal(410, "token_expired")
TOKEN_INVALID = Refusal(422, "token_invalid")
NEEDS_WRITE_SCOPE = Refusal(403, "insufficient_scope", {"required_scope": "write:sso"})
NEEDS_VERIFY_SCOPE = Refusal(403, "insufficient_scope", {"required_scope": Scope.VERIFY_SSO})


def missing(field: str) -> Refusal:
    return Refusal(422, "parameter_missing", {"field": field, "rule": "required"})


def invalid(field: str, rule: str) -> Refusal:
    return Refusal(422, "parameter_invalid", {"field": field, "rule": rule})


def refusal(answer: Answer) -> Refusal:
    """Parse an error response, and check that it has the format of all errors."""
    content = answer.json()
    assert content.keys() == {"error"}
    error = content["error"]
    assert {"code", "message"} <= error.keys() <= {"code", "message", "details"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error.get("details", True)  # omitted rather than empty
    assert (answer.header("www-authenticate") == "Bearer") == (answer.status == 401)
    assert (answer.header("retry-after") is not None) == (answer.status == 503)
    assert int(answer.header("retry-after") or 1) > 0
    return Refusal(answer.status, error["code"], error.get("details"))


def bearer(secret: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {secret}")]


def encoded(content: object = JANE, **fields: object) -> bytes:
    return json.dumps({**content, **fields} if isinstance(content, Mapping) else content).encode()


def padded(size: int, content: object = JANE) -> bytes:
    return encoded(content).ljust(size)


def make_api_token(
    database: Database,
    *,
    account_id: int | None = ACCOUNT,
    scopes: frozenset[Scope] = WRITE,
    max_role: Role | None = None,
    expires_at: int | None = None,
) -> tuple[int, str]:
    """Create an API token and return its id and secret."""
    with changing(database) as connection:
        return administration.create_api_token(
            connection,
            account_id=account_id,
            name="tests",
            scopes=scopes,
            max_role=max_role,
            expires_at=expires_at,
            now=int(time.time()),
        )


@contextmanager
def node(url: str, keys: Path | KeyDirectory, clock: Clock, **variables: str) -> Iterator[Client]:
    """A client of a separate node that uses the database `url`."""
    service = _new_node(url, keys, clock, **variables)
    try:
        yield Client(create_app(service))
    finally:
        service.close()


@asynccontextmanager
async def node_behind_proxy(url: str, keys: Path, clock: Clock) -> AsyncIterator[Client]:
    """The same for a database behind a proxy that runs in this event loop, which therefore must go on until the end."""
    service = _new_node(url, keys, clock)
    try:
        yield Client(create_app(service))
    finally:
        await asyncio.to_thread(service.close)


def _new_node(url: str, keys: Path | KeyDirectory, clock: Clock, **variables: str) -> Node:
    settings = read_settings({"SSO_DATABASE_URL": url, **variables})
    directory = KeyDirectory(keys) if isinstance(keys, Path) else keys
    return Node(settings, open_database(settings), directory, clock=clock)


async def settled(call: Awaitable[T]) -> T:
    """Return the result of `call` after all background tasks that it started have finished."""
    before = asyncio.all_tasks()
    result = await call
    await asyncio.gather(*(asyncio.all_tasks() - before))
    return result


BOTH = frozenset(Scope)
