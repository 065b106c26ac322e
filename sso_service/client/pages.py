"""Responses of the middleware that people read: refusals, and the question before another user is signed in.

Texts come from the table in `sso_service.problems`. Everything else in a page is constant or escaped.
"""

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from html import escape

from sso_service.client.asgi import Response, Scope
from sso_service.http import ISOLATED_PAGE, JSON_HEADERS, error_body, language, prefers_json
from sso_service.problems import ENTRIES, Text, problem

_CONTINUE = Text("Continue", "Weiter")

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ground: #f5f6f8; --ink: #1b1f26; --line: #d4d9e1;
  --accent: #1d5fd1; --on-accent: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --paper: #1a1d23; --ground: #121418; --ink: #e8eaee; --line: #3a414d;
  --accent: #8ab4f8; --on-accent: #10141b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 34rem; margin: 10vh auto 0; padding: 2rem; background: var(--paper); border: 1px solid var(--line);
  border-radius: .75rem; }
main > :last-child { margin-bottom: 0; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
p { margin: 0 0 1rem; }
a { display: inline-block; padding: .4rem .8rem; border-radius: .4rem; background: var(--accent);
  color: var(--on-accent); text-decoration: none; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
@media (max-width: 40rem) { main { margin: 1rem; padding: 1.5rem; } }
"""

# The style is part of the page, and the policy names it by its hash (CSP level 3, section 2.3.1): it is the only style
# that applies. The page allows no script, form, frame or request, so nothing can read it or click in it for the user.
_STYLE_HASH = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    # The page's own address may contain a login token that was not used.
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept, Accept-Language, Cookie",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    **ISOLATED_PAGE,
}


def refusal(scope: Scope, code: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response for an error code: a page, or JSON if the request prefers it.

    It quotes nothing from the request. `headers` replace those of the table.
    """
    described = problem(code, page=True)
    lines = {**described.headers, **(headers or {})}
    if prefers_json(scope):
        return Response(described.status, {**JSON_HEADERS, **lines}, error_body(described))
    return _page(scope, code, described.status, lines)


def switch_page(scope: Scope, current: str, href: str) -> Response:
    """Return the page that asks whether another user may replace `current`, an e-mail address. `href` confirms it."""
    return _page(scope, "switch", 200, {}, current=current, href=href)


def _page(
    scope: Scope, code: str, status: int, headers: Mapping[str, str], *, current: str = "", href: str = ""
) -> Response:
    lang = language(scope)
    entry = ENTRIES[code]
    title, text = (escape(part.in_language(lang)) if part else "" for part in (entry.title, entry.text))
    text = text.replace("%(current)s", escape(current))
    link = f'<p><a href="{escape(href)}" rel="nofollow noreferrer">{_CONTINUE.in_language(lang)}</a></p>\n'
    page = f"""<!DOCTYPE html>
<html lang="{lang}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{text}</p>
{link if href else ""}</main>
</body>
</html>
"""
    return Response(status, {**_HEADERS, "Content-Language": lang, **headers}, page.encode())
