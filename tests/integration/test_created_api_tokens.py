"""API tokens of an account: every one is on a page, with its creator and its expiry, and can be revoked."""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import Any

import msgspec
import pytest
from sqlalchemy import insert, select, update

from sso_service.database import open_database
from sso_service.database.accounts import EXPIRES_SOON, ApiTokenStatus, find_api_token
from sso_service.database.schema import api_tokens
from sso_service.database.transactions import Database
from sso_service.errors import NotAnAdmin
from sso_service.observability import logs
from sso_service.observability.audit import Event
from sso_service.permissions import Role, Scope
from sso_service.services.accounts import Actor
from sso_service.services.node import Node
from tests.support import administration
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT
from tests.support.databases import changing, on_sqlite
from tests.support.metrics import sample_of, samples_in
from tests.support.pages import Page
from tests.support.studio import API_TOKENS, MEMBERS, page_of, signed_in, submit
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

DAY = 86400


@pytest.fixture
async def admin(client: Client, database: Database, api_token: str) -> Client:
    """A browser in which Jane, an admin, is signed in."""
    return await signed_in(client, database, api_token, Role.ADMIN)


@pytest.fixture
async def other_admin(client: Client, database: Database, api_token: str) -> Client:
    """A browser in which John, also an admin, is signed in."""
    return await signed_in(client, database, api_token, Role.ADMIN, JOHN)


def add_api_tokens(database: Database, names: Sequence[str], account_id: int = ACCOUNT, **values: Any) -> None:
    """Add API tokens in this order, in one statement."""
    common = {"account_id": account_id, "hint": "abcd", "scopes": "write:sso", "created_at": 1, **values}
    with changing(database) as connection:
        rows = [{**common, "name": name, "digest": secrets.token_hex(32)} for name in names]
        connection.execute(insert(api_tokens), rows)


def active(database: Database) -> set[str]:
    """Return the names of the API tokens that are not revoked."""
    with changing(database) as connection:
        return set(connection.scalars(select(api_tokens.c.name).where(api_tokens.c.revoked_at.is_(None))))


def id_of(database: Database, email: str) -> int:
    with changing(database) as connection:
        found: int = administration.find_user(connection, email).id
        return found


async def create(browser: Client, name: str) -> str:
    """Create an API token on the settings page, and return its secret."""
    answer = await submit(browser, API_TOKENS, [("name", name), ("scope", "write:sso")])
    assert answer.status == 200
    (secret,) = [word for word in Page(answer.text).words("secret").split() if word.startswith("wf_live_")]
    return secret


def names(page: Page) -> list[str]:
    return [row[0] for row in page.rows]


def link(page: Page, text: str) -> str | None:
    """Return the address of the link with this text, or None."""
    return next((address for each, address in page.links if each == text), None)


# --- pages -----------------------------------------------------------------------------------------------------------


async def test_each_of_230_api_tokens_is_on_a_page_newest_first(admin: Client, database: Database) -> None:
    numbered = [f"token {n}" for n in range(230)]
    add_api_tokens(database, ["the oldest", *numbered])
    add_api_tokens(database, ["theirs"], OTHER_ACCOUNT)
    add_api_tokens(database, [f"gone {n}" for n in range(120)], revoked_at=2)
    add_api_tokens(database, [f"old {n}" for n in range(3)], expires_at=2)

    seen: list[str] = []
    pages: list[list[str]] = []
    address: str | None = API_TOKENS
    while address:
        page = await page_of(admin, address)
        pages.append(names(page))
        seen += names(page)
        assert (link(page, "Newer") is None) == (len(pages) == 1)
        address = link(page, "Older")
    assert seen == [*reversed(numbered), "the oldest", "tests"]
    assert {len(each) for each in pages[:-1]} == {50}

    for expected in reversed(pages[:-1]):  # the same pages, backwards
        back = link(page, "Newer")
        assert back
        page = await page_of(admin, back)
        assert names(page) == expected
    assert link(page, "Newer") is None

    revoke = link(await page_of(admin, f"{API_TOKENS}?before=3"), "Revoke the oldest")
    assert revoke
    await submit(admin, revoke)
    assert "the oldest" not in active(database)


async def test_revoked_and_expired_api_tokens_have_pages_of_their_own(admin: Client, database: Database) -> None:
    add_api_tokens(database, [f"gone {n}" for n in range(60)], revoked_at=2)
    add_api_tokens(database, ["old"], expires_at=2)
    page = await page_of(admin, API_TOKENS)
    assert (names(page), page.words("h2").count("Active API tokens")) == (["tests"], 1)
    first = await page_of(admin, link(page, "Show revoked and expired ones") or "")
    assert names(first) == ["old", *(f"gone {n}" for n in range(59, 10, -1))]
    assert (first.rows[0][-1], first.rows[1][-1]) == ("expired", "revoked")
    last = await page_of(admin, link(first, "Older") or "")
    assert names(last) == [f"gone {n}" for n in range(10, -1, -1)]
    assert (link(last, "Older"), link(last, "Show active ones")) == (None, API_TOKENS)


@on_sqlite
async def test_an_invalid_position_means_the_first_page(admin: Client, database: Database) -> None:
    add_api_tokens(database, [f"token {n}" for n in range(60)])
    first = names(await page_of(admin, API_TOKENS))
    for query in (
        "before=",
        "before=0",
        "before=-1",
        "before=x",
        "after=01",
        "before=%00",
        f"after={'9' * 5000}",
        "show=x",
    ):
        assert names(await page_of(admin, f"{API_TOKENS}?{query}")) == first, query[:20]
    beyond = await page_of(admin, f"{API_TOKENS}?before=1")
    assert (names(beyond), "There are no API tokens here." in beyond.words("p")) == ([], True)
    assert names(await page_of(admin, f"{API_TOKENS}?after=9999999999")) == []


# --- creators --------------------------------------------------------------------------------------------------------


async def test_an_api_token_shows_its_creator(admin: Client, other_admin: Client, database: Database) -> None:
    await create(other_admin, "Portal")
    rows = {row[0]: row for row in (await page_of(admin, API_TOKENS)).rows}
    assert rows["Portal"][4].endswith(f"by John Roe {JOHN['email']}")
    assert " by " not in rows["tests"][4], "it was made on the command line"


async def test_removing_a_member_offers_to_revoke_their_api_tokens(
    client: Client, admin: Client, other_admin: Client, database: Database
) -> None:
    john = id_of(database, JOHN["email"])
    secret = await create(other_admin, "Portal")
    await create(admin, "Jane's")
    add_api_tokens(database, ["John's in another account"], OTHER_ACCOUNT, created_by=john)
    add_api_tokens(database, ["gone"], revoked_at=2, created_by=john)
    everything = active(database)
    address = f"{MEMBERS}/{john}/remove"

    page = await page_of(admin, address)
    assert page.words("li").count(f"Portal ( …{secret[-4:]} )") == 1
    for other in ("Jane's", "another account", "gone"):
        assert other not in page.words("main")
    (form,) = (each for each in page.forms if each.action is None)
    assert form.fields == [], "the checkbox is checked"
    assert await submitted(admin, address) == 303
    assert active(database) == everything
    assert (await client.post_json("/v1/sso_tokens", JOHN, token=secret)).status == 201  # which adds John again

    assert await submitted(admin, address, [("revoke_api_tokens", "1")]) == 303
    assert active(database) == everything - {"Portal"}
    assert (await client.post_json("/v1/sso_tokens", JOHN, token=secret)).status == 401


async def submitted(browser: Client, address: str, fields: Sequence[tuple[str, str]] = ()) -> int:
    return (await submit(browser, address, fields)).status


async def test_demoting_an_admin_shows_their_api_tokens_and_asks_first(
    admin: Client, other_admin: Client, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    john = id_of(database, JOHN["email"])
    await create(other_admin, "Portal")
    address = f"{MEMBERS}/{john}/role"
    answer = await submit(admin, address, [("role", "publisher"), ("search", "roe"), ("page", "1")])
    page = Page(answer.text)
    assert (answer.status, page.words("h2")) == (200, "Change the role of John Roe?")
    assert "Portal" in page.words("li")
    assert await submitted(other_admin, API_TOKENS, [("name", "x" * 200)]) == 422, "the question demoted John"

    caplog.set_level(logging.INFO, logs.AUDIT_LOGGER)
    caplog.clear()
    form = page.form(address)
    answer = await submit(admin, form.action or "", [*form.fields, ("revoke_api_tokens", "1")])
    assert (answer.status, answer.header("location")) == (303, f"{MEMBERS}?search=roe&page=1&notice=role")
    assert active(database) == {"tests"}
    events = [(record.msg.event, record.msg.by_user_id) for record in caplog.records if isinstance(record.msg, Event)]
    jane = id_of(database, JANE["email"])
    assert events == [("role_changed", jane), ("api_token_revoked", jane)]
    # Publishers create no API tokens, and an admin keeps them: neither is asked about.
    assert await submitted(admin, address, [("role", "editor")]) == 303
    assert await submitted(admin, address, [("role", "admin")]) == 303


async def test_a_question_lists_fifty_api_tokens_and_revokes_all(
    admin: Client, other_admin: Client, database: Database
) -> None:
    john = id_of(database, JOHN["email"])
    add_api_tokens(database, [f"made {n}" for n in range(60)], created_by=john)
    page = await page_of(admin, f"{MEMBERS}/{john}/remove")
    assert (page.words("li").count("made "), page.words("li").endswith("and more")) == (50, True)
    assert await submitted(admin, f"{MEMBERS}/{john}/remove", [("revoke_api_tokens", "1")]) == 303
    assert active(database) == {"tests"}


async def test_an_admin_cannot_revoke_another_accounts_api_tokens_by_a_removal(
    admin: Client, other_admin: Client, database: Database
) -> None:
    john = id_of(database, JOHN["email"])
    add_api_tokens(database, ["elsewhere"], OTHER_ACCOUNT, created_by=john)
    assert "elsewhere" not in (await page_of(admin, f"{MEMBERS}/{john}/remove")).words("main")
    assert await submitted(admin, f"{MEMBERS}/{john}/remove", [("revoke_api_tokens", "1")]) == 303
    assert active(database) == {"tests", "elsewhere"}


async def test_the_last_admin_keeps_role_and_api_tokens(admin: Client, database: Database) -> None:
    await create(admin, "Portal")
    jane = id_of(database, JANE["email"])
    for address, fields in (
        (f"{jane}/role", [("role", "editor")]),
        (f"{jane}/role", [("role", "editor"), ("confirmed", "1")]),
        (f"{jane}/remove", []),
    ):
        assert await submitted(admin, f"{MEMBERS}/{address}", [*fields, ("revoke_api_tokens", "1")]) == 409
    assert active(database) == {"tests", "Portal"}


async def test_no_api_token_survives_that_is_created_during_the_removal(
    service: Node, admin: Client, other_admin: Client, database: Database
) -> None:
    john = id_of(database, JOHN["email"])
    operator, scopes = Actor(operator="root"), frozenset({Scope.WRITE_SSO})
    # Another node, because one node would make all changes in one transaction, one after the other.
    with closing(Node(service.settings, open_database(service.settings), service.keys)) as another:
        for attempt in range(40):
            with changing(database) as connection:
                administration.set_role(connection, JOHN["email"], ACCOUNT, Role.ADMIN)
            ending = (
                service.accounts.set_role(operator, ACCOUNT, john, Role.EDITOR, revoke_api_tokens=True)
                if attempt % 2
                else service.accounts.disable_user(operator, john, revoke_api_tokens=True)
            )
            creating = [
                another.accounts.create_api_token(Actor(admin_id=john), account_id=ACCOUNT, name=f"{n}", scopes=scopes)
                for n in range(3)
            ]
            results = await asyncio.gather(creating[0], ending, *creating[1:], return_exceptions=True)
            assert all(isinstance(each, str | list | NotAnAdmin) for each in results), results
            assert active(database) == {"tests"}, attempt
            await service.accounts.enable_user(operator, john)


# --- expiry ----------------------------------------------------------------------------------------------------------


async def test_api_tokens_that_expire_within_14_days_are_shown(admin: Client, database: Database, clock: Clock) -> None:
    now = int(clock())
    add_api_tokens(database, ["soon"], expires_at=now + EXPIRES_SOON)
    add_api_tokens(database, ["later"], expires_at=now + EXPIRES_SOON + 1)
    add_api_tokens(database, ["theirs"], OTHER_ACCOUNT, expires_at=now + 5)
    add_api_tokens(database, ["revoked"], expires_at=now + 5, revoked_at=now)
    page = await page_of(admin, API_TOKENS)
    assert "1 API token expires within 14 days." in page.words("warning")
    assert [row[0] for row in page.rows if "expires soon" in row[6]] == ["soon"]
    expiring = await page_of(admin, link(page, "Show what expires soon") or "")
    assert names(expiring) == ["soon"]
    with changing(database) as connection:
        connection.execute(update(api_tokens).where(api_tokens.c.name == "soon").values(expires_at=now))
    page = await page_of(admin, API_TOKENS)
    assert (names(page), page.words("warning")) == (["later", "tests"], "")


def expiring_events(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    events = [msgspec.to_builtins(record.msg) for record in caplog.records if isinstance(record.msg, Event)]
    caplog.clear()
    return events


async def test_all_nodes_together_log_an_expiring_api_token_once_a_day(
    service: Node, database: Database, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    clock.now = 1_900_000_000.5
    add_api_tokens(database, ["soon"], expires_at=1_900_000_000 + 2 * DAY)
    add_api_tokens(database, ["later"], expires_at=1_900_000_000 + 30 * DAY)
    caplog.set_level(logging.INFO, logs.AUDIT_LOGGER)
    settings = service.settings
    nodes = [service, *(Node(settings, database, service.keys, clock=clock) for _ in range(2))]

    async def round_of_all() -> list[dict[str, Any]]:
        await asyncio.gather(*(node.accounts.log_expiring_api_tokens() for node in nodes))
        return expiring_events(caplog)

    expected = {
        "event": "api_token_expiring",
        "account_id": ACCOUNT,
        "api_token_id": 1,
        "expires_at": "2030-03-19T17:46:40Z",
    }
    assert await round_of_all() == [expected]
    clock.advance(DAY - 60)
    assert await round_of_all() == []
    clock.advance(60)
    assert await round_of_all() == [expected]
    clock.advance(DAY)
    assert await round_of_all() == [], "it has expired"
    for node in nodes[1:]:
        node.close()


@on_sqlite
async def test_many_expiring_api_tokens_are_logged_a_hundred_at_a_time(
    service: Node, database: Database, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    add_api_tokens(database, [f"{n}" for n in range(250)], expires_at=int(clock()) + DAY)
    caplog.set_level(logging.INFO, logs.AUDIT_LOGGER)
    counts, ids = [], set()
    for _ in range(4):
        await service.accounts.log_expiring_api_tokens()
        events = expiring_events(caplog)
        counts.append(len(events))
        ids |= {event["api_token_id"] for event in events}
    assert (counts, len(ids)) == ([100, 100, 50, 0], 250)


async def test_metrics_report_how_many_api_tokens_expire_and_when(
    client: Client,
    service: Node,
    database: Database,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sso_service.services.node.PURGE_INTERVAL", 0.01)
    monkeypatch.setattr("sso_service.services.node.secrets.randbelow", lambda _: 0)
    now = int(clock())
    add_api_tokens(database, ["expired"], expires_at=now)
    add_api_tokens(database, ["soon"], expires_at=now + DAY)
    add_api_tokens(database, ["soon as well"], OTHER_ACCOUNT, expires_at=now + 2 * DAY)
    caplog.set_level(logging.INFO, logs.AUDIT_LOGGER)
    assert "sso_api_token" not in (await client.get("/metrics")).text, "it is not known yet"
    background = asyncio.create_task(service.run_in_background())
    await until(lambda: service.expiring is not None)
    samples = samples_in((await client.get("/metrics")).text)
    assert sample_of(samples, "sso_api_tokens_expiring") == 2
    assert sample_of(samples, "sso_api_token_next_expiry_seconds") == DAY
    await until(lambda: len(caplog.records) >= 2)
    clock.advance(30 * DAY)
    await until(lambda: service.expiring is not None and service.expiring.count == 0)
    text = (await client.get("/metrics")).text
    assert sample_of(samples_in(text), "sso_api_tokens_expiring") == 0
    assert "sso_api_token_next_expiry_seconds" not in text
    background.cancel()
    with suppress(asyncio.CancelledError):
        await background


async def test_lists_and_records_agree_about_the_status(service: Node, database: Database, clock: Clock) -> None:
    now = int(clock())
    expiries = (None, now - 1, now, now + 1, now + EXPIRES_SOON, now + EXPIRES_SOON + 1)
    for expires_at in expiries:
        for revoked_at in (None, 1):
            add_api_tokens(database, ["x"], expires_at=expires_at, revoked_at=revoked_at)
    counts = []
    for status in ApiTokenStatus:
        listed = await service.accounts.list_api_tokens_of(ACCOUNT, statuses=[status], limit=99)
        assert {each.status(now) for each in listed} == {status}
        counts.append(len(listed))
    assert counts == [2, 2, 2, 6]


async def test_revoking_by_creator_makes_the_secret_unknown(
    client: Client, service: Node, other_admin: Client, database: Database
) -> None:
    secret = await create(other_admin, "Portal")
    john = id_of(database, JOHN["email"])
    [created] = await service.accounts.remove_member(Actor(operator="root"), ACCOUNT, john, revoke_api_tokens=True)
    with changing(database) as connection:
        assert find_api_token(connection, created.id).revoked_at is not None
        digest = connection.scalar(select(api_tokens.c.digest).where(api_tokens.c.id == created.id))
        connection.execute(update(api_tokens).values(revoked_at=None))
    assert (digest or "").startswith("-")
    assert (await client.post_json("/v1/sso_tokens", JOHN, token=secret)).status == 401
