"""Rendering of pages: templates in two languages, and the security headers of every page."""

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.templating import Jinja2Templates
from starlette.types import Scope

from sso_service.http import ISOLATED_PAGE, language
from sso_service.problems import ENTRIES
from sso_service.web.studio.translations import LANGUAGES, translations

# The style is part of the page: no second request, and no path that a proxy has to forward. The policy allows it by its
# digest, so no other style applies, wherever it comes from.
_STYLE = resources.files(__package__).joinpath("static/studio.css").read_text("utf-8")


def style_source(style: str) -> str:
    """Return the Content-Security-Policy source that allows exactly this `<style>` (CSP level 3, section 2.3.1)."""
    return f"'sha256-{b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"


# No external resource, no script, no other style, no form that submits elsewhere.
_POLICY = (
    f"default-src 'none'; style-src {style_source(_STYLE)}; img-src data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors "
)

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # The page's own address may contain a login token that was not used. `no-referrer` would hide it as well, but then
    # browsers send `Origin: null` with the form, which proves nothing about its origin (Fetch standard, section 3.2).
    "Referrer-Policy": "strict-origin",
    "Vary": "Accept, Accept-Language, Cookie",
    **ISOLATED_PAGE,
}


def _environment(lang: str) -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.i18n"],
    )
    install: Any = environment.install_gettext_translations  # type: ignore[attr-defined]  # the extension adds it
    install(translations(lang), newstyle=True)
    environment.globals.update(lang=lang, style=Markup(_STYLE))  # nosec B704 # noqa: S704 - a file of this package
    return environment


_TEMPLATES = {lang: Jinja2Templates(env=_environment(lang)) for lang in LANGUAGES}


def page(
    scope: Scope,
    template: str,
    context: Mapping[str, Any],
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    framed_by: tuple[str, ...] = (),
) -> Response:
    """Render a page in the language that the browser prefers. Pages of the origins in `framed_by` may embed it."""
    lang = language(scope)
    return _TEMPLATES[lang].TemplateResponse(
        Request(scope), template, dict(context), status, _headers(lang, framed_by, headers or {})
    )


def message_page(
    scope: Scope,
    code: str,
    *,
    portal_url: str | None = None,
    headers: Mapping[str, str] | None = None,
    framed_by: tuple[str, ...] = (),
) -> Response:
    """Return the page for `code`, an entry with a title in `problems.ENTRIES`. It quotes nothing from the request.

    Status and headers are those of the entry; `headers` are added. The page links `portal_url` if it is an https URL.
    """
    entry, lang = ENTRIES[code], language(scope)
    # Checked wherever the URL comes from: a `javascript:` URL would run in this origin, and a path leads back here.
    link = portal_url if portal_url and portal_url.startswith("https://") else None
    sent = _headers(lang, framed_by, {**entry.headers, **(headers or {})})
    return HTMLResponse(_message(lang, code, link), entry.page_status, sent)


@lru_cache(maxsize=1024)
def _message(lang: str, code: str, portal_url: str | None) -> str:
    # Cached, because forged and used login tokens cost an attacker nothing: a flood of them must not render pages.
    return _TEMPLATES[lang].get_template("message.html").render(_message_context(lang, code, portal_url=portal_url))


def question_page(
    scope: Scope,
    *,
    current: str | None,
    fields: Mapping[str, str],
    headers: Mapping[str, str],
    framed_by: tuple[str, ...] = (),
) -> Response:
    """Render the question before a sign-in. Its form posts `fields` to `/sso/confirm`.

    `current` is the address of the user who is signed in and would be replaced, or None.
    """
    code = "confirm" if current is None else "switch"
    context = _message_context(language(scope), code, fields=fields, current=current)
    return page(scope, "message.html", context, status=ENTRIES[code].page_status, headers=headers, framed_by=framed_by)


def _message_context(
    lang: str,
    code: str,
    *,
    portal_url: str | None = None,
    fields: Mapping[str, str] | None = None,
    current: str | None = None,
) -> dict[str, Any]:
    title, text = ENTRIES[code].title, ENTRIES[code].text
    if title is None or text is None:
        raise ValueError(f"the code {code} has no page")
    return {
        "title": title.in_language(lang),
        # Formatted first and escaped by the template afterwards, so an address cannot add placeholders or markup.
        "text": text.in_language(lang) % {"current": current},
        "fields": fields,
        "current": current,
        "portal_url": portal_url,
    }


def _headers(lang: str, framed_by: tuple[str, ...], more: Mapping[str, str]) -> dict[str, str]:
    # Only the named origins may embed a page. Any other site could lay its own content over the page and trick the user
    # into clicking in it.
    framing = (
        {"Content-Security-Policy": _POLICY + " ".join(framed_by)}
        if framed_by
        else {"Content-Security-Policy": f"{_POLICY}'none'", "X-Frame-Options": "DENY"}
    )
    return {**_HEADERS, **framing, "Content-Language": lang, **more}
