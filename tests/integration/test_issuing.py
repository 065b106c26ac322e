"""`POST /v1/sso_tokens`: a login token for whoever an intranet names, and for every fault an answer of its own."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import struct
import traceback
from base64 import urlsafe_b64decode
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from sqlalchemy import delete, make_url, select, update

from sso_service import keyring
from sso_service.database.group_commit import MAX_WAITING
from sso_service.database.schema import api_tokens, memberships, users
from sso_service.database.transactions import Database
from sso_service.keyring import KeyDirectory
from sso_service.permissions import Role
from tests.support import administration
from tests.support.api import (
    INVALID_JSON,
    LIMIT,
    MISSING_TOKEN,
    NEEDS_WRITE_SCOPE,
    TOO_LARGE,
    UNAVAILABLE,
    VERIFY,
    WRITE,
    Refusal,
    bearer,
    encoded,
    invalid,
    make_api_token,
    missing,
    node,
    padded,
    refusal,
    settled,
)
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, PAGE
from tests.support.databases import changing, on_postgresql, on_sqlite, watching
from tests.support.outages import a_database_that, away, renamed
from tests.support.waiting import Stopwatch

pytestmark = pytest.mark.anyio


URL = "/v1/sso_tokens"
DEADLINE = 2.5


USER_DISABLED = Refusal(403, "user_disabled")
ROLE_NOT_ALLOWED = Refusal(403, "role_not_allowed")


def issued(answer: Answer) -> tuple[str, bool]:
    """The token, and whether its user was created for it."""
    assert answer.status == 201, answer
    content = answer.json()
    assert content.keys() == {"token", "user_created"}
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", content["token"])
    assert content["user_created"] is True or content["user_created"] is False
    return content["token"], content["user_created"]


def claims(token: str) -> tuple[int, int, int, int]:
    """expires_at, user_id, account_id, nonce."""
    expires_at, user_id, account_id, nonce = struct.unpack(">IIII", urlsafe_b64decode(token + "=")[:16])
    return expires_at, user_id, account_id, nonce


async def post(client: Client, body: bytes, secret: str, *headers: tuple[str, str]) -> Answer:
    return await client.request("POST", URL, headers=[*bearer(secret), *headers], body=body)


class Known(NamedTuple):
    """What the database knows of a user."""

    id: int
    first_name: str
    last_name: str
    roles: dict[int, Role]


def known(database: Database, email: str = JANE["email"]) -> Known:
    """The one user with this address, and the role in each account."""
    with database.connect() as connection:
        row = administration.find_user(connection, email)
        roles = {m.account_id: m.role for m in administration.list_memberships(connection, row.id)}
        return Known(row.id, row.first_name, row.last_name, roles)


def number_of_users(database: Database) -> int:
    with database.connect() as connection:
        return len(connection.execute(select(users.c.id)).all())


def key_secret(keys_dir: Path) -> str:
    """The secret of the only key, as its file has it."""
    (path,) = keys_dir.glob("*.json")
    secret: str = json.loads(path.read_text())["secret"]
    return secret


# --- the token -------------------------------------------------------------------------------------------------------


async def test_the_answer_is_the_one_of_the_public_page(client: Client, api_token: str) -> None:
    first = await client.post_json(URL, JANE, token=api_token)
    assert issued(first)[1] is True
    second = await client.post_json(URL, JANE, token=api_token)
    assert issued(second)[1] is False


async def test_a_token_can_be_checked_with_the_key_file_alone(
    client: Client, api_token: str, database: Database, clock: Clock, keys_dir: Path
) -> None:
    clock.now = int(clock.now) + 0.9  # seconds are cut off, not rounded
    token = await client.issue(api_token)
    raw = urlsafe_b64decode(token + "=")
    secret = urlsafe_b64decode(key_secret(keys_dir) + "=")
    token_key = hmac.new(secret, b"sso-token/v1", hashlib.sha256).digest()
    assert raw[16:] == hmac.new(token_key, raw[:16], hashlib.sha256).digest()[:16]
    assert claims(token)[:3] == (int(clock()) + 300, known(database).id, ACCOUNT)

    other_secret = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    clock.advance(10)
    assert claims(await client.issue(other_secret))[:3] == (int(clock()) + 300, known(database).id, OTHER_ACCOUNT)


@on_sqlite
async def test_tokens_of_one_person_and_one_second_differ_in_the_nonce(client: Client, api_token: str) -> None:
    tokens = await asyncio.gather(*(client.another().issue(api_token) for _ in range(50)))
    assert len({claims(token)[:3] for token in tokens}) == 1
    assert len({claims(token)[3] for token in tokens}) == len(set(tokens)) == 50


@on_sqlite
async def test_the_lifetime_is_a_setting(database_url: str, keys_dir: Path, clock: Clock, api_token: str) -> None:
    with node(database_url, keys_dir, clock, SSO_TOKEN_TTL="60") as client:
        assert claims(await client.issue(api_token))[0] == int(clock()) + 60


async def test_issuing_for_a_member_writes_nothing(client: Client, api_token: str, database: Database) -> None:
    await settled(client.issue(api_token))
    with watching(database) as mark:
        before = mark()
        await settled(asyncio.gather(*(client.another().issue(api_token) for _ in range(5))))
        assert mark() == before
        await settled(client.issue(api_token, JOHN))
        assert mark() != before  # or this test could not fail


# --- the API token ---------------------------------------------------------------------------------------------------


async def test_whoever_shows_no_good_api_token_is_told_only_that(client: Client, api_token: str) -> None:
    digest = hashlib.sha256(api_token.encode()).hexdigest()
    unknown = api_token[:-1] + ("A" if api_token[-1] != "A" else "B")
    requests: dict[str, list[tuple[str, str]]] = {
        "none": [],
        "empty": [("authorization", "")],
        "blank": [("authorization", " ")],
        "no scheme": [("authorization", api_token)],
        "no secret": [("authorization", "Bearer")],
        "empty secret": [("authorization", "Bearer ")],
        "blank secret": [("authorization", "Bearer   ")],
        "Basic": [("authorization", f"Basic {api_token}")],
        "Basic, as browsers send it": [("authorization", "Basic d2ZfbGl2ZV86eA==")],
        "Token": [("authorization", f"Token {api_token}")],
        "another word": [("authorization", f"BearerX {api_token}")],
        "a colon": [("authorization", f"Bearer:{api_token}")],
        "unknown": bearer(unknown),
        "upper case": bearer(api_token.upper()),
        "cut": bearer(api_token[:-1]),
        "longer": bearer(api_token + "A"),
        "two in one": bearer(f"{api_token} {api_token}"),
        "two with a comma": bearer(f"{api_token},{api_token}"),
        "what the database holds": bearer(digest),
        "non-ASCII": bearer("wf_live_\xfc\xff\x80"),
        "non-ASCII scheme": [("authorization", f"B\xe9arer {api_token}")],
        "control characters": bearer("wf_live_\x00\x7f"),
        "wildcards": bearer("wf_live_%"),
        "very long": bearer("wf_live_" + "A" * 10_000),
        "two headers": bearer(api_token) * 2,
        "a good and a bad header": bearer(api_token) + bearer(unknown),
        "a bad and a good header": bearer(unknown) + bearer(api_token),
        "another header": [("x-api-key", api_token), ("proxy-authorization", f"Bearer {api_token}")],
        "a cookie": [("cookie", f"authorization=Bearer {api_token}; access_token={api_token}")],
    }
    answers = {
        name: await client.request("POST", URL, headers=headers, body=encoded()) for name, headers in requests.items()
    }
    assert {name: refusal(answer) for name, answer in answers.items()} == dict.fromkeys(requests, MISSING_TOKEN)
    assert len({answer.body for answer in answers.values()}) == 1
    in_query = await client.request("POST", f"{URL}?access_token={api_token}", body=encoded())
    in_body = await client.request("POST", URL, body=encoded(access_token=api_token))
    assert refusal(in_query) == refusal(in_body) == MISSING_TOKEN


@on_sqlite
async def test_the_scheme_is_read_in_any_case(client: Client, api_token: str) -> None:
    for scheme in ("Bearer", "bearer", "BEARER", "bEARER", "Bearer "):
        headers = [("authorization", f"{scheme} {api_token}")]
        issued(await client.request("POST", URL, headers=headers, body=encoded()))


async def test_an_api_token_is_good_until_the_very_second_of_its_expiry(
    client: Client, database: Database, clock: Clock
) -> None:
    expires_at = int(clock()) + 100
    _, secret = make_api_token(database, expires_at=expires_at)
    clock.now = expires_at - 0.001
    issued(await post(client, encoded(), secret))
    clock.now = expires_at
    assert refusal(await post(client, encoded(), secret)) == MISSING_TOKEN
    clock.advance(86_400)
    assert refusal(await post(client, encoded(), secret)) == MISSING_TOKEN


async def test_a_revoked_api_token_is_refused_from_the_next_request_on(
    client: Client, database: Database, clock: Clock, api_token: str
) -> None:
    token_id, secret = make_api_token(database)
    issued(await post(client, encoded(), secret))
    with changing(database) as connection:
        # Revoked is revoked, also by an operator whose clock is ahead of ours.
        administration.revoke_api_token(connection, token_id, now=int(clock()) + 1000)
    assert refusal(await post(client, encoded(), secret)) == MISSING_TOKEN
    issued(await post(client, encoded(), api_token))


async def test_an_api_token_that_an_older_version_revoked_is_refused(client: Client, database: Database) -> None:
    token_id, secret = make_api_token(database)
    with changing(database) as connection:  # it left the digest as it was
        connection.execute(update(api_tokens).where(api_tokens.c.id == token_id).values(revoked_at=1))
    assert refusal(await post(client, encoded(), secret)) == MISSING_TOKEN


async def test_an_api_token_needs_the_scope(client: Client, database: Database) -> None:
    secrets = {
        "verify": make_api_token(database, scopes=VERIFY)[1],
        "none": make_api_token(database, scopes=frozenset())[1],
        "platform": make_api_token(database, account_id=None, scopes=VERIFY)[1],
    }
    answers = {name: refusal(await post(client, encoded(), secret)) for name, secret in secrets.items()}
    assert answers == dict.fromkeys(secrets, NEEDS_WRITE_SCOPE)
    assert number_of_users(database) == 0
    issued(await post(client, encoded(), make_api_token(database, scopes=WRITE | VERIFY)[1]))


async def test_an_api_token_notes_the_hour_of_its_last_use_once(
    client: Client, database: Database, clock: Clock, database_url: str, keys_dir: Path
) -> None:
    token_id, secret = make_api_token(database)
    _, unused = make_api_token(database)

    def last_uses() -> dict[int, int | None]:
        with database.connect() as connection:
            return {row.id: row.last_used_at for row in connection.execute(select(api_tokens))}

    assert set(last_uses().values()) == {None}
    hour = int(clock()) // 3600 * 3600
    clock.now = hour + 1800
    with watching(database) as mark, node(database_url, keys_dir, clock) as other_node:
        await settled(asyncio.gather(*(client.another().issue(secret) for _ in range(10))))
        assert last_uses()[token_id] == hour
        before = mark()
        clock.now = hour + 3599.9
        await settled(client.issue(secret))
        await settled(other_node.issue(secret))
        assert mark() == before
        clock.now = hour + 3600
        await settled(client.issue(secret))
        assert last_uses()[token_id] == hour + 3600
        before = mark()
        await settled(other_node.issue(secret))
        clock.now = hour + 3599  # a node whose clock is behind takes nothing back
        await settled(client.issue(secret))
        assert mark() == before
    assert [used for used in last_uses().values() if used is not None] == [hour + 3600]
    assert refusal(await settled(post(client, encoded(), unused + "x"))) == MISSING_TOKEN
    assert [used for used in last_uses().values() if used is not None] == [hour + 3600]


# --- the body --------------------------------------------------------------------------------------------------------


@on_sqlite
async def test_bodies_that_are_not_a_json_object_are_refused(client: Client, api_token: str) -> None:
    good = encoded()
    bodies = {
        "empty": b"",
        "blank": b" \n",
        "cut": good[:-1],
        "followed by something": good + b"x",
        "two": good + good,
        "text": b"email=jane.doe%40example.com&first_name=Jane&last_name=Doe",
        "single quotes": good.replace(b'"', b"'"),
        "comment": b"/* */" + good,
        "trailing comma": good[:-1] + b",}",
        "null": b"null",
        "true": b"true",
        "number": b"1",
        "string": b'"{}"',
        "array": b"[" + good + b"]",
        "array of pairs": b'[["email", "jane.doe@example.com"]]',
        "NaN": good[:-1] + b', "x": NaN}',
        "Infinity": good[:-1] + b', "x": Infinity}',
        "-Infinity": good[:-1] + b', "x": [-Infinity]}',
        "not UTF-8": good.replace(b"Jane", b"J\xe4ne"),
        "not UTF-8 where it is ignored": good[:-1] + b', "x": "\xff"}',
        "a surrogate in UTF-8": good.replace(b"Jane", b"\xed\xa0\x80"),
        "overlong UTF-8": good.replace(b"Jane", b"\xc0\x80"),
        "UTF-16": good.decode().encode("utf-16"),
        "UTF-16 without a mark": good.decode().encode("utf-16-le"),
        "UTF-32": good.decode().encode("utf-32"),
        "byte order mark": b"\xef\xbb\xbf" + good,
        "deep arrays": b"[" * LIMIT,
        "deep objects": b'{"a":' * (LIMIT // 5),
        "deep and closed": b"[" * (LIMIT // 2) + b"]" * (LIMIT // 2),
        "raw control character": good.replace(b"Jane", b"Ja\nne"),
        "raw NUL": good.replace(b"Jane", b"Ja\0ne"),
        "bad escape": good.replace(b"Jane", rb"\x41"),
    }
    answers = {name: refusal(await post(client, body, api_token)) for name, body in bodies.items()}
    assert answers == dict.fromkeys(bodies, INVALID_JSON)

    # How deep a parser goes is its own affair (RFC 8259 section 9), as long as it comes back.
    deep = await post(client, good[:-1] + b', "x": ' + b"[" * 8000 + b"]" * 8000 + b"}", api_token)
    assert deep.status == 201 or refusal(deep) == INVALID_JSON


@on_sqlite
async def test_more_than_16_kib_are_refused_however_they_come(client: Client, api_token: str) -> None:
    async def send(*pieces: bytes, length: str | None = None) -> Answer:
        headers = bearer(api_token) + ([("content-length", length)] if length is not None else [])
        return await client.request("POST", URL, headers=headers, pieces=pieces)

    too_large = {
        "one byte": await send(padded(LIMIT + 1)),
        "much": await send(padded(100 * LIMIT)),
        "in pieces": await send(*[b" " * 1000] * 16, encoded().rjust(385)),
        "in single bytes": await send(*[b" "] * (LIMIT + 1)),
        "declared": await send(encoded(), length=str(LIMIT + 1)),
        "declared beyond measure": await send(encoded(), length="9" * 4000),
        "declared small": await send(padded(LIMIT + 1), length="5"),
        "declared as nothing": await send(padded(LIMIT + 1), length="0"),
        "declared as less than nothing": await send(padded(LIMIT + 1), length="-1"),
        "declared as a word": await send(padded(LIMIT + 1), length="short"),
        "without an end": await send(*[b" " * 1000] * 1000),
    }
    assert {name: refusal(answer) for name, answer in too_large.items()} == dict.fromkeys(too_large, TOO_LARGE)

    issued(await send(padded(LIMIT)))
    issued(await send(padded(LIMIT), length=str(LIMIT)))
    issued(await send(*[b" " * 1000] * 16, encoded().rjust(384)))
    issued(await send(b"", *(bytes([byte]) for byte in encoded()), b""))
    issued(await send(encoded(), length="5"))


@on_sqlite
async def test_a_length_in_digits_that_are_none_is_no_reason_to_break(client: Client, api_token: str) -> None:
    length = ("content-length", "\xb2")  # a superscript two, which Python holds to be a digit but cannot read
    answer = await post(client, encoded(), api_token, length)
    assert answer.status in {201, 400}


async def test_each_fault_of_a_field_is_named(client: Client, api_token: str, database: Database) -> None:
    longest = f"{'a' * 64}@{'.'.join(['b' * 61] * 3)}.com"
    cases: dict[bytes, Refusal] = {
        b"{}": missing("email"),
        encoded({"first_name": "Jane", "last_name": "Doe"}): missing("email"),
        encoded({"email": JANE["email"], "last_name": "Doe"}): missing("first_name"),
        encoded({"email": JANE["email"], "first_name": "Jane"}): missing("last_name"),
        encoded(email=f"b{longest}"): invalid("email", "max_length"),
        encoded(email="jane"): invalid("email", "email"),
        encoded(email="jane@example"): invalid("email", "email"),
        encoded(email="j\u00e4ne@example.com"): invalid("email", "email"),
        encoded(email='"jane doe"@example.com'): invalid("email", "email"),
        encoded(email="jane@[192.0.2.1]"): invalid("email", "email"),
    }
    for field in ("email", "first_name", "last_name"):
        cases |= {encoded(**{field: blank}): missing(field) for blank in (None, "", " ", "\n\t")}
        wrong_types: tuple[object, ...] = (0, 1, 1.5, False, True, [], ["x"], {}, {"x": "y"})
        cases |= {encoded(**{field: value}): invalid(field, "type") for value in wrong_types}
        value = JANE[field]
        unfit = (f"{value}\n", f"\x1b{value}", f"{value}\x7f", f"{value}\x85", f"{value[:2]}\0{value[2:]}")
        lone = (f"{value}\ud800", f"\udfff{value}", f"{value}\udc00\ud800")
        cases |= {encoded(**{field: text}): invalid(field, "characters") for text in (*unfit, *lone)}
    for field in ("first_name", "last_name"):
        cases |= {encoded(**{field: letter * 101}): invalid(field, "max_length") for letter in ("x", "\xfc", "😀")}
    answers = {body: refusal(await post(client, body, api_token)) for body in cases}
    assert answers == cases
    assert number_of_users(database) == 0

    at_the_limits = {"email": longest, "first_name": "😀" * 100, "last_name": "\xfc" * 100}
    issued(await post(client, encoded(at_the_limits), api_token))
    assert known(database, longest)[1:3] == ("😀" * 100, "\xfc" * 100)


async def test_what_is_not_asked_for_is_ignored(client: Client, api_token: str, database: Database) -> None:
    extra = {"role": "admin", "account_id": OTHER_ACCOUNT, "id": 7, "disabled_at": 1, "x": "\0\ud800", "y": [None, {}]}
    issued(await post(client, encoded(**extra), api_token))
    assert known(database)[1:] == ("Jane", "Doe", {ACCOUNT: Role.EDITOR})
    issued(await client.request("POST", f"{URL}?email=x&role=admin&sso=x", headers=bearer(api_token), body=encoded()))
    assert number_of_users(database) == 1


@on_sqlite
async def test_the_content_type_does_not_matter(client: Client, api_token: str) -> None:
    issued(await post(client, encoded(), api_token))
    for content_type in ("application/json; charset=utf-8", "text/plain", "application/x-www-form-urlencoded", ""):
        issued(await post(client, encoded(), api_token, ("content-type", content_type)))


@on_sqlite
async def test_of_equal_names_the_last_counts(client: Client, api_token: str, database: Database) -> None:
    body = b'{"email": "other@example.com", "first_name": "A", "last_name": "B", ' + encoded()[1:]
    issued(await post(client, body, api_token))
    assert known(database)[1:3] == ("Jane", "Doe")
    assert number_of_users(database) == 1


# --- the order of checking -------------------------------------------------------------------------------------------


async def test_of_several_faults_the_first_is_reported(client: Client, database: Database, clock: Clock) -> None:
    expired = make_api_token(database, expires_at=int(clock()))[1]
    expired_without_scope = make_api_token(database, expires_at=int(clock()), scopes=VERIFY)[1]
    verifier = make_api_token(database, scopes=VERIFY)[1]
    platform = make_api_token(database, account_id=None, scopes=VERIFY)[1]
    capped = make_api_token(database, max_role=Role.EDITOR)[1]
    for person in (JANE, JOHN):
        await client.issue(capped, person)
        with changing(database) as connection:
            administration.set_role(connection, person["email"], ACCOUNT, Role.ADMIN)
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=int(clock()))

    too_large, no_json, no_object = b"x" * (LIMIT + 1), b"x", b"[]"
    lacking_and_wrong = encoded({"email": 5, "first_name": "x" * 101})
    wrong_for_jane, wrong_for_john = encoded(JANE, last_name=5), encoded(JOHN, last_name="x" * 101)
    cases = {
        ("nobody", too_large): MISSING_TOKEN,
        ("nobody", no_json): MISSING_TOKEN,
        ("nobody", b"{}"): MISSING_TOKEN,
        (expired, too_large): MISSING_TOKEN,
        (expired, wrong_for_jane): MISSING_TOKEN,
        (expired, encoded(JANE)): MISSING_TOKEN,
        (expired_without_scope, encoded(JANE)): MISSING_TOKEN,
        (expired_without_scope, no_object): MISSING_TOKEN,
        (verifier, too_large): NEEDS_WRITE_SCOPE,
        (verifier, no_json): NEEDS_WRITE_SCOPE,
        (verifier, no_object): NEEDS_WRITE_SCOPE,
        (verifier, b"{}"): NEEDS_WRITE_SCOPE,
        (verifier, wrong_for_john): NEEDS_WRITE_SCOPE,
        (verifier, encoded(JANE)): NEEDS_WRITE_SCOPE,
        (platform, no_json): NEEDS_WRITE_SCOPE,
        (capped, too_large): TOO_LARGE,
        (capped, padded(LIMIT + 1, {})): TOO_LARGE,
        (capped, padded(LIMIT + 1, JANE)): TOO_LARGE,
        (capped, no_json): INVALID_JSON,
        (capped, no_object): INVALID_JSON,
        (capped, lacking_and_wrong): missing("last_name"),
        (capped, encoded(JANE, first_name=None, email="x")): missing("first_name"),
        (capped, wrong_for_jane): invalid("last_name", "type"),
        (capped, wrong_for_john): invalid("last_name", "max_length"),
        (capped, encoded(JANE)): USER_DISABLED,
        (capped, encoded(JOHN)): ROLE_NOT_ALLOWED,
    }
    answers = {case: refusal(await post(client, case[1], case[0])) for case in cases}
    assert answers == cases


@on_sqlite
async def test_path_and_method_come_before_the_api_token(client: Client) -> None:
    assert refusal(await client.request("POST", "/v1/sso_token", body=b"x")) == Refusal(404, "not_found")
    assert refusal(await client.request("DELETE", "/v1")) == Refusal(404, "not_found")
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = await client.request(method, URL, body=b"x" * (LIMIT + 1))
        assert refusal(answer) == Refusal(405, "method_not_allowed")
        assert answer.header("allow") == "POST"


# --- provisioning ----------------------------------------------------------------------------------------------------


async def test_an_unknown_person_becomes_an_editor(client: Client, api_token: str, database: Database) -> None:
    assert issued(await post(client, encoded(), api_token))[1] is True
    assert known(database)[1:] == ("Jane", "Doe", {ACCOUNT: Role.EDITOR})


async def test_a_person_known_elsewhere_is_added_as_editor(client: Client, api_token: str, database: Database) -> None:
    elsewhere = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    await client.issue(elsewhere)
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], OTHER_ACCOUNT, Role.ADMIN)
    answer = await post(client, encoded(first_name="Janet", last_name="Roe"), api_token)
    assert issued(answer)[1] is False
    assert known(database)[1:] == ("Jane", "Doe", {ACCOUNT: Role.EDITOR, OTHER_ACCOUNT: Role.ADMIN})


async def test_a_member_keeps_role_and_name(client: Client, api_token: str, database: Database) -> None:
    await client.issue(api_token)
    for role in Role:
        with changing(database) as connection:
            administration.set_role(connection, JANE["email"], ACCOUNT, role)
        assert issued(await post(client, encoded(first_name="Janet"), api_token))[1] is False
        assert known(database)[1:] == ("Jane", "Doe", {ACCOUNT: role})


async def test_a_person_who_was_removed_comes_back_as_editor(
    client: Client, api_token: str, database: Database
) -> None:
    before = claims(await client.issue(api_token))[1]
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
        administration.remove_member(connection, JANE["email"], ACCOUNT)
    token, created = issued(await post(client, encoded(), api_token))
    assert (claims(token)[1], created) == (before, False)
    assert known(database).roles == {ACCOUNT: Role.EDITOR}


async def test_a_disabled_person_gets_no_token_and_is_added_nowhere(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    elsewhere = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    await client.issue(api_token)
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=int(clock()))
    assert refusal(await post(client, encoded(), api_token)) == USER_DISABLED
    assert refusal(await post(client, encoded(email=JANE["email"].upper()), elsewhere)) == USER_DISABLED
    assert known(database).roles == {ACCOUNT: Role.EDITOR}
    issued(await post(client, encoded(JOHN), api_token))
    with changing(database) as connection:
        administration.enable_user(connection, JANE["email"])
    assert issued(await post(client, encoded(), api_token))[1] is False


async def test_max_role_caps_whom_an_api_token_can_sign_in(client: Client, api_token: str, database: Database) -> None:
    await client.issue(api_token)
    caps: list[Role | None] = [None, *Role]
    secrets = {cap: make_api_token(database, max_role=cap)[1] for cap in caps}
    answers: dict[tuple[Role, Role | None], str] = {}
    for role in Role:
        with changing(database) as connection:
            administration.set_role(connection, JANE["email"], ACCOUNT, role)
        for cap, secret in secrets.items():
            answer = await post(client, encoded(), secret)
            answers[role, cap] = "issued" if answer.status == 201 else refusal(answer).code
            assert answer.status == 201 or refusal(answer) == ROLE_NOT_ALLOWED
    above = {
        (Role.PUBLISHER, Role.EDITOR),
        (Role.ADMIN, Role.EDITOR),
        (Role.ADMIN, Role.PUBLISHER),
    }
    assert {case for case, answer in answers.items() if answer == "role_not_allowed"} == above

    # What counts is the role in this account, and at this moment.
    assert issued(await post(client, encoded(JOHN), secrets[Role.EDITOR]))[1] is True
    in_other_account = make_api_token(database, account_id=OTHER_ACCOUNT, max_role=Role.EDITOR)[1]
    issued(await post(client, encoded(), in_other_account))
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.EDITOR)
        administration.set_role(connection, JANE["email"], OTHER_ACCOUNT, Role.ADMIN)
    issued(await post(client, encoded(), secrets[Role.EDITOR]))
    assert refusal(await post(client, encoded(), in_other_account)) == ROLE_NOT_ALLOWED


async def test_every_spelling_of_an_address_is_one_person(client: Client, api_token: str, database: Database) -> None:
    groups = [
        ["jane.doe@example.com", "Jane.Doe@Example.COM", "JANE.DOE@ＥＸＡＭＰＬＥ.com"],  # noqa: RUF001 - full width
        ["jane@bücher.example", "JANE@BÜCHER.EXAMPLE", "jane@xn--bcher-kva.example", "jane@bu\u0308cher.example"],
        ["jane@intranet.local", "Jane@Intranet.LOCAL"],
        ["jane@intranet.internal"],
        ["jane@intranet.corp"],
        ["jane@intranet.test"],
    ]
    for group in groups:
        answers = [issued(await post(client, encoded(email=email), api_token)) for email in group]
        assert [created for _, created in answers] == [True] + [False] * (len(group) - 1)
        assert len({claims(token)[1] for token, _ in answers}) == 1
    with database.connect() as connection:
        emails = set(connection.execute(select(users.c.email)).scalars())
    assert emails == {
        "jane.doe@example.com",
        "jane@xn--bcher-kva.example",
        "jane@intranet.local",
        "jane@intranet.internal",
        "jane@intranet.corp",
        "jane@intranet.test",
    }


async def test_the_id_of_a_user_who_is_gone_is_never_used_again(
    client: Client, api_token: str, database: Database, database_url: str, keys_dir: Path, clock: Clock
) -> None:
    used: set[int] = set()
    for attempt in range(3):
        ids = {claims(await client.issue(api_token, {**JANE, "email": f"{n}@example.com"}))[1] for n in range(3)}
        assert not ids & used, attempt
        used |= ids
        with changing(database) as connection:
            connection.execute(delete(memberships))
            connection.execute(delete(users))
    with node(database_url, keys_dir, clock) as after_restart:
        assert claims(await after_restart.issue(api_token))[1] > max(used)


async def test_a_hundred_first_requests_at_once_on_two_nodes_make_one_user(
    client: Client, api_token: str, database: Database, database_url: str, keys_dir: Path, clock: Clock
) -> None:
    with node(database_url, keys_dir, clock) as other_node:
        answers = await asyncio.gather(
            *(post(origin.another(), encoded(), api_token) for _ in range(50) for origin in (client, other_node))
        )
    results = [issued(answer) for answer in answers]
    assert Counter(created for _, created in results) == {True: 1, False: 99}
    assert {claims(token)[1] for token, _ in results} == {known(database).id}
    assert len({token for token, _ in results}) == 100
    assert number_of_users(database) == 1
    assert known(database).roles == {ACCOUNT: Role.EDITOR}


async def test_two_accounts_that_ask_first_for_one_person_at_once_share_the_user(
    client: Client, api_token: str, database: Database, database_url: str, keys_dir: Path, clock: Clock
) -> None:
    other_token = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    with node(database_url, keys_dir, clock) as other_node:
        answers = await asyncio.gather(
            *(
                post(origin.another(), encoded(), secret)
                for _ in range(10)
                for origin in (client, other_node)
                for secret in (api_token, other_token)
            )
        )
    results = [issued(answer) for answer in answers]
    assert sum(created for _, created in results) == 1
    assert Counter(claims(token)[1:3] for token, _ in results) == {
        (known(database).id, ACCOUNT): 20,
        (known(database).id, OTHER_ACCOUNT): 20,
    }
    assert known(database).roles == {ACCOUNT: Role.EDITOR, OTHER_ACCOUNT: Role.EDITOR}


async def test_many_new_people_at_once_on_two_nodes_each_become_one_user(
    client: Client, api_token: str, database: Database, database_url: str, keys_dir: Path, clock: Clock
) -> None:
    people = [{**JANE, "email": f"{n}@example.com", "first_name": f"N{n}"} for n in range(40)]
    with node(database_url, keys_dir, clock) as other_node:
        # In opposite orders, which is how two batches would wait for one another.
        answers = await asyncio.gather(
            *(post(client.another(), encoded(person), api_token) for person in people),
            *(post(other_node.another(), encoded(person), api_token) for person in reversed(people)),
        )
    results = [issued(answer) for answer in answers]
    assert sum(created for _, created in results) == number_of_users(database) == 40
    for n, (token, _) in enumerate(results[:40]):
        assert known(database, f"{n}@example.com")[:2] == (claims(token)[1], f"N{n}")
        assert claims(results[-1 - n][0])[1] == claims(token)[1]


# --- when it cannot be done now --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "state", ["is a directory", "is something else", "is empty", "refuses to connect", "never answers"]
)
async def test_a_database_that_cannot_be_used_is_503_in_time(
    state: str, tmp_path: Path, keys_dir: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "wf_live_" + "A" * 43
    with a_database_that(state, tmp_path) as url, node(url, keys_dir, clock) as client:
        begun = Stopwatch()
        good, bad = await asyncio.gather(post(client, encoded(), secret), post(client.another(), b"[]", secret))
        assert begun.own_seconds < DEADLINE + 0.5
    # Who cannot be known may not be told what is wrong with the body either.
    assert refusal(good) == refusal(bad) == UNAVAILABLE
    for leak in (secret, "hunter2", str(tmp_path)):
        assert leak not in good.text + bad.text
    assert secret not in caplog.text
    assert "hunter2" not in caplog.text


async def test_the_service_goes_on_by_itself_when_the_database_is_back(
    client: Client, api_token: str, database: Database
) -> None:
    await settled(client.issue(api_token))
    with away(database):
        assert refusal(await post(client, encoded(), api_token)) == UNAVAILABLE
        assert refusal(await post(client, encoded(JOHN), api_token)) == UNAVAILABLE
        assert refusal(await client.request("POST", URL, body=encoded())) == MISSING_TOKEN
    back = Stopwatch()
    while (answer := await post(client, encoded(), api_token)).status == 503:
        assert back.own_seconds < 2  # it pauses between two attempts to connect
        await asyncio.sleep(0.01)
    assert issued(answer)[1] is False
    assert issued(await post(client, encoded(JOHN), api_token))[1] is True


@pytest.mark.slow
async def test_while_somebody_locks_the_database_members_still_get_tokens(
    client: Client, api_token: str, database: Database
) -> None:
    await settled(client.issue(api_token))
    with database.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if database.is_sqlite else "BEGIN")
        if not database.is_sqlite:
            connection.exec_driver_sql("LOCK TABLE users, memberships IN SHARE ROW EXCLUSIVE MODE")
        begun = Stopwatch()
        member, newcomer = await asyncio.gather(
            post(client, encoded(), api_token), post(client.another(), encoded(JOHN), api_token)
        )
        assert begun.own_seconds < DEADLINE + 0.5
        connection.exec_driver_sql("ROLLBACK")
    issued(member)
    assert refusal(newcomer) == UNAVAILABLE
    assert issued(await post(client, encoded(JOHN), api_token))[1] is True


@asynccontextmanager
async def hanging_up_at_commit(url: str) -> AsyncIterator[str]:
    """A way to the PostgreSQL database `url` that breaks when a user was inserted and `COMMIT` has been handed on."""
    with psycopg.connect(url) as connection:
        server = f"{connection.info.host}/.s.PGSQL.{connection.info.port}"
    broken = asyncio.Event()
    ways: set[asyncio.Task[None]] = set()

    async def hand_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        inserted = False
        try:
            while data := await source.read(65_536):
                if broken.is_set():
                    break
                inserted = inserted or b"INSERT INTO users" in data
                if inserted and b"COMMIT" in data:
                    broken.set()
                target.write(data)
                await target.drain()
        finally:
            target.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_unix_connection(server)
        pair = [asyncio.create_task(hand_on(reader, to_server)), asyncio.create_task(hand_on(from_server, writer))]
        ways.update(pair)

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        way = make_url(url).set(host="127.0.0.1", port=port, query={})
        yield way.render_as_string(hide_password=False)
        assert broken.is_set()
        await asyncio.gather(*ways)


@on_postgresql
async def test_a_connection_that_breaks_at_commit_is_answered_as_outcome_unknown(
    database_url: str, database: Database, keys_dir: Path, clock: Clock, client: Client, api_token: str
) -> None:
    async with hanging_up_at_commit(database_url) as way:
        with node(way, keys_dir, clock) as behind:
            answer = await post(behind, encoded(), api_token)
    assert refusal(answer) == Refusal(503, "outcome_unknown")
    # It was done, in fact, and asking again does no harm.
    assert issued(await post(client, encoded(), api_token))[1] is False
    assert number_of_users(database) == 1


@pytest.mark.slow
@on_sqlite
async def test_more_requests_than_can_wait_are_turned_away(client: Client) -> None:
    answers = await asyncio.gather(
        *(post(client.another(), encoded(), "wf_live_unknown") for _ in range(MAX_WAITING + 50))
    )
    counted = Counter(refusal(answer)[:2] for answer in answers)
    assert 0 < counted[503, "overloaded"] <= 50
    assert counted.keys() <= {MISSING_TOKEN[:2], UNAVAILABLE[:2], (503, "overloaded")}
    assert refusal(await post(client, encoded(), "wf_live_unknown")) == MISSING_TOKEN


@on_sqlite
async def test_without_a_signing_key_nothing_is_issued(
    database_url: str, api_token: str, tmp_path: Path, clock: Clock
) -> None:
    keys_dir = tmp_path / "no-keys"
    keys_dir.mkdir()
    keyring.rotate(keys_dir, now=int(clock()), lead=60)  # its time will come
    with node(database_url, keys_dir, clock) as client:
        assert refusal(await post(client, encoded(), api_token)) == UNAVAILABLE
        assert refusal(await post(client, encoded(), "wf_live_unknown")) == MISSING_TOKEN
        assert refusal(await post(client, b"{}", api_token)) == missing("email")
        clock.advance(60)
        await client.issue(api_token)


@on_sqlite
async def test_keys_that_could_not_be_listed_for_a_minute_issue_nothing(
    database_url: str, keys_dir: Path, clock: Clock, api_token: str
) -> None:
    monotonic = Clock(0.0)
    keys = KeyDirectory(keys_dir, monotonic=monotonic)
    with node(database_url, keys, clock) as client:
        with renamed(keys_dir):
            for passed, good in ((0.0, True), (59.9, True), (60.0, False), (3600.0, False)):
                monotonic.now = passed
                keys.refresh()
                answer = await post(client, encoded(), api_token)
                assert (answer.status == 201) == good, passed
                assert good or refusal(answer) == UNAVAILABLE
        keys.refresh()
        await client.issue(api_token)


# --- secrets ---------------------------------------------------------------------------------------------------------


async def test_no_error_and_no_log_line_shows_a_secret(
    database_url: str, database: Database, keys_dir: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="sqlalchemy")
    _, secret = make_api_token(database, max_role=Role.EDITOR)
    _, verifier = make_api_token(database, scopes=VERIFY)
    _, expired = make_api_token(database, expires_at=int(clock()))
    with node(database_url, keys_dir, clock) as client:
        used, unused = await client.issue(secret), await client.issue(secret)
        await client.get(f"{PAGE}?sso={used}")
        cookie = client.cookies["studio_session"]
        carried = {**JANE, "token": unused, "api_token": secret, "cookie": cookie}
        answers = [
            await client.request("POST", f"{URL}?sso={unused}", headers=bearer(shown), body=body)
            for shown in (secret, verifier, expired, f"{secret}x")
            for body in (encoded(carried, email=unused), encoded(carried, first_name=secret * 3), b"[", b"{}")
        ]
        answers += [
            await post(client, encoded(carried).ljust(LIMIT + 1), secret),
            await client.request("PUT", f"{URL}?sso={unused}", headers=bearer(secret)),
            await client.request("POST", f"/v1/{secret}/{unused}", headers=bearer(secret)),
            await client.request("POST", URL, headers=bearer(secret) + bearer(unused), body=encoded(carried)),
        ]
        with changing(database) as connection:
            administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
        answers.append(await post(client, encoded(carried), secret))
        with changing(database) as connection:
            administration.disable_user(connection, JANE["email"], now=int(clock()))
        answers.append(await post(client, encoded(carried), secret))
        with away(database):
            answers.append(await post(client, encoded(carried), secret))
        crashes: list[str] = []
        for damaged in ("memberships", "api_tokens"):
            with changing(database) as connection:
                connection.exec_driver_sql(f"ALTER TABLE {damaged} RENAME TO lost_{damaged}")
            try:
                answers.append(await post(client, encoded(carried, email="new@example.com"), secret))
            except Exception as error:  # what the server would log
                crashes += traceback.format_exception(error)

    assert {answer.status for answer in answers} >= {400, 401, 403, 404, 405, 413, 422, 503}
    assert "SELECT" in caplog.text
    seen = "".join([caplog.text, *crashes, *(answer.text + str(answer.headers) for answer in answers)])
    secrets = {
        "API token": secret,
        "API token without the scope": verifier,
        "expired API token": expired,
        "used login token": used,
        "login token": unused,
        "cookie": cookie,
        "key": key_secret(keys_dir),
    }
    assert [name for name, value in secrets.items() if value in seen] == []
