"""The load of the soak: a process in which an intranet issues login tokens and browsers redeem them.

    python -m scripts.tools.proof.hostile.logins PLAN

PLAN is a `Plan` in JSON. When it is done, the process prints `Logins` in JSON.
"""

import asyncio
import json
import random
import resource
import sys
import time
from collections import Counter

import msgspec
import uvloop

from scripts.tools.bench.stores import email
from scripts.tools.proof.client import Answer, Endpoint, Lost, NotSent

_TIMEOUT = 10.0
"""Seconds that a person waits for a response."""
_FASTEST = 32
"""Concurrent logins of a load without a rate."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters: `rate` logins per second (0: as many as possible) of `people` users for `seconds`.

    `page` is the path that a login link opens.
    """

    port: int
    api_token: str
    people: int
    page: str
    rate: float
    seconds: float


class Logins(msgspec.Struct, frozen=True, kw_only=True):
    """The results. `times` are the seconds of each login from the moment at which it was due."""

    times: list[float]
    failed: dict[str, int]
    seconds: float
    cpu: float


class _Failed(Exception):
    """A login that did not work. The message states the step and its response."""


class _Load:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._loop = asyncio.get_running_loop()
        self._intranet = Endpoint("", plan.port)
        self._times: list[float] = []
        self._failed: Counter[str] = Counter()

    async def run(self) -> Logins:
        begin = self._loop.time()
        async with asyncio.TaskGroup() as group:
            if self._plan.rate:
                # The open loop: each login begins when it is due, even if earlier ones have not ended.
                for number in range(round(self._plan.rate * self._plan.seconds)):
                    due = begin + number / self._plan.rate
                    if (wait := due - self._loop.time()) > 0:
                        await asyncio.sleep(wait)
                    elif number % 50 == 0:
                        await asyncio.sleep(0)  # behind schedule: let the event loop read responses
                    group.create_task(self._login(due))
            else:
                for _ in range(_FASTEST):
                    group.create_task(self._login_repeatedly(begin + self._plan.seconds))
        seconds = self._loop.time() - begin
        return Logins(times=self._times, failed=dict(self._failed), seconds=seconds, cpu=time.process_time())

    async def _login_repeatedly(self, end: float) -> None:
        while (now := self._loop.time()) < end:
            await self._login(now)

    async def _login(self, due: float) -> None:
        try:
            await self._issue_and_redeem()
        except (_Failed, NotSent, Lost) as error:
            self._failed[str(error) or type(error).__name__] += 1
        self._times.append(self._loop.time() - due)

    async def _issue_and_redeem(self) -> None:
        plan = self._plan
        person = {"email": email(random.randint(1, plan.people)), "first_name": "Jane", "last_name": "Doe"}
        body = json.dumps(person)
        issued = await self._send(
            self._intranet,
            f"POST /v1/sso_tokens HTTP/1.1\r\nHost: studio.example\r\nAuthorization: Bearer {plan.api_token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}",
        )
        if issued.status != 201:
            code = issued.body.partition(b'"code":"')[2].partition(b'"')[0]
            raise _Failed(f"issuing: {issued.status} {code.decode()}")
        # Each browser has a connection of its own, which must be accepted beside the hostile ones.
        redeemed = await self._send(
            Endpoint("", plan.port),
            f"GET {plan.page}?sso={json.loads(issued.body)['token']} HTTP/1.1\r\nHost: studio.example\r\n"
            "Accept: text/html\r\nAccept-Language: de-DE,de;q=0.9,en;q=0.8\r\nSec-Fetch-Dest: document\r\n"
            "Sec-Fetch-Mode: navigate\r\nSec-Fetch-Site: cross-site\r\nConnection: close\r\n\r\n",
        )
        if redeemed.status != 303 or b"\r\nset-cookie: " not in redeemed.head.lower():
            raise _Failed(f"redeeming: {redeemed.status}")

    async def _send(self, endpoint: Endpoint, request: str) -> Answer:
        return await endpoint.send(request.encode(), seconds=_TIMEOUT, before_sending=lambda: None)


def main() -> None:
    """Run the plan in the first argument."""

    async def run() -> Logins:
        return await _Load(msgspec.json.decode(sys.argv[1], type=Plan)).run()

    # While the service is slow, each login that is due has a connection.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(msgspec.json.encode(runner.run(run())).decode())


if __name__ == "__main__":
    main()
