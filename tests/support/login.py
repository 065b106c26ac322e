"""Logins with `?sso=TOKEN`: their responses, and the tokens that they consume."""

from tests.support.client import Answer, Client
from tests.support.data import JANE, PAGE

EMAIL = JANE["email"]
SESSION_LIFETIME = 43200


async def is_usable(client: Client, token: str) -> bool:
    """True if `token` signs in a fresh browser. Consumes the token."""
    answer = await client.another().get(f"{PAGE}?sso={token}")
    assert answer.status in {303, 401, 403}
    return answer.status == 303


async def code(client: Client, target: str | bytes) -> tuple[int, str]:
    """Status and error code of a refused login. Checks that it neither signs in nor redirects."""
    answer = await client.get(target, accept="application/json")
    assert answer.header("location") is None
    assert answer.header("set-cookie") is None
    return answer.status, answer.error


def signs_in(answer: Answer, target: str) -> bool:
    """True if the response starts a session and redirects to `target`."""
    cookie = answer.header("set-cookie") or ""
    return answer.status == 303 and answer.header("location") == target and cookie.startswith("studio_session=")


def redirects(answer: Answer, target: str) -> bool:
    """True if the response redirects to `target` and leaves the session unchanged."""
    return answer.status == 303 and answer.header("location") == target and answer.header("set-cookie") is None
