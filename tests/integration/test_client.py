"""The Python client against the real application."""

import httpx
import pytest

from sso_service import tokens
from sso_service.client import (
    AsyncSSOClient,
    InsufficientScope,
    InvalidAPIToken,
    InvalidParameter,
    NoAccess,
    RoleNotAllowed,
    TokenConsumed,
    TokenExpired,
    TokenInvalid,
    TokenRefused,
    UserDisabled,
)
from sso_service.database.transactions import Database
from sso_service.permissions import Role, permissions
from sso_service.services.node import Node
from sso_service.web.app import create_app
from tests.support import administration
from tests.support.api import BOTH, make_api_token
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT
from tests.support.databases import changing, on_sqlite
from tests.support.python_client import FORGED, SERVICE_URL, call, error_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def transport(service: Node) -> httpx.ASGITransport:
    return httpx.ASGITransport(create_app(service))


@pytest.fixture
def client(transport: httpx.ASGITransport, database: Database) -> AsyncSSOClient:
    """A client of the real application. Its API token belongs to `ACCOUNT` and has both scopes."""
    return AsyncSSOClient(SERVICE_URL, make_api_token(database, scopes=BOTH)[1], transport=transport)


async def test_a_token_is_created_verified_and_consumed_once(client: AsyncSSOClient, clock: Clock) -> None:
    created = await client.create_token(**JANE)
    again = await client.create_token(**JANE)
    assert (created.user_created, again.user_created) == (True, False)
    assert created.token != again.token

    verification = await client.verify(created.token)
    assert (verification.active, verification.reason) == (True, None)
    login = await client.consume(created.token)
    assert (login.user.email, login.user.first_name, login.user.last_name) == tuple(JANE.values())
    assert (login.account_id, login.role, login.permissions) == (ACCOUNT, "editor", tuple(permissions(Role.EDITOR)))
    assert (login.expires_at, login.ref) == (int(clock()) + 300, tokens.ref(created.token))
    same = (verification.user, verification.account_id, verification.role, verification.permissions)
    assert same == (login.user, login.account_id, login.role, login.permissions)
    assert (verification.expires_at, verification.ref) == (login.expires_at, login.ref)

    error = await error_of(client.consume(created.token))
    assert (type(error), error.code, error.status) == (TokenConsumed, "token_consumed", 410)
    verification = await client.verify(created.token)
    assert (verification.active, verification.reason, verification.user) == (False, "consumed", None)


@on_sqlite
async def test_revoking_reports_whether_the_token_was_used_before(client: AsyncSSOClient) -> None:
    unused, used = (await client.create_token(**JANE)).token, (await client.create_token(**JANE)).token
    await client.consume(used)
    assert await client.revoke(unused) is True
    assert await client.revoke(used) is False
    assert type(await error_of(client.consume(unused))) is TokenConsumed


@on_sqlite
async def test_each_reason_to_refuse_a_login_token_has_its_own_error(
    client: AsyncSSOClient, database: Database, clock: Clock
) -> None:
    late, jane, john = [(await client.create_token(**person)).token for person in (JANE, JANE, JOHN)]
    with changing(database) as connection:
        administration.disable_user(connection, JOHN["email"], now=int(clock()))
    assert type(await error_of(client.consume(john))) is NoAccess
    assert type(await error_of(client.consume(jane[:-2] + "AA"))) is TokenInvalid
    assert type(await error_of(client.consume("\ud800"))) is TokenInvalid
    clock.advance(300)
    assert type(await error_of(client.consume(late))) is TokenExpired
    assert type(await error_of(client.revoke(late))) is TokenExpired
    assert {(await client.verify(each)).reason for each in (late, "x", jane[:-2] + "AA")} == {
        "expired",
        "malformed",
        "bad_signature",
    }
    assert all(issubclass(each, TokenRefused) for each in (TokenConsumed, TokenExpired, TokenInvalid, NoAccess))


@on_sqlite
async def test_each_reason_to_refuse_a_person_has_its_own_error(
    client: AsyncSSOClient, transport: httpx.ASGITransport, database: Database, clock: Clock
) -> None:
    error = await error_of(client.create_token(**{**JANE, "email": "no address"}))
    assert isinstance(error, InvalidParameter)
    assert (error.code, error.field, error.rule, error.status) == ("parameter_invalid", "email", "email", 422)
    error = await error_of(client.create_token(**{**JANE, "last_name": " "}))
    assert isinstance(error, InvalidParameter)
    assert (error.code, error.field, error.rule) == ("parameter_missing", "last_name", "required")
    error = await error_of(client.create_token(**{**JANE, "first_name": "\ud800"}))
    assert isinstance(error, InvalidParameter)
    assert (error.field, error.rule) == ("first_name", "characters")

    await client.create_token(**JANE)
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
    capped = make_api_token(database, max_role=Role.PUBLISHER)[1]
    error = await error_of(call(AsyncSSOClient, "create_token", api_token=capped, transport=transport, **JANE))
    assert type(error) is RoleNotAllowed
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=int(clock()))
    assert type(await error_of(client.create_token(**JANE))) is UserDisabled


@on_sqlite
async def test_each_reason_to_refuse_an_api_token_has_its_own_error(
    client: AsyncSSOClient, transport: httpx.ASGITransport, database: Database
) -> None:
    error = await error_of(call(AsyncSSOClient, "verify", token=FORGED, transport=transport))
    assert (type(error), error.status) == (InvalidAPIToken, 401)
    for_writing = make_api_token(database)[1]
    error = await error_of(call(AsyncSSOClient, "verify", api_token=for_writing, token=FORGED, transport=transport))
    assert isinstance(error, InsufficientScope)
    assert (error.required_scope, error.status) == ("verify:sso", 403)
    others = make_api_token(database, account_id=OTHER_ACCOUNT, scopes=BOTH)[1]
    token = (await client.create_token(**JANE)).token
    error = await error_of(call(AsyncSSOClient, "consume", api_token=others, token=token, transport=transport))
    assert type(error) is TokenInvalid
