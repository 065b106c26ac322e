"""Requests to Studio pages, as browsers make them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import msgspec
from sqlalchemy import Connection, insert, literal, select

from sso_service.database import open_database
from sso_service.database.schema import memberships, users
from sso_service.database.transactions import Database
from sso_service.people import search_text
from sso_service.permissions import Role
from sso_service.services.node import Node
from sso_service.web.app import create_app
from tests.support import administration
from tests.support.client import Answer, Client
from tests.support.data import ACCOUNT, JANE, TEAM
from tests.support.databases import changing
from tests.support.pages import Page

HOME = f"/client/{ACCOUNT}/t/{TEAM}"
SETTINGS = f"{HOME}/settings"
API_TOKENS, MEMBERS = f"{SETTINGS}/api-tokens", f"{SETTINGS}/team"
HTML = ("accept", "text/html,application/xhtml+xml,*/*;q=0.8")
SAME_ORIGIN = ("sec-fetch-site", "same-origin")


def add_members(connection: Connection, count: int, account_id: int = ACCOUNT) -> None:
    """Add editors to an account: `Firstname0 Lastname0`, `m0@example.com` and so on."""
    people = [
        {
            "email": (email := f"m{n}@example.com"),
            "first_name": (first := f"Firstname{n}"),
            "last_name": (last := f"Lastname{n}"),
            "search": search_text(email, first, last),
            "created_at": 1,
        }
        for n in range(count)
    ]
    connection.execute(insert(users), people)
    found = select(users.c.id, literal(account_id), literal(str(Role.EDITOR))).where(
        users.c.email.like("m%@example.com")
    )
    connection.execute(insert(memberships).from_select(["user_id", "account_id", "role"], found))


@contextmanager
def with_settings(service: Node, **changes: Any) -> Iterator[Client]:
    """Yield a client of another node over the same database and keys, with other settings."""
    settings = msgspec.structs.replace(service.settings, **changes)
    other = Node(settings, open_database(settings), service.keys, clock=service.trust.now)
    yield Client(create_app(other))
    other.close()


async def signed_in(
    client: Client, database: Database, api_token: str, role: Role, person: Mapping[str, str] = JANE
) -> Client:
    """Return a new browser in which `person` is signed in with this role."""
    browser = client.another()
    token = await browser.issue(api_token, person)
    with changing(database) as connection:
        administration.set_role(connection, person["email"], ACCOUNT, role)
    answer = await browser.get(f"/?sso={token}")
    assert answer.status == 303, answer
    return browser


async def see(browser: Client, target: str) -> Answer:
    """Navigate to `target`."""
    return await browser.request("GET", target, headers=[HTML])


async def page_of(browser: Client, target: str, status: int = 200) -> Page:
    """Navigate to `target`, check the status, and return the page."""
    answer = await see(browser, target)
    assert answer.status == status, (target, answer.status)
    assert answer.header("content-type") == "text/html; charset=utf-8"
    return Page(answer.text)


async def submit(
    browser: Client,
    target: str,
    fields: Sequence[tuple[str, str]] = (),
    *,
    origin: Sequence[tuple[str, str]] = (SAME_ORIGIN,),
) -> Answer:
    """Submit a form. The headers in `origin` state the page that it comes from: one of this origin by default."""
    headers = [HTML, *origin, ("content-type", "application/x-www-form-urlencoded")]
    return await browser.request("POST", target, headers=headers, body=urlencode(fields).encode())
