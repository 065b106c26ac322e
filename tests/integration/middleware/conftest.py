"""Fixtures of the middleware's tests: a frontend whose middleware calls the real application."""

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from sso_service.client import AsyncSSOClient
from sso_service.database.transactions import Database
from sso_service.services.node import Node
from sso_service.web.app import create_app
from tests.support.api import make_api_token
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import OTHER_ACCOUNT
from tests.support.frontend import frontend
from tests.support.python_client import SERVICE_URL


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    """SQLite only: the middleware uses no database, and the service's own tests cover both kinds."""
    shutil.copy(sqlite_template, tmp_path / "sso.db")
    return f"sqlite:///{tmp_path / 'sso.db'}"


@pytest.fixture
def transport(service: Node) -> httpx.ASGITransport:
    """A transport that calls the real application of the service."""
    return httpx.ASGITransport(create_app(service))


@pytest.fixture
def browser(transport: httpx.ASGITransport, platform: str, clock: Clock) -> Client:
    """A browser in front of a frontend for all accounts."""
    return Client(frontend(api_token=platform, transport=transport, clock=clock))


@pytest.fixture
def other_api_token(database: Database) -> str:
    """The secret of an API token of `OTHER_ACCOUNT` with the scope `write:sso`."""
    return make_api_token(database, account_id=OTHER_ACCOUNT)[1]


@pytest.fixture
def is_unused(transport: httpx.ASGITransport, platform: str) -> Callable[[str], Awaitable[bool]]:
    """A function that returns whether a login token is still active."""

    async def is_unused(token: str) -> bool:
        async with AsyncSSOClient(SERVICE_URL, platform, transport=transport) as client:
            return (await client.verify(token)).active

    return is_unused
