"""Users and API tokens: each operation of a batch gets its own result, and no batch reads a whole table."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import Connection, delete, event, select, text, update

from sso_service.database import database_at
from sso_service.database.directory import (
    Access,
    AccessQuery,
    Found,
    Lookup,
    Provisioned,
    ProvisionRequest,
    User,
    check_access,
    digest,
    record_uses,
)
from sso_service.database.directory import (
    look_up as look_up_batch,
)
from sso_service.database.directory import (
    provision as provision_batch,
)
from sso_service.database.ledger import Redemption, check_states, redeem
from sso_service.database.schema import api_tokens, consumed_nonces, memberships, users
from sso_service.database.transactions import Database
from sso_service.permissions import Role, Scope
from tests.support import administration
from tests.support.data import ACCOUNT, OTHER_ACCOUNT, OTHER_TEAM, PORTAL, TEAM
from tests.support.databases import changing, on_postgresql

NOW = 1_700_000_000  # before the database's clock, which limits `sessions_from`
UNKNOWN_ID = 4_000_000_000


def person(name: str, account_id: int = ACCOUNT) -> ProvisionRequest:
    return ProvisionRequest(f"{name.lower()}@example.com", name, "Doe", account_id, NOW)


def provision(database: Database, *people: ProvisionRequest) -> list[Provisioned]:
    with changing(database) as connection:
        return provision_batch(database, connection, people)


def access_of(database: Database, *queries: AccessQuery) -> list[Access]:
    with database.connect() as connection, database.reading(connection):
        return check_access(database, connection, queries)


def look_up(database: Database, *lookups: Lookup) -> list[Found]:
    with database.connect() as connection, database.reading(connection):
        return look_up_batch(database, connection, lookups)


@pytest.fixture
def people(database: Database) -> dict[str, int]:
    """The ids of Amy, an admin; Ben, disabled; Cleo, a member of the other account; and Dan, without an account."""
    names = ("Amy", "Ben", "Cleo", "Dan")
    accounts = (ACCOUNT, ACCOUNT, OTHER_ACCOUNT, ACCOUNT)
    ids = [p.user_id for p in provision(database, *map(person, names, accounts))]
    with changing(database) as connection:
        administration.set_role(connection, "amy@example.com", ACCOUNT, Role.ADMIN)
        administration.disable_user(connection, "ben@example.com", now=NOW)
        administration.remove_member(connection, "dan@example.com", ACCOUNT)
    return dict(zip(names, ids, strict=True))


# --- Lookups ---------------------------------------------------------------------------------------------------------


def test_each_lookup_in_a_batch_gets_its_own_result(database: Database, people: dict[str, int]) -> None:
    scopes = frozenset(Scope)
    with changing(database) as connection:
        created_tokens = [
            administration.create_api_token(
                connection, account_id=account, name="t", scopes=which, now=NOW, max_role=cap, expires_at=end
            )
            for account, which, cap, end in (
                (ACCOUNT, scopes, None, None),
                (OTHER_ACCOUNT, frozenset({Scope.WRITE_SSO}), Role.PUBLISHER, NOW + 5),
                (None, frozenset({Scope.VERIFY_SSO}), None, None),
            )
        ]
    secrets = {name: secret for name, (_, secret) in zip(("one", "other", "platform"), created_tokens, strict=True)}
    ids = {name: token_id for name, (token_id, _) in zip(("one", "other", "platform"), created_tokens, strict=True)}
    expected = {  # (API token, address) -> (id of the API token, user, disabled, role, sessions_from)
        ("one", "amy"): ("one", "Amy", False, Role.ADMIN, NOW),
        ("one", "ben"): ("one", "Ben", True, Role.EDITOR, NOW + 1),
        ("one", "cleo"): ("one", "Cleo", False, None, NOW),
        ("one", "dan"): ("one", "Dan", False, None, NOW),
        ("one", "eve"): ("one", None, False, None, 0),
        ("other", "cleo"): ("other", "Cleo", False, Role.EDITOR, NOW),
        ("other", "amy"): ("other", "Amy", False, None, NOW),
        ("platform", "amy"): ("platform", "Amy", False, None, NOW),
        # Without a valid API token no user is looked up.
        ("none", "amy"): (None, None, False, None, 0),
        ("none", "eve"): (None, None, False, None, 0),
    }
    # Each lookup occurs many times and in mixed order, so that the batch is larger than any page.
    lookups = [*expected, *reversed(expected)] * 30
    answers = look_up(
        database, *(Lookup(digest(secrets.get(token, "x")), f"{name}@example.com", NOW) for token, name in lookups)
    )
    assert len(answers) == len(lookups)
    for lookup, found in zip(lookups, answers, strict=True):
        token, user, disabled, role, sessions_from = expected[lookup]
        assert (found.api_token.id if found.api_token else None) == (ids[token] if token else None)
        assert found.user_id == (people[user] if user else None)
        assert (found.disabled, found.role, found.sessions_from) == (disabled, role, sessions_from)


def test_a_lookup_returns_everything_stored_about_an_api_token(database: Database) -> None:
    with changing(database) as connection:
        token_id, secret = administration.create_api_token(
            connection,
            account_id=OTHER_ACCOUNT,
            name="t",
            scopes=frozenset(Scope),
            now=NOW,
            max_role=Role.PUBLISHER,
            expires_at=NOW + 5,
        )
        connection.execute(update(api_tokens).values(revoked_at=NOW + 1))  # as an older version of this service did
        record_uses(connection, [(token_id, NOW - NOW % 3600)])
    [found] = look_up(database, Lookup(digest(secret), "", NOW + 4))
    token = found.api_token
    assert token is not None
    assert (token.id, token.account_id, token.scopes) == (token_id, OTHER_ACCOUNT, frozenset(Scope))
    assert (token.max_role, token.expires_at, token.revoked_at) == (Role.PUBLISHER, NOW + 5, NOW + 1)
    assert token.last_used_at == NOW - NOW % 3600
    assert (found.user_id, found.disabled, found.role) == (None, False, None)


def test_the_secret_of_an_api_token_is_not_stored_in_the_database(database: Database) -> None:
    with changing(database) as connection:
        _, secret = administration.create_api_token(
            connection, account_id=ACCOUNT, name="t", scopes=frozenset(Scope), now=NOW
        )
        row = connection.execute(select(api_tokens)).one()
    assert secret.startswith("wf_live_")
    assert len(secret) == len("wf_live_") + 43
    assert secret not in repr(row)
    assert row.digest == digest(secret)
    assert secret[8:-4] not in repr(row)


def test_a_revoked_api_token_is_not_found(database: Database) -> None:
    created_tokens = []
    with changing(database) as connection:
        for name in ("one", "two", "three"):
            created_tokens.append(
                administration.create_api_token(connection, account_id=ACCOUNT, name=name, scopes=frozenset(), now=NOW)
            )
        administration.revoke_api_token(connection, created_tokens[0][0], now=NOW)
        administration.revoke_api_token(connection, created_tokens[0][0], now=NOW + 1)
        administration.revoke_api_token(connection, created_tokens[1][0], account_id=ACCOUNT, now=NOW)
    found = look_up(database, *(Lookup(digest(secret), "", NOW) for _, secret in created_tokens))
    assert [each.api_token and each.api_token.id for each in found] == [None, None, created_tokens[2][0]]
    # The rest of the digest stays, so that a leaked API token can still be identified.
    with database.connect() as connection:
        rows = connection.execute(select(api_tokens).order_by(api_tokens.c.id)).all()
    assert [row.revoked_at for row in rows] == [NOW, NOW, None]
    assert [row.digest[1:] for row in rows] == [digest(secret)[1:] for _, secret in created_tokens]


def test_an_expired_api_token_is_not_found(database: Database) -> None:
    with changing(database) as connection:
        secrets = [
            administration.create_api_token(
                connection, account_id=ACCOUNT, name="t", scopes=frozenset(), now=NOW, expires_at=end
            )[1]
            for end in (NOW + 10, NOW + 11, None)
        ]
    for now, valid in (
        (NOW + 9, [True, True, True]),
        (NOW + 10, [False, True, True]),
        (NOW + 99, [False] * 2 + [True]),
    ):
        found = look_up(database, *(Lookup(digest(secret), "", now) for secret in secrets))
        assert [each.api_token is not None for each in found] == valid


def test_an_unknown_api_token_is_not_taken_for_its_neighbour_in_the_index(database: Database) -> None:
    with changing(database) as connection:
        stored = sorted(
            digest(
                administration.create_api_token(
                    connection, account_id=ACCOUNT, name="t", scopes=frozenset(Scope), now=NOW
                )[1]
            )
            for _ in range(9)
        )
    near = [change for each in stored for change in (each[:-1], each + "0", each.upper(), f"-{each[1:]}")]
    for each in {*near, "", "0" * 64, "f" * 64, "-", "~"} - {*stored}:
        [found] = look_up(database, Lookup(each, "", NOW))
        assert found.api_token is None, each


def test_text_in_an_address_or_digest_never_reaches_the_sql_statement(
    database: Database, people: dict[str, int]
) -> None:
    for hostile in ("'", '"', "\\", "%s", ":batch", "[]", "null", "é", "\t", "amy@example.com' --", "0123", "1e5"):
        [found] = look_up(database, Lookup(hostile, hostile, NOW))
        assert found == Found(None, None, False, None, 0)


# --- Access ----------------------------------------------------------------------------------------------------------


def test_each_access_check_in_a_batch_gets_its_own_result(database: Database, people: dict[str, int]) -> None:
    def user(name: str) -> User:
        disabled = name == "Ben"
        return User(people[name], f"{name.lower()}@example.com", name, "Doe", disabled, NOW + 1 if disabled else NOW)

    amy, ben, cleo, dan = people.values()
    expected = {
        AccessQuery(amy, ACCOUNT): Access(user("Amy"), Role.ADMIN, PORTAL, False),
        AccessQuery(amy, ACCOUNT, TEAM): Access(user("Amy"), Role.ADMIN, PORTAL, True),
        AccessQuery(amy, ACCOUNT, OTHER_TEAM): Access(user("Amy"), Role.ADMIN, PORTAL, False),
        AccessQuery(amy, ACCOUNT, UNKNOWN_ID): Access(user("Amy"), Role.ADMIN, PORTAL, False),
        AccessQuery(amy, OTHER_ACCOUNT, OTHER_TEAM): Access(user("Amy"), None, None, True),
        AccessQuery(amy, UNKNOWN_ID, TEAM): Access(user("Amy"), None, None, False),
        AccessQuery(ben, ACCOUNT, TEAM): Access(user("Ben"), Role.EDITOR, PORTAL, True),
        AccessQuery(cleo, ACCOUNT): Access(user("Cleo"), None, PORTAL, False),
        AccessQuery(cleo, OTHER_ACCOUNT, OTHER_TEAM): Access(user("Cleo"), Role.EDITOR, None, True),
        AccessQuery(dan, ACCOUNT): Access(user("Dan"), None, PORTAL, False),
        AccessQuery(UNKNOWN_ID, ACCOUNT, TEAM): Access(None, None, PORTAL, True),
        AccessQuery(2**32 - 1, 2**32 - 1, 2**32 - 1): Access(None, None, None, False),
        AccessQuery(0, 0, 0): Access(None, None, None, False),
    }
    queries = [*expected, *reversed(expected)] * 30
    assert access_of(database, *queries) == [expected[query] for query in queries]
    with_access = {query for query, access in expected.items() if access.member is not None}
    assert with_access == {
        AccessQuery(amy, ACCOUNT),
        AccessQuery(amy, ACCOUNT, TEAM),
        AccessQuery(amy, ACCOUNT, OTHER_TEAM),
        AccessQuery(amy, ACCOUNT, UNKNOWN_ID),
        AccessQuery(cleo, OTHER_ACCOUNT, OTHER_TEAM),
    }


def test_a_sign_out_takes_effect_with_the_next_read(database: Database, people: dict[str, int]) -> None:
    with changing(database) as connection:
        administration.sign_out_user(connection, "amy@example.com", now=NOW)
    [access] = access_of(database, AccessQuery(people["Amy"], ACCOUNT))
    assert access.user is not None
    assert access.user.sessions_from > NOW


# --- Provisioning ----------------------------------------------------------------------------------------------------


def test_one_batch_provisions_new_known_and_disabled_people(database: Database, people: dict[str, int]) -> None:
    batch = [
        person("Amy"),  # already an admin
        person("Eve"),  # unknown
        person("Ben"),  # disabled
        person("Cleo"),  # a user, but not a member of this account
        ProvisionRequest("eve@example.com", "Other", "Doe", ACCOUNT, NOW),  # a repetition
        person("Eve", OTHER_ACCOUNT),  # a repetition, for another account
        person("Dan"),  # a former member
        person("Ben", OTHER_ACCOUNT),
        person("Amy", OTHER_ACCOUNT),
        person("Cleo"),
    ]
    results = provision(database, *batch)
    eve = results[1].user_id
    assert eve not in people.values()
    assert results == [
        Provisioned(people["Amy"], created=False, role=Role.ADMIN, sessions_from=NOW),
        Provisioned(eve, created=True, role=Role.EDITOR, sessions_from=NOW),
        Provisioned(people["Ben"], created=False, role=None, sessions_from=NOW + 1),
        Provisioned(people["Cleo"], created=False, role=Role.EDITOR, sessions_from=NOW + 1),
        Provisioned(eve, created=False, role=Role.EDITOR, sessions_from=NOW),
        Provisioned(eve, created=False, role=Role.EDITOR, sessions_from=NOW),
        Provisioned(people["Dan"], created=False, role=Role.EDITOR, sessions_from=NOW + 1),
        Provisioned(people["Ben"], created=False, role=None, sessions_from=NOW + 1),
        Provisioned(people["Amy"], created=False, role=Role.EDITOR, sessions_from=NOW + 1),
        Provisioned(people["Cleo"], created=False, role=Role.EDITOR, sessions_from=NOW + 1),
    ]
    with database.connect() as connection:
        assert {(m.account_id, m.role) for m in administration.list_memberships(connection, people["Amy"])} == {
            (ACCOUNT, Role.ADMIN),
            (OTHER_ACCOUNT, Role.EDITOR),
        }
        assert [m.account_id for m in administration.list_memberships(connection, people["Ben"])] == [ACCOUNT]
        assert administration.find_user(connection, "eve@example.com").first_name == "Eve"  # the first name given
    assert [p.created for p in provision(database, *batch)] == [False] * len(batch)


def test_a_member_keeps_role_and_name(database: Database, people: dict[str, int]) -> None:
    renamed = ProvisionRequest("amy@example.com", "Amelia", "Roe", ACCOUNT, NOW + 100)
    assert provision(database, renamed) == [
        Provisioned(people["Amy"], created=False, role=Role.ADMIN, sessions_from=NOW)
    ]
    with database.connect() as connection:
        row = administration.find_user(connection, "amy@example.com")
    assert (row.first_name, row.last_name, row.created_at) == ("Amy", "Doe", NOW)


def test_only_the_first_of_equal_addresses_is_reported_as_created(database: Database) -> None:
    results = provision(database, *([person("Eve"), person("Fay")] * 20))
    assert [p.created for p in results] == [True, True] + [False] * 38
    assert len({p.user_id for p in results}) == 2


@pytest.mark.parametrize(
    "name",
    ["O'Brien", 'a "b"', "back\\slash", "Zoë", "日本語", "👩‍🚀", "null", "{}", "%s :x", "0123", "\u2028", "x" * 100],
)
def test_a_name_is_stored_unchanged(database: Database, name: str) -> None:
    [created] = provision(database, ProvisionRequest("x@example.com", name, name, ACCOUNT, NOW))
    [access] = access_of(database, AccessQuery(created.user_id, ACCOUNT))
    assert access.user == User(created.user_id, "x@example.com", name, name, False, NOW)


def test_two_nodes_that_provision_the_same_people_create_each_user_once(
    database: Database,
) -> None:
    people = [person(f"P{n:03}") for n in range(100)]
    nodes = [database_at(database.url) for _ in range(3)]
    barrier = Barrier(3)

    def node(which: Database, order: Sequence[ProvisionRequest]) -> dict[str, Provisioned]:
        results: dict[str, Provisioned] = {}
        for start in range(0, 100, 25):
            barrier.wait(10)
            chunk = order[start : start + 25]
            results |= zip((p.email for p in chunk), provision(which, *chunk), strict=True)
        return results

    orders = [people, people[:50][::-1] + people[50:], people[25::-1] + people[26:]]
    with ThreadPoolExecutor() as threads:
        answers = [
            future.result() for future in [threads.submit(node, *args) for args in zip(nodes, orders, strict=True)]
        ]
    for person_ in people:
        results = [answer[person_.email] for answer in answers]
        assert len({result.user_id for result in results}) == 1
        assert sorted(result.created for result in results) == [False, False, True]
        assert {result.role for result in results} == {Role.EDITOR}
    for each in nodes:
        each.close()


@on_postgresql
def test_slow_batches_of_two_nodes_do_not_deadlock(database: Database) -> None:
    people = [person(f"P{n}") for n in range(8)]
    with database.connect() as connection:
        slow = "RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.02); RETURN NEW; END $$"
        connection.exec_driver_sql(f"CREATE FUNCTION slow() {slow}")
        connection.exec_driver_sql("CREATE TRIGGER slow BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION slow()")
    with ThreadPoolExecutor() as threads:
        futures = [threads.submit(provision, database, *order) for order in (people, people[::-1])]
        answers = [future.result() for future in futures]
    assert {p.user_id for p in answers[0]} == {p.user_id for p in answers[1]}
    assert {p.role for answer in answers for p in answer} == {Role.EDITOR}


@on_postgresql
def test_a_batch_writes_in_key_order_to_prevent_deadlocks(database: Database) -> None:
    provision(database, *(person(f"P{n * n % 97:02}") for n in range(97)))
    with database.connect() as connection:
        emails = connection.execute(select(users.c.email).order_by(text("ctid"))).scalars().all()
        members = connection.execute(select(memberships.c.user_id).order_by(text("ctid"))).scalars().all()
    assert emails == sorted(emails)
    assert members == sorted(members)


def test_the_id_of_a_deleted_user_is_not_reused(database: Database) -> None:
    [last] = provision(database, person("Eve"))
    with changing(database) as connection:
        connection.execute(delete(memberships))
        connection.execute(delete(users))
    [next_] = provision(database, person("Fay"))
    assert next_.user_id > last.user_id


# --- Use of API tokens -----------------------------------------------------------------------------------------------


def test_the_hour_of_last_use_never_decreases(database: Database) -> None:
    with changing(database) as connection:
        ids = [
            administration.create_api_token(connection, account_id=ACCOUNT, name="t", scopes=frozenset(Scope), now=NOW)[
                0
            ]
            for _ in range(3)
        ]
    for batch, expected in (
        ([(ids[0], 7200)], [7200, None, None]),
        ([(ids[0], 3600), (ids[1], 3600), (ids[1], 10800), (ids[1], 7200)], [7200, 10800, None]),
        ([(ids[0], 10800), (UNKNOWN_ID, 3600)], [10800, 10800, None]),
    ):
        with changing(database) as connection:
            assert record_uses(connection, batch) == [None] * len(batch)
            used = select(api_tokens.c.last_used_at).order_by(api_tokens.c.id)
            assert list(connection.execute(used).scalars()) == expected


# --- Indexes ---------------------------------------------------------------------------------------------------------


@contextmanager
def explaining(connection: Connection) -> Iterator[list[str]]:
    """Run EXPLAIN for each statement of the block just before the statement itself. Yields the plans."""
    plans: list[str] = []
    is_sqlite = connection.dialect.name == "sqlite"

    def explain(_c: object, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        cursor.execute(("EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN ") + statement, parameters)
        plans.append("\n".join(str(row[-1]) for row in cursor.fetchall()))

    event.listen(connection, "before_cursor_execute", explain)
    yield plans
    event.remove(connection, "before_cursor_execute", explain)


def scans_a_large_table(plan: str) -> bool:
    # SQLite reports SCAN for a table and SEARCH for an index; PostgreSQL reports the kind of scan.
    return any(f"{scan} {table}" in plan for scan in ("SCAN", "Seq Scan on") for table in _LARGE)


_LARGE = ("users", "memberships", "consumed_nonces", "api_tokens")
_USERS = 2000
_API_TOKENS = 1000


@pytest.mark.parametrize("size", [1, 512])
def test_no_batch_scans_a_large_table(database: Database, size: int) -> None:
    people = [person(f"P{n:04}") for n in range(_USERS)]
    ids = [p.user_id for p in provision(database, *people)]
    with changing(database) as connection:
        connection.execute(consumed_nonces.insert(), [{"claims": n.to_bytes(16, "big")} for n in range(_USERS)])
        secret = ""
        for _ in range(_API_TOKENS):
            _, secret = administration.create_api_token(
                connection, account_id=ACCOUNT, name="t", scopes=frozenset(Scope), now=NOW
            )
    with database.connect() as connection:
        connection.exec_driver_sql("ANALYZE")
    some = slice(0, _USERS, _USERS // size)
    queries = [AccessQuery(user_id, ACCOUNT, TEAM) for user_id in ids[some]]
    with changing(database) as connection, explaining(connection) as plans:
        look_up_batch(database, connection, [Lookup(digest(secret), p.email, NOW) for p in people[some]])
        check_access(database, connection, queries)
        provision_batch(database, connection, people[some])
        redeem(
            database,
            connection,
            [Redemption(n.to_bytes(16, "big"), query, NOW, NOW) for n, query in enumerate(queries)],
        )
        check_states(connection, [(1).to_bytes(16, "big")])
    assert len(plans) == 2 + 4 + 3 + 2
    assert [plan for plan in plans if scans_a_large_table(plan)] == []
