"""The ledger: single use of claims, refusals that consume nothing, and the floor."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from sqlalchemy import delete, event, select, text, update

from sso_service.database import database_at
from sso_service.database.directory import AccessQuery, ProvisionRequest, provision
from sso_service.database.ledger import Redemption, Verdict, check_states, floor_at
from sso_service.database.ledger import redeem as redeem_batch
from sso_service.database.purging import RETENTION, PurgeRound
from sso_service.database.schema import consumed_floor, consumed_nonces, memberships, users
from sso_service.database.transactions import Database
from tests.support import administration
from tests.support.data import ACCOUNT, OTHER_ACCOUNT, OTHER_TEAM, TEAM
from tests.support.databases import on_postgresql
from tests.support.ledger import HOUR, NOW, ClockedLedger, claims, floor, put, rows, set_floor


@pytest.fixture
def jane(database: Database) -> AccessQuery:
    with database.connect() as connection, database.writing(connection):
        person = provision(database, connection, [ProvisionRequest("jane@example.com", "Jane", "Doe", ACCOUNT, NOW)])[0]
    return AccessQuery(person.user_id, ACCOUNT)


def redeem(database: Database, access: AccessQuery, *batch: bytes) -> list[Verdict]:
    return redeem_at(database, *(Redemption(each, access, NOW, NOW) for each in batch))


def redeem_at(database: Database, *redemptions: Redemption) -> list[Verdict]:
    with database.connect() as connection, database.writing(connection):
        return [redeemed.verdict for redeemed in redeem_batch(database, connection, redemptions)]


# --- Redeeming -------------------------------------------------------------------------------------------------------


def test_claims_are_redeemed_once_and_nothing_else_is_stored(database: Database, jane: AccessQuery) -> None:
    assert redeem(database, jane, claims(NOW)) == [Verdict.REDEEMED]
    for _ in range(3):
        assert redeem(database, jane, claims(NOW)) == [Verdict.CONSUMED]
    assert redeem(database, jane, claims(NOW, nonce=1)) == [Verdict.REDEEMED]
    assert rows(database) == [claims(NOW), claims(NOW, nonce=1)]
    assert list(consumed_nonces.c.keys()) == ["claims"]


def test_any_sixteen_bytes_are_distinguished(database: Database, jane: AccessQuery) -> None:
    odd = [
        bytes(16),
        b"\xff" * 16,
        bytes(15) + b"\x01",
        b"\x01" + bytes(15),
        b"a" * 16,
        b"A" * 16,
        b"\\" * 16,
        b"'" * 16,
    ]
    assert redeem(database, jane, *odd) == [Verdict.REDEEMED] * len(odd)
    assert redeem(database, jane, *reversed(odd)) == [Verdict.CONSUMED] * len(odd)
    assert rows(database) == sorted(odd)


def test_each_redemption_in_a_batch_gets_its_own_verdict(database: Database, jane: AccessQuery) -> None:
    used, new, old = claims(NOW, 1), claims(NOW, 2), claims(NOW - 9 * HOUR)
    redeem(database, jane, used)
    set_floor(database, floor_at(NOW - HOUR))
    assert redeem(database, jane, used, new, old, new, used) == [
        Verdict.CONSUMED,
        Verdict.REDEEMED,
        Verdict.EXPIRED,
        Verdict.CONSUMED,
        Verdict.CONSUMED,
    ]


def test_two_nodes_redeem_the_same_claims_once_without_deadlock(database: Database, jane: AccessQuery) -> None:
    other = database_at(database.url)
    batch = [claims(NOW + n, nonce=n) for n in range(200)]
    for start in range(0, 200, 50):
        chunk = batch[start : start + 50]
        barrier = threading.Barrier(4)

        def node(
            which: Database, order: Sequence[bytes], together: threading.Barrier = barrier
        ) -> dict[bytes, Verdict]:
            together.wait(10)
            return dict(zip(order, redeem(which, jane, *order), strict=True))

        with ThreadPoolExecutor(4) as threads:
            redemptions = [
                threads.submit(node, *arguments) for arguments in product((database, other), (chunk, chunk[::-1]))
            ]
            answers = [redemption.result() for redemption in redemptions]
        for each in chunk:
            assert sorted(answer[each].name for answer in answers) == ["CONSUMED"] * 3 + ["REDEEMED"]
    other.close()


@on_postgresql
@pytest.mark.parametrize(("end", "verdict"), [("COMMIT", Verdict.CONSUMED), ("ROLLBACK", Verdict.REDEEMED)])
def test_redeeming_waits_for_a_concurrent_transaction_on_the_same_claims(
    database: Database, jane: AccessQuery, end: str, verdict: Verdict
) -> None:
    blocked = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with database.connect() as rival, database.connect() as watcher, ThreadPoolExecutor() as threads:
        rival.exec_driver_sql("BEGIN")
        rival.execute(consumed_nonces.insert().values(claims=claims(NOW)))
        redemption = threads.submit(redeem, database, jane, claims(NOW))
        while not watcher.execute(blocked).scalar_one():
            assert not redemption.done()
        rival.exec_driver_sql(end)
        assert redemption.result(10) == [verdict]


# --- Refusals consume nothing ----------------------------------------------------------------------------------------


def test_a_redemption_without_access_consumes_nothing(database: Database, jane: AccessQuery) -> None:
    unknown, elsewhere = AccessQuery(4_000_000_000, ACCOUNT), AccessQuery(jane.user_id, OTHER_ACCOUNT)
    nowhere = AccessQuery(jane.user_id, 4_000_000_000)
    for access in (unknown, elsewhere, nowhere):
        assert redeem(database, access, claims(NOW)) == [Verdict.NO_ACCESS]
    with database.connect() as connection, database.writing(connection):
        administration.disable_user(connection, "jane@example.com", now=NOW)
    assert redeem(database, jane, claims(NOW)) == [Verdict.NO_ACCESS]
    assert rows(database) == []
    with database.connect() as connection, database.writing(connection):
        administration.enable_user(connection, "jane@example.com")
    assert redeem(database, jane, claims(NOW)) == [Verdict.EXPIRED]
    assert rows(database) == []
    assert redeem_at(database, Redemption(claims(NOW), jane, NOW + 1, NOW)) == [Verdict.REDEEMED]
    with database.connect() as connection, database.writing(connection):
        administration.remove_member(connection, "jane@example.com", ACCOUNT)
    assert redeem(database, jane, claims(NOW, 1)) == [Verdict.NO_ACCESS]
    assert rows(database) == [claims(NOW)]


def test_a_login_link_to_another_accounts_team_consumes_nothing(database: Database, jane: AccessQuery) -> None:
    for team in (OTHER_TEAM, 4_000_000_000):
        assert redeem(database, AccessQuery(jane.user_id, ACCOUNT, team), claims(NOW)) == [Verdict.NO_TEAM]
    assert rows(database) == []
    assert redeem(database, AccessQuery(jane.user_id, ACCOUNT, TEAM), claims(NOW)) == [Verdict.REDEEMED]


def test_a_refused_redemption_does_not_affect_its_batch(database: Database, jane: AccessQuery) -> None:
    unknown, wrong_team = AccessQuery(4_000_000_000, ACCOUNT), AccessQuery(jane.user_id, ACCOUNT, OTHER_TEAM)
    batch = [
        Redemption(claims(NOW), unknown, NOW, NOW),
        Redemption(claims(NOW), wrong_team, NOW, NOW),
        Redemption(claims(NOW), jane, NOW, NOW),
        Redemption(claims(NOW, 1), unknown, NOW, NOW),
        Redemption(claims(NOW), jane, NOW, NOW),
    ]
    assert redeem_at(database, *batch) == [
        Verdict.NO_ACCESS,
        Verdict.NO_TEAM,
        Verdict.REDEEMED,
        Verdict.NO_ACCESS,
        Verdict.CONSUMED,
    ]
    assert rows(database) == [claims(NOW)]


@on_postgresql
def test_a_batch_consumes_in_claims_order_to_prevent_deadlocks(database: Database, jane: AccessQuery) -> None:
    batch = [claims(NOW - n * n % 97, nonce=n) for n in range(97)]
    redeem(database, jane, *batch)
    with database.connect() as connection:
        order = connection.execute(select(consumed_nonces.c.claims).order_by(text("ctid"))).scalars().all()
    assert order == sorted(batch)


def test_checking_the_state_of_claims_consumes_nothing(database: Database, jane: AccessQuery) -> None:
    used, fresh, old = claims(NOW), claims(NOW, 1), claims(NOW - 9 * HOUR)
    redeem(database, jane, used)
    set_floor(database, floor_at(NOW - HOUR))
    for _ in range(2):
        with database.connect() as connection, database.reading(connection):
            states = check_states(connection, [used, fresh, old, used])
        assert states == [Verdict.CONSUMED, None, Verdict.EXPIRED, Verdict.CONSUMED]
    assert redeem(database, jane, fresh) == [Verdict.REDEEMED]


def test_a_redemption_returns_sessions_from_if_it_is_in_the_future(database: Database, jane: AccessQuery) -> None:
    with database.connect() as connection, database.writing(connection):
        administration.sign_out_user(connection, "jane@example.com", now=NOW)
    with database.connect() as connection, database.writing(connection):
        redemptions = [
            Redemption(claims(NOW, nonce), jane, NOW + 5, now) for nonce, now in enumerate((NOW, NOW + 1, NOW - 5))
        ]
        answers = redeem_batch(database, connection, redemptions)
    assert [answer.verdict for answer in answers] == [Verdict.REDEEMED] * 3
    assert [answer.sessions_from for answer in answers] == [NOW + 1, 0, NOW + 1]


@pytest.mark.parametrize("of", ["user", "membership"])
def test_a_token_from_before_a_sign_out_is_expired_and_is_not_consumed(
    database: Database, jane: AccessQuery, of: str
) -> None:
    used = claims(NOW, 1)
    assert redeem(database, jane, used) == [Verdict.REDEEMED]
    table = users if of == "user" else memberships
    with database.connect() as connection, database.writing(connection):
        connection.execute(update(table).values(sessions_from=NOW + 1))
    wrong_team = AccessQuery(jane.user_id, ACCOUNT, OTHER_TEAM)
    batch = [
        Redemption(used, jane, NOW, NOW),  # used before: that comes first
        Redemption(claims(NOW, 2), jane, NOW, NOW),
        Redemption(claims(NOW, 3), wrong_team, NOW, NOW),
        Redemption(claims(NOW, 4), jane, NOW + 1, NOW),
        Redemption(claims(NOW, 5), None, NOW, NOW),  # a revocation
    ]
    expired, redeemed = Verdict.EXPIRED, Verdict.REDEEMED
    assert redeem_at(database, *batch) == [Verdict.CONSUMED, expired, expired, redeemed, redeemed]
    assert rows(database) == [used, claims(NOW, 4), claims(NOW, 5)]


# --- The floor -------------------------------------------------------------------------------------------------------


def test_only_claims_at_or_above_the_floor_are_redeemed(database: Database, jane: AccessQuery) -> None:
    set_floor(database, claims(NOW, nonce=5))
    below = [claims(NOW - 1, nonce=9), claims(NOW, nonce=4), bytes(16)]
    above = [claims(NOW, nonce=5), claims(NOW, nonce=6), claims(NOW + 1)]
    assert redeem(database, jane, *below, *above) == [Verdict.EXPIRED] * 3 + [Verdict.REDEEMED] * 3
    assert rows(database) == above


def test_claims_below_the_floor_are_refused_with_and_without_their_row(database: Database, jane: AccessQuery) -> None:
    put(database, claims(NOW))
    set_floor(database, floor_at(NOW + 1))
    assert redeem(database, jane, claims(NOW)) != [Verdict.REDEEMED]
    with database.connect() as connection, database.writing(connection):
        connection.execute(delete(consumed_nonces))
    assert redeem(database, jane, claims(NOW)) == [Verdict.EXPIRED]


def test_without_a_floor_nothing_is_redeemed(database: Database, jane: AccessQuery) -> None:
    with database.connect() as connection, database.writing(connection):
        connection.execute(delete(consumed_floor))
    assert redeem(database, jane, claims(NOW)) != [Verdict.REDEEMED]
    assert rows(database) == []


def test_the_floor_never_falls(ledger: ClockedLedger) -> None:
    database, purger = ledger.database, ledger.purger()
    put(database, claims(NOW - 9 * HOUR))
    purger.run()
    risen = floor(database)
    assert risen == floor_at(NOW - RETENTION)
    ledger.database_clock.now = ledger.node.now = NOW - 2 * HOUR
    later = ledger.purger()
    for _ in range(3):
        assert not later.run().skipped
        assert floor(database) == risen
        ledger.wait(61)


def test_a_purger_does_not_lower_a_floor_that_another_one_raised(ledger: ClockedLedger) -> None:
    """Another purger raises the floor further, between this purger's read and its write."""
    database, other = ledger.database, database_at(ledger.database.url)
    put(database, claims(NOW - 9 * HOUR))
    higher = floor_at(NOW - RETENTION + 100)

    @event.listens_for(database.engine, "before_cursor_execute")
    def raise_floor(_c: object, _r: object, statement: str, *_: object) -> None:
        if statement.startswith("BEGIN I"):  # a transaction that writes
            set_floor(other, higher)

    ledger.purger().run()
    assert floor(database) == higher
    other.close()


def test_a_node_that_pauses_before_redeeming_finds_the_token_expired(ledger: ClockedLedger, jane: AccessQuery) -> None:
    """Redeeming reads no clock of the node, so a paused node cannot redeem claims that were purged."""
    database, purger = ledger.database, ledger.purger()
    token = claims(NOW)
    assert redeem(database, jane, token) == [Verdict.REDEEMED]
    ledger.wait(3 * HOUR)
    purger.run()
    ledger.wait(61)
    assert purger.run() == PurgeRound(deleted=1)
    assert redeem(database, jane, token) == [Verdict.EXPIRED]


def test_the_ledger_uses_the_clock_of_the_database(database: Database) -> None:
    with database.connect() as connection:
        assert abs(connection.execute(select(database.now())).scalar_one() - time.time()) < 2
