"""The page of the OpenAPI document: valid HTML that runs and loads nothing, complete, and safe against its content."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from itertools import pairwise

import html5lib

from sso_service.web.openapi import page
from tests.support.data import JANE
from tests.support.openapi import DOCUMENT, OPERATIONS

HTML, POLICY = page(DOCUMENT)


class Page:
    """The elements of a page, in order. Raises an error unless it is valid HTML."""

    def __init__(self, html: str) -> None:
        tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(html)
        self.elements: list[tuple[str, Mapping[str, str]]] = [(each.tag, each.attrib) for each in tree.iter()]
        self.texts: list[tuple[str, str]] = [(each.tag, each.text or "") for each in tree.iter()]

    def all(self, name: str) -> list[Mapping[str, str]]:
        """Return the attributes of each element with this name."""
        return [attributes for element, attributes in self.elements if element == name]


def test_the_page_runs_no_scripts_and_loads_nothing() -> None:
    found = Page(HTML)
    policy = dict(part.split(" ", 1) for part in POLICY.split("; "))
    (style,) = (text for element, text in found.texts if element == "style")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert not re.search(r"url\(|@import|image-set|//", style)
    harmless = {"html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "article"}
    harmless |= {"h1", "h2", "h3", "h4", "p", "ul", "li", "dl", "dt", "dd", "a", "code", "pre", "small", "strong"}
    assert {element for element, _ in found.elements} <= harmless
    attributes = {name for _, each in found.elements for name in each}
    assert attributes <= {"lang", "charset", "name", "content", "id", "href", "aria-label", "aria-labelledby"}
    assert {link["href"] for link in found.all("a") if not link["href"].startswith("#")} == {"/openapi.json"}


def test_the_page_shows_every_operation() -> None:
    found = Page(HTML)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {link["href"].removeprefix("#") for link in found.all("a") if link["href"].startswith("#")}
    labels = {each["aria-labelledby"] for _, each in found.elements if "aria-labelledby" in each}
    assert targets | labels <= set(ids)
    assert {operation["operationId"] for operation in OPERATIONS.values()} <= targets
    code = [text for element, text in found.texts if element == "code"]
    for (method, path), operation in OPERATIONS.items():
        assert f"{method} {path}" in code
        assert operation["x-codeSamples"][0]["source"] in code
    levels = [int(element[1]) for element, _ in found.elements if re.fullmatch("h[1-6]", element)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(found.all("main")) == len(found.all("nav")) == len(found.all("header")) == 1


def test_the_page_escapes_the_texts_of_the_document() -> None:
    nasty = "<script>alert(1)</script><b>`<i>`\n\n- <u>&\n- \"'"
    content = json.loads(json.dumps(DOCUMENT).replace(json.dumps(JANE["first_name"]), json.dumps(nasty)))
    content["info"]["description"] = content["tags"][0]["description"] = content["info"]["title"] = nasty
    operation = content["paths"]["/v1/sso_tokens"]["post"]
    operation["summary"] = operation["description"] = operation["x-codeSamples"][0]["source"] = nasty
    html, _ = page(content)
    assert {element for element, _ in Page(html).elements} == {element for element, _ in Page(HTML).elements}
    assert html.count("&lt;script&gt;") >= 6
