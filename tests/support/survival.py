"""A check of a service under load during an outage of its database."""

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
class Request:
    """A request: kind, start (monotonic), login token, duration (seconds), and response."""

    kind: str
    at: float
    token: str
    seconds: float
    reply: Reply


GOOD = {"issue": 201, "login": 303, "revoke": 200, "session": 200, "auth": 204, "ready": 200}
"""The requests that need the database, and their status while it is available."""


async def assert_survives(
    outage: Callable[[], AbstractContextManager[None]], seconds: float, url: str, home: Path
) -> None:
    """Run a service with the database `url` under load before, during and after an outage of at least `seconds`.

    During the outage, requests fail in time with 503, and other requests succeed. Every response is true: after the
    outage, each token is consumed if and only if its login succeeded, unless the response was `outcome_unknown`.
    """
    env = {"SSO_HOME": str(home), "SSO_DATABASE_URL": url}
    initialised = command("init", "--demo", env=env)
    api_token = re.findall(r"wf_live_\S+", initialised.stdout)[0]
    [key] = (key for key in keyring.load(home / "keys")[0].values() if isinstance(key, SigningKey))
    finished = asyncio.Event()
    requests: list[Request] = []

    def genuine() -> str:
        """Return a valid login token, without the database."""
        return sign(Claims(int(time.time()) + TTL, user_id, ACCOUNT, secrets.randbits(32)), key.token_key)

    def message(kind: str, token: str) -> bytes:
        return {
            "issue": issue(api_token),
            "login": login(token),
            "revoke": post("/v1/sso_tokens/revoke", api_token, {"token": token}),
            "session": get("/session", cookie),
            "auth": get("/auth", cookie, X_Original_URI=PAGE),
            "ready": get("/readyz"),
            "forged": login(token[:22] + secrets.token_urlsafe(15) + "A"),
            "healthy": get("/healthz"),
        }[kind]

    async def send_repeatedly(kind: str) -> None:
        async with open_connection(running) as connection:
            while not finished.is_set():
                token, started = genuine(), time.monotonic()
                reply = await connection.send(message(kind, token))
                requests.append(Request(kind, started, token, time.monotonic() - started, reply))
                await asyncio.sleep(0.05)  # limits the rate while the database refuses immediately

    def within(start: float, end: float = math.inf) -> list[Request]:
        return [each for each in requests if start <= each.at and each.at + each.seconds <= end]

    def fewest_without_database(answers: list[Request]) -> int:
        """Return the smaller number of responses to the two kinds of requests that need no database."""
        counts = Counter(each.kind for each in answers if each.kind not in GOOD)
        return min(counts["forged"], counts["healthy"])

    def all_good(answers: list[Request]) -> bool:
        return all(each.reply.status == GOOD.get(each.kind, each.reply.status) for each in answers)

    with serving(env, home / "log", workers=2) as running, recording_delays(running.process.pid) as delays:
        async with open_connection(running) as connection:
            first = (await connection.send(issue(api_token))).token
            user_id = unsafe_read_claims(first).user_id
            cookie = (await connection.send(login(first))).header("set-cookie").partition(";")[0]
        async with asyncio.TaskGroup() as group:
            for kind in ("forged", "healthy", *GOOD, *GOOD, "issue", "login", "login", "login"):
                group.create_task(send_repeatedly(kind))
            await until(lambda: len(requests) > 200)
            before_outage = time.monotonic()
            # Starts and ends in a thread: blocking the event loop would falsify the measured times.
            with ExitStack() as stack:
                await asyncio.to_thread(stack.enter_context, outage())
                outage_started = time.monotonic()
                await asyncio.sleep(seconds)
                await until(lambda: fewest_without_database(within(outage_started)) > 50)
                outage_ends = time.monotonic()
                await asyncio.to_thread(stack.close)
            outage_ended = time.monotonic()
            # The service has recovered once no request has failed for a second.
            while time.monotonic() < outage_ended + 1 or not all_good(within(time.monotonic() - 1)):
                assert time.monotonic() - delays.between(outage_ended, time.monotonic()) < outage_ended + 6
                await asyncio.sleep(0.1)
            recovered = time.monotonic()
            finished.set()

        for each in requests:
            seconds_taken = each.seconds - delays.between(each.at, each.at + each.seconds)
            match each.kind:
                case "forged":
                    assert (each.reply.status, seconds_taken < 0.5) == (401, True), each
                case "healthy":
                    assert (each.reply.status, seconds_taken < 0.5) == (200, True), each
                case _:
                    assert each.reply.status in {GOOD[each.kind], 503}, each
                    assert seconds_taken < 3, each
                    assert each.reply.status != 503 or each.reply.header("retry-after"), each
        assert all_good(within(0, before_outage))
        during = within(outage_started, outage_ends)
        assert {(each.kind, each.reply.status) for each in during if each.kind in GOOD} == {
            (kind, 503) for kind in GOOD
        }
        assert fewest_without_database(during) > 50
        assert {each.kind for each in within(recovered - 1)} >= set(GOOD)
        # The log summarises the outage in few lines.
        refused = sum(each.reply.status == 503 and each.kind != "ready" for each in requests)
        warnings = [text for text in (home / "log").read_text().splitlines() if " WARNING " in text]
        assert 0 < len(warnings) < 2 * (2 + (outage_ends - outage_started) / 4)
        counted = sum(int(found[1]) if (found := re.search(r"(\d+) more requests", text)) else 1 for text in warnings)
        assert counted <= refused

        # Each login response was true: a token was consumed or not, or the outcome was reported as unknown.
        logins = [each for each in requests if each.kind == "login"]
        again = await logged_in_again(running, [each.token for each in logins])
        for each, status in zip(logins, again, strict=True):
            if each.reply.status == 303:
                assert status == 401, each
            elif each.reply.error == "outcome_unknown":
                assert status in {303, 401}, each
            else:
                assert (each.reply.error, status) == ("unavailable", 303), each
        assert set(await logged_in_again(running, [each.token for each in logins[-500:]])) == {401}
