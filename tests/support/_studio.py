"""What the tests of the Studio's pages share: a page that was taken apart, and browsers where somebody is signed in."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlencode

import msgspec
from sqlalchemy import Connection, insert, literal, select

from sso_service.database import administration
from sso_service.database.engine import Database
from sso_service.database.schema import memberships, users
from sso_service.permissions import Role
from sso_service.service import Service
from sso_service.web.app import create_app
from tests.support._old import ACCOUNT, JANE, TEAM, Answer, Client, changing

HOME = f"/client/{ACCOUNT}/t/{TEAM}"
SETTINGS = f"{HOME}/settings"
API_TOKENS, MEMBERS = f"{SETTINGS}/api-tokens", f"{SETTINGS}/team"

HTML = ("accept", "text/html,application/xhtml+xml,*/*;q=0.8")
SAME_ORIGIN = ("sec-fetch-site", "same-origin")

_VOID = {"meta", "input", "link", "br"}


@dataclass(frozen=True, slots=True)
class Form:
    """A form: where it leads, and what it sends as it stands."""

    method: str
    action: str | None
    fields: list[tuple[str, str]] = field(default_factory=list)

    def sent(self, name: str) -> list[str]:
        """What it sends in the field `name`."""
        return [value for key, value in self.fields if key == name]


class Page(HTMLParser):
    """A page's parts. Making one fails unless its elements are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.lang = ""
        self.links: list[tuple[str, str]] = []
        """Text and address of each."""
        self.forms: list[Form] = []
        self.rows: list[list[str]] = []
        """The words in each cell of each row of a table's body."""
        self.sections: list[str] = []
        """The addresses in the navigation between sections."""
        self.actions: list[tuple[str, str]] = []
        self.elements: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        """The texts in each kind of element, and in each class."""
        self._open: list[tuple[str, str]] = []
        self._select = ""
        self._link: str | None = None
        assert html.startswith("<!DOCTYPE html>")
        self.feed(html)
        self.close()
        assert self._open == []
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        self.links = [(" ".join(text.split()), address) for text, address in self.links]

    def words(self, where: str) -> str:
        """The text within all elements of a kind, or of a class."""
        return " ".join(" ".join(self.texts.get(where, [])).split())

    def form(self, action: str) -> Form:
        """The only form with this in its address."""
        (found,) = (form for form in self.forms if form.action is not None and action in form.action)
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs), "an attribute occurs twice"
        self.elements.add(tag)
        self.attributes += [(tag, name, value) for name, value in found.items()]
        if tag not in _VOID:
            self._open.append((tag, found.get("class", "")))
        match tag:
            case "html":
                self.lang = found["lang"]
            case "form":
                self.forms.append(Form(found["method"], found.get("action")))
            case "input" if found.get("type") != "checkbox" or "checked" in found:
                self.forms[-1].fields.append((found["name"], found.get("value", "")))
            case "select":
                self._select = found["name"]
            case "option" if "selected" in found:
                self.forms[-1].fields.append((self._select, found["value"]))
            case "a":
                self.links.append(("", found["href"]))
                if self._is_in("header"):
                    self.sections.append(found["href"])
            case "tr":
                if self._is_in("tbody"):
                    self.rows.append([])
            case "td" | "th":
                if self._is_in("tbody"):
                    self.rows[-1].append("")
            case "li" if self._is_in("ul") and found.get("class") in {"may", "may-not"}:
                self.actions.append((found["class"], ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for kind in {kind for tag, classes in self._open for kind in (tag, *classes.split())}:
            self.texts.setdefault(kind, []).append(data)
        if self._is_in("a"):
            text, address = self.links[-1]
            self.links[-1] = (text + data, address)
        if self._is_in("tbody") and (self._is_in("td") or self._is_in("th")):
            self.rows[-1][-1] += data
        if self.actions and self._open and self._open[-1][0] == "li":
            allowed, text = self.actions[-1]
            self.actions[-1] = (allowed, (text + data).strip())

    def _is_in(self, tag: str) -> bool:
        return any(tag == open_tag for open_tag, _ in self._open)


def add_members(connection: Connection, count: int) -> None:
    """Editors of `ACCOUNT`: `Firstname0 Lastname0`, `m0@example.com` and so on."""
    people = [
        {"email": f"m{n}@example.com", "first_name": f"Firstname{n}", "last_name": f"Lastname{n}", "created_at": 1}
        for n in range(count)
    ]
    connection.execute(insert(users), people)
    found = select(users.c.id, literal(ACCOUNT), literal(str(Role.EDITOR))).where(users.c.email.like("m%@example.com"))
    connection.execute(insert(memberships).from_select(["user_id", "account_id", "role"], found))


@contextmanager
def with_settings(service: Service, **changes: Any) -> Iterator[Client]:
    """A client of another service over the same database and keys, with some settings changed."""
    settings = msgspec.structs.replace(service.settings, **changes)
    other = Service(settings, Database(settings.database), service.keys, clock=service.now)
    yield Client(create_app(other))
    other.close()


async def signed_in(
    client: Client, database: Database, api_token: str, role: Role, person: Mapping[str, str] = JANE
) -> Client:
    """Another browser, in which `person`, who has this role, is signed in."""
    browser = client.another()
    token = await browser.issue(api_token, person)
    with changing(database) as connection:
        administration.set_role(connection, person["email"], ACCOUNT, role)
    answer = await browser.get(f"/?sso={token}")
    assert answer.status == 303, answer
    return browser


async def see(browser: Client, target: str) -> Answer:
    """The answer to a person who goes to `target`."""
    return await browser.request("GET", target, headers=[HTML])


async def page_of(browser: Client, target: str, status: int = 200) -> Page:
    """The page that a person sees at `target`."""
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
    """The answer to a form, sent from one of our pages unless `origin` says otherwise."""
    headers = [HTML, *origin, ("content-type", "application/x-www-form-urlencoded")]
    return await browser.request("POST", target, headers=headers, body=urlencode(fields).encode())
