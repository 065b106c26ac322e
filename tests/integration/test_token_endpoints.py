"""The contract that `verify`, `consume` and `revoke` under `/v1/sso_tokens` share."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, update

from sso_service import keyring, tokens
from sso_service.database.schema import consumed_floor
from sso_service.database.transactions import Database
from sso_service.permissions import Scope
from sso_service.services.node import Node
from sso_service.tokens import Claims
from tests.support import administration
from tests.support.api import (
    INVALID_JSON,
    LIMIT,
    MISSING_TOKEN,
    OUTCOME_UNKNOWN,
    TOKEN_INVALID,
    TOO_LARGE,
    UNAVAILABLE,
    VERIFY,
    WRITE,
    Refusal,
    bearer,
    encoded,
    invalid,
    make_api_token,
    missing,
    node,
    padded,
    refusal,
    settled,
)
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT
from tests.support.databases import changing, on_sqlite
from tests.support.ledger import number_consumed
from tests.support.outages import lost_table, read_only, unreachable
from tests.support.redeeming import LIFETIME, browse, ref, token_key
from tests.support.token_endpoints import CONSUMED, CONSUMING, ENDPOINTS, EXPIRED, GOOD, INVALID, NO_ACCESS, Endpoint

pytestmark = pytest.mark.anyio


@pytest.fixture(params=ENDPOINTS, ids=lambda endpoint: endpoint.name)
def endpoint(request: pytest.FixtureRequest) -> Endpoint:
    endpoint: Endpoint = request.param
    return endpoint


@pytest.fixture
def secrets(endpoint: Endpoint, database: Database, api_token: str, verifier: str, platform: str) -> list[str]:
    """One secret for each kind of API token of `ACCOUNT` that may call the endpoint."""
    both = make_api_token(database, scopes=WRITE | VERIFY)[1]
    return [verifier, platform, both] if endpoint.scope == Scope.VERIFY_SSO else [api_token, both]


@pytest.fixture
def secret(secrets: list[str]) -> str:
    """The secret of an API token of `ACCOUNT` that may call the endpoint."""
    return secrets[0]


# --- The login token -------------------------------------------------------------------------------------------------


async def test_a_valid_token_is_accepted_and_consumed_if_the_endpoint_consumes(
    client: Client, endpoint: Endpoint, secret: str, api_token: str, database: Database
) -> None:
    token = await client.issue(api_token)
    assert await endpoint.outcome(client, token, secret) == GOOD
    assert number_consumed(database) == endpoint.consumes
    assert await endpoint.outcome(client, token, secret) == (CONSUMED if endpoint.consumes else GOOD)


async def test_a_token_is_valid_until_the_second_of_its_expiry(
    client: Client, endpoint: Endpoint, secret: str, api_token: str, database: Database, clock: Clock
) -> None:
    clock.now = float(int(clock.now))
    used, unused = await client.issue(api_token), await client.issue(api_token)
    clock.advance(LIFETIME - 0.5)
    assert await endpoint.outcome(client, used, secret) == GOOD
    clock.advance(0.5)
    for token in (used, unused):
        assert await endpoint.outcome(client, token, secret) == EXPIRED
    assert number_consumed(database) == endpoint.consumes


async def test_a_token_below_the_floor_is_reported_as_expired(
    client: Client, endpoint: Endpoint, secret: str, api_token: str, database: Database
) -> None:
    """Its row may have been purged, so the ledger cannot prove that it is unused."""
    token = await client.issue(api_token)
    with changing(database) as connection:
        connection.execute(update(consumed_floor).values(claims=b"\xff" * 16))
    assert await endpoint.outcome(client, token, secret) == EXPIRED
    assert number_consumed(database) == 0


async def test_a_token_that_the_service_did_not_issue_is_invalid(
    client: Client,
    service: Node,
    endpoint: Endpoint,
    secrets: list[str],
    api_token: str,
    database: Database,
    clock: Clock,
) -> None:
    token = await client.issue(api_token)
    claims = tokens.unsafe_read_claims(token)
    key = service.keys.ring.signing_key(int(clock()))
    texts = [
        "x",
        token[:-1],
        token + "A",
        f" {token}",
        f"{token}\n",
        token[:-1] + "B",
        token.swapcase(),
        "A" * 43,
        "\0",
        "\ud800",
        "\u00e9" * 43,
        *(tokens.sign(claims, wrong) for wrong in (bytes(32), key.secret, key.session_key, key.form_key)),
        tokens.sign(Claims(int(clock()) + LIFETIME + 61, claims.user_id, ACCOUNT, 7), key.token_key),
    ]
    for secret in secrets:
        for text in texts:
            answer = await client.post_json(endpoint.url, {"token": text}, token=secret)
            if endpoint.consumes:
                assert refusal(answer) == TOKEN_INVALID, text
            else:
                assert answer.json()["reason"] in {"malformed", "bad_signature"}, text
    assert number_consumed(database) == 0
    assert (await browse(client, token))[0] == 303


@on_sqlite
async def test_a_token_that_exceeds_the_maximum_lifetime_is_invalid(
    client: Client, service: Node, endpoint: Endpoint, secret: str, api_token: str, clock: Clock
) -> None:
    claims = tokens.unsafe_read_claims(await client.issue(api_token))
    latest = int(clock()) + LIFETIME + 60
    key = token_key(service, clock)
    overlong = tokens.sign(Claims(latest + 1, claims.user_id, ACCOUNT, 7), key)
    endless = tokens.sign(Claims(2**32 - 1, claims.user_id, ACCOUNT, 7), key)
    good = tokens.sign(Claims(latest, claims.user_id, ACCOUNT, 7), key)
    assert await endpoint.outcome(client, good, secret) == GOOD
    assert await endpoint.outcome(client, overlong, secret) == INVALID
    assert await endpoint.outcome(client, endless, secret) == INVALID
    clock.advance(1)
    assert await endpoint.outcome(client, overlong, secret) == GOOD


async def test_another_accounts_token_gets_the_same_response_as_a_forged_one(
    client: Client,
    endpoint: Endpoint,
    secret: str,
    api_token: str,
    database: Database,
    clock: Clock,
) -> None:
    """This also holds for expired, consumed and unknown tokens, so an account cannot learn about another."""
    other = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    other_secret = make_api_token(database, account_id=OTHER_ACCOUNT, scopes=frozenset({endpoint.scope}))[1]
    # Jane is a member of both accounts, John of the other only.
    await client.issue(api_token)
    foreign, used, revoked, johns = [await client.issue(other, person) for person in (JANE, JANE, JANE, JOHN)]
    assert (await client.another().get(f"/?sso={used}")).status == 303
    assert (await client.post_json("/v1/sso_tokens/revoke", {"token": revoked}, token=other)).json() == {
        "revoked": True
    }
    with changing(database) as connection:
        administration.disable_user(connection, JOHN["email"], now=int(clock()))

    def comparable(answer: Answer, token: str) -> object:
        if endpoint.consumes:
            return answer
        # Lengths and dates may differ; the header names must not.
        content = answer.json()
        assert content["ref"] == ref(token)
        return answer.status, [name for name, _ in answer.headers], {**content, "ref": None}

    async def ask(token: str) -> object:
        return comparable(await endpoint.ask(client, token, secret), token)

    fake = tokens.sign(tokens.unsafe_read_claims(foreign), bytes(32))
    forged = await ask(fake)
    assert await endpoint.outcome(client, fake, secret) == INVALID
    for_john = GOOD if endpoint.name == "revoke" else NO_ACCESS  # revoking does not check access
    for token, outcome in ((foreign, GOOD), (used, CONSUMED), (revoked, CONSUMED), (johns, for_john)):
        assert await ask(token) == forged
        assert await endpoint.outcome(client, token, other_secret) == outcome
        assert await ask(token) == forged
    clock.advance(LIFETIME + 1)  # links of a user who joins another account are dated a second ahead
    for token in (foreign, used, revoked, johns):
        assert await ask(token) == forged
        assert await endpoint.outcome(client, token, other_secret) == EXPIRED


# --- The signing key -------------------------------------------------------------------------------------------------


@on_sqlite
async def test_a_token_is_valid_as_long_as_its_key_verifies(
    client: Client, service: Node, endpoint: Endpoint, secret: str, api_token: str, keys_dir: Path, clock: Clock
) -> None:
    first, second, used = [await client.issue(api_token) for _ in range(3)]
    assert (await browse(client, used))[0] == 303
    keyring.rotate(keys_dir, now=int(clock()), lead=0)
    service.keys.refresh()
    assert await endpoint.outcome(client, first, secret) == GOOD
    assert await endpoint.outcome(client, await client.issue(api_token), secret) == GOOD

    keyring.revoke_all(keys_dir, now=int(clock()))
    service.keys.refresh()
    for token in (first, second, used):
        assert await endpoint.outcome(client, token, secret) == INVALID
    assert await endpoint.outcome(client, await client.issue(api_token), secret) == GOOD
    clock.advance(LIFETIME)
    for token in (first, second, used):
        assert await endpoint.outcome(client, token, secret) == INVALID
    assert await endpoint.outcome(client, await client.issue(api_token), secret) == GOOD


@on_sqlite
async def test_a_token_of_a_key_that_was_retired_long_ago_is_expired(
    client: Client, service: Node, endpoint: Endpoint, secret: str, api_token: str, keys_dir: Path, clock: Clock
) -> None:
    token = await client.issue(api_token)
    keyring.rotate(keys_dir, now=int(clock()))
    service.keys.refresh()
    clock.advance(7200)
    assert await endpoint.outcome(client, token, secret) == EXPIRED


@on_sqlite
async def test_a_key_that_another_node_has_just_created_is_found(
    client: Client,
    service: Node,
    endpoint: Endpoint,
    secret: str,
    api_token: str,
    database_url: str,
    keys_dir: Path,
    clock: Clock,
) -> None:
    new = keyring.rotate(keys_dir, now=int(clock()), lead=0)
    with node(database_url, keys_dir, clock) as other_node:
        token = await other_node.issue(api_token)
    assert service.keys.ring.signing_key(int(clock())) != new
    assert await endpoint.outcome(client, token, secret) == GOOD


# --- Order of checks -------------------------------------------------------------------------------------------------


async def test_only_the_first_of_several_errors_is_reported(
    client: Client,
    endpoint: Endpoint,
    secrets: list[str],
    api_token: str,
    verifier: str,
    platform: str,
    database: Database,
    clock: Clock,
) -> None:
    scopes = frozenset({endpoint.scope})
    expired = make_api_token(database, scopes=scopes, expires_at=int(clock()))[1]
    revoked_id, revoked = make_api_token(database, scopes=scopes)
    with changing(database) as connection:
        administration.revoke_api_token(connection, revoked_id, now=int(clock()))
    scopeless = make_api_token(database, scopes=frozenset())[1]
    others = [scopeless, *({api_token, verifier, platform} - {*secrets})]
    token = await client.issue(api_token)
    good = encoded({"token": token})
    too_large, no_json, no_object, no_token = b"x" * (LIMIT + 1), b"x", b"[]", b"{}"

    any_body = [too_large, good.ljust(LIMIT + 1), no_json, no_object, no_token, good]
    authorized = {
        too_large: TOO_LARGE,
        good.ljust(LIMIT + 1): TOO_LARGE,
        padded(LIMIT + 1, {}): TOO_LARGE,
        padded(LIMIT + 1, {"token": "x"}): TOO_LARGE,
        no_json: INVALID_JSON,
        b"": INVALID_JSON,
        b"null": INVALID_JSON,
        b'"x"': INVALID_JSON,
        no_object: INVALID_JSON,
        b"[" + good + b"]": INVALID_JSON,
        no_token: missing("token"),
        encoded({"sso": token}): missing("token"),
        encoded({"Token": "x", "sso": "x", "tokens": ["x"]}): missing("token"),
        b'{"token": " \\t"}': missing("token"),
    }
    authorized |= {encoded({"token": blank}): missing("token") for blank in (None, "", " ", "\n\t ")}
    wrong_types: list[object] = [0, 1, 5, 1.5, True, False, [], ["x"], [token], {}, {"token": "x"}]
    authorized |= {encoded({"token": value}): invalid("token", "type") for value in wrong_types}

    cases = {(secret, body): MISSING_TOKEN for secret in ("x", expired, revoked) for body in any_body}
    cases |= {(secret, body): endpoint.needs_scope for secret in others for body in any_body}
    cases |= {(secret, body): expected for secret in secrets for body, expected in authorized.items()}
    answers = {
        case: await client.request("POST", endpoint.url, headers=bearer(case[0]), body=case[1]) for case in cases
    }
    assert {case: refusal(answer) for case, answer in answers.items()} == cases
    assert refusal(await client.request("POST", f"{endpoint.url}?token={token}", body=good)) == MISSING_TOKEN
    assert number_consumed(database) == 0
    for secret in secrets:
        assert await endpoint.outcome(client, await client.issue(api_token), secret) == GOOD
    assert await endpoint.outcome(client, token, secrets[-1]) == GOOD


@on_sqlite
async def test_path_and_method_are_checked_before_the_api_token(client: Client, endpoint: Endpoint) -> None:
    assert refusal(await client.request("POST", f"{endpoint.url}/x", body=b"x")) == Refusal(404, "not_found")
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = await client.request(method, endpoint.url, body=b"x" * (LIMIT + 1))
        assert refusal(answer) == Refusal(405, "method_not_allowed")
        assert answer.header("allow") == "POST"


@on_sqlite
async def test_unknown_fields_and_query_parameters_are_ignored(
    client: Client, endpoint: Endpoint, secret: str, api_token: str
) -> None:
    def ask(query: str, body: bytes) -> Any:
        return client.request("POST", f"{endpoint.url}?{query}", headers=bearer(secret), body=body)

    unused = await client.issue(api_token)
    for before in (b"{", b'{"token": "x", '):  # the last of duplicate fields is used
        token = await client.issue(api_token)
        extra = {"token": token, "account_id": OTHER_ACCOUNT, "email": 5, "x": "\0\ud800", "y": [None, {}]}
        answer = await ask(f"token=x&sso={unused}", before + encoded(extra)[1:])
        assert answer.status == 200
        assert answer.json().get("revoked" if endpoint.name == "revoke" else "active") is True
        assert answer.header("set-cookie") is None
    assert refusal(await ask(f"token={unused}", b"{}")) == missing("token")
    assert await endpoint.outcome(client, unused, secret) == GOOD


# --- Database failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("database_url", "fault"),
    [
        ("sqlite", lost_table),
        ("sqlite", unreachable),
        ("postgresql", lost_table),
        ("postgresql", read_only),
        ("postgresql", unreachable),
    ],
    indirect=["database_url"],
)
async def test_a_database_failure_gives_503_and_keeps_the_token_valid(
    client: Client,
    endpoint: Endpoint,
    secret: str,
    api_token: str,
    database: Database,
    fault: Callable[[Database], Any],
) -> None:
    token = await settled(client.issue(api_token))
    # Record the API token's hour of use first, so that no write is pending.
    assert await settled(endpoint.outcome(client, await client.issue(api_token), secret)) == GOOD
    reads_only = fault is read_only and not endpoint.consumes
    with fault(database):
        for _ in range(2):
            answer = await endpoint.ask(client, token, secret)
            assert answer.status == 200 if reads_only else refusal(answer) == UNAVAILABLE
        if fault is unreachable:
            assert refusal(await endpoint.ask(client, "x", secret)) == UNAVAILABLE
        assert refusal(await client.post_json(endpoint.url, {"token": token})) == MISSING_TOKEN
    assert await endpoint.outcome(client, token, secret) == GOOD
    assert await endpoint.outcome(client, token, secret) == (CONSUMED if endpoint.consumes else GOOD)


@pytest.mark.parametrize("endpoint", CONSUMING, ids=lambda endpoint: endpoint.name)
@pytest.mark.parametrize("after", [False, True], ids=["before-execution", "after-execution"])
async def test_a_connection_lost_at_commit_is_reported_as_outcome_unknown(
    client: Client, endpoint: Endpoint, secret: str, api_token: str, database: Database, after: bool
) -> None:
    token = await settled(client.issue(api_token))
    await settled(endpoint.ask(client, "x", secret))  # records the API token's hour of use
    consuming: list[str] = []

    def lose_connection(cursor: Any, statement: str, *_: object) -> None:
        if statement == "COMMIT" and consuming:
            if after:
                cursor.execute(statement)
            cursor.connection.close()
            raise database.engine.dialect.loaded_dbapi.OperationalError("connection lost")
        if "INSERT INTO consumed_nonces" in statement:
            consuming.append(statement)

    event.listen(database.engine, "do_execute", lose_connection)
    answer = await endpoint.ask(client, token, secret)
    event.remove(database.engine, "do_execute", lose_connection)
    assert refusal(answer) == OUTCOME_UNKNOWN
    assert number_consumed(database) == after
    assert await endpoint.outcome(client, token, secret) == (CONSUMED if after else GOOD)


# --- Secrets ---------------------------------------------------------------------------------------------------------


async def test_responses_and_logs_contain_no_token(
    client: Client,
    endpoint: Endpoint,
    secret: str,
    api_token: str,
    database: Database,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="sqlalchemy")
    token, unused, late = [await client.issue(api_token) for _ in range(3)]
    forged = tokens.sign(tokens.unsafe_read_claims(token), bytes(32))
    texts = (token, token, forged, token + "x")
    answers = [await client.post_json(endpoint.url, {"token": text}, token=secret) for text in texts]
    answers += [await client.post_json(endpoint.url, {"token": text}, token="x") for text in texts]
    answers += [
        await client.post_json(endpoint.url, {"token": [token]}, token=secret),
        await client.request("POST", endpoint.url, headers=bearer(secret), body=token.encode()),
        await client.request("GET", f"{endpoint.url}?token={token}", headers=bearer(secret)),
        await client.request("POST", f"{endpoint.url}/{token}", headers=bearer(secret)),
    ]
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=int(clock()))
    answers.append(await client.post_json(endpoint.url, {"token": unused}, token=secret))
    clock.advance(LIFETIME)
    answers.append(await client.post_json(endpoint.url, {"token": late}, token=secret))
    with unreachable(database):
        answers.append(await client.post_json(endpoint.url, {"token": late}, token=secret))
    statuses = {"verify": set[int](), "consume": {403, 410}, "revoke": {410}}[endpoint.name]
    assert {answer.status for answer in answers} == {200, 400, 401, 404, 405, 422, 503} | statuses
    assert "SELECT" in caplog.text
    assert ("INSERT INTO consumed_nonces" in caplog.text) == endpoint.consumes
    seen = caplog.text + "".join(answer.text + str(answer.headers) for answer in answers)
    for each in (token, unused, late, forged, secret, api_token):
        assert each not in seen
