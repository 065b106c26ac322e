"""The OpenAPI document against the running application: every route, and every documented response, is provoked."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock
from urllib.parse import urlencode

import pytest

from sso_service.database.transactions import Database
from sso_service.permissions import Role, Scope
from sso_service.services.node import Node
from sso_service.web import login, requests
from sso_service.web.app import routing_table
from sso_service.web.openapi import page
from sso_service.web.problems import ErrorResponses
from tests.support import administration
from tests.support.api import bearer, make_api_token, node
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, PAGE
from tests.support.databases import changing, on_sqlite
from tests.support.openapi import DOCUMENT, LOGIN, OPERATIONS, SCHEMAS, SIGN_OUTS, Json, codes, resolve, validator
from tests.support.outages import a_database_that

pytestmark = [pytest.mark.anyio, on_sqlite]

ISSUE, VERIFY, CONSUME, REVOKE = (f"/v1/sso_tokens{name}" for name in ("", "/verify", "/consume", "/revoke"))
SIGN_IN, CONFIRM = f"GET {LOGIN}", "POST /sso/confirm"
KIM, LEA = {**JANE, "email": "kim@example.com"}, {**JANE, "email": "lea@example.com"}
SAME_ORIGIN = ("sec-fetch-site", "same-origin")


async def test_the_document_is_served_for_caches(client: Client) -> None:
    answer = await client.get("/openapi.json")
    assert answer.status == 200
    assert answer.json() == DOCUMENT
    assert answer.header("cache-control") == "public, max-age=300"


async def test_the_page_is_served_with_its_security_headers(client: Client) -> None:
    answer = await client.get("/docs")
    html, policy = page(DOCUMENT)
    assert answer.status == 200
    assert answer.header("content-type") == "text/html; charset=utf-8"
    assert answer.text == html
    assert answer.header("content-security-policy") == policy
    assert answer.header("x-frame-options") == "DENY"
    assert answer.header("cross-origin-opener-policy") == "same-origin"
    assert answer.header("cross-origin-resource-policy") == "same-origin"
    assert answer.header("referrer-policy") == "no-referrer"
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("cache-control") == "public, max-age=300"


def test_the_document_has_exactly_the_routes_of_the_service(service: Node) -> None:
    routes = {(route.method, route.path) for route in routing_table(service, ErrorResponses())}
    login_links = {(method, LOGIN) for method in login._METHODS.split(", ")}
    assert set(OPERATIONS) == routes | login_links


class Observer:
    """Compares responses with the document, and records which of the documented responses occurred."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str, int]] = set()

    def check(self, status: int, operation: str, answer: Answer, code: str = "") -> None:
        """Fail unless `answer` has this status and matches its description for `operation` (`POST /logout`)."""
        method, _, path = operation.partition(" ")
        assert answer.status == status, answer
        documented = resolve(OPERATIONS[method, path]["responses"][str(status)])
        for name, reference in documented.get("headers", {}).items():
            header, value = resolve(reference), answer.header(name.lower())
            assert value is not None or not header["required"], name
            if value is not None:
                validator(header["schema"]).validate(value)
        content = documented.get("content", {})
        kind = (answer.header("content-type") or "").partition(";")[0]
        assert (kind in content) == bool(answer.body), kind
        if kind == "application/json" and answer.body:
            validator(content[kind]["schema"], closed=True).validate(answer.json())
        if code:
            assert kind == "text/html" or answer.error == code
            assert code in codes(documented)
        self.seen.add((method, path, status))


@pytest.mark.slow
async def test_every_documented_response_occurs(
    client: Client, database: Database, database_url: str, keys_dir: Path, clock: Clock, tmp_path: Path
) -> None:
    _, secret = make_api_token(database, scopes=frozenset(Scope))
    observer = Observer()
    await check_operators(observer, client)
    strict = {"SSO_RATE_LIMIT": "1/hour", "SSO_METRICS_TOKEN": "hunter2"}
    with node(database_url, keys_dir, clock, **strict) as limited:
        await limited.post_json(ISSUE, JANE, token=secret)
        observer.check(401, "GET /metrics", await limited.get("/metrics"), "missing_token")
        await check_integrations(observer, client, limited, database, secret, clock)
    await check_browsers(observer, client, secret)
    with a_database_that("refuses to connect", tmp_path) as url, node(url, keys_dir, clock) as broken:
        await check_an_outage(observer, client, broken, secret)
    documented = {
        (method, path, int(status))
        for (method, path), operation in OPERATIONS.items()
        for status in operation["responses"]
    }
    assert observer.seen == documented


async def check_operators(observer: Observer, client: Client) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"):
        observer.check(200, f"GET {path}", await client.get(path))
        observer.check(405, f"GET {path}", await client.request("PUT", path), "method_not_allowed")


async def check_integrations(
    observer: Observer, client: Client, limited: Client, database: Database, secret: str, clock: Clock
) -> None:
    check = observer.check

    async def call(path: str, content: object, token: str | None = secret) -> Answer:
        return await client.post_json(path, content, token=token)

    issued = await call(ISSUE, JANE)
    check(201, f"POST {ISSUE}", issued)
    body = {"token": issued.json()["token"]}
    check(200, f"POST {VERIFY}", await call(VERIFY, body))
    check(200, f"POST {CONSUME}", await call(CONSUME, body))
    check(200, f"POST {VERIFY}", await call(VERIFY, body))
    check(410, f"POST {CONSUME}", await call(CONSUME, body), "token_consumed")
    check(200, f"POST {REVOKE}", await call(REVOKE, body))

    invalid: dict[str, Json] = {ISSUE: {}, VERIFY: {}, CONSUME: {"token": "x"}, REVOKE: {"token": "x"}}
    for path, content in invalid.items():
        operation, authorized = f"POST {path}", bearer(secret)
        other_scope = Scope.WRITE_SSO if path in {VERIFY, CONSUME} else Scope.VERIFY_SSO
        _, wrong = make_api_token(database, scopes=frozenset({other_scope}))
        check(401, operation, await call(path, content, None), "missing_token")
        check(403, operation, await call(path, content, wrong), "insufficient_scope")
        check(400, operation, await client.request("POST", path, headers=authorized, body=b"["), "invalid_json")
        large = await client.request("POST", path, headers=authorized, body=b" " * 16385)
        check(413, operation, large, "payload_too_large")
        check(408, operation, await send_slowly(client, path, *authorized), "request_timeout")
        check(429, operation, await limited.post_json(path, JANE | body, token=secret), "rate_limited")
        check(422, operation, await call(path, content))
        check(405, operation, await client.get(path), "method_not_allowed")

    body = {"token": await client.issue(secret)}
    clock.advance(300)
    check(410, f"POST {REVOKE}", await call(REVOKE, body), "token_expired")
    _, capped = make_api_token(database, max_role=Role.EDITOR)
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
    check(403, f"POST {ISSUE}", await call(ISSUE, JANE, capped), "role_not_allowed")
    body = {"token": await client.issue(secret, JOHN)}
    with changing(database) as connection:
        administration.disable_user(connection, JOHN["email"], now=int(clock()))
    check(403, f"POST {ISSUE}", await call(ISSUE, JOHN), "user_disabled")
    check(403, f"POST {CONSUME}", await call(CONSUME, body), "no_access")


async def check_browsers(observer: Observer, client: Client, secret: str) -> None:
    check = observer.check
    check(401, SIGN_IN, await client.get("/a?sso=x", accept="application/json"), "token_invalid")
    check(400, SIGN_IN, await client.get("/a//b?sso=x", accept="application/json"), "bad_path")
    check(403, SIGN_IN, await client.get("/a?sso=x", sec_fetch_dest="image"), "not_a_navigation")
    check(404, SIGN_IN, await client.get("/a"), "not_found")
    check(405, SIGN_IN, await client.request("PUT", "/a?sso=x"), "method_not_allowed")
    check(503, SIGN_IN, await client.get("/a?sso=x", sec_purpose="prefetch"))
    for method, status in (("HEAD", 200), ("OPTIONS", 204)):
        check(status, f"{method} {LOGIN}", await client.request(method, "/a?sso=x"))
        check(405, f"{method} {LOGIN}", await client.request("PUT", "/a?sso=x"), "method_not_allowed")
        answer = await client.request(method, "/a")
        # The server does not send the body of a response to HEAD.
        check(404, f"{method} {LOGIN}", replace(answer, body=b"") if method == "HEAD" else answer)

    jane, kim = client.another(), client.another()
    check(303, SIGN_IN, await jane.get(f"{PAGE}?sso={await client.issue(secret)}"))
    check(303, SIGN_IN, await kim.get(f"{PAGE}?sso={await client.issue(secret, KIM)}"))
    check(200, "GET /session", await jane.get("/session"))
    check(401, "GET /session", await client.get("/session"), "not_signed_in")
    check(405, "GET /session", await client.request("PUT", "/session"), "method_not_allowed")
    check(204, "GET /auth", await jane.get("/auth", x_original_uri=PAGE))
    check(401, "GET /auth", await client.get("/auth", x_original_uri=PAGE), "not_signed_in")
    check(403, "GET /auth", await jane.get("/auth"), "no_access")
    check(405, "GET /auth", await client.request("PUT", "/auth"), "method_not_allowed")

    form = await ask(observer, client, jane, secret)
    check(403, CONFIRM, await jane.request("POST", "/sso/confirm", body=form), "cross_origin")
    check(403, CONFIRM, await confirm(jane, b""), "form_invalid")
    check(413, CONFIRM, await confirm(jane, b" " * 16385), "payload_too_large")
    check(405, CONFIRM, await jane.get("/sso/confirm"), "method_not_allowed")
    session = jane.cookies["studio_session"]
    jane.cookies["studio_session"] = kim.cookies["studio_session"]
    check(200, CONFIRM, await confirm(jane, form))  # another user has signed in since the question
    jane.cookies["studio_session"] = session
    check(303, CONFIRM, await confirm(jane, form))
    jane.cookies["studio_session"] = session
    check(401, CONFIRM, await confirm(jane, form), "token_consumed")
    check(408, CONFIRM, await send_slowly(jane, "/sso/confirm"), "request_timeout")

    for path in SIGN_OUTS:
        check(403, f"POST {path}", await jane.request("POST", path), "cross_origin")
        check(405, f"POST {path}", await jane.get(path), "method_not_allowed")
        check(204, f"POST {path}", await jane.request("POST", path, headers=[SAME_ORIGIN]))
        check(200, f"POST {path}", await jane.request("POST", path, headers=[SAME_ORIGIN, ("accept", "text/html")]))


async def check_an_outage(observer: Observer, client: Client, broken: Client, secret: str) -> None:
    """Check the responses of `broken`, a node without a database that has the keys of `client`."""
    check = observer.check
    signed_in = client.another()
    await signed_in.get(f"{PAGE}?sso={await client.issue(secret)}")
    form = await ask(observer, client, signed_in, secret)
    broken.cookies = signed_in.cookies
    body = {"token": await client.issue(secret)}
    for path, content in {ISSUE: JANE, VERIFY: body, CONSUME: body, REVOKE: body}.items():
        check(503, f"POST {path}", await broken.post_json(path, content, token=secret), "unavailable")
    check(503, "GET /session", await broken.get("/session"), "unavailable")
    check(503, "GET /auth", await broken.get("/auth", x_original_uri=PAGE), "unavailable")
    everywhere = SIGN_OUTS[1]
    answer = await broken.request("POST", everywhere, headers=[SAME_ORIGIN])
    check(503, f"POST {everywhere}", answer, "unavailable")
    check(503, SIGN_IN, await broken.get(f"{PAGE}?sso={body['token']}"), "unavailable")
    check(503, CONFIRM, await confirm(broken, form), "unavailable")
    check(503, "GET /readyz", await broken.get("/readyz"))


async def ask(observer: Observer, client: Client, browser: Client, secret: str) -> bytes:
    """Open a login link for another user than that of `browser`. Return the form of the page that asks first."""
    answer = await browser.get(f"{PAGE}?sso={await client.issue(secret, LEA)}")
    observer.check(200, SIGN_IN, answer)
    fields = dict(re.findall(r'name="(\w+)" value="(.*?)"', answer.text))
    assert set(fields) == set(SCHEMAS["LoginForm"]["properties"])
    validator(SCHEMAS["LoginForm"]).validate(fields)
    return urlencode(fields).encode()


async def confirm(browser: Client, form: bytes) -> Answer:
    return await browser.request("POST", "/sso/confirm", headers=[SAME_ORIGIN], body=form)


async def send_slowly(client: Client, path: str, *headers: tuple[str, str]) -> Answer:
    """Return the response to a request whose body begins and does not end."""
    with mock.patch.object(requests, "_BODY_TIMEOUT", 0.01):
        return await client.request("POST", path, headers=[SAME_ORIGIN, *headers], body=b"{", ends=asyncio.Event())
