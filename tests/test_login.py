"""From an issued token to a session, over the real application."""

import pytest

from tests.support import PAGE, Client

pytestmark = pytest.mark.anyio


async def test_a_token_signs_in_once_and_leads_to_the_clean_url(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)

    answer = await client.get(f"{PAGE}?a=%20b&sso={token}&c=1")
    assert answer.status == 303
    assert answer.header("location") == f"{PAGE}?a=%20b&c=1"

    session = await client.get("/session")
    assert session.json()["user"]["email"] == "jane.doe@example.com"
    assert session.json()["role"] == "editor"

    again = await client.another().get(f"{PAGE}?sso={token}")
    assert again.status == 401
    assert token not in again.text
