"""The pages that people see when signing in: what happened, and what to do next, in German or English."""

from collections.abc import Mapping
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import Response
from starlette.types import Scope

from sso_service.web.requests import language

_templates = Environment(
    loader=PackageLoader("sso_service.web", "templates"), autoescape=True, undefined=StrictUndefined, auto_reload=False
)

_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # The page's own address may still carry a token that was not used. `no-referrer` would hide it as well, but would
    # also make browsers send `Origin: null` with the form, which is no proof of where it comes from (Fetch standard).
    "Referrer-Policy": "strict-origin",
    "Vary": "Accept, Accept-Language",
}

# Title and text of each page, by what happened.
_TEXTS: dict[str, dict[str, tuple[str, str]]] = {
    "en": {
        "token_invalid": (
            "This login link is not valid",
            "It may have been cut off or changed on its way. Go back to your portal and open Studio from there again.",
        ),
        "token_expired": (
            "This login link has expired",
            "Login links are good for a few minutes. Go back to your portal and open Studio from there again.",
        ),
        "token_consumed": (
            "This login link was already used",
            "Each link signs in once. Go back to your portal and open Studio from there again. If you have not used it "
            "yourself, tell your administrator.",
        ),
        "no_access": (
            "You have no access here",
            "You do not belong to this account or team, or you were disabled. Ask your administrator.",
        ),
        "bad_path": (
            "This address is not right",
            "The address behind the login link cannot be opened. The link was not used. Go back to your portal and "
            "open Studio from there again.",
        ),
        "not_a_navigation": (
            "Open this link in a browser tab",
            "Login links work only when a person opens them. The link was not used.",
        ),
        "cross_origin": ("Please try again", "The answer did not come from our page. Open the login link again."),
        "form_invalid": ("Please try again", "The page was open for too long. Open the login link again."),
        "unavailable": ("Please try again in a moment", "We cannot sign you in right now. The link was not used."),
        "overloaded": ("Please try again in a moment", "Many people are signing in right now. The link was not used."),
        "outcome_unknown": (
            "We cannot tell whether this link was used",
            "Something was interrupted. Go back to your portal and open Studio from there again for a new link.",
        ),
        "confirm": ("Continue to Studio", "You are about to sign in to Studio."),
        "switch": (
            "Switch user?",
            "You are signed in as {current}. This link signs in somebody else. Continue only if you meant to switch.",
        ),
        "continue": ("Continue", ""),
        "portal": ("Back to the portal", ""),
    },
    "de": {
        "token_invalid": (
            "Dieser Anmeldelink ist ungültig",
            "Vielleicht wurde er unterwegs abgeschnitten oder verändert. Geh zurück in dein Portal und öffne das "
            "Studio von dort noch einmal.",
        ),
        "token_expired": (
            "Dieser Anmeldelink ist abgelaufen",
            "Anmeldelinks gelten wenige Minuten. Geh zurück in dein Portal und öffne das Studio von dort noch einmal.",
        ),
        "token_consumed": (
            "Dieser Anmeldelink wurde schon benutzt",
            "Jeder Link meldet einmal an. Geh zurück in dein Portal und öffne das Studio von dort noch einmal. Wenn du "
            "ihn nicht selbst benutzt hast, melde es deiner Administration.",
        ),
        "no_access": (
            "Du hast hier keinen Zugang",
            "Du gehörst nicht zu diesem Konto oder Team, oder du wurdest gesperrt. Frag deine Administration.",
        ),
        "bad_path": (
            "Diese Adresse stimmt nicht",
            "Die Adresse hinter dem Anmeldelink lässt sich nicht öffnen. Der Link wurde nicht benutzt. Geh zurück in "
            "dein Portal und öffne das Studio von dort noch einmal.",
        ),
        "not_a_navigation": (
            "Öffne diesen Link in einem Browser-Tab",
            "Anmeldelinks funktionieren nur, wenn ein Mensch sie öffnet. Der Link wurde nicht benutzt.",
        ),
        "cross_origin": (
            "Bitte versuch es noch einmal",
            "Die Antwort kam nicht von unserer Seite. Öffne den Anmeldelink noch einmal.",
        ),
        "form_invalid": (
            "Bitte versuch es noch einmal",
            "Die Seite war zu lange offen. Öffne den Anmeldelink noch einmal.",
        ),
        "unavailable": (
            "Bitte versuch es gleich noch einmal",
            "Wir können dich gerade nicht anmelden. Der Link wurde nicht benutzt.",
        ),
        "overloaded": (
            "Bitte versuch es gleich noch einmal",
            "Gerade melden sich sehr viele an. Der Link wurde nicht benutzt.",
        ),
        "outcome_unknown": (
            "Wir wissen nicht, ob dieser Link benutzt wurde",
            "Etwas wurde unterbrochen. Geh zurück in dein Portal und öffne das Studio von dort noch einmal, mit einem "
            "neuen Link.",
        ),
        "confirm": ("Weiter zum Studio", "Du meldest dich jetzt im Studio an."),
        "switch": (
            "Benutzer wechseln?",
            "Du bist als {current} angemeldet. Dieser Link meldet jemand anderen an. Mach nur weiter, wenn du wechseln "
            "willst.",
        ),
        "continue": ("Weiter", ""),
        "portal": ("Zurück zum Portal", ""),
    },
}


def message_page(
    scope: Scope,
    what: str,
    status: int,
    *,
    portal_url: str | None = None,
    headers: Mapping[str, str] | None = None,
    framed_by: tuple[str, ...] = (),
) -> Response:
    """A page that says what happened. It never repeats anything of the request.

    Pages of the origins in `framed_by` may show it in a frame.
    """
    lang = language(scope)
    # Wherever it was set, a link is nothing but https: never a script, never a page of ours.
    if portal_url and portal_url.startswith("https://"):
        return _response(_render(lang, what, portal_url=portal_url), status, lang, framed_by, headers)
    return _plain(lang, what, status, framed_by, tuple((headers or {}).items()))


def question_page(
    scope: Scope,
    *,
    current: str | None,
    fields: Mapping[str, str],
    headers: Mapping[str, str],
    framed_by: tuple[str, ...] = (),
) -> Response:
    """A page that asks before it signs in; its answer carries `fields`. `current` is who would be replaced."""
    lang = language(scope)
    what = "confirm" if current is None else "switch"
    return _response(_render(lang, what, fields=fields, current=current), 200, lang, framed_by, headers)


@cache
def _plain(
    lang: str, what: str, status: int, framed_by: tuple[str, ...], headers: tuple[tuple[str, str], ...]
) -> Response:
    """A page that is the same for everybody, so that a flood of forged tokens renders none."""
    return _response(_render(lang, what), status, lang, framed_by, dict(headers))


def _render(
    lang: str,
    what: str,
    *,
    portal_url: str | None = None,
    fields: Mapping[str, str] | None = None,
    current: str | None = None,
) -> bytes:
    title, text = _TEXTS[lang][what]
    html = _templates.get_template("message.html").render(
        lang=lang,
        title=title,
        text=text.format(current=current),
        fields=fields,
        portal_url=portal_url,
        go_on=_TEXTS[lang]["continue"][0],
        back=_TEXTS[lang]["portal"][0],
    )
    return html.encode()


def _response(
    html: bytes, status: int, lang: str, framed_by: tuple[str, ...], headers: Mapping[str, str] | None
) -> Response:
    # No outside request, no script, and no frame around us but of those who were named: nothing could read the page or
    # click in it for the user.
    policy = "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors "
    framing = (
        {"Content-Security-Policy": policy + " ".join(framed_by)}
        if framed_by
        else {"Content-Security-Policy": policy + "'none'", "X-Frame-Options": "DENY"}
    )
    return Response(html, status, {**_HEADERS, **framing, "Content-Language": lang, **(headers or {})})
