"""Parsers of HTML pages."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "input", "link", "br"}


@dataclass(frozen=True, slots=True)
class Form:
    """A form: method, action, and the fields that it submits if nothing is changed."""

    method: str
    action: str | None
    fields: list[tuple[str, str]] = field(default_factory=list)

    def sent(self, name: str) -> list[str]:
        """Return the values of the field `name`."""
        return [value for key, value in self.fields if key == name]


class Page(HTMLParser):
    """The parts of a Studio page. Parsing fails unless the elements are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.lang = ""
        self.links: list[tuple[str, str]] = []
        """Text and address of each link."""
        self.forms: list[Form] = []
        self.rows: list[list[str]] = []
        """The text of each cell of each row in table bodies."""
        self.sections: list[str] = []
        """The addresses of the sections in the header."""
        self.actions: list[tuple[str, str]] = []
        self.elements: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        """The texts by kind of element, and by class."""
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
        """Return the text of all elements of a kind or a class."""
        return " ".join(" ".join(self.texts.get(where, [])).split())

    def form(self, action: str) -> Form:
        """Return the only form whose action contains `action`."""
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


VOID = {"meta", "input", "link", "br", "img", "hr"}


class MessagePage(HTMLParser):
    """The parts of a message page. Parsing fails unless the elements are balanced and the required ones occur once."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.lang = ""
        self.form: tuple[str, str] | None = None
        self.fields: dict[str, str] = {}
        self.links: list[str] = []
        self.texts: dict[str, str] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self._open: list[str] = []
        self._seen: list[str] = []
        self._declaration = ""
        self.feed(html)
        self.close()
        assert self._open == []
        assert self._declaration.lower() == "doctype html"
        assert html.lower().startswith("<!doctype html>")
        for element in ("html", "head", "body", "main", "title", "h1"):
            assert self._seen.count(element) == 1, element
        assert self._seen.index("head") < self._seen.index("body") < self._seen.index("main") < self._seen.index("h1")

    @property
    def elements(self) -> set[str]:
        return set(self._seen)

    def handle_decl(self, decl: str) -> None:
        self._declaration = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs), "an attribute occurs twice"
        self.attributes += [(tag, name, value) for name, value in found.items()]
        self._seen.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        match tag:
            case "html":
                self.lang = found["lang"]
            case "form":
                assert self.form is None
                self.form = (found["method"], found["action"])
            case "input":
                assert "form" in self._open
                assert found["type"] == "hidden"
                assert found["name"] not in self.fields
                self.fields[found["name"]] = found["value"]
            case "a":
                self.links.append(found["href"])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]] = self.texts.get(self._open[-1], "") + data
        else:
            assert data.strip() == "", "text outside the page"
