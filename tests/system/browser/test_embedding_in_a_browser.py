"""A Studio in a frame of an intranet on another site: the login, and the session afterwards."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
import msgspec
import pytest
from playwright.sync_api import Browser, BrowserContext, Frame
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sso_service.client import SSOClient
from sso_service.database import open_database
from sso_service.key_directory import KeyDirectory
from sso_service.services.node import Node
from sso_service.settings import Settings
from sso_service.web.app import create_app
from tests.support.data import JANE, PAGE

Https = Callable[[ASGIApp, str], str]

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


async def intranet(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond with a page that embeds the address in its query."""
    if scope["type"] == "http":
        source = Request(scope).query_params.get("studio", "")
        await HTMLResponse(f'<!DOCTYPE html><iframe src="{source}"></iframe>')(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Sites:
    """The origins of a Studio, of an intranet that may embed it, and of a site that must not."""

    studio: str
    intranet: str
    stranger: str
    client: SSOClient

    def login_url(self) -> str:
        return self.client.login_url(f"{self.studio}{PAGE}?chromeless=1", **JANE)


@pytest.fixture
def sites(settings: Settings, keys_dir: Path, api_token: str, https: Https) -> Iterator[Sites]:
    embedding = https(intranet, "intranet.example")
    service = Node(
        msgspec.structs.replace(settings, embed_origins=embedding), open_database(settings), KeyDirectory(keys_dir)
    )
    studio = https(create_app(service), "studio.example")
    transport = httpx.HTTPTransport(verify=False)  # its certificate names a host that only the browser resolves
    with SSOClient(studio.replace("studio.example", "127.0.0.1"), api_token, transport=transport) as client:
        yield Sites(studio, embedding, https(intranet, "stranger.example"), client)


@pytest.fixture
def person(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(ignore_https_errors=True)
    yield context
    context.close()


def frame_of(person: BrowserContext, site: str, address: str) -> Frame:
    """Open a page of `site` that embeds `address`, and return the frame."""
    page = person.new_page()
    page.goto(f"{site}/?studio={quote(address, safe='')}")
    (frame,) = page.main_frame.child_frames
    return frame


def session_in(frame: Frame, studio: str) -> str:
    """Return the response of `/session` in this frame."""
    frame.goto(f"{studio}/session")
    return frame.locator("body").inner_text()


def test_a_login_in_a_frame_of_another_site_lasts(sites: Sites, person: BrowserContext) -> None:
    frame = frame_of(person, sites.intranet, sites.login_url())
    assert frame.url == f"{sites.studio}{PAGE}?chromeless=1"
    assert JANE["email"] in session_in(frame, sites.studio)

    frame.page.reload()
    assert JANE["email"] in session_in(frame_of(person, sites.intranet, f"{sites.studio}{PAGE}"), sites.studio)


def test_a_session_in_a_frame_is_not_sent_in_frames_of_other_sites(sites: Sites, person: BrowserContext) -> None:
    frame_of(person, sites.intranet, sites.login_url())
    foreign = frame_of(person, sites.stranger, f"{sites.studio}{PAGE}")
    foreign.wait_for_url(re.compile("^chrome-error:"))  # the page refuses this frame; another navigation must wait
    assert "not_signed_in" in session_in(foreign, sites.studio)
    assert "not_signed_in" in session_in(person.new_page().main_frame, sites.studio)


def test_pages_appear_only_in_frames_of_the_configured_origins(sites: Sites, person: BrowserContext) -> None:
    forged = f"{sites.studio}{PAGE}?sso={'A' * 43}"
    assert "not valid" in frame_of(person, sites.intranet, forged).locator("h1").inner_text()
    frame_of(person, sites.stranger, forged).wait_for_url(re.compile("^chrome-error:"))
