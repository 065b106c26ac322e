"""The six kinds of requests that are sent to the systems, as bytes on the wire."""

import json
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from scripts.tools.bench.stores import ACCOUNT, TEAM, email
from scripts.tools.bench.systems import Ceiling, System

PAGE = f"/client/{ACCOUNT}/t/{TEAM}/posts"

_ENOUGH = 50_000
"""Number of different requests where a request may be sent again."""

_new_users = count(1)


@dataclass(frozen=True)
class Case:
    """A kind of request. `make` creates the given number of requests. `status` is the only correct answer to each."""

    name: str
    title: str
    status: int
    make: Callable[[System, int], list[bytes]]
    once: bool = False
    """Whether each request may be sent only once, because it changes something."""

    def requests(self, system: System, most: int) -> list[bytes]:
        """Return requests for a run that sends `most` at most. They are repeated where that makes no difference."""
        return self.make(system, most if self.once and system.remembers else min(most, _ENOUGH))

    def expected(self, system: System) -> int:
        """Return the status that `system` must answer with."""
        if isinstance(system, Ceiling):
            return self.status if self.status in {201, 204} else 303
        return self.status


def _post(system: System, address: str) -> bytes:
    body = json.dumps({"email": address, "first_name": "Jane", "last_name": "Doe"})
    return (
        f"POST /v1/sso_tokens HTTP/1.1\r\nHost: studio.example\r\nAuthorization: Bearer {system.secret}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def _get(target: str, headers: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: studio.example\r\n{headers}\r\n".encode()


def _issue_known(system: System, number: int) -> list[bytes]:
    return [_post(system, email(random.randint(1, system.people))) for _ in range(number)]


def _issue_new(system: System, number: int) -> list[bytes]:
    return [_post(system, f"new.{next(_new_users):010d}@intranet.example.com") for _ in range(number)]


def _logins(tokens: list[str]) -> list[bytes]:
    headers = "Accept: text/html\r\nSec-Fetch-Dest: document\r\n"
    return [_get(f"{PAGE}?sso={token}", headers) for token in tokens]


def _login(system: System, number: int) -> list[bytes]:
    return _logins(system.tokens(number))


def _forged(system: System, number: int) -> list[bytes]:
    # The last of 43 characters has two spare bits, which must be zero in a well-formed token.
    return _logins([secrets.token_urlsafe(32)[:-1] + "A" for _ in range(number)])


def _session(system: System, number: int) -> list[bytes]:
    cookies = [system.cookie(random.randint(1, system.people)) for _ in range(min(number, 1000))]
    return [_get("/session", f"Cookie: studio_session={cookie}\r\n") for cookie in cookies]


def _auth(system: System, number: int) -> list[bytes]:
    cookies = [system.cookie(random.randint(1, system.people)) for _ in range(min(number, 1000))]
    return [_get("/auth", f"Cookie: studio_session={cookie}\r\nX-Original-URI: {PAGE}\r\n") for cookie in cookies]


ISSUE = Case("issue", "issue, known user", 201, _issue_known)
ISSUE_NEW = Case("issue-new", "issue, new user", 201, _issue_new, once=True)
LOGIN = Case("login", "login", 303, _login, once=True)
FORGED = Case("forged", "forged token", 401, _forged)
SESSION = Case("session", "GET /session", 200, _session)
AUTH = Case("auth", "GET /auth", 204, _auth)
CASES = (ISSUE, ISSUE_NEW, LOGIN, FORGED, SESSION, AUTH)
