"""`POST /v1/sso_tokens`: users and memberships that issuing creates."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import delete, select

from sso_service.database.schema import memberships, users
from sso_service.database.transactions import Database
from sso_service.permissions import Role
from tests.support import administration
from tests.support.api import encoded, make_api_token, node, refusal
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT
from tests.support.databases import changing
from tests.support.issuing import ROLE_NOT_ALLOWED, USER_DISABLED, claims, issued, number_of_users, post, stored_user

pytestmark = pytest.mark.anyio


async def test_an_unknown_person_becomes_an_editor(client: Client, api_token: str, database: Database) -> None:
    assert issued(await post(client, encoded(), api_token))[1] is True
    assert stored_user(database)[1:] == ("Jane", "Doe", {ACCOUNT: Role.EDITOR})


async def test_a_user_of_another_account_is_added_as_editor(client: Client, api_token: str, database: Database) -> None:
    elsewhere = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    await client.issue(elsewhere)
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], OTHER_ACCOUNT, Role.ADMIN)
    answer = await post(client, encoded(first_name="Janet", last_name="Roe"), api_token)
    assert issued(answer)[1] is False
    assert stored_user(database)[1:] == ("Jane", "Doe", {ACCOUNT: Role.EDITOR, OTHER_ACCOUNT: Role.ADMIN})


async def test_a_member_keeps_role_and_name(client: Client, api_token: str, database: Database) -> None:
    await client.issue(api_token)
    for role in Role:
        with changing(database) as connection:
            administration.set_role(connection, JANE["email"], ACCOUNT, role)
        assert issued(await post(client, encoded(first_name="Janet"), api_token))[1] is False
        assert stored_user(database)[1:] == ("Jane", "Doe", {ACCOUNT: role})


async def test_a_removed_member_is_added_again_as_editor(client: Client, api_token: str, database: Database) -> None:
    before = claims(await client.issue(api_token))[1]
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
        administration.remove_member(connection, JANE["email"], ACCOUNT)
    token, created = issued(await post(client, encoded(), api_token))
    assert (claims(token)[1], created) == (before, False)
    assert stored_user(database).roles == {ACCOUNT: Role.EDITOR}


async def test_a_disabled_user_gets_no_token_and_no_membership(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    elsewhere = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    await client.issue(api_token)
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=int(clock()))
    assert refusal(await post(client, encoded(), api_token)) == USER_DISABLED
    assert refusal(await post(client, encoded(email=JANE["email"].upper()), elsewhere)) == USER_DISABLED
    assert stored_user(database).roles == {ACCOUNT: Role.EDITOR}
    issued(await post(client, encoded(JOHN), api_token))
    with changing(database) as connection:
        administration.enable_user(connection, JANE["email"])
    assert issued(await post(client, encoded(), api_token))[1] is False


async def test_max_role_limits_the_users_that_an_api_token_can_sign_in(
    client: Client, api_token: str, database: Database
) -> None:
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

    # The limit applies to the current role in this account.
    assert issued(await post(client, encoded(JOHN), secrets[Role.EDITOR]))[1] is True
    in_other_account = make_api_token(database, account_id=OTHER_ACCOUNT, max_role=Role.EDITOR)[1]
    issued(await post(client, encoded(), in_other_account))
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.EDITOR)
        administration.set_role(connection, JANE["email"], OTHER_ACCOUNT, Role.ADMIN)
    issued(await post(client, encoded(), secrets[Role.EDITOR]))
    assert refusal(await post(client, encoded(), in_other_account)) == ROLE_NOT_ALLOWED


async def test_all_spellings_of_an_address_refer_to_one_user(
    client: Client, api_token: str, database: Database
) -> None:
    groups = [
        ["jane.doe@example.com", "Jane.Doe@Example.COM", "JANE.DOE@example.com"],
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


async def test_the_id_of_a_deleted_user_is_not_reused(
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


async def test_concurrent_first_requests_on_two_nodes_create_one_user(
    client: Client, api_token: str, database: Database, database_url: str, keys_dir: Path, clock: Clock
) -> None:
    with node(database_url, keys_dir, clock) as other_node:
        answers = await asyncio.gather(
            *(post(origin.another(), encoded(), api_token) for _ in range(50) for origin in (client, other_node))
        )
    results = [issued(answer) for answer in answers]
    assert Counter(created for _, created in results) == {True: 1, False: 99}
    assert {claims(token)[1] for token, _ in results} == {stored_user(database).id}
    assert len({token for token, _ in results}) == 100
    assert number_of_users(database) == 1
    assert stored_user(database).roles == {ACCOUNT: Role.EDITOR}


async def test_concurrent_requests_of_two_accounts_share_one_user(
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
        (stored_user(database).id, ACCOUNT): 20,
        (stored_user(database).id, OTHER_ACCOUNT): 20,
    }
    assert stored_user(database).roles == {ACCOUNT: Role.EDITOR, OTHER_ACCOUNT: Role.EDITOR}


async def test_concurrent_requests_for_many_new_people_create_each_user_once(
    client: Client, api_token: str, database: Database, database_url: str, keys_dir: Path, clock: Clock
) -> None:
    people = [{**JANE, "email": f"{n}@example.com", "first_name": f"N{n}"} for n in range(40)]
    with node(database_url, keys_dir, clock) as other_node:
        # In opposite orders, which would make two batches wait for each other.
        answers = await asyncio.gather(
            *(post(client.another(), encoded(person), api_token) for person in people),
            *(post(other_node.another(), encoded(person), api_token) for person in reversed(people)),
        )
    results = [issued(answer) for answer in answers]
    assert sum(created for _, created in results) == number_of_users(database) == 40
    for n, (token, _) in enumerate(results[:40]):
        assert stored_user(database, f"{n}@example.com")[:2] == (claims(token)[1], f"N{n}")
        assert claims(results[-1 - n][0])[1] == claims(token)[1]
