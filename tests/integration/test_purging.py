"""Purging: rows are deleted late enough, in batches, and safely with wrong clocks."""

import asyncio
import math
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, event, func, select

from sso_service.database import database_at, open_database
from sso_service.database.ledger import floor_at
from sso_service.database.purging import FLOOR_AGE, RETENTION, Purger, PurgeRound
from sso_service.database.schema import consumed_nonces
from sso_service.database.transactions import Database
from sso_service.errors import OutcomeUnknown, Unavailable
from sso_service.key_directory import KeyDirectory
from sso_service.services.node import PURGE_INTERVAL, Node
from sso_service.settings import Settings
from sso_service.web.app import create_app
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import PAGE
from tests.support.databases import database_with_clock
from tests.support.keys import TTL
from tests.support.ledger import HOUR, NOW, ClockedLedger, claims, floor, put, rows, set_floor
from tests.support.waiting import until

# --- Purging ---------------------------------------------------------------------------------------------------------


def test_a_row_is_deleted_a_minute_after_the_floor_rose_above_it(ledger: ClockedLedger) -> None:
    database, purger = ledger.database, ledger.purger()
    old, at_floor, live = claims(NOW - RETENTION - 1), claims(NOW - RETENTION), claims(NOW)
    put(database, old, at_floor, live)
    assert purger.run() == PurgeRound()
    assert floor(database) == floor_at(NOW - RETENTION)
    ledger.wait(FLOOR_AGE - 1)
    assert purger.run() == PurgeRound()
    assert rows(database) == [old, at_floor, live]
    ledger.wait(1)
    assert purger.run() == PurgeRound(deleted=1)
    assert rows(database) == [at_floor, live]


def test_a_round_deletes_only_below_the_floor_of_its_previous_round(ledger: ClockedLedger) -> None:
    database, purger = ledger.database, ledger.purger()
    put(database, claims(NOW - RETENTION - 1))
    purger.run()
    ledger.wait(61)
    between = claims(NOW - RETENTION + 1)
    put(database, between)
    set_floor(database, floor_at(NOW - RETENTION + 30))  # set by another node in between
    assert purger.run() == PurgeRound(deleted=1)
    assert rows(database) == [between]
    ledger.wait(61)
    assert purger.run() == PurgeRound(deleted=1)


def test_a_restarted_purger_deletes_nothing_in_its_first_round(ledger: ClockedLedger) -> None:
    database = ledger.database
    put(database, claims(NOW - 9 * HOUR))
    for _ in range(5):
        assert ledger.purger().run() == PurgeRound()
        ledger.wait(FLOOR_AGE + 1)
    assert len(rows(database)) == 1


def test_rounds_in_quick_succession_do_not_postpone_the_deletion(ledger: ClockedLedger) -> None:
    database, purger = ledger.database, ledger.purger()
    put(database, claims(NOW - 9 * HOUR))
    deleted = 0
    for _ in range(7):
        deleted += purger.run().deleted
        ledger.wait(10)
    assert deleted == 1


def test_concurrent_purgers_make_progress_and_delete_only_old_rows(ledger: ClockedLedger, settings: Settings) -> None:
    database = ledger.database
    clock = ledger.database_clock
    nodes = [
        ClockedLedger(database_with_clock(settings, clock), clock, ledger.node, ledger.monotonic) for _ in range(4)
    ]
    purgers = [node.purger() for node in nodes]
    kept: list[bytes] = []
    with ThreadPoolExecutor(4) as threads:
        for number in range(8):
            now = int(ledger.node())
            put(database, claims(now - RETENTION - 10, nonce=number), claims(now, nonce=number))
            kept.append(claims(now, nonce=number))
            for round_ in [threads.submit(purger.run) for purger in purgers]:
                assert not round_.result().skipped
            limit = floor(database)
            assert limit <= floor_at(now - RETENTION)
            assert set(kept) <= set(rows(database))
            ledger.wait(61)
    assert floor(database) == floor_at(now - RETENTION)
    assert len(rows(database)) - len(kept) <= 2
    for node in nodes:
        node.database.close()


def test_alternating_purgers_do_not_postpone_each_others_deletions(ledger: ClockedLedger) -> None:
    database, purgers = ledger.database, [ledger.purger() for _ in range(6)]
    for turn in range(4 * len(purgers)):
        put(database, claims(int(ledger.node()) - RETENTION - 1, nonce=turn))
        purgers[turn % len(purgers)].run()
        ledger.wait(61 / len(purgers))
    assert len(rows(database)) < 3 * len(purgers)


@pytest.mark.parametrize("difference", [31, -32, 2 * HOUR, -2 * HOUR])
def test_a_round_is_skipped_while_node_and_database_clocks_differ(ledger: ClockedLedger, difference: int) -> None:
    database = ledger.database
    put(database, claims(NOW - 9 * HOUR))
    ledger.node.advance(difference)
    purger = ledger.purger()
    for _ in range(3):
        assert "clock" in purger.run().skipped
        ledger.wait(61)
    assert floor(database) == bytes(16)
    assert len(rows(database)) == 1
    ledger.node.now = ledger.database_clock.now  # the correction is a jump as well, which requires a restart
    fresh = ledger.purger()
    assert fresh.run() == PurgeRound()
    ledger.wait(61)
    assert fresh.run() == PurgeRound(deleted=1)


@pytest.mark.parametrize("difference", [0, 25, -25])
def test_a_small_clock_difference_does_not_stop_purging(ledger: ClockedLedger, difference: int) -> None:
    put(ledger.database, claims(NOW - 9 * HOUR))
    ledger.node.advance(difference)
    purger = ledger.purger()
    assert purger.run() == PurgeRound()
    ledger.wait(61)
    assert purger.run() == PurgeRound(deleted=1)


@pytest.mark.parametrize("jump", [31, -31, 2 * HOUR, -2 * HOUR])
def test_a_round_is_skipped_after_the_clock_of_the_machine_was_set(ledger: ClockedLedger, jump: int) -> None:
    database, purger = ledger.database, ledger.purger()
    put(database, claims(NOW - 9 * HOUR))
    purger.run()
    before = floor(database)
    ledger.wait(61)
    ledger.node.advance(jump)
    ledger.database_clock.advance(jump)  # the database runs on the same machine
    assert "clock" in purger.run().skipped
    assert floor(database) == before
    assert len(rows(database)) == 1
    ledger.node.advance(-jump)
    ledger.database_clock.advance(-jump)
    assert purger.run() == PurgeRound(deleted=1)


def test_slow_clock_drift_stops_purging_above_the_limit(ledger: ClockedLedger) -> None:
    purger, drifted = ledger.purger(), 0
    while not purger.run().skipped:
        ledger.wait(61)
        ledger.node.advance(2)
        ledger.database_clock.advance(2)
        drifted += 2
        assert drifted < 60
    assert 30 < drifted <= 34


def test_purging_an_idle_database_writes_nothing(ledger: ClockedLedger, tmp_path: Path) -> None:
    database, purger = ledger.database, ledger.purger()
    put(database, claims(NOW - 9 * HOUR), claims(NOW + 10 * HOUR))
    purger.run()
    ledger.wait(61)
    purger.run()
    assert rows(database) == [claims(NOW + 10 * HOUR)]
    changed: list[str] = []

    @event.listens_for(database.engine, "after_cursor_execute")
    def note(_: object, cursor: Any, statement: str, *__: object) -> None:
        if statement.split(maxsplit=1)[0] in {"INSERT", "UPDATE", "DELETE"} and cursor.rowcount > 0:
            changed.append(statement)

    files = sorted(path for path in tmp_path.glob("sso.db*") if path.suffix != ".db-shm")
    before = [path.read_bytes() for path in files]
    for _ in range(5):
        ledger.wait(61)
        assert purger.run() == PurgeRound()
    assert changed == []
    assert [path.read_bytes() for path in files] == before


def test_many_rows_are_deleted_in_several_transactions(ledger: ClockedLedger) -> None:
    database, purger = ledger.database, ledger.purger()
    put(database, *(claims(NOW - 9 * HOUR, nonce) for nonce in range(12_001)), claims(NOW))
    purger.run()
    ledger.wait(61)
    deletions: list[int] = []

    @event.listens_for(database.engine, "after_cursor_execute")
    def count(_: object, cursor: Any, statement: str, *__: object) -> None:
        if statement.startswith("DELETE"):
            deletions.append(cursor.rowcount)
        elif statement == "COMMIT" and deletions:
            deletions.append(0)

    assert purger.run() == PurgeRound(deleted=12_001)
    assert rows(database) == [claims(NOW)]
    assert max(deletions) <= 5000
    assert [chunk for chunk in deletions if chunk] == [5000, 5000, 2001]
    assert deletions.index(0) == 1  # each batch has its own transaction


def test_only_one_purger_deletes_at_a_time(ledger: ClockedLedger) -> None:
    database, other = ledger.database, database_at(ledger.database.url)
    purgers = [ledger.purger(), ledger.purger()]
    put(database, claims(NOW - 9 * HOUR))
    for purger in purgers:
        purger.run()
    ledger.wait(61)
    with other.connect() as connection, other.purging(connection) as alone:
        assert alone
        assert purgers[0].run() == PurgeRound(elsewhere=True)
    assert len(rows(database)) == 1
    assert purgers[1].run() == PurgeRound(deleted=1)
    other.close()


def test_every_round_estimates_the_number_of_rows(ledger: ClockedLedger) -> None:
    database, purger = ledger.database, ledger.purger()
    put(database, *(claims(NOW - 9 * HOUR, nonce) for nonce in range(3)), *(claims(NOW, nonce) for nonce in range(4)))
    if not database.is_sqlite:  # PostgreSQL maintains an estimate, which is updated with a delay
        with database.connect() as connection:
            connection.exec_driver_sql("ANALYZE consumed_nonces")
    assert purger.run().rows == 7
    assert purger.run().rows == 7  # too early to delete
    ledger.wait(61)
    with database.connect() as connection, database.purging(connection):
        assert purger.run() == PurgeRound(elsewhere=True)
        ledger.wait(61)
    done = purger.run()
    assert (done.deleted, done.rows) == (3, 4)
    ledger.node.advance(HOUR)
    skipped = purger.run()
    assert skipped.skipped
    assert skipped.rows in {4, 7}  # an estimate


@pytest.mark.anyio
async def test_a_worker_counts_rows_while_another_worker_purges(
    service: Node, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sso_service.services.node.PURGE_INTERVAL", 0.01)
    monkeypatch.setattr("sso_service.services.node.secrets.randbelow", lambda _: 0)
    put(database, *(claims(NOW, nonce) for nonce in range(3)))
    if not database.is_sqlite:
        with database.connect() as connection:
            connection.exec_driver_sql("ANALYZE consumed_nonces")
    assert service.consumed_rows is None
    with database.connect() as connection, database.purging(connection):
        background = asyncio.create_task(service.run_in_background())
        await until(lambda: service.consumed_rows == 3)
    background.cancel()
    with suppress(asyncio.CancelledError):
        await background


def test_a_failed_round_is_repeated_by_the_next_one(ledger: ClockedLedger) -> None:
    database, purger = ledger.database, ledger.purger()
    put(database, claims(NOW - 9 * HOUR))
    purger.run()
    ledger.wait(61)

    def fail(_c: object, statement: str, *_: object) -> None:
        if statement == "COMMIT":
            raise database.engine.dialect.loaded_dbapi.OperationalError("connection lost")

    event.listen(database.engine, "do_execute", fail)
    with pytest.raises((Unavailable, OutcomeUnknown)):
        purger.run()
    event.remove(database.engine, "do_execute", fail)
    assert purger.run() == PurgeRound(deleted=1)


def test_a_restored_floor_must_be_in_force_for_a_minute_before_deletion(ledger: ClockedLedger) -> None:
    database, purger = ledger.database, ledger.purger()
    put(database, claims(NOW - 9 * HOUR))
    purger.run()
    set_floor(database, floor_at(NOW - 5 * HOUR))  # from the backup
    ledger.wait(61)
    assert purger.run() == PurgeRound()
    assert len(rows(database)) == 1
    ledger.wait(59)
    assert purger.run() == PurgeRound()
    ledger.wait(2)
    assert purger.run() == PurgeRound(deleted=1)


# --- Clock jumps -----------------------------------------------------------------------------------------------------


@dataclass
class Nodes:
    """Two nodes with separate clocks, on one database with a clock of its own."""

    one: Client
    two: Client
    clocks: tuple[Clock, Clock]
    database: Database
    database_clock: Clock
    monotonic: Clock

    def wait(self, seconds: float) -> None:
        for clock in (*self.clocks, self.database_clock, self.monotonic):
            clock.advance(seconds)


@pytest.fixture
def nodes(settings: Settings, keys_dir: Path, clock: Clock) -> Iterator[Nodes]:
    clocks = Clock(clock()), Clock(clock())
    database_clock = Clock(clock())
    database = database_with_clock(settings, database_clock)
    services = [Node(settings, open_database(settings), KeyDirectory(keys_dir), clock=each) for each in clocks]
    one, two = (Client(create_app(service)) for service in services)
    yield Nodes(one, two, clocks, database, database_clock, Clock(1000))
    for service in services:
        service.close()
    database.close()


async def signs_in(node: Client, token: str) -> bool:
    """True if `token` signs in at this node now."""
    answer = await node.another().get(f"{PAGE}?sso={token}")
    assert answer.status in {303, 401}
    return answer.status == 303


AHEAD = 2 * HOUR


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("restarted", [False, True], ids=["", "purgers-restarted"])
@pytest.mark.parametrize("issued_ahead", [False, True], ids=["issued-before", "issued-ahead"])
async def test_purging_with_fast_clocks_never_lets_a_token_work_twice(
    nodes: Nodes, api_token: str, restarted: bool, issued_ahead: bool
) -> None:
    clocks = (*nodes.clocks, nodes.database_clock)
    now = clocks[0]()
    for ahead in product([False, True], repeat=3):  # the first node, the second node, the database
        for clock in clocks:
            clock.now = now
        set_floor(nodes.database, bytes(16))
        with nodes.database.connect() as connection, nodes.database.writing(connection):
            connection.execute(delete(consumed_nonces))
        moved = [clock for clock, is_ahead in zip(clocks, ahead, strict=True) if is_ahead]
        uses = await _uses(nodes, api_token, moved, restarted=restarted, issued_ahead=issued_ahead)
        assert max(uses) == 1 if any(ahead) else set(uses) == {1}, (ahead, uses)


async def _uses(
    nodes: Nodes, api_token: str, moved: list[Clock], *, restarted: bool, issued_ahead: bool
) -> Collection[int]:
    """Count the logins with each token while the `moved` clocks go ahead, purgers run, and the clocks go back."""

    def purgers() -> list[Purger]:
        return [Purger(nodes.database, clock=clock, monotonic=nodes.monotonic) for clock in nodes.clocks]

    async def issue() -> None:
        for node in (nodes.one, nodes.two, nodes.one, nodes.two):
            uses[await node.issue(api_token)] = 0

    async def use_all() -> None:
        for token in uses:
            for node in (nodes.one, nodes.two):
                uses[token] += await signs_in(node, token)

    uses: dict[str, int] = {}
    running = purgers()
    if not issued_ahead:
        await issue()
    for clock in moved:
        clock.advance(AHEAD)
    if issued_ahead:
        await issue()
    await use_all()
    if restarted:
        running = purgers()
    for _ in range(3):
        for purger in running:
            purger.run()
        nodes.wait(61)
        await use_all()
    for clock in moved:
        clock.advance(-AHEAD)
    for purger in (*running, *purgers()):
        purger.run()
        await use_all()
    return uses.values()


@pytest.mark.anyio
async def test_a_token_whose_row_was_purged_too_early_stays_refused(nodes: Nodes, api_token: str) -> None:
    """The worst case: all clocks are ahead, the row is deleted, and then all clocks are corrected."""
    token = await nodes.one.issue(api_token)
    assert await signs_in(nodes.one, token)
    for clock in (*nodes.clocks, nodes.database_clock):
        clock.advance(AHEAD)
    purger = Purger(nodes.database, clock=nodes.clocks[0], monotonic=nodes.monotonic)
    purger.run()
    nodes.wait(61)
    assert purger.run().deleted == 1
    for clock in (*nodes.clocks, nodes.database_clock):
        clock.advance(-AHEAD)
    assert rows(nodes.database) == []
    assert not await signs_in(nodes.one, token)
    assert not await signs_in(nodes.two, token)


def test_the_purge_delay_exceeds_the_longest_statement(database: Database) -> None:
    assert FLOOR_AGE >= 60
    with database.connect() as connection, database.writing(connection):
        if database.is_sqlite:
            return  # SQLite has a single writer, so the purge cannot raise the floor during another write
        limit = connection.execute(select(func.current_setting("statement_timeout"))).scalar_one()
    assert limit == "2s"


@pytest.mark.slow
@pytest.mark.anyio
async def test_the_ledger_keeps_an_hour_of_logins_plus_two_purge_rounds(
    client: Client, settings: Settings, clock: Clock, api_token: str
) -> None:
    monotonic = Clock(1000)
    database = database_with_clock(settings, clock)
    purger = Purger(database, clock=clock, monotonic=monotonic)
    start, each_round = clock(), 8
    most_rows = each_round * math.ceil((HOUR + TTL + 2 * PURGE_INTERVAL) / PURGE_INTERVAL)
    left, logins = [], 0

    async def sign_in() -> int:
        browser = client.another()
        return (await browser.get(f"{PAGE}?sso={await browser.issue(api_token)}")).status

    while clock() < start + 3 * HOUR:
        statuses = await asyncio.gather(*(sign_in() for _ in range(each_round)))
        assert statuses == [303] * each_round
        logins += each_round
        assert not purger.run().skipped
        with database.connect() as connection:
            left.append(connection.execute(select(func.count()).select_from(consumed_nonces)).scalar_one())
        for each in (clock, monotonic):
            each.advance(PURGE_INTERVAL)
    database.close()
    assert max(left) <= most_rows
    assert left[-1] >= each_round * HOUR / PURGE_INTERVAL  # no row younger than an hour was deleted
    assert logins > 2.5 * most_rows
