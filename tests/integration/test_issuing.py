"""`POST /v1/sso_tokens`: issuing login tokens, and a distinct error for every invalid request."""

import asyncio
import hashlib
import hmac
from base64 import urlsafe_b64decode
from pathlib import Path

import pytest
from sqlalchemy import select, update

from sso_service.database.schema import api_tokens
from sso_service.database.transactions import Database
from sso_service.permissions import Role
from tests.support import administration
from tests.support.api import (
    INVALID_JSON,
    LIMIT,
    MISSING_TOKEN,
    NEEDS_WRITE_SCOPE,
    TOO_LARGE,
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
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT
from tests.support.databases import changing, on_sqlite, watching
from tests.support.issuing import (
    ROLE_NOT_ALLOWED,
    URL,
    USER_DISABLED,
    claims,
    issued,
    key_secret,
    number_of_users,
    post,
    stored_user,
)

pytestmark = pytest.mark.anyio


# --- The login token -------------------------------------------------------------------------------------------------


async def test_the_response_has_the_documented_form(client: Client, api_token: str) -> None:
    first = await client.post_json(URL, JANE, token=api_token)
    assert issued(first)[1] is True
    second = await client.post_json(URL, JANE, token=api_token)
    assert issued(second)[1] is False


async def test_a_token_can_be_verified_with_the_key_file_alone(
    client: Client, api_token: str, database: Database, clock: Clock, keys_dir: Path
) -> None:
    clock.now = int(clock.now) + 0.9  # fractions of a second are truncated, not rounded
    token = await client.issue(api_token)
    raw = urlsafe_b64decode(token + "=")
    secret = urlsafe_b64decode(key_secret(keys_dir) + "=")
    token_key = hmac.new(secret, b"sso-token/v1", hashlib.sha256).digest()
    assert raw[16:] == hmac.new(token_key, raw[:16], hashlib.sha256).digest()[:16]
    assert claims(token)[:3] == (int(clock()) + 300, stored_user(database).id, ACCOUNT)

    other_secret = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    clock.advance(10)
    assert claims(await client.issue(other_secret))[:3] == (int(clock()) + 300, stored_user(database).id, OTHER_ACCOUNT)


@on_sqlite
async def test_tokens_of_one_person_and_second_have_different_nonces(client: Client, api_token: str) -> None:
    tokens = await asyncio.gather(*(client.another().issue(api_token) for _ in range(50)))
    assert len({claims(token)[:3] for token in tokens}) == 1
    assert len({claims(token)[3] for token in tokens}) == len(set(tokens)) == 50


@on_sqlite
async def test_the_token_lifetime_is_configurable(
    database_url: str, keys_dir: Path, clock: Clock, api_token: str
) -> None:
    with node(database_url, keys_dir, clock, SSO_TOKEN_TTL="60") as client:
        assert claims(await client.issue(api_token))[0] == int(clock()) + 60


async def test_issuing_for_a_member_writes_nothing(client: Client, api_token: str, database: Database) -> None:
    await settled(client.issue(api_token))
    with watching(database) as fingerprint:
        before = fingerprint()
        await settled(asyncio.gather(*(client.another().issue(api_token) for _ in range(5))))
        assert fingerprint() == before
        await settled(client.issue(api_token, JOHN))
        assert fingerprint() != before  # proves that the check above can fail


# --- The API token ---------------------------------------------------------------------------------------------------


async def test_every_request_without_a_valid_api_token_gets_the_same_error(client: Client, api_token: str) -> None:
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
        "another scheme": [("authorization", f"BearerX {api_token}")],
        "colon": [("authorization", f"Bearer:{api_token}")],
        "unknown": bearer(unknown),
        "upper case": bearer(api_token.upper()),
        "cut": bearer(api_token[:-1]),
        "longer": bearer(api_token + "A"),
        "two with a space": bearer(f"{api_token} {api_token}"),
        "two with a comma": bearer(f"{api_token},{api_token}"),
        "digest": bearer(digest),
        "non-ASCII": bearer("wf_live_\xfc\xff\x80"),
        "non-ASCII scheme": [("authorization", f"B\xe9arer {api_token}")],
        "control characters": bearer("wf_live_\x00\x7f"),
        "wildcards": bearer("wf_live_%"),
        "very long": bearer("wf_live_" + "A" * 10_000),
        "two headers": bearer(api_token) * 2,
        "valid and invalid header": bearer(api_token) + bearer(unknown),
        "invalid and valid header": bearer(unknown) + bearer(api_token),
        "another header": [("x-api-key", api_token), ("proxy-authorization", f"Bearer {api_token}")],
        "cookie": [("cookie", f"authorization=Bearer {api_token}; access_token={api_token}")],
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
async def test_the_authorization_scheme_is_case_insensitive(client: Client, api_token: str) -> None:
    for scheme in ("Bearer", "bearer", "BEARER", "bEARER", "Bearer "):
        headers = [("authorization", f"{scheme} {api_token}")]
        issued(await client.request("POST", URL, headers=headers, body=encoded()))


async def test_an_api_token_is_valid_until_the_second_of_its_expiry(
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
        # Revocation takes effect even if the clock of the operator's machine is ahead.
        administration.revoke_api_token(connection, token_id, now=int(clock()) + 1000)
    assert refusal(await post(client, encoded(), secret)) == MISSING_TOKEN
    issued(await post(client, encoded(), api_token))


async def test_an_api_token_revoked_by_an_older_version_is_refused(client: Client, database: Database) -> None:
    token_id, secret = make_api_token(database)
    with changing(database) as connection:  # the older version kept the digest
        connection.execute(update(api_tokens).where(api_tokens.c.id == token_id).values(revoked_at=1))
    assert refusal(await post(client, encoded(), secret)) == MISSING_TOKEN


async def test_issuing_requires_the_write_scope(client: Client, database: Database) -> None:
    secrets = {
        "verify": make_api_token(database, scopes=VERIFY)[1],
        "none": make_api_token(database, scopes=frozenset())[1],
        "platform": make_api_token(database, account_id=None, scopes=VERIFY)[1],
    }
    answers = {name: refusal(await post(client, encoded(), secret)) for name, secret in secrets.items()}
    assert answers == dict.fromkeys(secrets, NEEDS_WRITE_SCOPE)
    assert number_of_users(database) == 0
    issued(await post(client, encoded(), make_api_token(database, scopes=WRITE | VERIFY)[1]))


async def test_the_last_use_of_an_api_token_is_recorded_once_an_hour(
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
    with watching(database) as fingerprint, node(database_url, keys_dir, clock) as other_node:
        await settled(asyncio.gather(*(client.another().issue(secret) for _ in range(10))))
        assert last_uses()[token_id] == hour
        before = fingerprint()
        clock.now = hour + 3599.9
        await settled(client.issue(secret))
        await settled(other_node.issue(secret))
        assert fingerprint() == before
        clock.now = hour + 3600
        await settled(client.issue(secret))
        assert last_uses()[token_id] == hour + 3600
        before = fingerprint()
        await settled(other_node.issue(secret))
        clock.now = hour + 3599  # a node whose clock is behind does not lower it
        await settled(client.issue(secret))
        assert fingerprint() == before
    assert [used for used in last_uses().values() if used is not None] == [hour + 3600]
    assert refusal(await settled(post(client, encoded(), unused + "x"))) == MISSING_TOKEN
    assert [used for used in last_uses().values() if used is not None] == [hour + 3600]


# --- The request body ------------------------------------------------------------------------------------------------


@on_sqlite
async def test_a_body_that_is_not_a_json_object_is_refused(client: Client, api_token: str) -> None:
    good = encoded()
    bodies = {
        "empty": b"",
        "blank": b" \n",
        "cut": good[:-1],
        "trailing text": good + b"x",
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
        "not UTF-8 in an ignored field": good[:-1] + b', "x": "\xff"}',
        "a surrogate in UTF-8": good.replace(b"Jane", b"\xed\xa0\x80"),
        "overlong UTF-8": good.replace(b"Jane", b"\xc0\x80"),
        "UTF-16": good.decode().encode("utf-16"),
        "UTF-16 without a byte order fingerprint": good.decode().encode("utf-16-le"),
        "UTF-32": good.decode().encode("utf-32"),
        "byte order fingerprint": b"\xef\xbb\xbf" + good,
        "deep arrays": b"[" * LIMIT,
        "deep objects": b'{"a":' * (LIMIT // 5),
        "deep and closed": b"[" * (LIMIT // 2) + b"]" * (LIMIT // 2),
        "raw control character": good.replace(b"Jane", b"Ja\nne"),
        "raw NUL": good.replace(b"Jane", b"Ja\0ne"),
        "bad escape": good.replace(b"Jane", rb"\x41"),
    }
    answers = {name: refusal(await post(client, body, api_token)) for name, body in bodies.items()}
    assert answers == dict.fromkeys(bodies, INVALID_JSON)

    # RFC 8259 section 9 lets a parser limit the depth. It only has to respond.
    deep = await post(client, good[:-1] + b', "x": ' + b"[" * 8000 + b"]" * 8000 + b"}", api_token)
    assert deep.status == 201 or refusal(deep) == INVALID_JSON


@on_sqlite
async def test_a_body_above_16_kib_is_refused_in_every_form(client: Client, api_token: str) -> None:
    async def send(*pieces: bytes, length: str | None = None) -> Answer:
        headers = bearer(api_token) + ([("content-length", length)] if length is not None else [])
        return await client.request("POST", URL, headers=headers, pieces=pieces)

    too_large = {
        "one byte": await send(padded(LIMIT + 1)),
        "much": await send(padded(100 * LIMIT)),
        "in chunks": await send(*[b" " * 1000] * 16, encoded().rjust(385)),
        "in single bytes": await send(*[b" "] * (LIMIT + 1)),
        "declared": await send(encoded(), length=str(LIMIT + 1)),
        "declared very large": await send(encoded(), length="9" * 4000),
        "declared small": await send(padded(LIMIT + 1), length="5"),
        "declared zero": await send(padded(LIMIT + 1), length="0"),
        "declared negative": await send(padded(LIMIT + 1), length="-1"),
        "declared as text": await send(padded(LIMIT + 1), length="short"),
        "endless": await send(*[b" " * 1000] * 1000),
    }
    assert {name: refusal(answer) for name, answer in too_large.items()} == dict.fromkeys(too_large, TOO_LARGE)

    issued(await send(padded(LIMIT)))
    issued(await send(padded(LIMIT), length=str(LIMIT)))
    issued(await send(*[b" " * 1000] * 16, encoded().rjust(384)))
    issued(await send(b"", *(bytes([byte]) for byte in encoded()), b""))
    issued(await send(encoded(), length="5"))


@on_sqlite
async def test_a_content_length_with_unusual_digits_is_handled(client: Client, api_token: str) -> None:
    length = ("content-length", "\xb2")  # superscript two: str.isdigit() accepts it, int() does not
    answer = await post(client, encoded(), api_token, length)
    assert answer.status in {201, 400}


async def test_an_invalid_field_is_reported_with_its_rule(client: Client, api_token: str, database: Database) -> None:
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
    assert stored_user(database, longest)[1:3] == ("😀" * 100, "\xfc" * 100)


async def test_unknown_fields_and_query_parameters_are_ignored(
    client: Client, api_token: str, database: Database
) -> None:
    extra = {"role": "admin", "account_id": OTHER_ACCOUNT, "id": 7, "disabled_at": 1, "x": "\0\ud800", "y": [None, {}]}
    issued(await post(client, encoded(**extra), api_token))
    assert stored_user(database)[1:] == ("Jane", "Doe", {ACCOUNT: Role.EDITOR})
    issued(await client.request("POST", f"{URL}?email=x&role=admin&sso=x", headers=bearer(api_token), body=encoded()))
    assert number_of_users(database) == 1


@on_sqlite
async def test_the_content_type_is_ignored(client: Client, api_token: str) -> None:
    issued(await post(client, encoded(), api_token))
    for content_type in ("application/json; charset=utf-8", "text/plain", "application/x-www-form-urlencoded", ""):
        issued(await post(client, encoded(), api_token, ("content-type", content_type)))


@on_sqlite
async def test_the_last_of_duplicate_fields_is_used(client: Client, api_token: str, database: Database) -> None:
    body = b'{"email": "other@example.com", "first_name": "A", "last_name": "B", ' + encoded()[1:]
    issued(await post(client, body, api_token))
    assert stored_user(database)[1:3] == ("Jane", "Doe")
    assert number_of_users(database) == 1


# --- Order of checks -------------------------------------------------------------------------------------------------


async def test_only_the_first_of_several_errors_is_reported(client: Client, database: Database, clock: Clock) -> None:
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
    missing_and_invalid = encoded({"email": 5, "first_name": "x" * 101})
    invalid_for_jane, invalid_for_john = encoded(JANE, last_name=5), encoded(JOHN, last_name="x" * 101)
    cases = {
        ("unknown", too_large): MISSING_TOKEN,
        ("unknown", no_json): MISSING_TOKEN,
        ("unknown", b"{}"): MISSING_TOKEN,
        (expired, too_large): MISSING_TOKEN,
        (expired, invalid_for_jane): MISSING_TOKEN,
        (expired, encoded(JANE)): MISSING_TOKEN,
        (expired_without_scope, encoded(JANE)): MISSING_TOKEN,
        (expired_without_scope, no_object): MISSING_TOKEN,
        (verifier, too_large): NEEDS_WRITE_SCOPE,
        (verifier, no_json): NEEDS_WRITE_SCOPE,
        (verifier, no_object): NEEDS_WRITE_SCOPE,
        (verifier, b"{}"): NEEDS_WRITE_SCOPE,
        (verifier, invalid_for_john): NEEDS_WRITE_SCOPE,
        (verifier, encoded(JANE)): NEEDS_WRITE_SCOPE,
        (platform, no_json): NEEDS_WRITE_SCOPE,
        (capped, too_large): TOO_LARGE,
        (capped, padded(LIMIT + 1, {})): TOO_LARGE,
        (capped, padded(LIMIT + 1, JANE)): TOO_LARGE,
        (capped, no_json): INVALID_JSON,
        (capped, no_object): INVALID_JSON,
        (capped, missing_and_invalid): missing("last_name"),
        (capped, encoded(JANE, first_name=None, email="x")): missing("first_name"),
        (capped, invalid_for_jane): invalid("last_name", "type"),
        (capped, invalid_for_john): invalid("last_name", "max_length"),
        (capped, encoded(JANE)): USER_DISABLED,
        (capped, encoded(JOHN)): ROLE_NOT_ALLOWED,
    }
    answers = {case: refusal(await post(client, case[1], case[0])) for case in cases}
    assert answers == cases


@on_sqlite
async def test_path_and_method_are_checked_before_the_api_token(client: Client) -> None:
    assert refusal(await client.request("POST", "/v1/sso_token", body=b"x")) == Refusal(404, "not_found")
    assert refusal(await client.request("DELETE", "/v1")) == Refusal(404, "not_found")
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = await client.request(method, URL, body=b"x" * (LIMIT + 1))
        assert refusal(answer) == Refusal(405, "method_not_allowed")
        assert answer.header("allow") == "POST"
