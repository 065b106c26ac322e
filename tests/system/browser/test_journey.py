"""Complete uses of the Studio, from the first login link on, in browsers without JavaScript."""

from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, Response

from sso_service.client import InvalidAPIToken, SSOClient
from tests.support.data import JANE, JOHN
from tests.support.demo import ADMIN, Demo

Browsers = Callable[..., BrowserContext]

EDITOR_SEES = ["Posts", "Ideas"]
PUBLISHER_SEES = ["Posts", "Ideas", "Areas", "Topics", "Templates"]


@pytest.fixture(scope="module")
def demo(demos: Callable[..., Demo]) -> Demo:
    return demos()


@pytest.fixture
def admin(demo: Demo, browsers: Browsers) -> Page:
    """The settings page, in the browser of the account's admin."""
    return demo.open(browsers(), ADMIN, "settings")


def heading(page: Page) -> str:
    return page.locator("h1").inner_text()


def status_of(response: Response | None) -> int:
    assert response is not None
    return response.status


def sections(page: Page) -> list[str]:
    """Return the names of the sections in the header."""
    return page.get_by_role("navigation", name="Sections").get_by_role("link").all_inner_texts()


def may(page: Page, action: str) -> str:
    """Return `yes` or `no`, as screen readers read the page's text about an action."""
    (item,) = (text for text in page.locator(".actions li").all_text_contents() if action in text)
    return item.rpartition(": ")[2]


def row(page: Page, text: str) -> Locator:
    """Return the row of the table that contains `text`."""
    return page.get_by_role("row").filter(has_text=text)


def make_api_token(admin: Page, name: str) -> str:
    """Create an API token, and return its secret as the page shows it."""
    admin.get_by_role("link", name="API Tokens").click()
    admin.get_by_label("Name", exact=True).fill(name)
    admin.get_by_label("write:sso").check()
    admin.get_by_role("button", name="Create").click()
    return admin.get_by_role("region", name="Your new API token").locator("code").inner_text()


def sign_out(page: Page, how: str = "Sign out") -> None:
    page.locator("summary").click()
    page.get_by_role("button", name=how, exact=True).click()


def test_an_admin_connects_an_intranet_and_a_new_user_signs_in(demo: Demo, browsers: Browsers) -> None:
    admin = browsers().new_page()
    admin.goto(demo.admin_link)
    assert "sso=" not in admin.url
    assert heading(admin) == "Settings"

    secret = make_api_token(admin, "Intranet")
    assert row(admin, "Intranet").locator("code").inner_text() == secret[-4:]
    admin.goto(demo.address("settings/api-tokens"))
    assert secret not in admin.content()

    posts = demo.address("posts")
    with SSOClient(demo.url, secret) as intranet:
        first, second = (intranet.login_url(posts, **JANE) for _ in range(2))

    jane = browsers().new_page()
    jane.goto(first)
    assert jane.url == posts
    assert sections(jane) == EDITOR_SEES
    assert (may(jane, "Edit"), may(jane, "Publish")) == ("yes", "no")
    jane.get_by_role("link", name="Ideas").click()
    assert heading(jane) == "Ideas"
    assert status_of(jane.goto(demo.address("settings"))) == 403
    assert heading(jane) == "Your role may not see this"

    admin.get_by_role("link", name="Team").click()
    row(admin, JANE["email"]).get_by_label("Role of Jane Doe", exact=True).select_option("Publisher")
    row(admin, JANE["email"]).get_by_role("button", name="Change").click()
    assert "The role was changed" in admin.get_by_role("status").inner_text()

    jane.goto(posts)
    assert sections(jane) == PUBLISHER_SEES
    jane.get_by_role("link", name="Areas").click()
    assert (heading(jane), may(jane, "Publish")) == ("Areas", "yes")

    other = browsers().new_page()
    assert status_of(other.goto(first)) == 401
    assert heading(other) == "This login link was already used"
    other.goto(second)
    assert sections(other) == PUBLISHER_SEES


def test_a_removed_member_loses_access_immediately(demo: Demo, admin: Page, browsers: Browsers) -> None:
    john = demo.open(browsers(), JOHN)
    admin.get_by_role("link", name="Team").click()
    row(admin, JOHN["email"]).get_by_role("link", name="Remove").click()
    admin.get_by_role("link", name="Cancel").click()
    row(admin, JOHN["email"]).get_by_role("link", name="Remove").click()
    assert admin.locator("h2").inner_text() == "Remove John Roe?"
    assert status_of(john.reload()) == 200  # the question alone changes nothing

    admin.get_by_role("button", name="Remove").click()
    assert "The member was removed" in admin.get_by_role("status").inner_text()
    assert row(admin, JOHN["email"]).count() == 0
    john.get_by_role("link", name="Ideas").click()
    assert heading(john) == "You are not signed in"


def test_the_only_admin_keeps_the_role(admin: Page) -> None:
    admin.get_by_role("link", name="Team").click()
    row(admin, ADMIN["email"]).get_by_role("combobox").select_option("Editor")
    row(admin, ADMIN["email"]).get_by_role("button", name="Change").click()
    assert "needs an admin" in admin.get_by_role("alert").inner_text()
    assert row(admin, ADMIN["email"]).get_by_role("combobox").input_value() == "admin"


def test_signing_out_ends_only_the_session_of_this_browser(demo: Demo, browsers: Browsers) -> None:
    here, there = demo.open(browsers(), JANE), demo.open(browsers(), JANE)
    sign_out(here)
    assert heading(here) == "You are signed out"
    assert status_of(here.goto(demo.address("posts"))) == 401
    assert status_of(there.reload()) == 200


def test_signing_out_everywhere_ends_the_sessions_of_other_browsers(demo: Demo, browsers: Browsers) -> None:
    here, there = demo.open(browsers(), JANE), demo.open(browsers(), JANE)
    sign_out(here, "Sign out everywhere")
    assert heading(here) == "You are signed out"
    there.get_by_role("link", name="Ideas").click()
    assert heading(there) == "You are not signed in"


def test_an_admin_signs_a_member_out_everywhere(demo: Demo, admin: Page, browsers: Browsers) -> None:
    jane = demo.open(browsers(), JANE)
    admin.get_by_role("link", name="Team").click()
    row(admin, JANE["email"]).get_by_role("button", name="Sign out everywhere").click()
    assert "signed out everywhere" in admin.get_by_role("status").inner_text()
    assert status_of(jane.reload()) == 401


def test_a_revoked_api_token_creates_no_login_links(demo: Demo, admin: Page) -> None:
    with SSOClient(demo.url, make_api_token(admin, "Leaked")) as intranet:
        row(admin, "Leaked").get_by_role("link", name="Revoke").click()
        assert admin.locator("h2").inner_text() == "Revoke Leaked?"
        intranet.login_url(demo.address("posts"), **JOHN)  # the question alone changes nothing

        admin.get_by_role("button", name="Revoke").click()
        assert "The API token was revoked" in admin.get_by_role("status").inner_text()
        assert row(admin, "Leaked").count() == 0
        admin.get_by_role("link", name="Show revoked and expired ones").click()
        assert row(admin, "Leaked").get_by_text("revoked", exact=True).count() == 1
        with pytest.raises(InvalidAPIToken):
            intranet.login_url(demo.address("posts"), **JOHN)


def test_a_login_link_for_another_user_asks_before_it_switches(demo: Demo, browsers: Browsers) -> None:
    page = demo.open(browsers(), JANE)
    link = demo.link(JOHN, "ideas")
    assert status_of(page.goto(link)) == 200
    assert heading(page) == "Switch user?"
    assert JANE["email"] in page.locator("main").inner_text()
    page.goto(demo.address("posts"))
    assert JANE["email"] in page.locator("main").inner_text()  # the question alone changes nothing

    page.goto(link)
    page.get_by_role("button", name="Continue").click()
    assert page.url == demo.address("ideas")
    assert JOHN["email"] in page.locator("main").inner_text()


def is_chromeless(address: str) -> bool:
    return parse_qs(urlsplit(address).query).get("chromeless") == ["1"]


def test_no_page_that_a_chromeless_page_links_has_a_header(demo: Demo, browsers: Browsers) -> None:
    page = demo.open(browsers(), ADMIN, "settings?chromeless=1")
    unseen, seen = {page.url}, set[str]()
    while unseen:
        seen.add(address := unseen.pop())
        page.goto(address)
        assert page.get_by_role("banner").count() == 0, address
        assert page.get_by_role("navigation", name="Sections").count() == 0, address
        links = page.get_by_role("main").get_by_role("link").all()
        unseen |= {demo.url + str(link.get_attribute("href")) for link in links} - seen
        for form in page.locator("form").all():
            action = form.get_attribute("action") or address
            field = form.locator("input[type=hidden][name=chromeless]")
            assert is_chromeless(action) or field.input_value() == "1", address
        assert all(is_chromeless(each) for each in unseen), address
    assert {urlsplit(address).path.rpartition("/")[2] for address in seen} == {"api-tokens", "team", "revoke", "remove"}


def test_the_response_to_a_chromeless_form_has_no_header(demo: Demo, browsers: Browsers) -> None:
    page = demo.open(browsers(), ADMIN, "settings?chromeless=1")
    make_api_token(page, "Framed")
    assert page.get_by_role("banner").count() == 0
    row(page, "Framed").get_by_role("link", name="Revoke").click()
    page.get_by_role("button", name="Revoke").click()
    assert page.get_by_role("status").count() == 1
    assert page.get_by_role("banner").count() == 0

    page.get_by_role("link", name="Team").click()
    page.get_by_label("Search by name").fill("admin@")
    page.get_by_role("button", name="Search").click()
    row(page, ADMIN["email"]).get_by_role("button", name="Change").click()
    assert page.get_by_role("status").count() == 1
    assert page.get_by_label("Search by name").input_value() == "admin@"
    assert page.get_by_role("banner").count() == 0


def tab_to(page: Page, target: Locator) -> None:
    """Press Tab until `target` has the focus. Fails unless the focus is visible."""
    for _ in range(100):
        page.keyboard.press("Tab")
        if target.evaluate("element => element === document.activeElement"):
            assert target.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
            return
    pytest.fail(f"Tab does not lead to {target}")


def press(page: Page, target: Locator, key: str = "Enter") -> None:
    tab_to(page, target)
    with page.expect_navigation():
        page.keyboard.press(key)


def test_every_function_works_with_the_keyboard_alone(demo: Demo, admin: Page) -> None:
    demo.link(JANE)
    page = admin
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the content")
    assert skip.evaluate("element => element === document.activeElement")
    assert skip.evaluate("element => element.getBoundingClientRect().left") >= 0  # visible while it has the focus
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"

    tab_to(page, page.get_by_label("Name", exact=True))
    page.keyboard.type("Typed")
    tab_to(page, page.get_by_label("verify:sso"))
    page.keyboard.press("Space")
    press(page, page.get_by_role("button", name="Create"))
    assert "verify:sso write:sso" in row(page, "Typed").inner_text()
    press(page, row(page, "Typed").get_by_role("link", name="Revoke"))
    press(page, page.get_by_role("button", name="Revoke"), "Space")
    press(page, page.get_by_role("link", name="Show revoked and expired ones"))
    assert row(page, "Typed").get_by_text("revoked", exact=True).count() == 1

    press(page, page.get_by_role("link", name="Team"))
    tab_to(page, page.get_by_label("Search by name"))
    page.keyboard.type("jane")
    with page.expect_navigation():
        page.keyboard.press("Enter")
    tab_to(page, row(page, JANE["email"]).get_by_role("combobox"))
    page.keyboard.type("Pub")
    press(page, row(page, JANE["email"]).get_by_role("button", name="Change"))
    assert row(page, JANE["email"]).get_by_role("combobox").input_value() == "publisher"
    press(page, row(page, JANE["email"]).get_by_role("link", name="Remove"))
    press(page, page.get_by_role("button", name="Remove"))
    assert row(page, JANE["email"]).count() == 0

    tab_to(page, page.locator("summary"))
    page.keyboard.press("Enter")
    press(page, page.get_by_role("button", name="Sign out", exact=True))
    assert heading(page) == "You are signed out"
