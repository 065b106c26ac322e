"""Login links end with sessions: sign-out everywhere, disabling and removal. Each of them within its account."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import ColumnElement, Connection, select, update

from sso_service.database import members
from sso_service.database.group_commit import GroupCommit
from sso_service.database.members import sign_out_member, sign_out_user
from sso_service.database.schema import memberships, users
from sso_service.database.transactions import Database
from sso_service.services.accounts import Actor
from sso_service.services.node import Node
from sso_service.tokens import CLOCK_ALLOWANCE, unsafe_read_claims
from tests.support import administration
from tests.support.api import make_api_token, node
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, OTHER_TEAM, PAGE
from tests.support.databases import changing, on_postgresql
from tests.support.ledger import number_consumed
from tests.support.login import EMAIL, code, is_usable, redirects
from tests.support.redeeming import ACTIVE, EXPIRED, LIFETIME, browse, consume, state
from tests.support.sessions import COOKIE, sign_in

pytestmark = pytest.mark.anyio

SAME_ORIGIN = [("sec-fetch-site", "same-origin")]
OTHER_PAGE = f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts"


@pytest.fixture
def other_api_token(database: Database) -> str:
    return make_api_token(database, account_id=OTHER_ACCOUNT)[1]


def disable_and_enable(connection: Connection, now: int) -> None:
    administration.disable_user(connection, EMAIL, now=now)
    administration.enable_user(connection, EMAIL)


def remove(connection: Connection, now: int) -> None:
    administration.remove_member(connection, EMAIL, ACCOUNT)


def sign_out(connection: Connection, now: int) -> None:
    administration.sign_out_user(connection, EMAIL, now=now)


def sign_out_in_the_account(connection: Connection, now: int, *, database: Database) -> None:
    user_id = administration.find_user(connection, EMAIL).id
    administration.sign_out_member(connection, ACCOUNT, user_id, database=database)


@pytest.mark.parametrize("change", [sign_out, disable_and_enable, remove])
async def test_links_from_before_are_refused_and_a_fresh_one_works_at_once(
    client: Client,
    api_token: str,
    verifier: str,
    database: Database,
    clock: Clock,
    change: Callable[[Connection, int], None],
) -> None:
    # All of it happens in the same second.
    before = [await client.issue(api_token) for _ in range(3)]
    with changing(database) as connection:
        change(connection, int(clock()))
    fresh = await client.issue(api_token)
    assert await code(client, f"{PAGE}?sso={before[0]}") == (401, "token_expired")
    assert await state(client, before[1], verifier) == EXPIRED
    answer = await consume(client, before[1], verifier)
    assert (answer.status, answer.error) == (410, "token_expired")
    assert number_consumed(database) == 0
    assert await state(client, fresh, verifier) == ACTIVE
    assert await is_usable(client, fresh)
    # Revoking needs no access, so it makes sure that such a token never works.
    answer = await client.post_json("/v1/sso_tokens/revoke", {"token": before[2]}, token=api_token)
    assert answer.json() == {"revoked": True}


def sign_out_after(
    batches: GroupCommit[Any, Any], database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let a sign-out follow each operation of `batches`, before its caller goes on in the next second."""
    submit = batches.submit

    async def submit_and_sign_out(op: Any) -> Any:
        result = await submit(op)
        with changing(database) as connection:
            sign_out(connection, int(clock()))
        clock.advance(1)
        return result

    monkeypatch.setattr(batches, "submit", submit_and_sign_out)


async def test_a_sign_out_during_a_login_ends_its_session(
    client: Client, service: Node, api_token: str, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await client.issue(api_token)
    with monkeypatch.context() as during:
        sign_out_after(service.redeeming._redemptions, database, clock, during)
        assert (await client.get(f"{PAGE}?sso={token}")).status == 303
    assert (await client.get("/session")).status == 401
    await sign_in(client, api_token)
    assert (await client.get("/session")).status == 200


@on_postgresql
@pytest.mark.parametrize("of", ["user", "member"])
async def test_a_sign_out_that_is_committed_late_ends_the_logins_until_then(
    client: Client, service: Node, api_token: str, database: Database, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    user_id = unsafe_read_claims(await client.issue(api_token)).user_id
    real, read = members.database_time, []

    def database_time(connection: Connection, database: Database) -> int:
        """The clock, two seconds before the commit of the first transaction that reads it."""
        read.append(real(connection, database))
        return read[-1] - 2 if len(read) == 1 else read[-1]

    monkeypatch.setattr(members, "database_time", database_time)
    if of == "user":
        await service.accounts.sign_out_user(Actor(), user_id)
    else:
        await service.accounts.sign_out_member(Actor(), ACCOUNT, user_id)
    table = users if of == "user" else memberships
    with database.connect() as connection:
        assert connection.execute(select(table.c.sessions_from)).scalar_one() > read[0]


async def test_a_link_is_not_dated_after_a_sign_out_during_its_issuing(
    client: Client, service: Node, api_token: str, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.issue(api_token)
    with monkeypatch.context() as during:
        sign_out_after(service.issuing._lookups, database, clock, during)
        token = await client.issue(api_token)
    assert await browse(client, token) == (401, "token_expired")
    assert await is_usable(client, await client.issue(api_token))


async def test_the_admins_sign_out_ends_links_of_this_account_only(
    client: Client, api_token: str, other_api_token: str, database: Database, clock: Clock
) -> None:
    with database.connect() as connection, database.reading(connection):
        clock.now = connection.execute(select(database.now())).scalar_one()
    here, there = await client.issue(api_token), await client.issue(other_api_token)
    with changing(database) as connection:
        sign_out_in_the_account(connection, int(clock()), database=database)
    assert await browse(client, here) == (401, "token_expired")
    assert (await client.another().get(f"{OTHER_PAGE}?sso={there}")).status == 303
    assert await is_usable(client, await client.issue(api_token))


async def test_signing_out_everywhere_ends_sessions_of_this_account_only(
    client: Client, api_token: str, other_api_token: str
) -> None:
    here, also_here, there = client.another(), client.another(), client.another()
    await sign_in(here, api_token)
    await sign_in(also_here, api_token)
    await sign_in(there, other_api_token, page=OTHER_PAGE)
    link = await client.issue(other_api_token)

    async def signed_in() -> list[int]:
        return [(await each.get("/session")).status for each in (here, also_here, there)]

    assert await signed_in() == [200, 200, 200]
    copy = here.cookies[COOKIE]
    answer = await here.request("POST", "/sso/sign-out-everywhere", headers=SAME_ORIGIN)
    assert answer.status == 204
    here.cookies[COOKIE] = copy
    assert await signed_in() == [401, 401, 200]
    assert (await client.another().get(f"{OTHER_PAGE}?sso={link}")).status == 303


async def test_a_link_that_ended_leads_the_same_user_on(
    client: Client, api_token: str, database: Database, database_url: str, keys_dir: Path, clock: Clock
) -> None:
    old = await client.issue(api_token)
    with changing(database) as connection:
        sign_out(connection, int(clock()))
    await sign_in(client, api_token)
    assert redirects(await client.get(f"{PAGE}?sso={old}"), PAGE)
    # Without a question, even where one is asked before each login.
    with node(database_url, keys_dir, clock, SSO_CONFIRM_LOGIN="1") as confirming:
        confirming.cookies.update(client.cookies)
        assert redirects(await confirming.get(f"{PAGE}?sso={old}"), PAGE)
        assert (await confirming.get(f"{PAGE}?sso={await client.issue(api_token, JOHN)}")).status == 200


async def test_a_fresh_link_works_however_far_sign_outs_are_ahead(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    await client.issue(api_token)
    for _ in range(CLOCK_ALLOWANCE // 2):
        with changing(database) as connection:
            sign_out(connection, int(clock()))
    token = await client.issue(api_token)
    assert unsafe_read_claims(token).expires_at == int(clock()) + CLOCK_ALLOWANCE // 2 + LIFETIME
    assert await is_usable(client, token)


async def test_members_can_sign_out_whatever_admins_do_and_operators_always(
    client: Client, api_token: str, database: Database
) -> None:
    user_id = unsafe_read_claims(await client.issue(api_token)).user_id
    by_admin = partial(sign_out_member, account_id=ACCOUNT, user_id=user_id, database=database)
    by_member = partial(by_admin, by_member=True)
    ahead = CLOCK_ALLOWANCE // 4
    for change in [by_admin] * ahead + [by_member] * (CLOCK_ALLOWANCE // 3 - ahead):
        with changing(database) as connection:
            change(connection)
    with changing(database) as connection:
        of_member = connection.execute(select(memberships.c.sessions_from)).scalar_one()
        sign_out_user(connection, user_id, database=database)
        assert connection.execute(select(users.c.sessions_from)).scalar_one() > of_member


@pytest.mark.parametrize("of", ["user", "member"])
async def test_a_sign_out_never_moves_a_later_one_back(
    client: Client, api_token: str, database: Database, of: str
) -> None:
    user_id = unsafe_read_claims(await client.issue(api_token)).user_id
    later = 4_000_000_000

    class Overtaken:
        """A database whose clock is read after another transaction has signed the user out."""

        def now(self) -> ColumnElement[int]:
            connection.execute(update(table).values(sessions_from=later))
            return database.now()

    overtaken = cast("Database", Overtaken())
    table = users if of == "user" else memberships
    with changing(database) as connection:
        if of == "user":
            sign_out_user(connection, user_id, database=overtaken)
        else:
            sign_out_member(connection, ACCOUNT, user_id, database=overtaken)
        assert connection.execute(select(table.c.sessions_from)).scalar_one() == later


async def test_a_token_that_is_older_than_its_user_is_refused(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    """The id can have belonged to another person, in a database that was replaced."""
    token = await client.issue(api_token)
    assert unsafe_read_claims(token).expires_at == int(clock()) + LIFETIME
    with changing(database) as connection:
        created_at, sessions_from = connection.execute(select(users.c.created_at, users.c.sessions_from)).one()
        assert sessions_from == created_at == int(clock())
        assert connection.execute(select(memberships.c.sessions_from)).scalar_one() == created_at
        connection.execute(update(users).values(sessions_from=created_at + 1))
    assert await browse(client, token) == (401, "token_expired")


async def test_a_node_that_is_ahead_does_not_date_users_ahead(
    database_url: str, keys_dir: Path, api_token: str, database: Database, clock: Clock
) -> None:
    ahead = Clock(clock() + 50)
    with node(database_url, keys_dir, ahead) as fast, node(database_url, keys_dir, clock) as exact:
        token = await fast.issue(api_token)
        with database.connect() as connection:
            sessions_from, now = connection.execute(select(users.c.sessions_from, database.now())).one()
        assert sessions_from <= now
        assert await is_usable(exact, token)
        await sign_in(exact, api_token)
        assert (await exact.get("/session")).status == 200


async def test_no_link_is_issued_that_every_node_would_refuse(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    await client.issue(api_token)
    with changing(database) as connection:  # as by a clock that was ahead and was set back
        connection.execute(update(users).values(sessions_from=int(clock()) + CLOCK_ALLOWANCE + 1))
    answer = await client.post_json("/v1/sso_tokens", JANE, token=api_token)
    assert (answer.status, answer.error) == (503, "unavailable")
    clock.advance(1)
    assert await is_usable(client, await client.issue(api_token))
