"""`SSO_RATE_LIMIT`: only login tokens that may sign in use up a frontend's quota. Every response reports it."""

import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from sso_service.database.transactions import Database
from sso_service.permissions import Scope
from sso_service.services.node import Node
from tests.support import administration
from tests.support.api import make_api_token, node
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import JANE, OTHER_ACCOUNT
from tests.support.databases import changing, on_sqlite
from tests.support.redeeming import LIFETIME

pytestmark = pytest.mark.anyio

URL = "/v1/sso_tokens"
ENDPOINTS = ("verify", "consume", "revoke")
LIMIT = 20


@pytest.fixture
def limited(database_url: str, keys_dir: Path, clock: Clock) -> Iterator[Client]:
    with node(
        database_url, keys_dir, clock, SSO_RATE_LIMIT=f"{LIMIT}/hour", SSO_CORS_ORIGINS="https://a.example"
    ) as it:
        yield it


@pytest.fixture
def frontend(database: Database) -> str:
    return make_api_token(database, scopes=frozenset(Scope))[1]


@pytest.fixture
async def foreign(client: Client, database: Database) -> str:
    """A genuine login token of another account."""
    return await client.issue(make_api_token(database, account_id=OTHER_ACCOUNT)[1])


def forged() -> str:
    return urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()


def remaining(answer: Answer) -> int:
    assert answer.header("ratelimit-policy") == f'"default";q={LIMIT};w=3600'
    found = re.fullmatch(r'"default";r=([0-9]+);t=([0-9]+)', answer.header("ratelimit") or "")
    assert found, answer
    assert 0 <= int(found[2]) <= 3600
    return int(found[1])


async def test_forged_login_tokens_use_up_no_quota(
    client: Client, limited: Client, api_token: str, frontend: str, foreign: str
) -> None:
    token = await client.issue(api_token)
    overlong = {"token": "x" * 20_000}
    contents = [
        *({"token": forged()} for _ in range(2 * LIMIT)),
        *({"token": each} for each in ("x", "", " ", "x" * 5000, token[:-1], f"{token}=", foreign, 7, None)),
        *({}, [], overlong),
    ]
    for number, content in enumerate(contents):
        answer = await limited.post_json(f"{URL}/{ENDPOINTS[number % 3]}", content, token=frontend)
        assert answer.status in {200, 400, 413, 422}
        assert remaining(answer) == LIMIT
    answer = await limited.post_json(f"{URL}/consume", {"token": token}, token=frontend)
    assert (answer.status, remaining(answer)) == (200, LIMIT - 1)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_login_tokens_count_until_they_expire(
    client: Client, limited: Client, api_token: str, frontend: str, clock: Clock, endpoint: str
) -> None:
    expired = await client.issue(api_token)
    clock.advance(LIFETIME)
    for _ in range(2):  # anyone who ever had a link could otherwise keep others from signing in
        answer = await limited.post_json(f"{URL}/{endpoint}", {"token": expired}, token=frontend)
        assert (answer.status, remaining(answer)) == (200 if endpoint == "verify" else 410, LIMIT)
    used = await client.issue(api_token)
    for left in reversed(range(LIMIT)):
        assert remaining(await limited.post_json(f"{URL}/{endpoint}", {"token": used}, token=frontend)) == left
    answer = await limited.post_json(f"{URL}/{endpoint}", {"token": used}, token=frontend)
    assert (answer.status, answer.error, remaining(answer)) == (429, "rate_limited", 0)
    # The draft: `Retry-After` is not earlier than the reset.
    reset = int((answer.header("ratelimit") or "").rpartition("=")[2])
    assert reset <= int(answer.header("retry-after") or "") <= 3600
    # A forged token gets its own answer even then: it costs no quota, and reveals none.
    answer = await limited.post_json(f"{URL}/verify", {"token": forged()}, token=frontend)
    assert answer.json()["reason"] == "bad_signature"


async def test_each_request_to_issue_counts_valid_or_not(limited: Client, api_token: str) -> None:
    contents: list[object] = [JANE, {}, [], {**JANE, "email": "x"}, {"email": "x" * 20_000}]
    for used, content in enumerate(contents, start=1):
        assert remaining(await limited.post_json(URL, content, token=api_token)) == LIMIT - used


async def test_a_request_without_the_scope_reports_the_quota_and_does_not_count(limited: Client, verifier: str) -> None:
    answer = await limited.post_json(URL, JANE, token=verifier)
    assert (answer.status, remaining(answer)) == (403, LIMIT)


async def test_only_accepted_api_tokens_get_the_quota(limited: Client, api_token: str, database: Database) -> None:
    def has_quota(answer: Answer) -> bool:
        return answer.header("ratelimit") is not None or answer.header("ratelimit-policy") is not None

    assert not has_quota(await limited.post_json(URL, JANE, token="wf_live_unknown"))
    assert not has_quota(await limited.request("POST", URL))
    assert not has_quota(await limited.get("/session"))
    assert has_quota(await limited.post_json(URL, JANE, token=api_token))
    # Not once it is revoked: the answer is that to an unknown one.
    with changing(database) as connection:
        administration.revoke_api_token(connection, 1, now=1)
    answers = [await limited.post_json(URL, JANE, token=each) for each in (api_token, "wf_live_unknown")]
    assert answers[0].status == 401
    assert len({(answer.status, tuple(answer.headers), answer.body) for answer in answers}) == 1


async def test_without_a_limit_nothing_is_counted_or_reported(client: Client, service: Node, api_token: str) -> None:
    answer = await client.post_json(URL, JANE, token=api_token)
    assert [name for name, _ in answer.headers if name.startswith("ratelimit")] == []
    assert service.issuing.quota(api_token) is None


@on_sqlite
async def test_scripts_of_an_allowed_origin_can_read_the_quota(limited: Client, api_token: str) -> None:
    headers = [("authorization", f"Bearer {api_token}"), ("origin", "https://a.example")]
    answer = await limited.request("POST", URL, headers=headers, body=b"{}")
    exposed = (answer.header("access-control-expose-headers") or "").lower().split(", ")
    assert sorted(exposed) == ["ratelimit", "ratelimit-policy", "retry-after"]
