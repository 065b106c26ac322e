"""`POST /v1/sso_tokens` when the database or the keys fail, and what errors and logs reveal."""

import asyncio
import logging
import traceback
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from sso_service import keyring
from sso_service.database.group_commit import MAX_WAITING
from sso_service.database.transactions import Database
from sso_service.key_directory import KeyDirectory
from sso_service.permissions import Role
from tests.support import administration
from tests.support.api import (
    LIMIT,
    MISSING_TOKEN,
    UNAVAILABLE,
    VERIFY,
    Refusal,
    bearer,
    encoded,
    make_api_token,
    missing,
    node,
    node_behind_proxy,
    refusal,
    settled,
)
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, PAGE
from tests.support.databases import changing, on_postgresql, on_sqlite
from tests.support.issuing import DEADLINE, URL, issued, key_secret, number_of_users, post
from tests.support.outages import a_database_that, renamed, unreachable
from tests.support.waiting import Stopwatch

pytestmark = pytest.mark.anyio


# --- Failures --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "state", ["is a directory", "is not a database", "is empty", "refuses to connect", "never answers"]
)
async def test_an_unusable_database_is_reported_as_503_before_the_deadline(
    state: str, tmp_path: Path, keys_dir: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "wf_live_" + "A" * 43
    with a_database_that(state, tmp_path) as url, node(url, keys_dir, clock) as client:
        started = Stopwatch()
        good, bad = await asyncio.gather(post(client, encoded(), secret), post(client.another(), b"[]", secret))
        assert started.own_seconds < DEADLINE + 0.5
    # Without authentication, the response must not depend on the body either.
    assert refusal(good) == refusal(bad) == UNAVAILABLE
    for leak in (secret, "hunter2", str(tmp_path)):
        assert leak not in good.text + bad.text
    assert secret not in caplog.text
    assert "hunter2" not in caplog.text


async def test_issuing_resumes_when_the_database_returns(client: Client, api_token: str, database: Database) -> None:
    await settled(client.issue(api_token))
    with unreachable(database):
        assert refusal(await post(client, encoded(), api_token)) == UNAVAILABLE
        assert refusal(await post(client, encoded(JOHN), api_token)) == UNAVAILABLE
        assert refusal(await client.request("POST", URL, body=encoded())) == MISSING_TOKEN
    back = Stopwatch()
    while (answer := await post(client, encoded(), api_token)).status == 503:
        assert back.own_seconds < 2  # the service pauses between attempts to connect
        await asyncio.sleep(0.01)
    assert issued(answer)[1] is False
    assert issued(await post(client, encoded(JOHN), api_token))[1] is True


@pytest.mark.slow
async def test_members_get_tokens_while_the_database_is_locked_for_writing(
    client: Client, api_token: str, database: Database
) -> None:
    await settled(client.issue(api_token))
    with database.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if database.is_sqlite else "BEGIN")
        if not database.is_sqlite:
            connection.exec_driver_sql("LOCK TABLE users, memberships IN SHARE ROW EXCLUSIVE MODE")
        started = Stopwatch()
        member, new_person = await asyncio.gather(
            post(client, encoded(), api_token), post(client.another(), encoded(JOHN), api_token)
        )
        assert started.own_seconds < DEADLINE + 0.5
        connection.exec_driver_sql("ROLLBACK")
    issued(member)
    assert refusal(new_person) == UNAVAILABLE
    assert issued(await post(client, encoded(JOHN), api_token))[1] is True


@asynccontextmanager
async def proxy_that_drops_commits(url: str) -> AsyncIterator[str]:
    """Proxy for the PostgreSQL database `url`. Drops the connection after forwarding the `COMMIT` for a new user."""
    with psycopg.connect(url) as connection:
        server = f"{connection.info.host}/.s.PGSQL.{connection.info.port}"
    broken = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()

    async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        inserted = False
        try:
            while data := await source.read(65_536):
                if broken.is_set():
                    break
                inserted = inserted or b"INSERT INTO users" in data
                if inserted and b"COMMIT" in data:
                    broken.set()
                target.write(data)
                await target.drain()
        finally:
            target.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_unix_connection(server)
        pair = [asyncio.create_task(forward(reader, to_server)), asyncio.create_task(forward(from_server, writer))]
        tasks.update(pair)

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        proxy_url = make_url(url).set(host="127.0.0.1", port=port, query={})
        yield proxy_url.render_as_string(hide_password=False)
        assert broken.is_set()
        await asyncio.gather(*tasks)


@on_postgresql
async def test_a_connection_lost_at_commit_is_reported_as_outcome_unknown(
    database_url: str, database: Database, keys_dir: Path, clock: Clock, client: Client, api_token: str
) -> None:
    async with (
        proxy_that_drops_commits(database_url) as proxy_url,
        node_behind_proxy(proxy_url, keys_dir, clock) as proxied,
    ):
        answer = await post(proxied, encoded(), api_token)
    assert refusal(answer) == Refusal(503, "outcome_unknown")
    # The transaction did commit, and a repeated request is harmless.
    assert issued(await post(client, encoded(), api_token))[1] is False
    assert number_of_users(database) == 1


@pytest.mark.slow
@on_sqlite
async def test_requests_above_the_queue_limit_are_rejected(client: Client) -> None:
    answers = await asyncio.gather(
        *(post(client.another(), encoded(), "wf_live_unknown") for _ in range(MAX_WAITING + 50))
    )
    counted = Counter(refusal(answer)[:2] for answer in answers)
    assert 0 < counted[503, "overloaded"] <= 50
    assert counted.keys() <= {MISSING_TOKEN[:2], UNAVAILABLE[:2], (503, "overloaded")}
    assert refusal(await post(client, encoded(), "wf_live_unknown")) == MISSING_TOKEN


@on_sqlite
async def test_without_a_signing_key_no_token_is_issued(
    database_url: str, api_token: str, tmp_path: Path, clock: Clock
) -> None:
    keys_dir = tmp_path / "no-keys"
    keys_dir.mkdir()
    keyring.rotate(keys_dir, now=int(clock()), lead=60)  # signs only after the lead time
    with node(database_url, keys_dir, clock) as client:
        assert refusal(await post(client, encoded(), api_token)) == UNAVAILABLE
        assert refusal(await post(client, encoded(), "wf_live_unknown")) == MISSING_TOKEN
        assert refusal(await post(client, b"{}", api_token)) == missing("email")
        clock.advance(60)
        await client.issue(api_token)


@on_sqlite
async def test_no_token_is_issued_when_keys_have_been_unreadable_for_a_minute(
    database_url: str, keys_dir: Path, clock: Clock, api_token: str
) -> None:
    monotonic = Clock(0.0)
    keys = KeyDirectory(keys_dir, monotonic=monotonic)
    with node(database_url, keys, clock) as client:
        with renamed(keys_dir):
            for elapsed, good in ((0.0, True), (59.9, True), (60.0, False), (3600.0, False)):
                monotonic.now = elapsed
                keys.refresh()
                answer = await post(client, encoded(), api_token)
                assert (answer.status == 201) == good, elapsed
                assert good or refusal(answer) == UNAVAILABLE
        keys.refresh()
        await client.issue(api_token)


# --- Secrets ---------------------------------------------------------------------------------------------------------


async def test_errors_and_logs_contain_no_secrets(
    database_url: str, database: Database, keys_dir: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="sqlalchemy")
    _, secret = make_api_token(database, max_role=Role.EDITOR)
    _, verifier = make_api_token(database, scopes=VERIFY)
    _, expired = make_api_token(database, expires_at=int(clock()))
    with node(database_url, keys_dir, clock) as client:
        used, unused = await client.issue(secret), await client.issue(secret)
        await client.get(f"{PAGE}?sso={used}")
        cookie = client.cookies["studio_session"]
        secrets_in_body = {**JANE, "token": unused, "api_token": secret, "cookie": cookie}
        answers = [
            await client.request("POST", f"{URL}?sso={unused}", headers=bearer(shown), body=body)
            for shown in (secret, verifier, expired, f"{secret}x")
            for body in (
                encoded(secrets_in_body, email=unused),
                encoded(secrets_in_body, first_name=secret * 3),
                b"[",
                b"{}",
            )
        ]
        answers += [
            await post(client, encoded(secrets_in_body).ljust(LIMIT + 1), secret),
            await client.request("PUT", f"{URL}?sso={unused}", headers=bearer(secret)),
            await client.request("POST", f"/v1/{secret}/{unused}", headers=bearer(secret)),
            await client.request("POST", URL, headers=bearer(secret) + bearer(unused), body=encoded(secrets_in_body)),
        ]
        with changing(database) as connection:
            administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
        answers.append(await post(client, encoded(secrets_in_body), secret))
        with changing(database) as connection:
            administration.disable_user(connection, JANE["email"], now=int(clock()))
        answers.append(await post(client, encoded(secrets_in_body), secret))
        with unreachable(database):
            answers.append(await post(client, encoded(secrets_in_body), secret))
        crashes: list[str] = []
        for damaged in ("memberships", "api_tokens"):
            with changing(database) as connection:
                connection.exec_driver_sql(f"ALTER TABLE {damaged} RENAME TO lost_{damaged}")
            try:
                answers.append(await post(client, encoded(secrets_in_body, email="new@example.com"), secret))
            except Exception as error:  # as the server would log it
                crashes += traceback.format_exception(error)

    assert {answer.status for answer in answers} >= {400, 401, 403, 404, 405, 413, 422, 503}
    assert "SELECT" in caplog.text
    seen = "".join([caplog.text, *crashes, *(answer.text + str(answer.headers) for answer in answers)])
    secrets = {
        "API token": secret,
        "API token without the scope": verifier,
        "expired API token": expired,
        "used login token": used,
        "login token": unused,
        "cookie": cookie,
        "key": key_secret(keys_dir),
    }
    assert [name for name, value in secrets.items() if value in seen] == []
