"""Pages of the client's middleware: texts, headers and escaping."""

import re
from base64 import b64encode
from hashlib import sha256
from html import unescape

import pytest

from sso_service.client import pages
from sso_service.client.asgi import Response, Scope
from sso_service.problems import ENTRIES
from tests.support.pages import MessagePage

REFUSALS = {
    "bad_path": 400,
    "token_invalid": 401,
    "token_expired": 401,
    "token_consumed": 401,
    "no_access": 403,
    "not_a_navigation": 403,
    "unavailable": 503,
    "overloaded": 503,
    "outcome_unknown": 503,
}


def scope(**headers: str) -> Scope:
    """Return the scope of a GET with these headers, whose names have `_` for `-`."""
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": "GET", "headers": lines}


def check_page(response: Response, language: str) -> MessagePage:
    """Check the parts that every page has and return the page."""
    page = MessagePage(response.body.decode())
    assert page.lang == language == response.headers["Content-Language"]
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Vary"] == "Accept, Accept-Language, Cookie"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["X-Frame-Options"] == "DENY"
    assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    (style,) = re.findall(r"<style>(.*?)</style>", response.body.decode(), re.DOTALL)
    digest = b64encode(sha256(style.encode()).digest()).decode()
    assert response.headers["Content-Security-Policy"].split("; ") == [
        "default-src 'none'",
        f"style-src 'sha256-{digest}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    assert not page.elements & {"script", "form", "iframe", "img", "object"}
    assert not any(name == "style" or name.startswith("on") for _, name, _ in page.attributes)
    return page


@pytest.mark.parametrize("language", ["en", "de"])
@pytest.mark.parametrize(("code", "status"), REFUSALS.items())
def test_a_refusal_has_the_title_and_the_text_of_the_table(code: str, status: int, language: str) -> None:
    response = pages.refusal(scope(accept_language=language), code)
    assert response.status == status
    page = check_page(response, language)
    entry = ENTRIES[code]
    assert entry.title
    assert entry.text
    assert page.texts["h1"] == page.texts["title"] == entry.title.in_language(language)
    assert page.texts["p"] == entry.text.in_language(language)
    assert page.links == []
    assert response.headers.get("Retry-After") == ("2" if status == 503 else None)


@pytest.mark.parametrize(("code", "status"), REFUSALS.items())
def test_a_refusal_is_json_for_a_client_that_prefers_it(code: str, status: int) -> None:
    response = pages.refusal(scope(accept="application/json"), code, {"Retry-After": "7"})
    assert response.status == status
    assert response.body.decode() == f'{{"error":{{"code":"{code}","message":"{ENTRIES[code].message}"}}}}'
    assert response.headers == {
        "Content-Type": "application/json",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Retry-After": "7",
    }


@pytest.mark.parametrize(
    ("language", "title", "text", "label"),
    [
        ("en", "Switch user?", "You are signed in as {}. ", "Continue"),
        ("de", "Benutzer wechseln?", "Du bist als {} angemeldet. ", "Weiter"),
    ],
)
def test_the_question_escapes_the_user_and_the_link(language: str, title: str, text: str, label: str) -> None:
    current, href = "<b>&\"'%(current)s@example.com", "/a?b=<script>&c=\"'>&amp;sso=T"
    response = pages.switch_page(scope(accept_language=language), current, href)
    page = check_page(response, language)
    assert response.status == 200
    assert page.texts["h1"] == title
    assert text.format(current) in page.texts["p"]
    assert (page.texts["a"], page.links) == (label, [href])
    (raw,) = re.findall(r'href="(/[^"]*)"', response.body.decode())
    assert unescape(raw) == href
