"""Concurrent purging by several processes."""

import signal
import subprocess
import sys
import time

import pytest

from sso_service.database.purging import PurgeRound
from tests.support.ledger import HOUR, NOW, ClockedLedger, claims, put
from tests.support.waiting import PATIENCE


@pytest.mark.parametrize(
    ("database_url", "end"),
    [("sqlite", signal.SIGKILL), ("postgresql", signal.SIGKILL), ("postgresql", signal.SIGSTOP)],
    indirect=["database_url"],
)
def test_a_killed_or_paused_purger_does_not_block_other_processes(
    ledger: ClockedLedger, database_url: str, end: signal.Signals
) -> None:
    database, purger = ledger.database, ledger.purger()
    put(database, claims(NOW - 9 * HOUR))
    purger.run()
    ledger.wait(61)
    other = subprocess.Popen(
        [sys.executable, "-c", _DELETES_UNTIL_KILLED, database_url], stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        assert purger.run() == PurgeRound(elsewhere=True)
        ledger.wait(61)
        try:
            other.send_signal(end)
            deadline = time.monotonic() + PATIENCE
            while (done := purger.run()).elsewhere:
                assert time.monotonic() < deadline
                ledger.wait(61)
                time.sleep(0.05)
        finally:
            other.kill()
    assert done == PurgeRound(deleted=1)


_DELETES_UNTIL_KILLED = """
import sys, time
from sso_service.database import open_database
from sso_service.settings import read_settings
database = open_database(read_settings({"SSO_DATABASE_URL": sys.argv[1]}))
with database.connect() as connection, database.purging(connection) as alone:
    print(alone, flush=True)
    while True:
        time.sleep(1)
"""
