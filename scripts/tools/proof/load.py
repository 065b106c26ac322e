"""The load: a process that acts for many users and intranets, issues and redeems tokens, and records every request.

    python -m scripts.tools.proof.load PLAN

PLAN is a `Plan` in JSON. Each second, the process prints its progress as a line of JSON. When the plan is done, it
prints an empty line and waits for a line on stdin. Then it redeems once more all tokens with an unknown outcome, and
exits.
"""

import asyncio
import os
import random
import sys
import time
from base64 import urlsafe_b64decode
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count
from typing import Any

import msgspec
import uvloop

from scripts.tools.proof.client import Answer, Endpoint, Lost, NotSent
from scripts.tools.proof.history import Issue, Redeem, SignOut, Way, write_line

TIMEOUT, LONG_TIMEOUT = 6.0, 30.0
"""Time-outs of clients in seconds. The long one lets a few requests wait until a paused node resumes."""

_TURN = 0.2


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The task of the process. `endpoints` are names and ports of nodes, `api_tokens` are by account."""

    seed: str
    endpoints: list[tuple[str, int]]
    api_tokens: dict[int, str]
    platform: str
    ttl: int
    retention: int
    tokens: int
    redemptions: int
    seconds: float
    clients: int
    history: str


class Progress(msgspec.Struct):
    """Counts of the work done so far."""

    issued: int = 0
    redemptions: int = 0
    successes: int = 0
    lost: int = 0
    unsure: int = 0


class Presentation(msgspec.Struct, frozen=True):
    """A token that is due, and the ways in which to redeem it, all at the same moment."""

    token: str
    account_id: int
    ways: tuple[Way, ...]


class _Error(msgspec.Struct):
    code: str


class _Reply(msgspec.Struct):
    """All fields that a response can have."""

    token: str = ""
    user_created: bool = False
    user: dict[str, Any] = {}
    account_id: int = 0
    revoked: bool = False
    error: _Error | None = None


_decode_reply = msgspec.json.Decoder(_Reply).decode


class Load:
    """The clients of one process."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._endpoints = [Endpoint(node, port) for node, port in plan.endpoints]
        self._by_node: defaultdict[str, list[Endpoint]] = defaultdict(list)
        for endpoint in self._endpoints:
            self._by_node[endpoint.node].append(endpoint)
        # Limits the requests per node, so that a node that does not respond cannot occupy all clients.
        self._most_per_node = max(2, plan.clients * 2 // 5)
        self._due: list[tuple[float, int, Presentation]] = []
        self._number = count()
        self._people = count()
        self._known = 0
        self._unsure: dict[str, int] = {}
        self._succeeded: set[str] = set()
        self._lines: list[bytes] = []
        self._file = os.open(plan.history, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._end = time.monotonic() + plan.seconds
        self._each = max(1, round(plan.redemptions / plan.tokens))
        # Tokens to issue per second, tokens that may be issued now, tokens per second that were recently presented for
        # the last time, and redemptions at the last adjustment.
        self._rate, self._allowed, self._capacity, self._done = 120.0, 0.0, 120.0, 0
        self.progress = Progress()

    async def run(self) -> None:
        """Carry out the plan."""
        clients = [asyncio.create_task(self._client()) for _ in range(self._plan.clients)]
        ended = asyncio.gather(*clients)
        for turn in count():
            await asyncio.wait([ended], timeout=_TURN)
            if ended.done():
                break
            self._adapt()
            if turn % 5 == 0:
                self._report()
        await ended
        self._report()
        print(flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await self._settle()
        self._report()

    def _report(self) -> None:
        os.write(self._file, b"".join(self._lines))
        self._lines.clear()
        self.progress.unsure = len(self._unsure)
        print(msgspec.json.encode(self.progress).decode(), flush=True)

    def _adapt(self) -> None:
        """Adjust the rate of issuing, so that tokens are redeemed when they are due."""
        late = time.monotonic() - self._due[0][0] if self._due else 0.0
        done, self._done = self._done, self.progress.redemptions
        self._capacity += ((self._done - done) / self._each / _TURN - self._capacity) * _TURN / 5
        if late < 0.1:
            self._rate *= 1.02
        elif late > 0.5:
            self._rate = max(20.0, min(self._rate, self._capacity))
        self._allowed = min(self._rate, self._allowed + self._rate * _TURN)

    # --- schedule ---

    @property
    def _over(self) -> bool:
        done = self.progress.issued >= self._plan.tokens and self.progress.redemptions >= self._plan.redemptions
        return done or time.monotonic() >= self._end

    async def _client(self) -> None:
        while not self._over:
            now = time.monotonic()
            if self._due and self._due[0][0] <= now:
                _, _, presentation = heappop(self._due)
                await self._present(presentation)
            elif self._allowed > 0:
                await self._issue()
            else:
                await asyncio.sleep(0.02)

    def _schedule(self, token: str, account_id: int) -> None:
        """Schedule the redemptions of a token."""
        draw, plan, now = self._random, self._plan, time.monotonic()
        # Most tokens are used soon, some at the last moment, each by several concurrent requests.
        first = draw.uniform(0, 2) if draw.random() < 0.8 else plan.ttl + draw.uniform(-1.5, 0.5)
        together = draw.randint(1, max(1, self._each * 2 // 3))
        self._put(now + first, Presentation(token, account_id, tuple(self._way() for _ in range(together))))
        for _ in range(self._each - together):
            match draw.random():
                case r if r < 0.5:
                    wait = draw.uniform(0, plan.ttl)
                case r if r < 0.7:
                    wait = plan.ttl + draw.uniform(-1.5, 1.5)
                case r if r < 0.85:
                    wait = draw.uniform(1, 2) * plan.ttl
                case _:  # after the ledger may have purged it
                    wait = plan.ttl + plan.retention + draw.uniform(0, 60)
            self._put(now + wait, Presentation(token, account_id, (self._way(),)))

    def _put(self, due: float, presentation: Presentation) -> None:
        heappush(self._due, (due, next(self._number), presentation))

    def _way(self) -> Way:
        return self._random.choices(("browser", "consume", "revoke"), (60, 28, 12))[0]

    def _choose_endpoint(self) -> Endpoint | None:
        free = [some for some in self._by_node.values() if sum(each.in_flight for each in some) < self._most_per_node]
        return self._random.choice(self._random.choice(free)) if free else None

    # --- issuing ---

    async def _issue(self) -> None:
        draw = self._random
        account_id = draw.choices(list(self._plan.api_tokens), (3, 1))[0]
        if draw.random() < 0.85 and self._known:
            email = f"person.{draw.randrange(self._known)}@intranet.example"
            await self._issue_one(email, account_id)
            return
        # A new user: several intranets, with several pages each, send the first request at the same moment.
        number = next(self._people)
        email = f"person.{number}@intranet.example"
        accounts = draw.choices(list(self._plan.api_tokens), (3, 1), k=draw.randint(1, 4))
        await asyncio.gather(*(self._issue_one(email, account) for account in accounts))
        self._known = max(self._known, number + 1)

    async def _issue_one(self, email: str, account_id: int) -> None:
        spelt = "".join(draw.upper() if self._random.random() < 0.3 else draw for draw in email)
        body = msgspec.json.encode({"email": spelt, "first_name": "Jane", "last_name": "Doe"})
        sent = await self._send(_post("/v1/sso_tokens", self._plan.api_tokens[account_id], body))
        if sent is None:
            return
        node, start, end, answer = sent
        reply = _reply(answer)
        self._write(
            Issue(
                start=start,
                end=end,
                node=node,
                account_id=account_id,
                email=email,
                status=answer.status if answer else None,
                code=_code(reply),
                token=reply.token,
                user_created=reply.user_created,
            )
        )
        self._allowed -= 1
        if reply.token:
            self.progress.issued += 1
            self._schedule(reply.token, account_id)

    # --- redeeming ---

    async def _present(self, presentation: Presentation) -> None:
        if len(presentation.ways) == 1:
            await self._present_one(presentation, presentation.ways[0])
        else:
            await asyncio.gather(*(self._present_one(presentation, way) for way in presentation.ways))

    async def _present_one(self, presentation: Presentation, way: Way, *, again: bool = False) -> None:
        draw, token, account_id = self._random, presentation.token, presentation.account_id
        api_token = self._plan.api_tokens[account_id]
        if not again:
            match draw.random():
                case r if r < 0.01:  # a forgery
                    token = self._forge(token)
                case r if r < 0.02 and way != "browser":  # the API token of another account
                    api_token = draw.choice(
                        [other for key, other in self._plan.api_tokens.items() if key != account_id]
                    )
                case r if r < 0.5 and way == "consume":
                    api_token = self._plan.platform
        if way == "browser":
            page = f"/client/{account_id}/t/{account_id}/posts" if draw.random() < 0.5 else "/"
            request = f"GET {page}?sso={token} HTTP/1.1\r\nHost: studio\r\nAccept: application/json\r\n\r\n".encode()
        else:
            request = _post(f"/v1/sso_tokens/{way}", api_token, msgspec.json.encode({"token": token}))
        sent = await self._send(request)
        if sent is None:
            if not again:
                self._put(time.monotonic() + draw.uniform(0.1, 1), Presentation(token, account_id, (way,)))
            return
        node, start, end, answer = sent
        reply = _reply(answer)
        user_id, signed_in_to = _signed_in(way, answer, reply)
        success = bool(user_id) or reply.revoked
        code = _code(reply)
        self._write(
            Redeem(
                start=start,
                end=end,
                node=node,
                way=way,
                token=token,
                status=answer.status if answer else None,
                code=code,
                success=success,
                user_id=user_id,
                account_id=signed_in_to,
            )
        )
        self.progress.redemptions += 1
        self.progress.successes += success
        if success:
            self._succeeded.add(token)
            self._unsure.pop(token, None)
            if way == "browser" and draw.random() < 0.05:
                await self._sign_out(start, answer, user_id, signed_in_to)
        elif (
            (answer is None or code == "outcome_unknown")
            and token == presentation.token
            and token not in self._succeeded
            and token not in self._unsure
        ):
            # The outcome is checked soon, while the token is valid, and once more at the end.
            self._put(time.monotonic() + draw.uniform(0, 3), Presentation(token, account_id, (self._way(),)))
            self._unsure[token] = account_id

    async def _sign_out(self, began: float, login: Answer | None, user_id: int, account_id: int) -> None:
        """Sign out everywhere, in a session that began with the answer `login` after `began`."""
        assert login is not None
        cookie = login.head.partition(b"studio_session=")[2].partition(b";")[0].decode()
        sent = await self._send(
            f"POST /sso/sign-out-everywhere HTTP/1.1\r\nHost: studio\r\nSec-Fetch-Site: same-origin\r\n"
            f"Cookie: studio_session={cookie}\r\nContent-Length: 0\r\n\r\n".encode()
        )
        if sent is not None:
            node, start, end, answer = sent
            self._write(
                SignOut(
                    began=began,
                    start=start,
                    end=end,
                    node=node,
                    user_id=user_id,
                    account_id=account_id,
                    status=answer.status if answer else None,
                )
            )

    def _forge(self, token: str) -> str:
        position = self._random.randrange(42)
        other = self._random.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
        forged = f"{token[:position]}{other}{token[position + 1 :]}"
        return forged if forged != token else f"{token[:-1]}B"  # has a spare bit set

    async def _settle(self) -> None:
        """Redeem once more every token with an unknown outcome, with limited concurrency."""
        unsure = iter(list(self._unsure.items()))

        async def settle(some: Iterator[tuple[str, int]]) -> None:
            for token, account_id in some:
                await self._present_one(Presentation(token, account_id, ()), "consume", again=True)

        await asyncio.gather(*(settle(unsure) for _ in range(16)))

    # --- requests ---

    async def _send(self, request: bytes) -> tuple[str, float, float | None, Answer | None] | None:
        """Send a request. Return the node, the times of request and response, and the response.

        The last two are None if no response arrived. The result is None if the request was not sent.
        """
        while (endpoint := self._choose_endpoint()) is None:  # noqa: ASYNC110 - many clients wait, one may proceed
            await asyncio.sleep(0.02)
        start = time.monotonic()

        def before_sending() -> None:
            nonlocal start
            start = time.monotonic()

        timeout = LONG_TIMEOUT if self._random.random() < 0.03 else TIMEOUT
        try:
            answer = await endpoint.send(request, seconds=timeout, before_sending=before_sending)
        except Lost:
            self.progress.lost += 1
            return endpoint.node, start, None, None
        except NotSent:
            await asyncio.sleep(0.05)
            return None
        return endpoint.node, start, time.monotonic(), answer

    def _write(self, record: Issue | Redeem | SignOut) -> None:
        self._lines.append(write_line(record))


def _post(path: str, api_token: str, body: bytes) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: studio\r\nAuthorization: Bearer {api_token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


_NOTHING = _Reply()


def _reply(answer: Answer | None) -> _Reply:
    if answer is None or not answer.body:
        return _NOTHING
    with suppress(msgspec.DecodeError):
        return _decode_reply(answer.body)
    return _NOTHING


def _code(reply: _Reply) -> str:
    return reply.error.code if reply.error else ""


def _signed_in(way: Way, answer: Answer | None, reply: _Reply) -> tuple[int, int]:
    """Return the user and the account that a response signs in, or zeros."""
    if answer is None:
        return 0, 0
    if way == "consume" and answer.status == 200:
        return reply.user["id"], reply.account_id
    if way == "browser" and answer.status == 303:
        cookie = answer.head.partition(b"studio_session=")[2].partition(b";")[0]
        if cookie:
            payload = cookie.partition(b".")[0]
            user_id, account_id = msgspec.json.decode(urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)))
            return user_id, account_id
    return 0, 0


if __name__ == "__main__":
    uvloop.run(Load(msgspec.json.decode(sys.argv[1], type=Plan)).run())
