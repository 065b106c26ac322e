"""Sessions: sign in and sign out."""

from sso_service.database.transactions import Database
from tests.support import administration
from tests.support.client import Client
from tests.support.data import JANE, PAGE
from tests.support.databases import changing

COOKIE = "studio_session"
HALF_A_DAY = 43_200


async def sign_in(client: Client, api_token: str, person: dict[str, str] = JANE, page: str = PAGE) -> str:
    """The cookie of a new session."""
    token = await client.issue(api_token, person)
    answer = await client.get(f"{page}?sso={token}")
    assert answer.status == 303, answer
    return client.cookies[COOKIE]


def sign_out_everywhere(database: Database, now: float, email: str = JANE["email"]) -> None:
    with changing(database) as connection:
        administration.sign_out_user(connection, email, now=int(now))
