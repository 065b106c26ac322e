"""Bytes written to disk: none when a token is issued, and a few when one is consumed."""

import random
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text

from scripts.tools.bench.cases import ISSUE
from scripts.tools.bench.open_loop import open_loop
from scripts.tools.bench.stores import ACCOUNT, POSTGRESQL, TEAM, Store
from scripts.tools.bench.systems import LIFETIME, Ours
from sso_service.database import database_at
from sso_service.database.directory import AccessQuery
from sso_service.database.ledger import Redemption, Verdict, redeem
from sso_service.tokens import Claims

_ISSUES = 1000
_RATE = 1000
_BATCH = 50
"""Logins per transaction, about as many as wait at 64 connections."""
_CLICK = 3.0
"""Average number of seconds until a token is used."""


@dataclass(frozen=True)
class PerLogin:
    """Bytes that a login adds on disk, in table and index."""

    kind: str
    logins: int
    bytes: float


def bytes_written_when_issuing(system: Ours) -> int:
    """Return by how many bytes the files of an SQLite database change when 1000 tokens are issued for known users."""
    assert system.store is not None
    path = Path(str(system.store.sqlalchemy_url.database))
    files = [path, path.with_name(path.name + "-wal")]
    open_loop(
        system.server.port, ISSUE.requests(system, 1), rate=1
    )  # writes the API token's `last_used_at` for this hour
    time.sleep(1)
    before = [_content(file) for file in files]
    answers = open_loop(system.server.port, ISSUE.requests(system, _ISSUES), rate=_RATE)
    assert answers.statuses == {201: _ISSUES}, answers.statuses
    return sum(_difference(old, _content(file)) for old, file in zip(before, files, strict=True))


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _difference(old: bytes, new: bytes) -> int:
    changed = 0 if new.startswith(old) else sum(a != b for a, b in zip(old, new, strict=False))
    return changed + abs(len(new) - len(old))


def bytes_per_login(store: Store, logins: int) -> PerLogin:
    """Consume tokens as at a thousand logins per second, and return the disk space that they take.

    Tokens are used a few seconds after they were issued, some later than others. So the rows are not inserted exactly
    in the order of their keys.
    """
    database = database_at(store.sqlalchemy_url)
    before = _size(store)
    with database.connect() as connection:
        for batch in _redemptions(store, logins):
            with database.writing(connection):
                results = redeem(database, connection, batch)
            assert all(result.verdict is Verdict.REDEEMED for result in results)
    database.close()
    return PerLogin(store.kind, logins, (_size(store) - before) / logins)


def _redemptions(store: Store, logins: int) -> list[list[Redemption]]:
    begin = time.time()
    used = []
    for number in range(logins):
        user_id = random.randint(1, store.people)
        issued_at = begin + number / _RATE
        claims = Claims(int(issued_at) + LIFETIME, user_id, ACCOUNT, secrets.randbits(32))
        redemption = Redemption(claims.pack(), AccessQuery(user_id, ACCOUNT, TEAM), int(issued_at), int(issued_at))
        used.append((issued_at + random.expovariate(1 / _CLICK), redemption))
    used.sort(key=lambda pair: pair[0])
    return [[redemption for _, redemption in used[start : start + _BATCH]] for start in range(0, logins, _BATCH)]


def _size(store: Store) -> int:
    """Return the bytes of the ledger and its index, without the write-ahead log."""
    with store.engine.connect() as connection:
        if store.kind == POSTGRESQL:
            size = "SELECT pg_total_relation_size('consumed_nonces')"
        else:
            # SQLite does not report the size of a table, but nothing else grows here.
            connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
            size = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
        return int(connection.execute(text(size)).scalar_one())
