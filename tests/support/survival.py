"""A check of a service under load while its database is not there."""

import asyncio
import math
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from sso_service import keyring
from sso_service.keyring import SigningKey
from sso_service.tokens import Claims, sign, unsafe_read_claims
from tests.support.connections import Reply, get, issue, logged_in_again, login, open_connection, post
from tests.support.data import ACCOUNT, PAGE
from tests.support.keys import TTL
from tests.support.processes import command, serving
from tests.support.waiting import recording_delays, until


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: what for, when (monotonic), with which login token, how long it took (seconds), and the answer."""

    what: str
    at: float
    token: str
    took: float
    reply: Reply


GOOD = {"issue": 201, "login": 303, "revoke": 200, "session": 200, "auth": 204, "ready": 200}
"""What needs the database, and the status when it is there."""


async def assert_survives(
    outage: Callable[[], AbstractContextManager[None]], seconds: float, url: str, home: Path
) -> None:
    """A service on the database `url` that is under load before, during and after an `outage`."""
    env = {"SSO_HOME": str(home), "SSO_DATABASE_URL": url}
    made = command("init", "--demo", env=env)
    api_token = re.findall(r"wf_live_\S+", made.stdout)[0]
    [key] = (key for key in keyring.load(home / "keys")[0].values() if isinstance(key, SigningKey))
    over = asyncio.Event()
    asked: list[Asked] = []

    def genuine() -> str:
        """A login token that needs no database to be made."""
        return sign(Claims(int(time.time()) + TTL, user_id, ACCOUNT, secrets.randbits(32)), key.token_key)

    def request(what: str, token: str) -> bytes:
        return {
            "issue": issue(api_token),
            "login": login(token),
            "revoke": post("/v1/sso_tokens/revoke", api_token, {"token": token}),
            "session": get("/session", cookie),
            "auth": get("/auth", cookie, X_Original_URI=PAGE),
            "ready": get("/readyz"),
            "forged": login(token[:22] + secrets.token_urlsafe(15) + "A"),
            "healthy": get("/healthz"),
        }[what]

    async def ask(what: str) -> None:
        async with open_connection(running) as connection:
            while not over.is_set():
                token, begun = genuine(), time.monotonic()
                reply = await connection.send(request(what, token))
                asked.append(Asked(what, begun, token, time.monotonic() - begun, reply))
                await asyncio.sleep(0.05)  # or a database that refuses at once makes this a flood

    def begun_in(start: float, end: float = math.inf) -> list[Asked]:
        return [each for each in asked if start <= each.at and each.at + each.took <= end]

    def fewest_without_database(answers: list[Asked]) -> int:
        """How often each request that needs no database was answered, at least."""
        counts = Counter(each.what for each in answers if each.what not in GOOD)
        return min(counts["forged"], counts["healthy"])

    def all_good(answers: list[Asked]) -> bool:
        return all(each.reply.status == GOOD.get(each.what, each.reply.status) for each in answers)

    with serving(env, home / "log", workers=2) as running, recording_delays(running.process.pid) as delays:
        async with open_connection(running) as connection:
            first = (await connection.send(issue(api_token))).token
            user_id = unsafe_read_claims(first).user_id
            cookie = (await connection.send(login(first))).header("set-cookie").partition(";")[0]
        async with asyncio.TaskGroup() as group:
            for what in ("forged", "healthy", *GOOD, *GOOD, "issue", "login", "login", "login"):
                group.create_task(ask(what))
            await until(lambda: len(asked) > 200)
            leaving = time.monotonic()
            # Begun and ended in a thread, or the times below would be those of waiting here.
            with ExitStack() as absence:
                await asyncio.to_thread(absence.enter_context, outage())
                gone = time.monotonic()
                await asyncio.sleep(seconds)
                await until(lambda: fewest_without_database(begun_in(gone)) > 50)
                returning = time.monotonic()
                await asyncio.to_thread(absence.close)
            back = time.monotonic()
            # The service has recovered when nothing has failed for a second.
            while time.monotonic() < back + 1 or not all_good(begun_in(time.monotonic() - 1)):
                assert time.monotonic() - delays.between(back, time.monotonic()) < back + 6
                await asyncio.sleep(0.1)
            settled = time.monotonic()
            over.set()

        for each in asked:
            took = each.took - delays.between(each.at, each.at + each.took)
            match each.what:
                case "forged":
                    assert (each.reply.status, took < 0.5) == (401, True), each
                case "healthy":
                    assert (each.reply.status, took < 0.5) == (200, True), each
                case _:
                    assert each.reply.status in {GOOD[each.what], 503}, each
                    assert took < 3, each
                    assert each.reply.status != 503 or each.reply.header("retry-after"), each
        assert all_good(begun_in(0, leaving))
        during = begun_in(gone, returning)
        assert {(each.what, each.reply.status) for each in during if each.what in GOOD} == {
            (what, 503) for what in GOOD
        }
        assert fewest_without_database(during) > 50
        assert {each.what for each in begun_in(settled - 1)} >= set(GOOD)
        # In the log it is an event, not a line for each of these.
        refused = sum(each.reply.status == 503 and each.what != "ready" for each in asked)
        told = [text for text in (home / "log").read_text().splitlines() if " WARNING " in text]
        assert 0 < len(told) < 2 * (2 + (returning - gone) / 4)
        counted = sum(int(found[1]) if (found := re.search(r"(\d+) more requests", text)) else 1 for text in told)
        assert counted <= refused

        # What was said of a link is true: used, not used, or, if that could not be told, one of both.
        logins = [each for each in asked if each.what == "login"]
        again = await logged_in_again(running, [each.token for each in logins])
        for each, status in zip(logins, again, strict=True):
            if each.reply.status == 303:
                assert status == 401, each
            elif each.reply.error == "outcome_unknown":
                assert status in {303, 401}, each
            else:
                assert (each.reply.error, status) == ("unavailable", 303), each
        assert set(await logged_in_again(running, [each.token for each in logins[-500:]])) == {401}
