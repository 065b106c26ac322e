"""What a refusal may not tell: why an API token is refused, and how much of a forged login token is right."""

import json
import secrets
from pathlib import Path

import pytest

from scripts.tools.timing.__main__ import line, results
from scripts.tools.timing.cases import Case
from scripts.tools.timing.dudect import THRESHOLD, Measured, largest_t
from sso_service.database.transactions import Database
from sso_service.permissions import Scope
from tests.support import administration
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE
from tests.support.databases import changing

pytestmark = pytest.mark.anyio

FEW = 5000
CERTAIN = 10.0
"""|t| that nothing but a leak explains, however busy the machine: dudect's own limit."""


def refused_api_tokens(database: Database, clock: Clock) -> dict[str, str]:
    """What may be sent in place of an API token, by what is wrong with it."""
    now = int(clock())
    made: dict[str, str] = {}
    with changing(database) as connection:
        for what in ("good", "revoked", "expired"):
            token_id, made[what] = administration.create_api_token(
                connection, account_id=ACCOUNT, name=what, scopes=frozenset(Scope), now=now - 10, expires_at=now + 10
            )
            if what == "revoked":
                administration.revoke_api_token(connection, token_id, now=now)
    good = made.pop("good")
    clock.advance(10)
    return {
        **made,
        "unknown": "wf_live_" + secrets.token_urlsafe(32),
        "wrong in its first character": "wf_live_" + ("A" if good[8] != "A" else "B") + good[9:],
        "wrong in its last character": good[:-1] + ("A" if good[-1] != "A" else "B"),
        "short": "x",
    }


@pytest.mark.parametrize("path", ["", "/verify", "/consume", "/revoke"])
async def test_every_refusal_of_an_api_token_is_the_same_to_the_byte(
    client: Client, database: Database, clock: Clock, path: str
) -> None:
    wrong = [("authorization", f"Bearer {secret}") for secret in refused_api_tokens(database, clock).values()]
    headers = [[], *([each] for each in wrong), [("authorization", "Basic eA==")], [wrong[0], wrong[1]]]
    contents: list[object] = [JANE, {"token": "x"}, {}, []]
    bodies = [json.dumps(content).encode() for content in contents] + [b"", b"x" * 20_000]
    answers = {
        (answer.status, tuple(answer.headers), answer.body)
        for sent in headers
        for body in bodies
        for answer in [await client.request("POST", f"/v1/sso_tokens{path}", headers=sent, body=body)]
    }
    [(status, _, body)] = answers
    assert (status, json.loads(body)["error"]["code"]) == (401, "missing_token")


@pytest.mark.slow
async def test_the_time_of_a_refusal_tells_nothing_and_planted_leaks_are_found(tmp_path: Path) -> None:
    planted = []
    async for case, measured in results(tmp_path, FEW):
        assert (measured.t >= CERTAIN) is case.planted, line(case, measured)
        assert line(case, measured).startswith(case.title)
        planted.append(case.planted)
    assert planted == [False, False, True, False, False, True]


def test_equal_times_are_not_told_apart_and_different_ones_are() -> None:
    noise = [secrets.randbelow(1000) for _ in range(20_000)]
    kinds = [secrets.randbelow(2) for _ in noise]
    assert largest_t(list(zip(noise, kinds, strict=True))) < THRESHOLD + 1
    later = [(taken + 50 * kind, kind) for taken, kind in zip(noise, kinds, strict=True)]
    assert largest_t(later) > CERTAIN
    # Also if a few slow measurements drown it, were they not cut off.
    drowned = [(taken + (10**9 if number % 50 == 0 else 0), kind) for number, (taken, kind) in enumerate(later)]
    assert largest_t(drowned) > CERTAIN
    assert largest_t([(5, kind) for kind in kinds]) == 0.0
    assert largest_t([(5 + kind, kind) for kind in kinds]) > CERTAIN


@pytest.mark.parametrize(
    ("planted", "t", "verdict"),
    [
        (False, 4.4, "  not told apart"),
        (False, 4.5, "  told apart, WRONG"),
        (True, 4.5, "  told apart"),
        (True, 4.4, "  not told apart, WRONG"),
    ],
)
def test_a_leak_that_should_not_be_there_and_one_that_was_not_found_are_wrong(
    planted: bool, t: float, verdict: str
) -> None:
    async def call(_: str) -> None: ...

    case = Case("a title", call, (str, str), planted=planted)
    assert line(case, Measured((1000, 2000), t)).endswith(verdict)
