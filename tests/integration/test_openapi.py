"""The OpenAPI document and its page: valid, complete, and true in both directions.

What it says of requests is compared with the code that reads them. What it says of answers is compared with answers:
all that are documented are provoked here, and what schemathesis provokes has to be documented.
"""

import asyncio
import base64
import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlencode, urlsplit

import html5lib
import jsonschema_rs
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator

from sso_service import people, tokens
from sso_service.database import open_database
from sso_service.database.transactions import Database
from sso_service.errors import FieldError, MalformedToken
from sso_service.keyring import KeyDirectory
from sso_service.permissions import Role, Scope
from sso_service.services.node import Node
from sso_service.settings import read_settings
from sso_service.web import login, problems, requests
from sso_service.web.api import decode_person, decode_token
from sso_service.web.app import create_app, routing_table
from sso_service.web.openapi import page
from sso_service.web.problems import ErrorResponses
from tests.support import administration
from tests.support.addresses import ADDRESSES
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, PAGE
from tests.support.databases import changing, on_sqlite
from tests.support.openapi import DOCUMENT, LOGIN, OPERATIONS, SIGN_OUTS, Json, make_api_token
from tests.support.outages import a_database_that

pytestmark = pytest.mark.anyio


def validator(schema: Json) -> jsonschema_rs.Draft202012Validator:
    """A validator for a schema of the document, with what it refers to. Formats count."""
    whole = {**schema, "components": DOCUMENT["components"]}
    return jsonschema_rs.Draft202012Validator(whole, validate_formats=True)


def resolved(value: Json) -> Json:
    for name in value["$ref"].split("/")[1:] if "$ref" in value else ():
        value = value[name] if "$ref" not in value else DOCUMENT[name]
    return value


# --- the document ----------------------------------------------------------------------------------------------------


@on_sqlite
async def test_the_document_is_served_for_caches_as_valid_openapi(client: Client) -> None:
    answer = await client.get("/openapi.json")
    assert answer.status == 200
    assert answer.json() == DOCUMENT
    assert answer.header("cache-control") == "public, max-age=300"
    OpenAPIV31SpecValidator(answer.json()).validate()


def test_all_schemas_and_examples_of_the_document_are_valid() -> None:
    def check(value: Any) -> int:
        if isinstance(value, list):
            return sum(map(check, value))
        if not isinstance(value, dict):
            return 0
        found = sum(map(check, value.values()))
        if "schema" in value:
            jsonschema_rs.meta.validate(value["schema"])
            if "example" in value:
                validator(value["schema"]).validate(value["example"])
                found += 1
        return found

    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)
    assert check(DOCUMENT) >= 12


def test_every_part_of_the_document_is_used_and_every_link_leads_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    for kind, entries in DOCUMENT["components"].items():
        for name in entries:
            assert (f'"{name}": [' if kind == "securitySchemes" else f'"#/components/{kind}/{name}"') in text, name
    assert {tag for each in OPERATIONS.values() for tag in each["tags"]} == {tag["name"] for tag in DOCUMENT["tags"]}
    answers = [answer for each in OPERATIONS.values() for answer in each["responses"].values()]
    links = [link["operationId"] for answer in answers for link in answer.get("links", {}).values()]
    assert links
    assert set(links) <= {each["operationId"] for each in OPERATIONS.values()}


@on_sqlite
def test_every_route_is_in_the_document_and_nothing_else(service: Node) -> None:
    routes = {(route.method, route.path) for route in routing_table(service, ErrorResponses())}
    links = {(method, LOGIN) for method in login._METHODS.split(", ")}
    assert set(OPERATIONS) == routes | links


def test_every_error_that_the_service_knows_is_in_the_document() -> None:
    source = Path(problems.__file__).read_text() + Path(login.__file__).read_text()
    known = {
        (int(status or 503), code)
        for status, code in re.findall(r'(?:Problem\(\s*(\d{3}), |_unavailable\()"(\w+)"', source)
    } - {(500, "internal_error")}  # a bug
    assert len(known) >= 25
    documented = {
        (int(status), code)
        for operation in OPERATIONS.values()
        for status, answer in operation["responses"].items()
        for code in codes(resolved(answer))
    }
    assert documented == known
    assert set(DOCUMENT["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["code"]["enum"]) == {
        code for _, code in known
    }


def codes(answer: Json) -> list[str]:
    """The error codes that a documented answer may have."""
    match answer.get("content", {}).get("application/json"):
        case {"schema": {"allOf": [_, {"properties": {"error": {"properties": {"code": {"enum": found}}}}}]}}:
            return list(found)
    return []


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_curl_line_of_an_operation_is_a_request_for_it(method: str, path: str) -> None:
    (sample,) = OPERATIONS[method, path]["x-codeSamples"]
    command, *arguments = shlex.split(sample["source"].replace("\\\n", ""))
    assert command == "curl"
    given: dict[str, list[str]] = {}
    urls: list[str] = []
    flags = iter(arguments)
    for flag in flags:
        if flag.startswith("http"):
            urls.append(flag)
        else:
            given.setdefault(flag, []).append("" if flag in {"-s", "-i", "-I"} else next(flags))
    (url,) = urls
    implied = "HEAD" if "-I" in given else "POST" if "-d" in given else "GET"
    assert given.get("-X", [implied]) == [method]
    assert urlsplit(url).path == (PAGE if path == LOGIN else path)
    body = OPERATIONS[method, path].get("requestBody", {"content": {}})["content"]
    if "application/json" in body:
        validator(body["application/json"]["schema"]).validate(json.loads(given["-d"][0]))
        assert "Content-Type: application/json" in given["-H"]
        assert "Authorization: Bearer $API_TOKEN" in given["-H"]


# --- requests --------------------------------------------------------------------------------------------------------

often = hypothesis_settings(derandomize=True, deadline=None, database=None, max_examples=300)

NEARLY = st.builds(
    "{}@{}".format,
    st.text('aZ0.-_+!"\\( @\xe9\x00', max_size=6),
    st.lists(st.text("aZx0n-\xe9_", max_size=6), max_size=4).map(".".join),
)
PERSON = validator(DOCUMENT["components"]["schemas"]["Person"])
A63, A64, A65 = "a" * 63, "a" * 64, "a" * 65


def is_person(value: object) -> bool:
    try:
        people.normalise_email(decode_person(json.dumps(value).encode()).email)
    except FieldError:
        return False
    return True


@often
@given(ADDRESSES | NEARLY | st.emails() | st.text(max_size=300))
@example(f"{A64}@a.ch")
@example(f"{A65}@a.ch")
@example(f"a@{A63}.ch")
@example(f"a@{A64}.ch")
@example(f"a@b.{A63}")
@example(f"a@b.{A64}")
@example(f"{A64}@{A63}.{A63}.{'a' * 58}.ch")  # 254 characters
@example(f"{A64}@{A63}.{A63}.{'a' * 59}.ch")
@example("a@b")
@example("a@b.1")
@example("a@b.c1")
@example("a@b.1c")
@example("a@b.c.")
@example("a@localhost")
@example("a@x.LocalHost")
@example("a@x.localhost.ch")
@example("a@ab--c.ch")
@example("a@xn--mller-kva.ch")
@example("a@[192.0.2.1]")
@example('"a b"@b.ch')
@example(".a@b.ch")
@example("a..b@b.ch")
def test_an_address_is_accepted_if_and_only_if_the_document_says_so(address: str) -> None:
    accepted, valid = is_person({**JANE, "email": address}), PERSON.is_valid({**JANE, "email": address})
    # More is accepted than is promised: blanks around it, and more than 64 characters before the @ (RFC 5321).
    if accepted and address == address.strip() and len(address.partition("@")[0]) <= 64:
        assert valid
    # Which letters beyond ASCII may be in a domain, and what is Punycode, a schema cannot say.
    if valid and address.isascii() and "xn--" not in address.lower():
        assert accepted


@often
@given(
    st.text(max_size=110) | st.text("a \x00\x1f\x7f\x85\x9f\xa0\u1680\u2007\u2028\u3000\ufeff\U0001f600", max_size=4)
)
@example("a" * 100)
@example("a" * 101)
@example(" " * 100)
@example("\ufeff")
def test_a_name_is_accepted_if_and_only_if_the_document_says_so(name: str) -> None:
    for field in ("first_name", "last_name"):
        value = {**JANE, field: name}
        assert is_person(value) == PERSON.is_valid(value)


@often
@given(
    st.fixed_dictionaries(
        {}, optional={name: st.none() | st.just("a@b.ch") | st.integers() | st.lists(st.text()) for name in JANE}
    )
    | st.dictionaries(st.text(), st.text()).map(lambda others: {**others, **JANE})
)
def test_a_person_is_accepted_if_and_only_if_the_document_says_so(value: Json) -> None:
    assert is_person(value) == PERSON.is_valid(value)


TEXTS = st.text() | st.text(" \x00\x1c\x1f\x7f\x85\xa0\u1680\u2028\u3000\ufeff", max_size=3)


@often
@given(st.none() | st.booleans() | TEXTS)
def test_a_text_may_be_verified_if_and_only_if_the_document_says_so(token: object) -> None:
    try:
        accepted = decode_token(json.dumps({"token": token}).encode()) == token
    except FieldError:
        accepted = False
    assert validator({"$ref": "#/components/schemas/TokenToVerify"}).is_valid({"token": token}) == accepted


@often
@given(st.from_regex(r"[A-Za-z0-9_-]{42,43}[A-Za-z0-9_-]", fullmatch=True) | st.text(max_size=50))
def test_a_text_has_the_form_of_a_token_if_and_only_if_the_document_says_so(token: str) -> None:
    try:
        tokens.unsafe_read_claims(token)
        well_formed = True
    except MalformedToken:
        well_formed = False
    assert validator({"$ref": "#/components/schemas/LoginToken"}).is_valid(token) == well_formed


# --- answers ---------------------------------------------------------------------------------------------------------


class Witness:
    """Checks that answers are documented, and remembers which of those that are documented it has seen."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str, int]] = set()

    def see(self, status: int, operation: str, answer: Answer, code: str = "") -> None:
        """Fails unless `answer` is what the document says about this status of an operation (`POST /logout`)."""
        method, _, path = operation.partition(" ")
        assert answer.status == status, answer
        documented = resolved(OPERATIONS[method, path]["responses"][str(status)])
        for name, reference in documented.get("headers", {}).items():
            header, value = resolved(reference), answer.header(name.lower())
            assert value is not None or not header["required"], name
            if value is not None:
                validator(header["schema"]).validate(value)
        content = documented.get("content", {})
        kind = (answer.header("content-type") or "").partition(";")[0]
        assert (kind in content) == bool(answer.body), kind
        if kind == "application/json" and answer.body:
            validator(content[kind]["schema"]).validate(answer.json())
        if code:
            assert kind == "text/html" or answer.error == code
            assert code in codes(documented)
        self.seen.add((method, path, status))


ISSUE, VERIFY, CONSUME, REVOKE = (f"/v1/sso_tokens{name}" for name in ("", "/verify", "/consume", "/revoke"))
SIGN_IN, CONFIRM = f"GET {LOGIN}", "POST /sso/confirm"
KIM, LEA = {**JANE, "email": "kim@example.com"}, {**JANE, "email": "lea@example.com"}
SAME_ORIGIN = ("sec-fetch-site", "same-origin")


@on_sqlite
async def test_every_answer_that_is_documented_is_given(
    client: Client, database: Database, keys_dir: Path, clock: Clock, tmp_path: Path
) -> None:
    secret = make_api_token(database, *Scope)
    witness = Witness()
    await operations_are_answered(witness, client)
    strict = {"SSO_RATE_LIMIT": "1/hour", "SSO_METRICS_TOKEN": "hunter2"}
    once = Client(create_app(Node(read_settings(strict), database, KeyDirectory(keys_dir), clock=clock)))
    await once.post_json(ISSUE, JANE, token=secret)
    witness.see(401, "GET /metrics", await once.get("/metrics"), "missing_token")
    await calls_are_answered(witness, client, once, database, secret, clock)
    await browsers_are_answered(witness, client, secret)
    with a_database_that("refuses to connect", tmp_path) as url:
        unreachable = open_database(read_settings({"SSO_DATABASE_URL": url}))
        service = Node(read_settings({}), unreachable, KeyDirectory(keys_dir), clock=clock)
        await an_outage_is_answered(witness, client, Client(create_app(service)), secret)
        service.close()
    documented = {
        (method, path, int(status))
        for (method, path), operation in OPERATIONS.items()
        for status in operation["responses"]
    }
    assert witness.seen == documented


async def operations_are_answered(witness: Witness, client: Client) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"):
        witness.see(200, f"GET {path}", await client.get(path))
        witness.see(405, f"GET {path}", await client.request("PUT", path), "method_not_allowed")


async def calls_are_answered(
    witness: Witness, client: Client, limited: Client, database: Database, secret: str, clock: Clock
) -> None:
    async def call(path: str, content: object, token: str | None = secret) -> Answer:
        return await client.post_json(path, content, token=token)

    issued = await call(ISSUE, JANE)
    witness.see(201, f"POST {ISSUE}", issued)
    body = {"token": issued.json()["token"]}
    witness.see(200, f"POST {VERIFY}", await call(VERIFY, body))
    witness.see(200, f"POST {CONSUME}", await call(CONSUME, body))
    witness.see(200, f"POST {VERIFY}", await call(VERIFY, body))
    witness.see(410, f"POST {CONSUME}", await call(CONSUME, body), "token_consumed")
    witness.see(200, f"POST {REVOKE}", await call(REVOKE, body))

    bearer = [("authorization", f"Bearer {secret}")]
    no_token: dict[str, Json] = {ISSUE: {}, VERIFY: {}, CONSUME: {"token": "x"}, REVOKE: {"token": "x"}}
    for path, content in no_token.items():
        operation = f"POST {path}"
        wrong = make_api_token(database, Scope.WRITE_SSO if path in {VERIFY, CONSUME} else Scope.VERIFY_SSO)
        witness.see(401, operation, await call(path, content, None), "missing_token")
        witness.see(403, operation, await call(path, content, wrong), "insufficient_scope")
        witness.see(400, operation, await client.request("POST", path, headers=bearer, body=b"["), "invalid_json")
        large = await client.request("POST", path, headers=bearer, body=b" " * 16385)
        witness.see(413, operation, large, "payload_too_large")
        witness.see(408, operation, await too_slow(client, path, *bearer), "request_timeout")
        witness.see(429, operation, await limited.request("POST", path, headers=bearer), "rate_limited")
        witness.see(422, operation, await call(path, content))
        witness.see(405, operation, await client.get(path), "method_not_allowed")

    body = {"token": await client.issue(secret)}
    clock.advance(300)
    witness.see(410, f"POST {REVOKE}", await call(REVOKE, body), "token_expired")
    capped = make_api_token(database, Scope.WRITE_SSO, max_role=Role.EDITOR)
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
    witness.see(403, f"POST {ISSUE}", await call(ISSUE, JANE, capped), "role_not_allowed")
    body = {"token": await client.issue(secret, JOHN)}
    with changing(database) as connection:
        administration.disable_user(connection, JOHN["email"], now=int(clock()))
    witness.see(403, f"POST {ISSUE}", await call(ISSUE, JOHN), "user_disabled")
    witness.see(403, f"POST {CONSUME}", await call(CONSUME, body), "no_access")


async def browsers_are_answered(witness: Witness, client: Client, secret: str) -> None:
    see, put = witness.see, "PUT"
    see(401, SIGN_IN, await client.get("/a?sso=x", accept="application/json"), "token_invalid")
    see(400, SIGN_IN, await client.get("/a//b?sso=x", accept="application/json"), "bad_path")
    see(403, SIGN_IN, await client.get("/a?sso=x", sec_fetch_dest="image"), "not_a_navigation")
    see(404, SIGN_IN, await client.get("/a"), "not_found")
    see(405, SIGN_IN, await client.request(put, "/a?sso=x"), "method_not_allowed")
    see(503, SIGN_IN, await client.get("/a?sso=x", sec_purpose="prefetch"))
    for method, status in (("HEAD", 200), ("OPTIONS", 204)):
        see(status, f"{method} {LOGIN}", await client.request(method, "/a?sso=x"))
        see(405, f"{method} {LOGIN}", await client.request(put, "/a?sso=x"), "method_not_allowed")
        answer = await client.request(method, "/a")
        # The body of an answer to HEAD goes no further than the server.
        see(404, f"{method} {LOGIN}", replace(answer, body=b"") if method == "HEAD" else answer)

    jane, kim = client.another(), client.another()
    see(303, SIGN_IN, await jane.get(f"{PAGE}?sso={await client.issue(secret)}"))
    see(303, SIGN_IN, await kim.get(f"{PAGE}?sso={await client.issue(secret, KIM)}"))
    see(200, "GET /session", await jane.get("/session"))
    see(401, "GET /session", await client.get("/session"), "not_signed_in")
    see(405, "GET /session", await client.request(put, "/session"), "method_not_allowed")
    see(204, "GET /auth", await jane.get("/auth", x_original_uri=PAGE))
    see(401, "GET /auth", await client.get("/auth", x_original_uri=PAGE), "not_signed_in")
    see(403, "GET /auth", await jane.get("/auth"), "no_access")
    see(405, "GET /auth", await client.request(put, "/auth"), "method_not_allowed")

    form = await ask(witness, client, jane, secret)
    see(403, CONFIRM, await jane.request("POST", "/sso/confirm", body=form), "cross_origin")
    see(403, CONFIRM, await confirm(jane, b""), "form_invalid")
    see(413, CONFIRM, await confirm(jane, b" " * 16385), "payload_too_large")
    see(405, CONFIRM, await jane.get("/sso/confirm"), "method_not_allowed")
    janes = jane.cookies["studio_session"]
    jane.cookies["studio_session"] = kim.cookies["studio_session"]
    see(200, CONFIRM, await confirm(jane, form))  # somebody else has signed in since it asked
    jane.cookies["studio_session"] = janes
    see(303, CONFIRM, await confirm(jane, form))
    jane.cookies["studio_session"] = janes
    see(401, CONFIRM, await confirm(jane, form), "token_consumed")
    see(408, CONFIRM, await too_slow(jane, "/sso/confirm"), "request_timeout")

    for path in SIGN_OUTS:
        see(403, f"POST {path}", await jane.request("POST", path), "cross_origin")
        see(405, f"POST {path}", await jane.get(path), "method_not_allowed")
        see(204, f"POST {path}", await jane.request("POST", path, headers=[SAME_ORIGIN]))
        see(200, f"POST {path}", await jane.request("POST", path, headers=[SAME_ORIGIN, ("accept", "text/html")]))


async def ask(witness: Witness, client: Client, browser: Client, secret: str) -> bytes:
    """The form in which `browser`, in which somebody is signed in, is asked whether to switch to another."""
    page = await browser.get(f"{PAGE}?sso={await client.issue(secret, LEA)}")
    witness.see(200, SIGN_IN, page)
    return urlencode(dict(re.findall(r'name="(\w+)" value="(.*?)"', page.text))).encode()


async def confirm(browser: Client, form: bytes) -> Answer:
    return await browser.request("POST", "/sso/confirm", headers=[SAME_ORIGIN], body=form)


async def too_slow(client: Client, path: str, *headers: tuple[str, str]) -> Answer:
    """The answer to who begins a body and does not go on."""
    with mock.patch.object(requests, "_BODY_TIMEOUT", 0.01):
        return await client.request("POST", path, headers=[SAME_ORIGIN, *headers], body=b"{", ends=asyncio.Event())


async def an_outage_is_answered(witness: Witness, client: Client, broken: Client, secret: str) -> None:
    """`broken` is a node without a database; its keys are those of `client`, which has one."""
    signed_in = client.another()
    await signed_in.get(f"{PAGE}?sso={await client.issue(secret)}")
    form = await ask(witness, client, signed_in, secret)
    broken.cookies = signed_in.cookies
    body = {"token": await client.issue(secret)}
    for path, content in {ISSUE: JANE, VERIFY: body, CONSUME: body, REVOKE: body}.items():
        witness.see(503, f"POST {path}", await broken.post_json(path, content, token=secret), "unavailable")
    witness.see(503, "GET /session", await broken.get("/session"), "unavailable")
    witness.see(503, "GET /auth", await broken.get("/auth", x_original_uri=PAGE), "unavailable")
    everywhere = SIGN_OUTS[1]
    answer = await broken.request("POST", everywhere, headers=[SAME_ORIGIN])
    witness.see(503, f"POST {everywhere}", answer, "unavailable")
    witness.see(503, SIGN_IN, await broken.get(f"{PAGE}?sso={body['token']}"), "unavailable")
    witness.see(503, CONFIRM, await confirm(broken, form), "unavailable")
    witness.see(503, "GET /readyz", await broken.get("/readyz"))


# --- the page --------------------------------------------------------------------------------------------------------


class Page:
    """A page's elements, in order. Making one fails unless it is HTML to the letter."""

    def __init__(self, html: str) -> None:
        tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(html)
        self.elements: list[tuple[str, Mapping[str, str]]] = [(each.tag, each.attrib) for each in tree.iter()]
        self.texts: list[tuple[str, str]] = [(each.tag, each.text or "") for each in tree.iter()]

    def all(self, name: str) -> list[Mapping[str, str]]:
        """The attributes of each of these elements."""
        return [attributes for element, attributes in self.elements if element == name]


async def docs(client: Client) -> tuple[Answer, Page]:
    answer = await client.get("/docs")
    assert answer.status == 200
    assert answer.header("content-type") == "text/html; charset=utf-8"
    return answer, Page(answer.text)


@on_sqlite
async def test_the_page_runs_nothing_and_asks_nobody_for_anything(client: Client) -> None:
    answer, found = await docs(client)
    policy = dict(part.split(" ", 1) for part in (answer.header("content-security-policy") or "").split("; "))
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


@on_sqlite
async def test_every_operation_has_its_place_on_the_page(client: Client) -> None:
    _, found = await docs(client)
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


def test_the_page_shows_what_the_document_says_as_text() -> None:
    nasty = "<script>alert(1)</script><b>`<i>`\n\n- <u>&\n- \"'"
    content = json.loads(json.dumps(DOCUMENT).replace(json.dumps(JANE["first_name"]), json.dumps(nasty)))
    content["info"]["description"] = content["tags"][0]["description"] = content["info"]["title"] = nasty
    operation = content["paths"]["/v1/sso_tokens"]["post"]
    operation["summary"] = operation["description"] = operation["x-codeSamples"][0]["source"] = nasty
    html, _ = page(content)
    plain, _ = page(DOCUMENT)
    assert {element for element, _ in Page(html).elements} == {element for element, _ in Page(plain).elements}
    assert html.count("&lt;script&gt;") >= 6
