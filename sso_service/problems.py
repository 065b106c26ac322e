"""One table: what each error code means to an API client, to a browser, and to the documentation.

API errors, login pages, Studio pages, the client's middleware, the connection's own refusals and the OpenAPI document
all read this table, so a code has one status, one message and one page. It depends on nothing but the error ladder, so
every layer may use it.
"""

from dataclasses import dataclass, field

from sso_service.errors import FieldError, MethodNotAllowed, PagesRateLimited, RateLimited, ServiceError
from sso_service.http import Problem

RETRY_AFTER = "2"
"""Seconds after which a client should retry a request that was answered with 503."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text of a page in both languages. `%(current)s` stands for the user who is signed in."""

    en: str
    de: str

    def in_language(self, language: str) -> str:
        """Return the text in `language`, which is `en` or `de`."""
        return self.de if language == "de" else self.en


@dataclass(frozen=True, slots=True)
class Entry:
    """The meaning of a code.

    `status` is the HTTP status for API clients, `page_status` that for browsers. `message` is for people who read API
    responses, `meaning` is for the documentation. `title` and `text` make the page. `code` is sent to clients instead
    of the entry's own, if it is set.
    """

    status: int
    message: str = ""
    meaning: str = ""
    page_status: int = 0
    title: Text | None = None
    text: Text | None = None
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)


_BACK = Text(
    "Go back to your portal and open Studio from there again.",
    "Geh zurück in dein Portal und öffne das Studio von dort noch einmal.",
)
_RETRY = Text("Please try again", "Bitte versuch es noch einmal")
_RETRY_SOON = Text("Please try again in a moment", "Bitte versuch es gleich noch einmal")
_RETRY_HEADERS = {"Retry-After": RETRY_AFTER}
_CLOSE = {"Connection": "close"}

ENTRIES: dict[str, Entry] = {
    # --- login tokens
    "token_invalid": Entry(
        422,
        "The login token is not valid.",
        "The text is not a login token, the token is forged, or another account issued it.",
        401,
        Text("This login link is not valid", "Dieser Anmeldelink ist ungültig"),
        Text(
            f"It may have been cut off or changed on its way. {_BACK.en}",
            f"Vielleicht wurde er unterwegs abgeschnitten oder verändert. {_BACK.de}",
        ),
    ),
    "token_expired": Entry(
        410,
        "The login token has expired.",
        "The lifetime of the login token is over, or its user was signed out everywhere, disabled or removed since it "
        "was issued.",
        401,
        Text("This login link has expired", "Dieser Anmeldelink ist abgelaufen"),
        Text(f"Login links are valid for a few minutes. {_BACK.en}", f"Anmeldelinks gelten wenige Minuten. {_BACK.de}"),
    ),
    "token_consumed": Entry(
        410,
        "The login token was used before.",
        "The login token was used or revoked before.",
        401,
        Text("This login link was already used", "Dieser Anmeldelink wurde schon benutzt"),
        Text(
            f"Each link signs in once. {_BACK.en} If you have not used it yourself, tell your administrator.",
            f"Jeder Link meldet einmal an. {_BACK.de} Wenn du ihn nicht selbst benutzt hast, melde es deiner "
            "Administration.",
        ),
    ),
    "no_access": Entry(
        403,
        "The user has no access here.",
        "The user is disabled or not in the account, or the path is not one that the user may see. The token was not "
        "consumed.",
        403,
        Text("You have no access here", "Du hast hier keinen Zugang"),
        Text(
            "You do not belong to this account or team, or you were disabled. Ask your administrator.",
            "Du gehörst nicht zu diesem Konto oder Team, oder du wurdest gesperrt. Frag deine Administration.",
        ),
    ),
    "not_allowed": Entry(
        403,
        "The user has no access here.",
        "The role does not permit this.",
        403,
        Text("Your role may not see this", "Deine Rolle darf das nicht sehen"),
        Text(
            "An administrator of your account can give you another role, under Settings, Team.",
            "Die Administration deines Kontos kann dir unter Einstellungen, Team eine andere Rolle geben.",
        ),
        code="no_access",
    ),
    # --- API tokens and users
    "missing_token": Entry(
        401,
        "Missing or invalid API token.",
        "The API token is missing, unknown, revoked or expired.",
        headers={"WWW-Authenticate": "Bearer"},
    ),
    "insufficient_scope": Entry(
        403,
        "The API token lacks the scope {required_scope}.",
        "The API token is valid but lacks the scope in `details.required_scope`.",
    ),
    "rate_limited": Entry(
        429,
        "This API token is used too often. Try again in a moment.",
        "The API token is used more often than `SSO_RATE_LIMIT` allows, or pages are requested more often than "
        "`SSO_PAGE_RATE_LIMIT` allows. Nothing was done; retry after `Retry-After` seconds.",
    ),
    "user_disabled": Entry(403, "This user is disabled.", "An operator has disabled the user."),
    "role_not_allowed": Entry(
        403,
        "The user's role is above the highest role that this API token may sign in.",
        "The user's role is above the `max_role` of the API token.",
    ),
    # --- sessions
    "not_signed_in": Entry(
        401,
        "There is no valid session.",
        "There is no session, or it has ended: expired, signed out, user disabled or removed.",
        401,
        Text("You are not signed in", "Du bist nicht angemeldet"),
        Text(
            "Go back to your portal and open Studio from there.",
            "Geh zurück in dein Portal und öffne das Studio von dort.",
        ),
    ),
    "pages_rate_limited": Entry(
        429,
        "Pages are requested too often. Try again in a moment.",
        page_status=429,
        title=_RETRY_SOON,
        text=Text(
            "You or your team open pages faster than we can show them. Nothing was changed.",
            "Du oder dein Team öffnet Seiten schneller, als wir sie zeigen können. Es wurde nichts geändert.",
        ),
        code="rate_limited",
    ),
    "cross_origin": Entry(
        403,
        "The request does not come from a page of this site.",
        "The request does not come from a page of this origin: it has neither `Sec-Fetch-Site: same-origin` nor the "
        "right `Origin`.",
        403,
        _RETRY,
        Text(
            "The request did not come from our page. Open the login link again.",
            "Die Anfrage kam nicht von unserer Seite. Öffne den Anmeldelink noch einmal.",
        ),
    ),
    "form_invalid": Entry(
        403,
        "The form is no longer valid.",
        "The page was open for more than 5 minutes, or the form belongs to another question. The token was not "
        "consumed.",
        403,
        _RETRY,
        Text(
            "The page was open for too long. Open the login link again.",
            "Die Seite war zu lange offen. Öffne den Anmeldelink noch einmal.",
        ),
    ),
    "last_admin": Entry(
        409, "The account would have no admin.", "The change would leave the account without an admin."
    ),
    # --- requests
    "bad_path": Entry(
        400,
        "The path is not canonical.",
        "The path can be read in two ways (`..`, `//`, `;`, `\\`, encoded `/`, `.` or `%`, control characters), or it "
        "has over 64 segments or its query over 200 parameters. The token was not consumed.",
        400,
        Text("This address is not valid", "Diese Adresse ist ungültig"),
        Text(
            f"The address behind the login link cannot be opened. The link was not used. {_BACK.en}",
            f"Die Adresse hinter dem Anmeldelink lässt sich nicht öffnen. Der Link wurde nicht benutzt. {_BACK.de}",
        ),
    ),
    "not_a_navigation": Entry(
        403,
        "Login links work only when a person opens them.",
        "The response is not for a browser's window (`Sec-Fetch-Dest`). The token was not consumed.",
        403,
        Text("Open this link in a browser tab", "Öffne diesen Link in einem Browser-Tab"),
        Text(
            "Login links work only when a person opens them. The link was not used.",
            "Anmeldelinks funktionieren nur, wenn ein Mensch sie öffnet. Der Link wurde nicht benutzt.",
        ),
    ),
    "invalid_json": Entry(400, "The body is not a JSON object.", "The body is not a JSON object in UTF-8."),
    "parameter_missing": Entry(422, meaning="`details.field` is absent, null or blank; `details.rule` is `required`."),
    "parameter_invalid": Entry(
        422, meaning="`details.field` breaks the rule `details.rule`: `type`, `max_length`, `characters` or `email`."
    ),
    "payload_too_large": Entry(
        413, "The body is larger than 16 KiB.", "The body is over 16 KiB. The connection is closed.", headers=_CLOSE
    ),
    "request_timeout": Entry(
        408,
        "The request took too long.",
        "The body took longer than 10 seconds. The connection is closed.",
        headers=_CLOSE,
    ),
    "not_found": Entry(
        404,
        "Nothing exists at this address.",
        "Nothing exists at this path without `sso` in the query.",
        404,
        Text("There is nothing here", "Hier ist nichts"),
        Text(
            "The address may be wrong, or the page was removed.",
            "Vielleicht stimmt die Adresse nicht, oder die Seite gibt es nicht mehr.",
        ),
    ),
    "method_not_allowed": Entry(
        405, "This method is not allowed here.", "The path does not support this method; `Allow` lists those it does."
    ),
    "bad_request": Entry(400, "The request is not valid HTTP.", "The request is not valid HTTP."),
    "uri_too_long": Entry(414, "The address is too long.", "The request line is over 32 KiB.", headers=_CLOSE),
    "headers_too_large": Entry(
        431, "The headers are too large.", "The head is over 32 KiB or 100 lines.", headers=_CLOSE
    ),
    # --- load, database, keys
    "unavailable": Entry(
        503,
        "The service cannot do this now. Try again in a moment.",
        "The database or the signing keys cannot be used now. Nothing was done; retry after `Retry-After` seconds.",
        503,
        _RETRY_SOON,
        Text(
            "We cannot sign you in right now. The link was not used.",
            "Wir können dich gerade nicht anmelden. Der Link wurde nicht benutzt.",
        ),
        headers=_RETRY_HEADERS,
    ),
    "overloaded": Entry(
        503,
        "The service is overloaded. Try again in a moment.",
        "More requests wait than can be answered in time. Nothing was done; retry after `Retry-After` seconds.",
        503,
        _RETRY_SOON,
        Text(
            "Many people are signing in right now. The link was not used.",
            "Gerade melden sich viele Leute an. Der Link wurde nicht benutzt.",
        ),
        headers=_RETRY_HEADERS,
    ),
    "outcome_unknown": Entry(
        503,
        "It is not known whether this was done. Get a new login link.",
        "The database gave no clear answer: the operation may have been done or not. Get a new login token.",
        503,
        Text("We do not know whether this link was used", "Wir wissen nicht, ob dieser Link benutzt wurde"),
        Text(
            "The sign-in was interrupted. Go back to your portal and open Studio from there again for a new link.",
            "Die Anmeldung wurde unterbrochen. Geh zurück in dein Portal und öffne das Studio von dort noch einmal, "
            "mit einem neuen Link.",
        ),
        headers=_RETRY_HEADERS,
    ),
    "internal_error": Entry(500, "An internal error occurred.", "A bug: the log has a traceback."),
    # --- pages only: a page of the Studio that cannot be shown, a change whose outcome is not known, results, questions
    "page_unavailable": Entry(
        503,
        page_status=503,
        title=_RETRY_SOON,
        text=Text(
            "We cannot show this page right now. Nothing was lost.",
            "Wir können diese Seite gerade nicht zeigen. Es ging nichts verloren.",
        ),
        headers=_RETRY_HEADERS,
    ),
    "change_unknown": Entry(
        503,
        page_status=503,
        title=Text("We do not know whether this was done", "Wir wissen nicht, ob die Änderung gespeichert wurde"),
        text=Text(
            "The change was interrupted. Go back and check.",
            "Die Änderung wurde unterbrochen. Geh zurück und sieh nach.",
        ),
        headers=_RETRY_HEADERS,
    ),
    "signed_out": Entry(
        200,
        page_status=200,
        title=Text("You are signed out", "Du bist abgemeldet"),
        text=Text(
            "To come back, open Studio from your portal again.",
            "Um zurückzukommen, öffne das Studio noch einmal von deinem Portal aus.",
        ),
    ),
    "confirm": Entry(
        200,
        page_status=200,
        title=Text("Continue to Studio", "Weiter zum Studio"),
        text=Text("You are about to sign in to Studio.", "Du meldest dich jetzt im Studio an."),
    ),
    "switch": Entry(
        200,
        page_status=200,
        title=Text("Switch user?", "Benutzer wechseln?"),
        text=Text(
            "You are signed in as %(current)s. This link signs in another user. Continue only if you meant to switch.",
            "Du bist als %(current)s angemeldet. Dieser Link meldet einen anderen Benutzer an. Mach nur weiter, wenn "
            "du wechseln willst.",
        ),
    ),
}


def api_problem(error: ServiceError) -> Problem:
    """Return `error` as an API client sees it."""
    entry = ENTRIES[error.code]
    message = str(error) if isinstance(error, FieldError) else entry.message.format(**error.details or {})
    headers = entry.headers
    if isinstance(error, RateLimited | PagesRateLimited):
        headers = {"Retry-After": str(error.retry_after)}
    elif isinstance(error, MethodNotAllowed):
        headers = {"Allow": error.allowed}
    return Problem(entry.status, entry.code or error.code, message, error.details, headers)


def problem(code: str, *, page: bool = False) -> Problem:
    """Return the error `code` without details, as an API client sees it, or with `page` with the status of the page."""
    entry = ENTRIES[code]
    return Problem(entry.page_status if page else entry.status, entry.code or code, entry.message, None, entry.headers)
