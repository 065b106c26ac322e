"""Helpers that sign in and sign out."""

from sso_service.database.transactions import Database
from tests.support import administration
from tests.support.client import Client
from tests.support.data import JANE, PAGE
from tests.support.databases import changing

COOKIE = "studio_session"
SESSION_LIFETIME = 43_200
"""Lifetime of sessions in seconds: the default setting."""


async def sign_in(client: Client, api_token: str, person: dict[str, str] = JANE, page: str = PAGE) -> str:
    """Sign in with a new login token, and return the session cookie."""
    token = await client.issue(api_token, person)
    answer = await client.get(f"{page}?sso={token}")
    assert answer.status == 303, answer
    return client.cookies[COOKIE]


def sign_out_everywhere(database: Database, now: float, email: str = JANE["email"]) -> None:
    with changing(database) as connection:
        administration.sign_out_user(connection, email, now=int(now))
