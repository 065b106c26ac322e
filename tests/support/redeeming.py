"""Login tokens: verify them, consume them, and open them as login links."""

import hashlib
from typing import Any

from sso_service.services.node import Node
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import PAGE

CONSUME_URL = "/v1/sso_tokens/consume"
VERIFY_URL = "/v1/sso_tokens/verify"
ACTIVE = "active"
# Every token that is not active gets one of these reasons: `{"active": false, "reason": ..., "ref": ...}`.
MALFORMED, BAD_SIGNATURE, EXPIRED, CONSUMED, NO_ACCESS = (
    "malformed",
    "bad_signature",
    "expired",
    "consumed",
    "no_access",
)
LIFETIME = 300


async def consume(client: Client, token: object, secret: str) -> Answer:
    answer = await client.post_json(CONSUME_URL, {"token": token}, token=secret)
    assert answer.header("set-cookie") is None
    assert answer.header("location") is None
    assert str(token) not in answer.text
    return answer


def login(answer: Answer) -> dict[str, Any]:
    """The content of a successful consumption: the user that signs in."""
    assert answer.status == 200, answer
    content: dict[str, Any] = answer.json()
    assert content["active"] is True
    return content


async def browse(client: Client, token: str) -> tuple[int, str]:
    """The status of opening a login link in a browser, and the redirect target or error code."""
    answer = await client.another().get(f"{PAGE}?sso={token}", accept="application/json")
    return answer.status, answer.header("location") or answer.error


def token_key(service: Node, clock: Clock) -> bytes:
    return service.keys.ring.signing_key(int(clock())).token_key


def ref(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()[:12]


async def ask(client: Client, token: object, secret: str) -> Answer:
    return await client.post_json(VERIFY_URL, {"token": token}, token=secret)


async def state(client: Client, token: str, secret: str) -> str:
    """`active` or the reason why not. Checks that an inactive token reveals nothing but its reason and ref."""
    answer = await ask(client, token, secret)
    assert answer.status == 200, answer
    assert answer.header("set-cookie") is None
    assert token not in answer.text
    content = answer.json()
    if content["active"] is True:
        return ACTIVE
    assert content == {"active": False, "reason": content["reason"], "ref": ref(token)}
    reason: str = content["reason"]
    return reason
