"""The OpenAPI document: valid, complete, and equal to the structs, the error table and the code that reads requests."""

import json
import shlex
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import jsonschema_rs
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec import UNSET, Struct
from openapi_spec_validator import OpenAPIV31SpecValidator

from sso_service import errors, people, tokens
from sso_service.errors import FieldError, InsufficientScope, LoginTokenError, MalformedToken
from sso_service.http import ErrorBody, ErrorFields
from sso_service.permissions import Scope
from sso_service.problems import ENTRIES
from sso_service.web import schemas
from sso_service.web.api import decode_person, decode_token
from sso_service.web.openapi import components
from sso_service.web.schemas import LoginToken, LoginTokenBody, PersonBody, SessionBody, TokenBody
from tests.support.addresses import ADDRESSES
from tests.support.data import JANE, PAGE
from tests.support.openapi import DOCUMENT, LOGIN, OPERATIONS, SCHEMAS, Json, codes, resolve, validator

# --- the document as a whole -----------------------------------------------------------------------------------------


def test_the_document_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


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
                validator(value["schema"], closed=True).validate(value["example"])
                found += 1
        return found

    for schema in SCHEMAS.values():
        jsonschema_rs.meta.validate(schema)
    assert check(DOCUMENT) >= 12


def test_every_component_is_used_and_every_link_has_a_target() -> None:
    text = json.dumps(DOCUMENT)
    for kind, entries in DOCUMENT["components"].items():
        for name in entries:
            assert (f'"{name}": [' if kind == "securitySchemes" else f'"#/components/{kind}/{name}"') in text, name
    assert {tag for each in OPERATIONS.values() for tag in each["tags"]} == {tag["name"] for tag in DOCUMENT["tags"]}
    responses = [response for each in OPERATIONS.values() for response in each["responses"].values()]
    links = [link["operationId"] for response in responses for link in response.get("links", {}).values()]
    assert links
    assert set(links) <= {each["operationId"] for each in OPERATIONS.values()}


def test_every_error_code_is_documented_with_its_status() -> None:
    # Not of an operation: refused before a request is complete, a bug, or of the Studio's pages only (`last_admin`).
    # `not_allowed` is sent as `no_access`.
    others = {"bad_request", "uri_too_long", "headers_too_large", "internal_error", "last_admin", "not_allowed"}
    expected = {
        (status, code)
        for code, entry in ENTRIES.items()
        if entry.meaning and code not in others
        for status in {entry.status, entry.page_status or entry.status}
    }
    documented = {
        (int(status), code)
        for operation in OPERATIONS.values()
        for status, response in operation["responses"].items()
        for code in codes(resolve(response))
    }
    assert documented == expected
    assert set(SCHEMAS["ErrorFields"]["properties"]["code"]["enum"]) == {code for _, code in expected}


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_curl_command_of_an_operation_is_a_request_for_it(method: str, path: str) -> None:
    (sample,) = OPERATIONS[method, path]["x-codeSamples"]
    command, *arguments = shlex.split(sample["source"].replace("\\\n", ""))
    assert command == "curl"
    options: dict[str, list[str]] = {}
    urls: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument.startswith("http"):
            urls.append(argument)
        else:
            options.setdefault(argument, []).append("" if argument in {"-s", "-i", "-I"} else next(remaining))
    (url,) = urls
    implied = "HEAD" if "-I" in options else "POST" if "-d" in options else "GET"
    assert options.get("-X", [implied]) == [method]
    assert urlsplit(url).path == (PAGE if path == LOGIN else path)
    body = OPERATIONS[method, path].get("requestBody", {"content": {}})["content"]
    if "application/json" in body:
        validator(body["application/json"]["schema"]).validate(json.loads(options["-d"][0]))
        assert "Content-Type: application/json" in options["-H"]
        assert "Authorization: Bearer $API_TOKEN" in options["-H"]


# --- structs ---------------------------------------------------------------------------------------------------------

BODIES = [value for value in vars(schemas).values() if isinstance(value, type) and value.__module__ == schemas.__name__]


def test_the_document_describes_every_body_and_no_other() -> None:
    assert set(SCHEMAS) == {body.__name__ for body in [*BODIES, ErrorBody, ErrorFields]} | {"Role"}


@pytest.mark.parametrize("body", [*BODIES, ErrorBody, ErrorFields], ids=lambda body: body.__name__)
def test_the_document_has_the_fields_of_a_struct(body: type[Struct]) -> None:
    fields = msgspec.structs.fields(body)
    schema = SCHEMAS[body.__name__]
    assert list(schema["properties"]) == [field.encode_name for field in fields]
    assert schema["required"] == [field.encode_name for field in fields if field.default is not UNSET]
    assert schema["description"] == body.__doc__


def test_a_new_field_of_a_struct_appears_in_the_document() -> None:
    class Extended(SessionBody, frozen=True, kw_only=True):
        colour: str = "red"
        size: int | msgspec.UnsetType = UNSET

    schema = components.schemas([Extended], [])["Extended"]
    assert schema["properties"]["colour"] == {"type": "string"}
    assert schema["properties"]["size"] == {"type": "integer"}
    assert schema["required"] == [*SCHEMAS["SessionBody"]["required"], "colour"]


@pytest.mark.parametrize(
    ("body", "decode"),
    [(PersonBody, decode_person), (TokenBody, decode_token), (LoginTokenBody, decode_token)],
    ids=["person", "text", "login token"],
)
def test_a_request_needs_exactly_the_fields_of_its_struct(body: type[Struct], decode: Any) -> None:
    content: Json = components.example(SCHEMAS[body.__name__], SCHEMAS)
    decode(json.dumps(content).encode())
    for name in body.__struct_fields__:
        rest = {other: value for other, value in content.items() if other != name}
        with pytest.raises(FieldError) as caught:
            decode(json.dumps(rest).encode())
        assert (caught.value.field, caught.value.rule) == (name, "required")


def test_the_document_lists_the_reasons_of_inactive_tokens() -> None:
    def leaves(kind: type[LoginTokenError]) -> Iterator[type[LoginTokenError]]:
        yield from (
            (leaf for each in kind.__subclasses__() for leaf in leaves(each)) if kind.__subclasses__() else [kind]
        )

    documented = SCHEMAS["InactiveToken"]["properties"]["reason"]["enum"]
    assert set(documented) == {leaf.reason for leaf in leaves(LoginTokenError)}


def test_the_document_lists_the_details_of_errors() -> None:
    details = SCHEMAS["ErrorFields"]["properties"]["details"]["properties"]
    assert set(details["rule"]["enum"]) == set(errors._RULES)
    sent = [FieldError("email", "required").details, InsufficientScope(Scope.WRITE_SSO).details]
    assert set(details) == {name for each in sent for name in each or {}}


# --- requests --------------------------------------------------------------------------------------------------------

often = hypothesis_settings(derandomize=True, deadline=None, database=None, max_examples=300)

NEARLY_ADDRESSES = st.builds(
    "{}@{}".format,
    st.text('aZ0.-_+!"\\( @\xe9\x00', max_size=6),
    st.lists(st.text("aZx0n-\xe9_", max_size=6), max_size=4).map(".".join),
)
PERSON = validator(SCHEMAS["PersonBody"])
A63, A64, A65 = "a" * 63, "a" * 64, "a" * 65


def is_person(value: object) -> bool:
    try:
        people.normalise_email(decode_person(json.dumps(value).encode()).email)
    except FieldError:
        return False
    return True


@pytest.mark.slow
@often
@given(ADDRESSES | NEARLY_ADDRESSES | st.emails() | st.text(max_size=300))
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
def test_an_address_is_accepted_exactly_if_it_matches_the_document(address: str) -> None:
    accepted, valid = is_person({**JANE, "email": address}), PERSON.is_valid({**JANE, "email": address})
    # More is accepted than promised: white space around it, and over 64 characters before the @ (RFC 5321).
    if accepted and address == address.strip() and len(address.partition("@")[0]) <= 64:
        assert valid
    # A schema cannot express which letters beyond ASCII a domain may contain, nor what is valid Punycode.
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
def test_a_name_is_accepted_exactly_if_it_matches_the_document(name: str) -> None:
    for field in ("first_name", "last_name"):
        value = {**JANE, field: name}
        assert is_person(value) == PERSON.is_valid(value)


@pytest.mark.slow
@often
@given(
    st.fixed_dictionaries(
        {}, optional={name: st.none() | st.just("a@b.ch") | st.integers() | st.lists(st.text()) for name in JANE}
    )
    | st.dictionaries(st.text(), st.text()).map(lambda others: {**others, **JANE})
)
def test_a_person_is_accepted_exactly_if_it_matches_the_document(value: Json) -> None:
    assert is_person(value) == PERSON.is_valid(value)


TEXTS = st.text() | st.text(" \x00\x1c\x1f\x7f\x85\xa0\u1680\u2028\u3000\ufeff", max_size=3)


@often
@given(st.none() | st.booleans() | TEXTS)
def test_a_text_can_be_verified_exactly_if_it_matches_the_document(token: object) -> None:
    try:
        accepted = decode_token(json.dumps({"token": token}).encode()) == token
    except FieldError:
        accepted = False
    assert validator(SCHEMAS["TokenBody"]).is_valid({"token": token}) == accepted


@pytest.mark.slow
@often
@given(st.from_regex(r"[A-Za-z0-9_-]{42,43}[A-Za-z0-9_-]", fullmatch=True) | st.text(max_size=50))
def test_a_login_token_has_exactly_the_form_in_the_document(token: str) -> None:
    try:
        tokens.unsafe_read_claims(token)
        well_formed = True
    except MalformedToken:
        well_formed = False
    assert validator(msgspec.json.schema(LoginToken)).is_valid(token) == well_formed
