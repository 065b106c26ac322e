"""Issuing login tokens: requests, responses, and the users that it creates."""

import json
import re
import struct
from base64 import urlsafe_b64decode
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import select

from sso_service.database.schema import users
from sso_service.database.transactions import Database
from sso_service.permissions import Role
from tests.support import administration
from tests.support.api import Refusal, bearer
from tests.support.client import Answer, Client
from tests.support.data import JANE

URL = "/v1/sso_tokens"
DEADLINE = 2.5
USER_DISABLED = Refusal(403, "user_disabled")
ROLE_NOT_ALLOWED = Refusal(403, "role_not_allowed")


def issued(answer: Answer) -> tuple[str, bool]:
    """The login token, and whether issuing it created the user."""
    assert answer.status == 201, answer
    content = answer.json()
    assert content.keys() == {"token", "user_created"}
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", content["token"])
    assert content["user_created"] is True or content["user_created"] is False
    return content["token"], content["user_created"]


def claims(token: str) -> tuple[int, int, int, int]:
    """expires_at, user_id, account_id, nonce."""
    expires_at, user_id, account_id, nonce = struct.unpack(">IIII", urlsafe_b64decode(token + "=")[:16])
    return expires_at, user_id, account_id, nonce


async def post(client: Client, body: bytes, secret: str, *headers: tuple[str, str]) -> Answer:
    return await client.request("POST", URL, headers=[*bearer(secret), *headers], body=body)


class StoredUser(NamedTuple):
    """A user as the database has it."""

    id: int
    first_name: str
    last_name: str
    roles: dict[int, Role]


def stored_user(database: Database, email: str = JANE["email"]) -> StoredUser:
    """The user with this address, and their role in each account."""
    with database.connect() as connection:
        row = administration.find_user(connection, email)
        roles = {m.account_id: m.role for m in administration.list_memberships(connection, row.id)}
        return StoredUser(row.id, row.first_name, row.last_name, roles)


def number_of_users(database: Database) -> int:
    with database.connect() as connection:
        return len(connection.execute(select(users.c.id)).all())


def key_secret(keys_dir: Path) -> str:
    """The secret of the only key, as stored in its file."""
    (path,) = keys_dir.glob("*.json")
    secret: str = json.loads(path.read_text())["secret"]
    return secret
