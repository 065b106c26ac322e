"""Accounts cannot hurt one another: pages have their own threads, connections and limits."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import event, insert, select

from sso_service.database.members import MemberPage
from sso_service.database.schema import memberships, users
from sso_service.database.transactions import LOGIN_POOL, PAGE_POOL, Database
from sso_service.errors import PagesRateLimited, SettingsError
from sso_service.observability.audit import Event, EventName
from sso_service.observability.logs import AUDIT_LOGGER
from sso_service.permissions import Role, Scope
from sso_service.services.node import Node
from sso_service.services.page_limits import AT_ONCE, SESSIONS, WAITING, PageLimits
from sso_service.sessions import Session
from sso_service.settings import read_settings
from tests.support import administration
from tests.support.api import settled
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, OTHER_TEAM, PAGE
from tests.support.databases import changing, on_sqlite
from tests.support.group_commit import BlockingStep, endless
from tests.support.pages import MessagePage
from tests.support.studio import API_TOKENS, HTML, MEMBERS, add_members, page_of, see, signed_in, submit, with_settings
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.anyio

SEARCH = f"{MEMBERS}?search=zz"
OTHER_PAGE = f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts"


@pytest.fixture
async def admin(client: Client, database: Database, api_token: str) -> Client:
    """A browser in which Jane, the only admin, is signed in. John is an editor."""
    await client.issue(api_token, JOHN)
    return await signed_in(client, database, api_token, Role.ADMIN)


@pytest.fixture
async def neighbour(client: Client, database: Database) -> Client:
    """A browser in which John is signed in to another account."""
    browser = client.another()
    answer = await browser.get(f"{OTHER_PAGE}?sso={await browser.issue(new_api_token(database), JOHN)}")
    assert answer.status == 303
    return browser


def new_api_token(database: Database) -> str:
    with changing(database) as connection:
        _, secret = administration.create_api_token(
            connection, account_id=OTHER_ACCOUNT, name="theirs", scopes=frozenset({Scope.WRITE_SSO}), now=1
        )
    return secret


@contextmanager
def stuck(database: Database) -> Iterator[BlockingStep]:
    """Block every thread that takes a connection of `database`, until the end of the block."""
    block = BlockingStep()
    event.listen(database.engine, "checkout", block)
    try:
        yield block
    finally:
        event.remove(database.engine, "checkout", block)
        block.release()


@asynccontextmanager
async def in_progress(*requests: Any) -> AsyncIterator[list["asyncio.Task[Any]"]]:
    """Start requests. Those that still run at the end of the block are cancelled."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    await asyncio.sleep(0)
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- threads and connections -----------------------------------------------------------------------------------------


async def test_logins_work_while_all_threads_of_pages_are_stuck(
    client: Client, service: Node, admin: Client, database: Database, api_token: str
) -> None:
    changes = [submit(admin, f"{MEMBERS}/{user_id}/role", [("role", "editor")]) for user_id in range(1, 5)]
    with stuck(service.page_database) as block:
        async with in_progress(see(admin, SEARCH), see(admin, API_TOKENS), *changes):
            await block.entered()
            for _ in range(3):
                browser = client.another()
                token = await browser.issue(api_token, {**JANE, "email": "new@example.com"})
                assert (await browser.get(f"{PAGE}?sso={token}")).status == 303
                assert (await browser.get("/session")).status == 200
            assert (await client.get("/readyz")).status == 200
            assert (await client.get("/metrics")).status == 200
            block.release()


async def test_logins_share_neither_threads_nor_connections_with_pages(
    client: Client, service: Node, admin: Client, api_token: str
) -> None:
    used: list[tuple[str, str]] = []
    for name, database in (("logins", service.database), ("pages", service.page_database)):

        def record(*_: object, name: str = name) -> None:
            used.append((name, threading.current_thread().name.partition("_")[0]))

        event.listen(database.engine, "checkout", record)
    token = await settled(client.issue(api_token))  # the first use of an API token is written down
    await client.get(f"{PAGE}?sso={token}")
    assert set(used) == {("logins", "logins")}
    used.clear()
    await see(admin, MEMBERS)
    # The access check of the session, then the members and the frame of the page.
    assert used == [("logins", "logins"), ("pages", "pages"), ("pages", "pages")]
    assert service.database.engine.pool is not service.page_database.engine.pool


async def test_a_worker_opens_at_most_18_connections(service: Node) -> None:
    assert sum(pool.size + pool.more for pool in (LOGIN_POOL, PAGE_POOL)) == 18
    for database, pool in ((service.database, LOGIN_POOL), (service.page_database, PAGE_POOL)):
        opened = [database.engine.connect() for _ in range(pool.size + pool.more)]
        assert database.engine.pool.checkedout() == len(opened)  # type: ignore[attr-defined]  # of QueuePool
        assert database.engine.pool.overflow() == pool.more  # type: ignore[attr-defined]
        for connection in opened:
            connection.close()


async def test_a_transaction_of_pages_serves_one_request(service: Node) -> None:
    begun: list[str] = []

    @event.listens_for(service.page_database.engine, "before_cursor_execute")
    def record(_c: object, _r: object, statement: str, *_: object) -> None:
        if statement.startswith("BEGIN"):
            begun.append(statement)

    await asyncio.gather(*(service.accounts.find_account(ACCOUNT) for _ in range(5)))
    assert len(begun) == 5


# --- clients that leave ----------------------------------------------------------------------------------------------


async def test_a_page_whose_client_has_gone_leaves_the_queue(admin: Client, service: Node) -> None:
    leaves = asyncio.Event()
    statements: list[str] = []

    @event.listens_for(service.page_database.engine, "before_cursor_execute")
    def record(_c: object, _r: object, statement: str, parameters: object, *_: object) -> None:
        statements.append(str(parameters))

    with stuck(service.page_database) as block:
        first = asyncio.ensure_future(see(admin, f"{MEMBERS}?search=first"))
        await block.entered()
        second = asyncio.ensure_future(admin.request("GET", f"{MEMBERS}?search=second", headers=[HTML], leaves=leaves))
        third = asyncio.ensure_future(see(admin, f"{MEMBERS}?search=third"))
        await asyncio.sleep(0.1)
        leaves.set()
        with pytest.raises(LookupError):
            await asyncio.wait_for(second, PATIENCE)
        block.release()
        assert [(await first).status, (await third).status] == [200, 200]
    seen = " ".join(statements)
    assert "first" in seen
    assert "third" in seen
    assert "second" not in seen


@on_sqlite
async def test_a_search_whose_client_has_gone_is_interrupted(
    admin: Client, service: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended, leaves = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def search(connection: Any, *_: object, **_more: object) -> None:
        loop.call_soon_threadsafe(begun.set)
        try:
            endless(connection)
        finally:
            loop.call_soon_threadsafe(ended.set)

    with monkeypatch.context() as patch:
        patch.setattr("sso_service.database.members.list_members", search)
        request = asyncio.ensure_future(admin.request("GET", SEARCH, headers=[HTML], leaves=leaves))
        await asyncio.wait_for(begun.wait(), PATIENCE)
        leaves.set()
        with pytest.raises(LookupError):
            await request
        await asyncio.wait_for(ended.wait(), PATIENCE)
    assert (await see(admin, SEARCH)).status == 200


async def test_a_change_whose_client_has_gone_is_made_and_recorded(
    admin: Client, service: Node, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with changing(database) as connection:
        john = administration.find_user(connection, JOHN["email"]).id
    caplog.set_level(logging.INFO, AUDIT_LOGGER)
    leaves = asyncio.Event()
    with stuck(service.page_database) as block:
        headers = [HTML, ("sec-fetch-site", "same-origin"), ("content-type", "application/x-www-form-urlencoded")]
        request = asyncio.ensure_future(
            admin.request("POST", f"{MEMBERS}/{john}/role", headers=headers, body=b"role=publisher", leaves=leaves)
        )
        await block.entered()
        leaves.set()
        await asyncio.sleep(0.1)
        block.release()
        assert (await request).status == 303
    with changing(database) as connection:
        found = administration.list_memberships(connection, john)
    assert {membership.role for membership in found if membership.account_id == ACCOUNT} == {Role.PUBLISHER}
    [recorded] = [record.msg for record in caplog.records if record.name == AUDIT_LOGGER]
    assert isinstance(recorded, Event)
    assert (recorded.event, recorded.user_id) == (EventName.ROLE_CHANGED, john)


@on_sqlite
async def test_a_change_whose_client_has_gone_before_its_turn_is_not_made(
    admin: Client, service: Node, database: Database
) -> None:
    with changing(database) as connection:
        john = administration.find_user(connection, JOHN["email"]).id
    leaves = asyncio.Event()
    headers = [HTML, ("sec-fetch-site", "same-origin")]
    with stuck(service.page_database) as block:
        async with in_progress(*(see(admin, SEARCH) for _ in range(AT_ONCE))):
            await block.entered()
            change = admin.request("POST", f"{MEMBERS}/{john}/remove", headers=headers, leaves=leaves)
            request = asyncio.ensure_future(change)
            await asyncio.sleep(0.1)
            leaves.set()
            block.release()
            with pytest.raises(LookupError):
                await asyncio.wait_for(request, PATIENCE)
    with changing(database) as connection:
        assert ACCOUNT in {each.account_id for each in administration.list_memberships(connection, john)}


async def test_a_page_counts_as_in_flight_while_its_client_is_watched(
    admin: Client, service: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = BlockingStep()

    def search(*_: object, **_more: object) -> MemberPage:
        block()
        return MemberPage([], 0)

    monkeypatch.setattr("sso_service.database.members.list_members", search)
    with with_settings(service, max_in_flight=1) as limited:
        limited.cookies = admin.cookies
        request = asyncio.ensure_future(see(limited, SEARCH))
        await block.entered()
        assert (await limited.get("/session")).error == "overloaded"
        block.release()
        assert (await request).status == 200
        assert (await limited.get("/session")).status == 200


# --- limits ----------------------------------------------------------------------------------------------------------


async def test_a_session_that_requests_pages_too_often_gets_429_without_a_query(
    admin: Client, neighbour: Client, service: Node
) -> None:
    service.page_limits = PageLimits(read_settings({"SSO_PAGE_RATE_LIMIT": "3/hour"}).page_rate)
    assert [(await see(admin, MEMBERS)).status for _ in range(3)] == [200, 200, 200]
    connections: list[object] = []
    for engine in (service.database.engine, service.page_database.engine):
        event.listen(engine, "checkout", lambda *_: connections.append(_))
    answer = await see(admin, MEMBERS)
    assert (answer.status, answer.header("retry-after")) == (429, "1200")
    assert MessagePage(answer.text).texts["h1"] == "Please try again in a moment"
    german = await admin.request("GET", MEMBERS, headers=[HTML, ("accept-language", "de")])
    assert MessagePage(german.text).texts["h1"] == "Bitte versuch es gleich noch einmal"
    answer = await admin.get(MEMBERS)
    assert (answer.status, answer.error, answer.header("retry-after")) == (429, "rate_limited", "1200")
    assert (await submit(admin, API_TOKENS, [("name", "x")])).status == 429
    assert connections == []
    # Neither other sessions nor other requests of this one are limited.
    assert (await admin.get("/session")).status == 200
    assert (await see(neighbour, OTHER_PAGE)).status == 200


def test_a_session_gets_its_quota_back_with_time(clock: Clock) -> None:
    limits = PageLimits(read_settings({"SSO_PAGE_RATE_LIMIT": "60/minute"}).page_rate, monotonic=clock)
    session, other = Session(1, ACCOUNT, 1), Session(1, ACCOUNT, 2)

    def allowed(of: Session) -> int:
        count = 0
        with suppress(PagesRateLimited):
            while True:
                limits.count(of)
                count += 1
        return count

    assert (allowed(session), allowed(session), allowed(other)) == (60, 0, 60)
    clock.advance(10)
    assert allowed(session) == 10
    clock.advance(3600)
    assert allowed(session) == 60


def test_the_memory_of_the_limit_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sso_service.services.page_limits._MOST_COUNTED", 10)
    limits = PageLimits(read_settings({"SSO_PAGE_RATE_LIMIT": "1/hour"}).page_rate, monotonic=clock)
    for issued_at in range(100):
        limits.count(Session(1, 1 + issued_at, issued_at))
    for issued_at in range(90, 100):
        with pytest.raises(PagesRateLimited):
            limits.count(Session(1, 1 + issued_at, issued_at))
    limits.count(Session(1, 1, 0))


def test_further_sessions_do_not_multiply_the_quota_of_an_account(clock: Clock) -> None:
    limits = PageLimits(read_settings({"SSO_PAGE_RATE_LIMIT": "10/minute"}).page_rate, monotonic=clock)
    served = 0
    for issued_at in range(100):
        with suppress(PagesRateLimited):
            for _ in range(10):
                limits.count(Session(1, ACCOUNT, issued_at))
                served += 1
    assert served == 10 * SESSIONS
    limits.count(Session(1, OTHER_ACCOUNT, 0))


@pytest.mark.parametrize("limit", ["often", "0", "10", "10/fortnight", "-1/minute", "100 per"])
def test_an_invalid_page_rate_limit_is_refused_at_start(limit: str) -> None:
    with pytest.raises(SettingsError, match="SSO_PAGE_RATE_LIMIT"):
        read_settings({"SSO_PAGE_RATE_LIMIT": limit})


async def test_an_account_has_few_requests_in_progress_and_some_waiting() -> None:
    limits = PageLimits(read_settings({}).page_rate)
    running: list[int] = []
    release = asyncio.Event()

    async def request(account_id: int) -> None:
        async with limits.turn(account_id):
            running.append(account_id)
            await release.wait()

    async with in_progress(*(request(ACCOUNT) for _ in range(AT_ONCE + WAITING))) as tasks:
        await until(lambda: len(running) == AT_ONCE)
        with pytest.raises(PagesRateLimited):
            await request(ACCOUNT)
        async with in_progress(request(OTHER_ACCOUNT)):
            await until(lambda: OTHER_ACCOUNT in running)
            for task in tasks[: AT_ONCE + 1]:  # clients that leave, one of them while it waits
                task.cancel()
            await until(lambda: running.count(ACCOUNT) == 2 * AT_ONCE)
            release.set()
            await asyncio.gather(*tasks[AT_ONCE + 1 :])
    assert running.count(ACCOUNT) == AT_ONCE + WAITING - 1
    await request(ACCOUNT)


async def test_a_request_whose_turn_does_not_come_gets_429(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sso_service.services.page_limits.PATIENCE", 0.01)
    limits = PageLimits(read_settings({}).page_rate)

    async def request() -> None:
        async with limits.turn(ACCOUNT):
            await asyncio.Event().wait()

    async with in_progress(*(request() for _ in range(AT_ONCE))):
        with pytest.raises(PagesRateLimited):
            await request()


# --- changes ---------------------------------------------------------------------------------------------------------


async def test_a_refused_change_does_not_read_every_member(admin: Client, service: Node, database: Database) -> None:
    """Logins wait for the transaction of a change, and an admin can repeat a change that is refused."""
    with changing(database) as connection:
        add_members(connection, 5000)
        connection.exec_driver_sql("ANALYZE")
        jane = connection.scalars(select(users.c.id).where(users.c.email == JANE["email"])).one()
    plans: list[str] = []

    @event.listens_for(service.page_database.engine, "before_cursor_execute")
    def explain(_c: object, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        if statement.startswith("SELECT"):
            cursor.execute(f"EXPLAIN {'QUERY PLAN ' if database.is_sqlite else ''}{statement}", parameters)
            plans.append(str(cursor.fetchall()))

    page = await submit(admin, f"{MEMBERS}/{jane}/role", [("role", "editor"), ("confirmed", "1")])
    assert page.status == 409
    *_, search_for_another, _ = [plan for plan in plans if "memberships" in plan]
    assert "ix_memberships_admins" in search_for_another, plans


# --- search ----------------------------------------------------------------------------------------------------------


@on_sqlite
def test_sqlite_calls_no_function_of_this_process(database: Database) -> None:
    with database.connect() as connection:
        assert connection.exec_driver_sql("SELECT lower('É')").scalar_one() == "É"


async def test_users_without_a_search_text_get_one(admin: Client, service: Node, database: Database) -> None:
    with changing(database) as connection:  # as a program of the version before search texts does
        person = [{"email": f"old{n}@example.com", "first_name": "Élie", "last_name": "Old"} for n in range(450)]
        connection.execute(insert(users), [{**each, "created_at": 1} for each in person])
        found = connection.scalars(select(users.c.id).where(users.c.last_name == "Old")).all()
        joined = [{"user_id": each, "account_id": ACCOUNT, "role": "editor"} for each in found]
        connection.execute(insert(memberships), joined)
    assert (await page_of(admin, f"{MEMBERS}?search=%C3%A9lie")).rows == []
    async with in_progress(service.run_in_background()):
        for _ in range(3000):
            page = await page_of(admin, f"{MEMBERS}?search=%C3%A9lie")
            if "450 members" in page.words("section"):
                break
            await asyncio.sleep(0.02)
        else:
            pytest.fail("the users were not found")
