"""Side channels: a refusal reveals neither why an API token is refused nor how much of a forged token is correct."""

import json
import secrets
from collections.abc import Awaitable
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import event

from scripts.tools.timing.__main__ import line, results
from scripts.tools.timing.cases import Case
from scripts.tools.timing.dudect import THRESHOLD, Measured, largest_t
from sso_service.database.transactions import Database
from sso_service.observability import audit
from sso_service.observability.audit import Event
from sso_service.permissions import Scope
from sso_service.services.node import Node
from sso_service.tokens import sign, unsafe_read_claims
from tests.support import administration
from tests.support.api import make_api_token, settled
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, OTHER_ACCOUNT
from tests.support.databases import changing

pytestmark = pytest.mark.anyio

SAMPLES = 5000
CERTAIN = 10.0
"""A |t| that only a leak explains, even on a busy machine. It is dudect's own limit."""


def refused_api_tokens(database: Database, clock: Clock) -> dict[str, str]:
    """Invalid API tokens by the reason why they are invalid."""
    now = int(clock())
    created: dict[str, str] = {}
    with changing(database) as connection:
        for kind in ("good", "revoked", "expired"):
            token_id, created[kind] = administration.create_api_token(
                connection, account_id=ACCOUNT, name=kind, scopes=frozenset(Scope), now=now - 10, expires_at=now + 10
            )
            if kind == "revoked":
                administration.revoke_api_token(connection, token_id, now=now)
    good = created.pop("good")
    clock.advance(10)
    return {
        **created,
        "unknown": "wf_live_" + secrets.token_urlsafe(32),
        "wrong in its first character": "wf_live_" + ("A" if good[8] != "A" else "B") + good[9:],
        "wrong in its last character": good[:-1] + ("A" if good[-1] != "A" else "B"),
        "short": "x",
    }


@pytest.mark.parametrize("path", ["", "/verify", "/consume", "/revoke"])
async def test_all_refusals_of_an_api_token_are_byte_identical(
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
async def test_refusal_times_reveal_nothing_and_planted_leaks_are_detected(tmp_path: Path) -> None:
    planted = []
    async for case, measured in results(tmp_path, SAMPLES):
        assert (measured.t >= CERTAIN) is case.planted, line(case, measured)
        assert line(case, measured).startswith(case.title)
        planted.append(case.planted)
    assert planted == [False] * 4 + [True] + [False] * 2 + [True] + [False] * 4 + [True]


def test_the_statistic_separates_different_timings_only() -> None:
    noise = [secrets.randbelow(1000) for _ in range(20_000)]
    kinds = [secrets.randbelow(2) for _ in noise]
    assert largest_t(list(zip(noise, kinds, strict=True))) < THRESHOLD + 1
    later = [(taken + 50 * kind, kind) for taken, kind in zip(noise, kinds, strict=True)]
    assert largest_t(later) > CERTAIN
    # Outliers must not hide a difference, so the slowest measurements are cut off.
    with_outliers = [(taken + (10**9 if number % 50 == 0 else 0), kind) for number, (taken, kind) in enumerate(later)]
    assert largest_t(with_outliers) > CERTAIN
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
def test_an_unexpected_leak_and_an_undetected_planted_leak_fail(planted: bool, t: float, verdict: str) -> None:
    async def call(_: str) -> None: ...

    case = Case("a title", call, (str, str), planted=planted)
    assert line(case, Measured((1000, 2000), t)).endswith(verdict)


class Steps:
    """The steps that a request causes: statements, checks of the key directory, and events without their ref."""

    def __init__(self, service: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[object] = []
        event.listen(service.database.engine, "before_cursor_execute", self._statement)
        refresh = service.keys.refresh_if_changed

        def check() -> bool:
            self.taken.append("key directory")
            return refresh()

        def write(event_: Event) -> None:
            self.taken.append(msgspec.structs.replace(event_, ref=None))

        monkeypatch.setattr(service.keys, "refresh_if_changed", check)
        monkeypatch.setattr(audit, "record", write)

    def _statement(self, _c: object, _r: object, statement: str, *_: object) -> None:
        self.taken.append(statement)

    async def of(self, answer: Awaitable[Answer]) -> tuple[object, ...]:
        self.taken.clear()
        await settled(answer)
        return tuple(self.taken)


@pytest.mark.parametrize("endpoint", ["verify", "consume", "revoke"])
async def test_another_accounts_token_takes_the_steps_of_a_forged_one(
    client: Client,
    service: Node,
    api_token: str,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    endpoint: str,
) -> None:
    there = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    here = make_api_token(database, scopes=frozenset(Scope))[1]
    unused, used, own = [await settled(client.issue(each)) for each in (there, there, api_token)]
    assert (await client.another().get(f"/?sso={used}")).status == 303
    forged = sign(unsafe_read_claims(unused), bytes(32))
    steps = Steps(service, monkeypatch)

    async def of(token: str) -> tuple[object, ...]:
        return await steps.of(client.post_json(f"/v1/sso_tokens/{endpoint}", {"token": token}, token=here))

    await of(forged)  # the first use of an API token is written down
    expected = await of(forged)
    assert "key directory" in expected
    assert await of(unused) == await of(used) == expected
    assert await of(own) != expected


@pytest.mark.parametrize("path", ["", "/verify", "/consume", "/revoke"])
async def test_refused_api_tokens_take_the_same_steps(
    client: Client,
    service: Node,
    api_token: str,
    database: Database,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    await settled(client.issue(api_token, JANE))  # the first use of an API token is written down
    refused = refused_api_tokens(database, clock)
    steps = Steps(service, monkeypatch)
    taken = {
        name: await steps.of(client.post_json(f"/v1/sso_tokens{path}", {**JANE, "token": "x"}, token=secret))
        for name, secret in refused.items()
    }
    assert len(set(taken.values())) == 1, taken
    assert any(isinstance(step, Event) for step in taken["unknown"])
