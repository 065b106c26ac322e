"""The endpoints of `/openapi.json` and `/docs`. Both responses are made once in a process."""

from functools import cache

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from sso_service.http import ISOLATED, ISOLATED_PAGE
from sso_service.web.openapi.document import document
from sso_service.web.openapi.page import page

_HEADERS = {"Cache-Control": "public, max-age=300", "X-Content-Type-Options": "nosniff", **ISOLATED}


@cache
def openapi_endpoint() -> ASGIApp:
    """Return the endpoint of the document as JSON."""
    return Response(msgspec.json.encode(document()), headers=_HEADERS, media_type="application/json")


@cache
def docs_endpoint() -> ASGIApp:
    """Return the endpoint of the document as a page."""
    rendered, policy = page(document())
    headers = {
        **_HEADERS,
        **ISOLATED_PAGE,
        "Content-Security-Policy": policy,
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
    }
    return Response(rendered, headers=headers, media_type="text/html")
