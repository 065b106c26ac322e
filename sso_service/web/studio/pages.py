"""Pages: templates in two languages, and the headers that every page of ours has."""

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from copy import copy
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response
from starlette.templating import Jinja2Templates
from starlette.types import Scope

from sso_service.http import language
from sso_service.web.translations import LANGUAGES, marked, translations

# In the page itself: no further request, nothing that a proxy has to know of. The policy names it by its digest, so it
# is the only style that works, wherever it comes from.
_STYLE = resources.files("sso_service.web").joinpath("static/studio.css").read_text("utf-8")


def style_source(style: str) -> str:
    """What a Content-Security-Policy says to allow exactly this `<style>` (CSP level 3, section 2.3.1)."""
    return f"'sha256-{b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"


_STYLE_SOURCE = style_source(_STYLE)

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # The page's own address may still carry a token that was not used. `no-referrer` would hide it as well, but would
    # also make browsers send `Origin: null` with the form, which is no proof of where it comes from (Fetch standard).
    "Referrer-Policy": "strict-origin",
    "Vary": "Accept, Accept-Language, Cookie",
}


def _environment(lang: str) -> Environment:
    environment = Environment(
        loader=PackageLoader("sso_service.web", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.i18n"],
    )
    install: Any = environment.install_gettext_translations  # type: ignore[attr-defined]  # the extension adds it
    install(translations(lang), newstyle=True)
    environment.globals.update(lang=lang, style=Markup(_STYLE))  # nosec B704 # noqa: S704 - our own file
    return environment


_TEMPLATES = {lang: Jinja2Templates(env=_environment(lang)) for lang in LANGUAGES}

# Title and text of each message, by what happened.
_MESSAGES: dict[str, tuple[str, str]] = {
    "token_invalid": (
        marked("This login link is not valid"),
        marked(
            "It may have been cut off or changed on its way. Go back to your portal and open Studio from there again."
        ),
    ),
    "token_expired": (
        marked("This login link has expired"),
        marked("Login links are good for a few minutes. Go back to your portal and open Studio from there again."),
    ),
    "token_consumed": (
        marked("This login link was already used"),
        marked(
            "Each link signs in once. Go back to your portal and open Studio from there again. If you have not used it "
            "yourself, tell your administrator."
        ),
    ),
    "no_access": (
        marked("You have no access here"),
        marked("You do not belong to this account or team, or you were disabled. Ask your administrator."),
    ),
    "not_allowed": (
        marked("Your role may not see this"),
        marked("An administrator of your account can give you another role, under Settings, Team."),
    ),
    "not_signed_in": (
        marked("You are not signed in"),
        marked("Go back to your portal and open Studio from there."),
    ),
    "signed_out": (
        marked("You are signed out"),
        marked("To come back, open Studio from your portal again."),
    ),
    "not_found": (
        marked("There is nothing here"),
        marked("The address may be wrong, or what was there is gone."),
    ),
    "bad_path": (
        marked("This address is not right"),
        marked(
            "The address behind the login link cannot be opened. The link was not used. Go back to your portal and "
            "open Studio from there again."
        ),
    ),
    "not_a_navigation": (
        marked("Open this link in a browser tab"),
        marked("Login links work only when a person opens them. The link was not used."),
    ),
    "cross_origin": (
        marked("Please try again"),
        marked("The answer did not come from our page. Open the login link again."),
    ),
    "form_invalid": (
        marked("Please try again"),
        marked("The page was open for too long. Open the login link again."),
    ),
    "unavailable": (
        marked("Please try again in a moment"),
        marked("We cannot sign you in right now. The link was not used."),
    ),
    "overloaded": (
        marked("Please try again in a moment"),
        marked("Many people are signing in right now. The link was not used."),
    ),
    "outcome_unknown": (
        marked("We cannot tell whether this link was used"),
        marked("Something was interrupted. Go back to your portal and open Studio from there again for a new link."),
    ),
    "page_unavailable": (
        marked("Please try again in a moment"),
        marked("We cannot show this page right now. Nothing was lost."),
    ),
    "change_unknown": (
        marked("We cannot tell whether this was done"),
        marked("Something was interrupted. Go back and look."),
    ),
    "confirm": (marked("Continue to Studio"), marked("You are about to sign in to Studio.")),
    "switch": (
        marked("Switch user?"),
        marked(
            "You are signed in as %(current)s. This link signs in somebody else. Continue only if you meant to switch."
        ),
    ),
}


def page(
    scope: Scope,
    template: str,
    context: Mapping[str, Any],
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    framed_by: tuple[str, ...] = (),
) -> Response:
    """A page in the language that the browser asks for. Pages of the origins in `framed_by` may show it in a frame."""
    lang = language(scope)
    return _TEMPLATES[lang].TemplateResponse(
        Request(scope),
        template,
        dict(context),
        status,
        {**_HEADERS, **_framing(framed_by), "Content-Language": lang, **(headers or {})},
    )


def message_page(
    scope: Scope,
    what: str,
    status: int,
    *,
    portal_url: str | None = None,
    headers: Mapping[str, str] | None = None,
    framed_by: tuple[str, ...] = (),
) -> Response:
    """A page that says what happened. It never repeats anything of the request."""
    # Wherever it was set, a link is nothing but https: never a script, never a page of ours.
    if portal_url and portal_url.startswith("https://"):
        return _message(scope, what, status, headers, framed_by, portal_url=portal_url)
    response = copy(_plain(language(scope), what, status, framed_by, tuple((headers or {}).items())))
    response.raw_headers = list(response.raw_headers)  # whoever adds one adds it to this answer only
    return response


def question_page(
    scope: Scope,
    *,
    current: str | None,
    fields: Mapping[str, str],
    headers: Mapping[str, str],
    framed_by: tuple[str, ...] = (),
) -> Response:
    """A page that asks before it signs in; its answer carries `fields`. `current` is who would be replaced."""
    what = "confirm" if current is None else "switch"
    return _message(scope, what, 200, headers, framed_by, fields=fields, current=current)


def link_page(scope: Scope, *, current: str, href: str) -> Response:
    """A page that asks before it signs in somebody else than `current`; who follows `href` agrees."""
    headers = {"Referrer-Policy": "no-referrer"}  # there is no form here, so nothing is lost by it
    return _message(scope, "switch", 200, headers, (), current=current, href=href)


@cache
def _plain(
    lang: str, what: str, status: int, framed_by: tuple[str, ...], headers: tuple[tuple[str, str], ...]
) -> Response:
    """A page that is the same for everybody, so that a flood of forged tokens renders none."""
    scope = {"type": "http", "headers": [(b"accept-language", lang.encode())]}
    return _message(scope, what, status, dict(headers), framed_by)


def _message(
    scope: Scope,
    what: str,
    status: int,
    headers: Mapping[str, str] | None,
    framed_by: tuple[str, ...],
    *,
    portal_url: str | None = None,
    fields: Mapping[str, str] | None = None,
    current: str | None = None,
    href: str | None = None,
) -> Response:
    title, text = _MESSAGES[what]
    context = {
        "title": title,
        "text": text,
        "fields": fields,
        "portal_url": portal_url,
        "current": current,
        "href": href,
    }
    return page(scope, "message.html", context, status=status, headers=headers, framed_by=framed_by)


def _framing(framed_by: tuple[str, ...]) -> dict[str, str]:
    # No outside request, no script, no style but ours, and no frame around us but of those who were named: nothing
    # could read the page or click in it for the user.
    policy = f"default-src 'none'; style-src {_STYLE_SOURCE}; img-src data:; base-uri 'none'; form-action 'self'"
    if framed_by:
        return {"Content-Security-Policy": f"{policy}; frame-ancestors {' '.join(framed_by)}"}
    return {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'", "X-Frame-Options": "DENY"}
