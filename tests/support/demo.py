"""The demo account of a running service."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from playwright.sync_api import BrowserContext, Page

from sso_service.client import SSOClient
from sso_service.services.installation import DEMO_ACCOUNT, DEMO_ADMIN, DEMO_TEAM

ADMIN: dict[str, str] = msgspec.structs.asdict(DEMO_ADMIN)


@dataclass(frozen=True, slots=True)
class Demo:
    """A service with the demo account, a login link for its admin, and a client with its API token."""

    url: str
    env: Mapping[str, str]
    admin_link: str
    client: SSOClient

    def address(self, page: str) -> str:
        """Return the URL of a page of the demo team. `page` follows the path of the team."""
        return f"{self.url}/client/{DEMO_ACCOUNT}/t/{DEMO_TEAM}/{page}"

    def link(self, person: Mapping[str, str], page: str = "posts") -> str:
        """Return a login link for a person."""
        return self.client.login_url(self.address(page), **person)

    def open(self, context: BrowserContext, person: Mapping[str, str], page: str = "posts") -> Page:
        """Open a page in this browser by a login link for a person."""
        opened = context.new_page()
        opened.goto(self.link(person, page))
        return opened
