"""Every page in Chromium: valid HTML, no external requests, accessible in both colour schemes, fits a phone."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import html5lib
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Page, Response, ViewportSize
from sqlalchemy import Connection, insert, update

from sso_service import keyring, tokens
from sso_service.database import open_database, schema
from sso_service.database.directory import ProvisionRequest, provision
from sso_service.database.transactions import Database
from sso_service.permissions import Role, Scope
from sso_service.services.installation import DEMO_ACCOUNT
from sso_service.settings import read_settings
from sso_service.tokens import Claims
from tests.support import administration
from tests.support.data import JANE, JOHN, PORTAL
from tests.support.demo import ADMIN, Demo

SCREENSHOTS = Path(__file__).parent / "screenshots" / "all"

DESKTOP = ViewportSize(width=1100, height=700)
PHONE = ViewportSize(width=390, height=640)

# Of maximum length, without places for line breaks.
LONG = {
    "email": f"{'m' * 64}@{'a' * 60}.example",
    "first_name": "Maximiliane-" + "x" * 60,
    "last_name": "von und zu " + "Y" * 80,
}


@dataclass(frozen=True, slots=True)
class Scene:
    """A browser page and the service that it visits."""

    demo: Demo
    page: Page

    def open(self, address: str) -> None:
        self.page.goto(address if "://" in address else self.demo.address(address))

    def follow(self, link: str) -> None:
        """Open a login link, and confirm the login."""
        self.page.goto(link)
        self.press()

    def sign_in(self, person: dict[str, str], page: str) -> None:
        self.follow(self.demo.link(person, page))

    def press(self) -> None:
        """Press the primary button."""
        self.page.locator("main .primary").click()


def editor(scene: Scene) -> None:
    scene.sign_in(JANE, "posts")


def admin(scene: Scene) -> None:
    scene.sign_in(ADMIN, "areas")


def menu(scene: Scene) -> None:
    scene.sign_in(LONG, "posts")
    scene.page.locator("summary").click()


def chromeless(scene: Scene) -> None:
    scene.sign_in(ADMIN, "settings?chromeless=1")


def api_tokens(scene: Scene) -> None:
    scene.sign_in(ADMIN, "settings/api-tokens")


def revoked_api_tokens(scene: Scene) -> None:
    scene.sign_in(ADMIN, "settings/api-tokens?show=revoked")


def older_api_tokens(scene: Scene) -> None:
    api_tokens(scene)
    scene.page.locator("a[rel=next]").click()


def new_secret(scene: Scene) -> None:
    api_tokens(scene)
    scene.page.locator("#name").fill("SharePoint")
    scene.press()


def problem(scene: Scene) -> None:
    api_tokens(scene)
    scene.page.locator("#name").fill("   ")
    scene.press()


def notice(scene: Scene) -> None:
    scene.sign_in(ADMIN, f"settings/team?search={ADMIN['email']}&notice=role")


def team(scene: Scene) -> None:
    scene.sign_in(ADMIN, "settings/team?search=example")


def last_page_of_team(scene: Scene) -> None:
    scene.sign_in(ADMIN, "settings/team?search=@crowd&page=2")


def search_without_result(scene: Scene) -> None:
    scene.sign_in(ADMIN, "settings/team?search=nomatch")


def last_admin(scene: Scene) -> None:
    scene.sign_in(ADMIN, f"settings/team?search={ADMIN['email']}")
    scene.page.locator("select").select_option("editor")
    scene.page.locator("select + button").click()


def revoke(scene: Scene) -> None:
    scene.sign_in(ADMIN, "settings/api-tokens/1/revoke")


def remove(scene: Scene) -> None:
    team(scene)
    scene.page.get_by_role("row").filter(has_text=LONG["email"]).get_by_role("link").click()


def demote(scene: Scene) -> None:
    scene.sign_in(ADMIN, "settings/team?search=jim.poe")
    scene.page.locator("select").select_option("editor")
    scene.page.locator("select + button").click()


def remove_creator(scene: Scene) -> None:
    scene.sign_in(ADMIN, "settings/team?search=jim.poe")
    scene.page.locator("td a.danger").click()


def not_allowed(scene: Scene) -> None:
    editor(scene)
    scene.open("settings")


def not_found(scene: Scene) -> None:
    editor(scene)
    scene.open(f"{scene.demo.url}/nothing")


def no_access(scene: Scene) -> None:
    link = scene.demo.link(JOHN)
    with changing(scene.demo) as (connection, _):
        administration.remove_member(connection, JOHN["email"], DEMO_ACCOUNT)
    scene.follow(link)


def not_signed_in(scene: Scene) -> None:
    scene.open("posts")


def signed_out(scene: Scene) -> None:
    editor(scene)
    scene.page.locator("summary").click()
    scene.page.locator("form[action='/logout'] button").click()


def used(scene: Scene) -> None:
    link = scene.demo.link(JANE)
    scene.follow(link)
    scene.page.context.clear_cookies()
    scene.open(link)
    scene.press()


def expired(scene: Scene) -> None:
    now = int(time.time())
    entries, _ = keyring.load(read_settings(scene.demo.env).keys_path)
    token_key = keyring.KeyRing(entries.values()).signing_key(now).token_key
    with changing(scene.demo) as (connection, _):
        user_id = administration.find_user(connection, ADMIN["email"]).id
    scene.open("posts?sso=" + tokens.sign(Claims(now - 1, user_id, DEMO_ACCOUNT, 0), token_key))


def invalid(scene: Scene) -> None:
    scene.open("posts?sso=" + "A" * 43)


def confirm(scene: Scene) -> None:
    scene.open(scene.demo.link(JANE))


def switch(scene: Scene) -> None:
    editor(scene)
    scene.open(scene.demo.link(LONG))


Opener = Callable[[Scene], None]

# The function that opens each page, the expected status, and a heading of the page in English.
PAGES: list[tuple[Opener, int, str]] = [
    (editor, 200, "Posts"),
    (admin, 200, "Areas"),
    (menu, 200, "Posts"),
    (chromeless, 200, "Create an API token"),
    (api_tokens, 200, "Create an API token"),
    (revoked_api_tokens, 200, "Revoked and expired API tokens"),
    (older_api_tokens, 200, "Active API tokens"),
    (new_secret, 200, "Your new API token"),
    (problem, 422, "Create an API token"),
    (notice, 200, "Members"),
    (team, 200, "Members"),
    (last_page_of_team, 200, "Members"),
    (search_without_result, 200, "Members"),
    (last_admin, 409, "Members"),
    (revoke, 200, "Revoke demo?"),
    (remove, 200, f"Remove {LONG['first_name']} {LONG['last_name']}?"),
    (demote, 200, "Change the role of Jim Poe?"),
    (remove_creator, 200, "Remove Jim Poe?"),
    (not_allowed, 403, "Your role may not see this"),
    (not_found, 404, "There is nothing here"),
    (no_access, 403, "You have no access here"),
    (not_signed_in, 401, "You are not signed in"),
    (signed_out, 200, "You are signed out"),
    (used, 401, "This login link was already used"),
    (expired, 401, "This login link has expired"),
    (invalid, 401, "This login link is not valid"),
    (confirm, 200, "Continue to Studio"),
    (switch, 200, "Switch user?"),
]


@pytest.fixture(scope="module")
def demo(demos: Callable[..., Demo]) -> Demo:
    """A demo account with a portal, more than one page of members, and API tokens of every status."""
    demo = demos(SSO_CONFIRM_LOGIN="1")
    now = int(time.time())
    crowd = [ProvisionRequest(f"{n}@crowd.test", f"No. {n}", "Zzz", DEMO_ACCOUNT, now) for n in range(51)]
    crowd.append(ProvisionRequest("jim.poe@example.com", "Jim", "Poe", DEMO_ACCOUNT, now))
    with changing(demo) as (connection, database):
        connection.execute(update(schema.accounts).values(portal_url=PORTAL))
        provision(database, connection, crowd)
        administration.disable_user(connection, "jim.poe@example.com", now=now)
        for name, lifetime in {"Intranet": 365 * 86400, "Expired": -1, "Revoked": 86400}.items():
            token_id, _ = administration.create_api_token(
                connection,
                account_id=DEMO_ACCOUNT,
                name=name,
                scopes=frozenset({Scope.WRITE_SSO}),
                max_role=Role.EDITOR,
                now=now,
                expires_at=now + lifetime,
            )
        administration.revoke_api_token(connection, token_id, now=now)  # the last one
    for person in (JANE, LONG):
        demo.link(person)
    with changing(demo) as (connection, _):
        # A disabled admin, so that the account's other admin is the last one.
        jim = administration.set_role(connection, "jim.poe@example.com", DEMO_ACCOUNT, Role.ADMIN)
        values = {"account_id": DEMO_ACCOUNT, "hint": "abcd", "scopes": "write:sso", "created_at": now}
        rows = [{"name": f"{n}", "digest": f"{n}", "created_by": jim, **values} for n in range(55)]
        connection.execute(insert(schema.api_tokens), rows)
        long = administration.find_user(connection, LONG["email"]).id
        of_long = {"created_by": long, "expires_at": now + 86400}
        connection.execute(
            update(schema.api_tokens).where(schema.api_tokens.c.name.in_(["54", "Intranet"])).values(of_long)
        )
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return demo


@contextmanager
def changing(demo: Demo) -> Iterator[tuple[Connection, Database]]:
    """Open a transaction in the database of the service."""
    database = open_database(read_settings(demo.env))
    with database.connect() as connection, database.writing(connection):
        yield connection, database
    database.close()


@pytest.mark.parametrize("locale", ["en-GB", "de-DE"])
@pytest.mark.parametrize(("opener", "status", "title"), PAGES, ids=[opener.__name__ for opener, _, _ in PAGES])
def test_a_page_is_valid_self_contained_accessible_and_responsive(
    demo: Demo, browsers: Callable[..., BrowserContext], opener: Opener, status: int, title: str, locale: str
) -> None:
    context = browsers(locale=locale, viewport=DESKTOP, java_script_enabled=True)
    page = context.new_page()
    requested: list[str] = []
    console: list[str] = []
    responses: list[Response] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("console", lambda message: console.append(message.text))
    page.on("response", lambda response: responses.append(response))  # noqa: PLW0108 - an attribute is set on it
    opener(Scene(demo, page))

    response = next(each for each in reversed(responses) if each.request.is_navigation_request())
    assert response.status == status
    assert page.locator("html").get_attribute("lang") == locale[:2]
    assert locale != "en-GB" or title in page.locator("h1, h2").all_inner_texts()
    html5lib.HTMLParser(strict=True).parse(response.text())
    assert [url for url in requested if not url.startswith((demo.url + "/", "data:"))] == []
    # The console may report the status of the page itself, and nothing else.
    assert [each for each in console if not each.startswith("Failed to load resource: the server")] == []

    # The last column of a table contains the actions of each row, so it must not be hidden by scrolling.
    hidden = page.locator(".scroll").evaluate_all(
        "all => all.filter(each => each.scrollWidth > each.clientWidth).length"
    )
    assert hidden == 0

    page.set_viewport_size(PHONE)
    page.screenshot(path=SCREENSHOTS / f"{opener.__name__}-{locale[:2]}-phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]

    if locale == "en-GB":  # elements and colours do not depend on the language
        page.set_viewport_size(DESKTOP)
        page.screenshot(path=SCREENSHOTS / f"{opener.__name__}-light.png", full_page=True)
        assert violations(page) == []
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=SCREENSHOTS / f"{opener.__name__}-dark.png", full_page=True)
        assert violations(page, "color-contrast") == []


def violations(page: Page, *rules: str) -> list[str]:
    """Return the serious and critical problems that axe finds, by all of its rules or by some."""
    options = {"resultTypes": ["violations"], **({"runOnly": list(rules)} if rules else {})}
    return [
        f"{each['id']}: {node['html']}"
        for each in Axe().run(page, options=options).response["violations"]
        if each["impact"] in {"serious", "critical"}
        for node in each["nodes"]
    ]
