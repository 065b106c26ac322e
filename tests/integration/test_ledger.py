"""The ledger: a token is consumed once, nothing is consumed without need, and purging gives no token a second life."""

import asyncio
import math
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    delete,
    event,
    func,
    select,
    text,
    update,
)

from sso_service.database import database_at, open_database
from sso_service.database.directory import AccessQuery, ProvisionRequest, provision
from sso_service.database.ledger import Redemption, Verdict, check_states, floor_at
from sso_service.database.ledger import redeem as redeem_batch
from sso_service.database.purging import FLOOR_AGE, RETENTION, Purger, PurgeRound
from sso_service.database.schema import consumed_floor, consumed_nonces
from sso_service.database.transactions import Database
from sso_service.errors import OutcomeUnknown, Unavailable
from sso_service.keyring import KeyDirectory
from sso_service.services.node import PURGE_INTERVAL, Node
from sso_service.settings import Settings
from sso_service.web.app import create_app
from tests.support import administration
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, OTHER_ACCOUNT, OTHER_TEAM, PAGE, TEAM
from tests.support.databases import database_with_clock, on_postgresql
from tests.support.keys import TTL
from tests.support.ledger import HOUR, NOW, World, claims, put, rows
from tests.support.waiting import until


@pytest.fixture
def jane(database: Database) -> AccessQuery:
    with database.connect() as connection, database.writing(connection):
        person = provision(database, connection, [ProvisionRequest("jane@example.com", "Jane", "Doe", ACCOUNT, NOW)])[0]
    return AccessQuery(person.user_id, ACCOUNT)


def redeem(database: Database, place: AccessQuery, *wanted: bytes) -> list[Verdict]:
    return redeem_at(database, *(Redemption(each, place, NOW) for each in wanted))


def redeem_at(database: Database, *redemptions: Redemption) -> list[Verdict]:
    with database.connect() as connection, database.writing(connection):
        return [redeemed.verdict for redeemed in redeem_batch(database, connection, redemptions)]


def floor(database: Database) -> bytes:
    with database.connect() as connection:
        return bytes(connection.execute(select(consumed_floor.c.claims)).scalar_one())


def set_floor(database: Database, value: bytes) -> None:
    with database.connect() as connection, database.writing(connection):
        connection.execute(update(consumed_floor).values(claims=value))


# --- redeeming -------------------------------------------------------------------------------------------------------


def test_claims_are_redeemed_once_and_are_all_that_is_kept(database: Database, jane: AccessQuery) -> None:
    assert redeem(database, jane, claims(NOW)) == [Verdict.REDEEMED]
    for _ in range(3):
        assert redeem(database, jane, claims(NOW)) == [Verdict.CONSUMED]
    assert redeem(database, jane, claims(NOW, nonce=1)) == [Verdict.REDEEMED]
    assert rows(database) == [claims(NOW), claims(NOW, nonce=1)]
    assert list(consumed_nonces.c.keys()) == ["claims"]


def test_any_sixteen_bytes_are_told_apart(database: Database, jane: AccessQuery) -> None:
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


def test_in_a_batch_new_used_and_repeated_claims_each_get_their_own_verdict(
    database: Database, jane: AccessQuery
) -> None:
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


def test_two_nodes_with_the_same_claims_in_opposite_order_redeem_each_once_and_do_not_deadlock(
    database: Database, jane: AccessQuery
) -> None:
    other = database_at(database.url)
    wanted = [claims(NOW + n, nonce=n) for n in range(200)]
    for start in range(0, 200, 50):
        piece = wanted[start : start + 50]
        barrier = threading.Barrier(4)

        def node(
            which: Database, order: Sequence[bytes], together: threading.Barrier = barrier
        ) -> dict[bytes, Verdict]:
            together.wait(10)
            return dict(zip(order, redeem(which, jane, *order), strict=True))

        with ThreadPoolExecutor(4) as threads:
            trips = [threads.submit(node, *arguments) for arguments in product((database, other), (piece, piece[::-1]))]
            answers = [trip.result() for trip in trips]
        for each in piece:
            assert sorted(answer[each].name for answer in answers) == ["CONSUMED"] * 3 + ["REDEEMED"]
    other.close()


@on_postgresql
@pytest.mark.parametrize(("end", "verdict"), [("COMMIT", Verdict.CONSUMED), ("ROLLBACK", Verdict.REDEEMED)])
def test_a_claim_that_another_node_is_about_to_consume_is_waited_for(
    database: Database, jane: AccessQuery, end: str, verdict: Verdict
) -> None:
    blocked = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with database.connect() as rival, database.connect() as watcher, ThreadPoolExecutor() as threads:
        rival.exec_driver_sql("BEGIN")
        rival.execute(consumed_nonces.insert().values(claims=claims(NOW)))
        ours = threads.submit(redeem, database, jane, claims(NOW))
        while not watcher.execute(blocked).scalar_one():
            assert not ours.done()
        rival.exec_driver_sql(end)
        assert ours.result(10) == [verdict]


# --- nothing is consumed without need --------------------------------------------------------------------------------


def test_who_has_no_access_consumes_nothing(database: Database, jane: AccessQuery) -> None:
    stranger, elsewhere = AccessQuery(4_000_000_000, ACCOUNT), AccessQuery(jane.user_id, OTHER_ACCOUNT)
    nowhere = AccessQuery(jane.user_id, 4_000_000_000)
    for place in (stranger, elsewhere, nowhere):
        assert redeem(database, place, claims(NOW)) == [Verdict.NO_ACCESS]
    with database.connect() as connection, database.writing(connection):
        administration.disable_user(connection, "jane@example.com", now=NOW)
    assert redeem(database, jane, claims(NOW)) == [Verdict.NO_ACCESS]
    assert rows(database) == []
    with database.connect() as connection, database.writing(connection):
        administration.enable_user(connection, "jane@example.com")
    assert redeem(database, jane, claims(NOW)) == [Verdict.REDEEMED]
    with database.connect() as connection, database.writing(connection):
        administration.remove_member(connection, "jane@example.com", ACCOUNT)
    assert redeem(database, jane, claims(NOW, 1)) == [Verdict.NO_ACCESS]
    assert rows(database) == [claims(NOW)]


def test_on_the_way_to_another_accounts_team_nothing_is_consumed(database: Database, jane: AccessQuery) -> None:
    for team in (OTHER_TEAM, 4_000_000_000):
        assert redeem(database, AccessQuery(jane.user_id, ACCOUNT, team), claims(NOW)) == [Verdict.NO_TEAM]
    assert rows(database) == []
    assert redeem(database, AccessQuery(jane.user_id, ACCOUNT, TEAM), claims(NOW)) == [Verdict.REDEEMED]


def test_who_is_refused_does_not_stand_in_the_way_of_those_in_the_same_batch(
    database: Database, jane: AccessQuery
) -> None:
    stranger, lost = AccessQuery(4_000_000_000, ACCOUNT), AccessQuery(jane.user_id, ACCOUNT, OTHER_TEAM)
    batch = [
        Redemption(claims(NOW), stranger, NOW),
        Redemption(claims(NOW), lost, NOW),
        Redemption(claims(NOW), jane, NOW),
        Redemption(claims(NOW, 1), stranger, NOW),
        Redemption(claims(NOW), jane, NOW),
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
def test_a_batch_consumes_in_the_order_of_the_claims_so_that_two_cannot_deadlock(
    database: Database, jane: AccessQuery
) -> None:
    wanted = [claims(NOW - n * n % 97, nonce=n) for n in range(97)]
    redeem(database, jane, *wanted)
    with database.connect() as connection:
        order = connection.execute(select(consumed_nonces.c.claims).order_by(text("ctid"))).scalars().all()
    assert order == sorted(wanted)


def test_the_state_of_claims_can_be_asked_without_consuming_them(database: Database, jane: AccessQuery) -> None:
    used, fresh, old = claims(NOW), claims(NOW, 1), claims(NOW - 9 * HOUR)
    redeem(database, jane, used)
    set_floor(database, floor_at(NOW - HOUR))
    for _ in range(2):
        with database.connect() as connection, database.reading(connection):
            states = check_states(connection, [used, fresh, old, used])
        assert states == [Verdict.CONSUMED, None, Verdict.EXPIRED, Verdict.CONSUMED]
    assert redeem(database, jane, fresh) == [Verdict.REDEEMED]


def test_a_redemption_tells_from_when_on_a_session_counts_if_that_is_yet_to_come(
    database: Database, jane: AccessQuery
) -> None:
    with database.connect() as connection, database.writing(connection):
        administration.sign_out_user(connection, "jane@example.com", now=NOW)
    with database.connect() as connection, database.writing(connection):
        asked = [Redemption(claims(NOW, nonce), jane, now) for nonce, now in enumerate((NOW, NOW + 1, NOW - 5))]
        answers = redeem_batch(database, connection, asked)
    assert [answer.verdict for answer in answers] == [Verdict.REDEEMED] * 3
    assert [answer.sessions_from for answer in answers] == [NOW + 1, 0, NOW + 1]


# --- the floor -------------------------------------------------------------------------------------------------------


def test_only_claims_at_or_above_the_floor_are_redeemed(database: Database, jane: AccessQuery) -> None:
    set_floor(database, claims(NOW, nonce=5))
    below = [claims(NOW - 1, nonce=9), claims(NOW, nonce=4), bytes(16)]
    above = [claims(NOW, nonce=5), claims(NOW, nonce=6), claims(NOW + 1)]
    assert redeem(database, jane, *below, *above) == [Verdict.EXPIRED] * 3 + [Verdict.REDEEMED] * 3
    assert rows(database) == above


def test_a_row_below_the_floor_is_as_good_as_none(database: Database, jane: AccessQuery) -> None:
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


def test_the_floor_never_falls(world: World) -> None:
    database, purger = world.database, world.purger()
    put(database, claims(NOW - 9 * HOUR))
    purger.run()
    risen = floor(database)
    assert risen == floor_at(NOW - RETENTION)
    world.database_clock.now = world.node.now = NOW - 2 * HOUR
    later = world.purger()
    for _ in range(3):
        assert not later.run().skipped
        assert floor(database) == risen
        world.wait(61)


def test_a_purger_that_is_overtaken_does_not_lower_the_floor_again(world: World) -> None:
    """Another one raises the floor further, between this one's look at it and its write."""
    database, other = world.database, database_at(world.database.url)
    put(database, claims(NOW - 9 * HOUR))
    higher = floor_at(NOW - RETENTION + 100)

    @event.listens_for(database.engine, "before_cursor_execute")
    def overtake(_c: object, _r: object, statement: str, *_: object) -> None:
        if statement.startswith("BEGIN I"):  # a transaction that writes
            set_floor(other, higher)

    world.purger().run()
    assert floor(database) == higher
    other.close()


# --- purging ---------------------------------------------------------------------------------------------------------


def test_a_row_is_deleted_when_its_floor_has_been_in_force_for_a_minute(world: World) -> None:
    database, purger = world.database, world.purger()
    old, at_floor, live = claims(NOW - RETENTION - 1), claims(NOW - RETENTION), claims(NOW)
    put(database, old, at_floor, live)
    assert purger.run() == PurgeRound()
    assert floor(database) == floor_at(NOW - RETENTION)
    world.wait(FLOOR_AGE - 1)
    assert purger.run() == PurgeRound()
    assert rows(database) == [old, at_floor, live]
    world.wait(1)
    assert purger.run() == PurgeRound(deleted=1)
    assert rows(database) == [at_floor, live]


def test_only_rows_below_the_floor_that_was_proven_go_not_those_below_a_later_one(world: World) -> None:
    database, purger = world.database, world.purger()
    put(database, claims(NOW - RETENTION - 1))
    purger.run()
    world.wait(61)
    between = claims(NOW - RETENTION + 1)
    put(database, between)
    set_floor(database, floor_at(NOW - RETENTION + 30))  # by another node, just now
    assert purger.run() == PurgeRound(deleted=1)
    assert rows(database) == [between]
    world.wait(61)
    assert purger.run() == PurgeRound(deleted=1)


def test_after_a_restart_a_floor_has_to_prove_itself_anew(world: World) -> None:
    database = world.database
    put(database, claims(NOW - 9 * HOUR))
    for _ in range(5):
        assert world.purger().run() == PurgeRound()
        world.wait(FLOOR_AGE + 1)
    assert len(rows(database)) == 1


def test_rounds_that_come_too_early_do_not_put_off_the_deletion(world: World) -> None:
    database, purger = world.database, world.purger()
    put(database, claims(NOW - 9 * HOUR))
    deleted = 0
    for _ in range(7):
        deleted += purger.run().deleted
        world.wait(10)
    assert deleted == 1


def test_several_purgers_at_once_neither_starve_nor_delete_too_much(world: World, settings: Settings) -> None:
    database = world.database
    clock = world.database_clock
    nodes = [World(database_with_clock(settings, clock), clock, world.node, world.monotonic) for _ in range(4)]
    purgers = [node.purger() for node in nodes]
    kept: list[bytes] = []
    with ThreadPoolExecutor(4) as threads:
        for number in range(8):
            now = int(world.node())
            put(database, claims(now - RETENTION - 10, nonce=number), claims(now, nonce=number))
            kept.append(claims(now, nonce=number))
            for round_ in [threads.submit(purger.run) for purger in purgers]:
                assert not round_.result().skipped
            limit = floor(database)
            assert limit <= floor_at(now - RETENTION)
            assert set(kept) <= set(rows(database))
            world.wait(61)
    assert floor(database) == floor_at(now - RETENTION)
    assert len(rows(database)) - len(kept) <= 2
    for node in nodes:
        node.database.close()


def test_purgers_that_take_turns_do_not_put_off_each_others_deletions(world: World) -> None:
    database, purgers = world.database, [world.purger() for _ in range(6)]
    for turn in range(4 * len(purgers)):
        put(database, claims(int(world.node()) - RETENTION - 1, nonce=turn))
        purgers[turn % len(purgers)].run()
        world.wait(61 / len(purgers))
    assert len(rows(database)) < 3 * len(purgers)


@pytest.mark.parametrize("difference", [31, -32, 2 * HOUR, -2 * HOUR])
def test_a_round_is_skipped_while_node_and_database_disagree_about_the_time(world: World, difference: int) -> None:
    database = world.database
    put(database, claims(NOW - 9 * HOUR))
    world.node.advance(difference)
    purger = world.purger()
    for _ in range(3):
        assert "clock" in purger.run().skipped
        world.wait(61)
    assert floor(database) == bytes(16)
    assert len(rows(database)) == 1
    world.node.now = world.database_clock.now  # corrected, which is a jump too: a restart is needed
    fresh = world.purger()
    assert fresh.run() == PurgeRound()
    world.wait(61)
    assert fresh.run() == PurgeRound(deleted=1)


@pytest.mark.parametrize("difference", [0, 25, -25])
def test_a_small_difference_of_clocks_does_not_matter(world: World, difference: int) -> None:
    put(world.database, claims(NOW - 9 * HOUR))
    world.node.advance(difference)
    purger = world.purger()
    assert purger.run() == PurgeRound()
    world.wait(61)
    assert purger.run() == PurgeRound(deleted=1)


@pytest.mark.parametrize("jump", [31, -31, 2 * HOUR, -2 * HOUR])
def test_a_round_is_skipped_after_the_clock_of_the_machine_was_set(world: World, jump: int) -> None:
    database, purger = world.database, world.purger()
    put(database, claims(NOW - 9 * HOUR))
    purger.run()
    before = floor(database)
    world.wait(61)
    world.node.advance(jump)
    world.database_clock.advance(jump)  # the database runs on the same machine
    assert "clock" in purger.run().skipped
    assert floor(database) == before
    assert len(rows(database)) == 1
    world.node.advance(-jump)
    world.database_clock.advance(-jump)
    assert purger.run() == PurgeRound(deleted=1)


def test_a_clock_that_drifts_slowly_counts_once_it_has_drifted_too_far(world: World) -> None:
    purger, drifted = world.purger(), 0
    while not purger.run().skipped:
        world.wait(61)
        world.node.advance(2)
        world.database_clock.advance(2)
        drifted += 2
        assert drifted < 60
    assert 30 < drifted <= 34


def test_an_idle_database_is_not_written_to(world: World, tmp_path: Path) -> None:
    database, purger = world.database, world.purger()
    put(database, claims(NOW - 9 * HOUR), claims(NOW + 10 * HOUR))
    purger.run()
    world.wait(61)
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
        world.wait(61)
        assert purger.run() == PurgeRound()
    assert changed == []
    assert [path.read_bytes() for path in files] == before


def test_many_rows_are_deleted_in_pieces(world: World) -> None:
    database, purger = world.database, world.purger()
    put(database, *(claims(NOW - 9 * HOUR, nonce) for nonce in range(12_001)), claims(NOW))
    purger.run()
    world.wait(61)
    pieces: list[int] = []

    @event.listens_for(database.engine, "after_cursor_execute")
    def count(_: object, cursor: Any, statement: str, *__: object) -> None:
        if statement.startswith("DELETE"):
            pieces.append(cursor.rowcount)
        elif statement == "COMMIT" and pieces:
            pieces.append(0)

    assert purger.run() == PurgeRound(deleted=12_001)
    assert rows(database) == [claims(NOW)]
    assert max(pieces) <= 5000
    assert [piece for piece in pieces if piece] == [5000, 5000, 2001]
    assert pieces.index(0) == 1  # each in a transaction of its own


def test_one_purger_at_a_time_deletes_and_the_next_one_makes_up_for_it(world: World) -> None:
    database, other = world.database, database_at(world.database.url)
    purgers = [world.purger(), world.purger()]
    put(database, claims(NOW - 9 * HOUR))
    for purger in purgers:
        purger.run()
    world.wait(61)
    with other.connect() as connection, other.purging(connection) as alone:
        assert alone
        assert purgers[0].run() == PurgeRound(elsewhere=True)
    assert len(rows(database)) == 1
    assert purgers[1].run() == PurgeRound(deleted=1)
    other.close()


def test_each_round_tells_about_how_many_rows_there_are_whatever_else_it_does(world: World) -> None:
    database, purger = world.database, world.purger()
    put(database, *(claims(NOW - 9 * HOUR, nonce) for nonce in range(3)), *(claims(NOW, nonce) for nonce in range(4)))
    if not database.is_sqlite:  # it keeps the number itself, and tells a little later
        with database.connect() as connection:
            connection.exec_driver_sql("ANALYZE consumed_nonces")
    assert purger.run().rows == 7
    assert purger.run().rows == 7  # too early
    world.wait(61)
    with database.connect() as connection, database.purging(connection):
        assert purger.run() == PurgeRound(elsewhere=True)
        world.wait(61)
    done = purger.run()
    assert (done.deleted, done.rows) == (3, 4)
    world.node.advance(HOUR)
    skipped = purger.run()
    assert skipped.skipped
    assert skipped.rows in {4, 7}  # an estimate


@pytest.mark.anyio
async def test_every_worker_learns_how_many_rows_there_are_also_while_another_one_purges(
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


def test_a_round_that_fails_is_made_up_for_by_the_next(world: World) -> None:
    database, purger = world.database, world.purger()
    put(database, claims(NOW - 9 * HOUR))
    purger.run()
    world.wait(61)

    def fail(_c: object, statement: str, *_: object) -> None:
        if statement == "COMMIT":
            raise database.engine.dialect.loaded_dbapi.OperationalError("lost")

    event.listen(database.engine, "do_execute", fail)
    with pytest.raises((Unavailable, OutcomeUnknown)):
        purger.run()
    event.remove(database.engine, "do_execute", fail)
    assert purger.run() == PurgeRound(deleted=1)


def test_after_an_older_database_was_put_in_place_its_floor_has_to_prove_itself(world: World) -> None:
    database, purger = world.database, world.purger()
    put(database, claims(NOW - 9 * HOUR))
    purger.run()
    set_floor(database, floor_at(NOW - 5 * HOUR))  # the backup's
    world.wait(61)
    assert purger.run() == PurgeRound()
    assert len(rows(database)) == 1
    world.wait(59)
    assert purger.run() == PurgeRound()
    world.wait(2)
    assert purger.run() == PurgeRound(deleted=1)


# --- clocks that jump ------------------------------------------------------------------------------------------------


@dataclass
class Nodes:
    """Two nodes with clocks of their own on one database, which has one too."""

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


async def works(node: Client, token: str) -> bool:
    """True if `token` signs in at this node now."""
    answer = await node.another().get(f"{PAGE}?sso={token}")
    assert answer.status in {303, 401}
    return answer.status == 303


AHEAD = 2 * HOUR


@pytest.mark.anyio
@pytest.mark.parametrize("restarted", [False, True], ids=["", "purgers restarted"])
@pytest.mark.parametrize("issued_ahead", [False, True], ids=["issued before", "issued ahead"])
async def test_clocks_that_are_hours_ahead_while_the_purge_runs_and_then_back_let_no_token_work_twice(
    nodes: Nodes, api_token: str, restarted: bool, issued_ahead: bool
) -> None:
    clocks = (*nodes.clocks, nodes.database_clock)
    now = clocks[0]()
    for ahead in product([False, True], repeat=3):  # the first node, the second, the database
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
    """How often each of some tokens worked while `moved` clocks went ahead, purgers ran, and the clocks went back."""

    def purgers() -> list[Purger]:
        return [Purger(nodes.database, clock=clock, monotonic=nodes.monotonic) for clock in nodes.clocks]

    async def issue() -> None:
        for node in (nodes.one, nodes.two, nodes.one, nodes.two):
            uses[await node.issue(api_token)] = 0

    async def use_all() -> None:
        for token in uses:
            for node in (nodes.one, nodes.two):
                uses[token] += await works(node, token)

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
async def test_a_row_that_was_deleted_too_early_by_a_wrong_clock_still_gives_its_token_no_second_life(
    nodes: Nodes, api_token: str
) -> None:
    """The worst case: all clocks ahead, the row is really gone, and then all clocks are right again."""
    token = await nodes.one.issue(api_token)
    assert await works(nodes.one, token)
    for clock in (*nodes.clocks, nodes.database_clock):
        clock.advance(AHEAD)
    purger = Purger(nodes.database, clock=nodes.clocks[0], monotonic=nodes.monotonic)
    purger.run()
    nodes.wait(61)
    assert purger.run().deleted == 1
    for clock in (*nodes.clocks, nodes.database_clock):
        clock.advance(-AHEAD)
    assert rows(nodes.database) == []
    assert not await works(nodes.one, token)
    assert not await works(nodes.two, token)


def test_a_node_that_slept_between_reading_the_token_and_redeeming_it_is_too_late(
    world: World, jane: AccessQuery
) -> None:
    """Nothing that happens at redeeming asks a clock, so one that was paused cannot redeem what was purged."""
    database, purger = world.database, world.purger()
    token = claims(NOW)
    assert redeem(database, jane, token) == [Verdict.REDEEMED]
    world.wait(3 * HOUR)
    purger.run()
    world.wait(61)
    assert purger.run() == PurgeRound(deleted=1)
    assert redeem(database, jane, token) == [Verdict.EXPIRED]


def test_a_purge_waits_for_longer_than_any_statement_may_live(database: Database) -> None:
    assert FLOOR_AGE >= 60
    with database.connect() as connection, database.writing(connection):
        if database.is_sqlite:
            return  # one writer at a time: the purge cannot raise the floor while another writes
        limit = connection.execute(select(func.current_setting("statement_timeout"))).scalar_one()
    assert limit == "2s"


def test_the_state_of_the_ledger_is_told_by_the_databases_own_clock(database: Database) -> None:
    with database.connect() as connection:
        assert abs(connection.execute(select(database.now())).scalar_one() - time.time()) < 2


@pytest.mark.slow
@pytest.mark.anyio
async def test_three_hours_of_logins_leave_the_rows_of_an_hour_and_five_minutes_and_two_purge_rounds(
    client: Client, settings: Settings, clock: Clock, api_token: str
) -> None:
    monotonic = Clock(1000)
    database = database_with_clock(settings, clock)
    purger = Purger(database, clock=clock, monotonic=monotonic)
    start, each_round = clock(), 8
    at_most = each_round * math.ceil((HOUR + TTL + 2 * PURGE_INTERVAL) / PURGE_INTERVAL)
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
    assert max(left) <= at_most
    assert left[-1] >= each_round * HOUR / PURGE_INTERVAL  # nothing that is younger than an hour is gone
    assert logins > 2.5 * at_most
