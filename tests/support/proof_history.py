"""A hand-written history for the proof's checker, and functions that edit it."""

import hashlib
import struct
from base64 import urlsafe_b64encode
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from scripts.tools.proof.checker import check, read_claims
from scripts.tools.proof.history import (
    AnyRecord,
    Database,
    Decision,
    Fault,
    Issue,
    Pause,
    Person,
    Redeem,
    Revocation,
    Run,
    Separation,
    SignOut,
    Way,
)

TTL = 300


def make_token(expires_at: int, user_id: int, account_id: int, nonce: int) -> str:
    """Return a string with the form of a login token. The checker does not verify its tag."""
    claims = struct.pack(">IIII", expires_at, user_id, account_id, nonce)
    return urlsafe_b64encode(claims + hashlib.md5(claims).digest()).decode().rstrip("=")


def row(token: str) -> str:
    claims = read_claims(token)
    assert claims
    return claims.raw.hex()


def found(records: list[AnyRecord]) -> set[str]:
    return {violation.rule for violation in check(records).violations}


START = 1_000_000.0
"""Monotonic time (seconds) at which the history starts. Times passed to the functions below are relative to it."""
WALL = 1_900_000_000
END = 900
ADA, BEN = 7, 8
"""Ids of two users. Each belongs to the account with the same id."""


def issue(at: float, user_id: int, node: str = "a", *, created: bool = False) -> Issue:
    """Return a record that issues a token for a user, in the user's account."""
    token = make_token(WALL + int(at) + TTL, user_id, user_id, nonce=int(at * 10))
    email = {ADA: "ada@intranet.test", BEN: "ben@intranet.test"}[user_id]
    return Issue(
        start=START + at,
        end=START + at + 0.1,
        node=node,
        account_id=user_id,
        email=email,
        status=201,
        token=token,
        user_created=created,
    )


def redeem(at: float, issued: Issue, way: Way, node: str = "a", status: int | None = 401, code: str = "") -> Redeem:
    """Return an attempt to redeem a token. It takes 0.2 s. A `status` of None means no response."""
    success = status in (200, 303)
    signs_in = success and way != "revoke"
    return Redeem(
        start=START + at,
        end=None if status is None else START + at + 0.2,
        node=node,
        way=way,
        token=issued.token,
        status=status,
        code=code,
        success=success,
        user_id=issued.account_id if signs_in else 0,
        account_id=issued.account_id if signs_in else 0,
    )


def sign_out(at: float, began: float, user_id: int, account_id: int, status: int | None = 204) -> SignOut:
    """Return a sign-out everywhere at `at`, by a session that began after `began`. It takes 0.1 s."""
    return SignOut(
        began=START + began,
        start=START + at,
        end=None if status is None else START + at + 0.1,
        node="a",
        user_id=user_id,
        account_id=account_id,
        status=status,
    )


def decision(at: float, issued: Issue, node: str = "a", key_id: str = "old") -> Decision:
    """Return a node's decision that a token is valid, made 0.1 s after an attempt began at `at`."""
    now = WALL + int(at)
    return Decision(at=START + at + 0.1, node=node, pid=ord(node), token=issued.token, now=now, key_id=key_id)


# Ada signs in, and opens the same link again.
FIRST = issue(0, ADA, created=True)
FIRST_DECISION = decision(1, FIRST)
FIRST_LOGIN = redeem(1, FIRST, "browser", status=303)
FIRST_AGAIN = redeem(2, FIRST, "browser", "b", code="token_consumed")
# Ben's frontend loses a response, retries, and receives `token_consumed`.
LOST = issue(3, BEN, "b", created=True)
LOST_DECISION = decision(4, LOST)
LOST_ATTEMPT = redeem(4, LOST, "consume", status=None)
LOST_AGAIN = redeem(5, LOST, "consume", "b", status=410, code="token_consumed")
# A token is revoked. A second revocation has no effect.
REVOKED = issue(6, BEN)
TOKEN_REVOCATION = redeem(7, REVOKED, "revoke", status=200)
SECOND_TOKEN_REVOCATION = replace(redeem(8, REVOKED, "revoke", status=200), success=False)
# A token signs in after an overload, which consumes nothing, and after an unknown outcome.
RETRIED = issue(9, ADA)
OVERLOADED = redeem(10, RETRIED, "browser", "b", status=503, code="overloaded")
UNKNOWN = redeem(11, RETRIED, "consume", "b", status=503, code="outcome_unknown")
RETRIED_LOGIN = redeem(12, RETRIED, "browser", "b", status=303)
RETRIED_DECISION = decision(12, RETRIED, "b")
# One token is never used, and another one only after it expired.
UNUSED = issue(13, ADA)
LATE = issue(14, ADA)
TOO_LATE = redeem(14 + TTL, LATE, "browser", code="token_expired")
# A key is revoked while node "b" is paused, and node "c" is separated from the key directory.
BEFORE_REVOCATION = issue(400, ADA)
REJOINED = issue(401, ADA)
REVOCATION = Revocation(at=START + 410, key_id="old", nodes=("a", "b"))
PAUSE = Pause(start=START + 411, end=START + 431, node="b", pid=ord("b"))
SEPARATION = Separation(start=START + 405, end=START + 440, node="c")
RESUMED_LOGIN = redeem(434, BEFORE_REVOCATION, "browser", "b", status=303)
RESUMED_DECISION = decision(434, BEFORE_REVOCATION, "b")
REJOINED_LOGIN = redeem(444, REJOINED, "consume", "c", status=200)
REJOINED_DECISION = decision(444, REJOINED, "c")
# A node is killed. Long after that, a login with the new key succeeds.
KILL = Fault(start=START + 500, end=START + 501, kind="kill -9", node="a", pid=ord("a"))
NEW_KEY = issue(600, BEN)
NEW_KEY_DECISION = decision(601, NEW_KEY, "b", "new")
NEW_KEY_LOGIN = redeem(601, NEW_KEY, "browser", "b", status=303)
NEW_KEY_UNUSED = issue(602, BEN)
# The response with one token is lost, and another token is forged.
UNANSWERED = replace(issue(610, BEN), end=None, status=None, token="")
FORGED = replace(issue(620, ADA), token=make_token(WALL + 900, ADA, ADA, 1))
FORGERY = redeem(620, FORGED, "browser", code="token_invalid")
USED = (FIRST, LOST, REVOKED, RETRIED, BEFORE_REVOCATION, REJOINED, NEW_KEY)
RUN = Run(seed=1, database="sqlite", token_ttl=TTL)
# Nodes "a" and "b" share a key directory. Node "c" is separated from it at times.
HISTORY: list[AnyRecord] = [
    RUN,
    *(FIRST, FIRST_DECISION, FIRST_LOGIN, FIRST_AGAIN, decision(2, FIRST, "b")),
    *(LOST, LOST_DECISION, LOST_ATTEMPT, LOST_AGAIN, decision(5, LOST, "b")),
    *(REVOKED, TOKEN_REVOCATION, SECOND_TOKEN_REVOCATION, decision(7, REVOKED), decision(8, REVOKED)),
    *(RETRIED, OVERLOADED, UNKNOWN, RETRIED_LOGIN, RETRIED_DECISION, decision(11, RETRIED, "b")),
    *(UNUSED, LATE, TOO_LATE),
    *(BEFORE_REVOCATION, REJOINED, REVOCATION, PAUSE, SEPARATION),
    *(RESUMED_LOGIN, RESUMED_DECISION, REJOINED_LOGIN, REJOINED_DECISION),
    *(KILL, NEW_KEY, NEW_KEY_DECISION, NEW_KEY_LOGIN, NEW_KEY_UNUSED, UNANSWERED, FORGERY),
    Database(
        consumed=tuple(row(issued.token) for issued in USED),
        floor=struct.pack(">IIII", WALL + END - 3600, 0, 0, 0).hex(),
        people=(Person(1, "admin@studio.test"), Person(ADA, "ada@intranet.test"), Person(BEN, "ben@intranet.test")),
        now=WALL + END,
    ),
]
Edit = Callable[[list[AnyRecord]], list[AnyRecord]]


def add(*more: AnyRecord) -> Edit:
    return lambda records: [*records, *more]


def drop(*unwanted: AnyRecord) -> Edit:
    return lambda records: [record for record in records if record not in unwanted]


def change(old: AnyRecord, **changes: Any) -> Edit:
    return lambda records: [replace(record, **changes) if record == old else record for record in records]


def change_database(**edits: Callable[[Any], Any]) -> Edit:
    """Return an edit that applies a function to each named field of the database's record."""

    def edit_database(records: list[AnyRecord]) -> list[AnyRecord]:
        return [
            replace(record, **{name: edit(getattr(record, name)) for name, edit in edits.items()})
            if isinstance(record, Database)
            else record
            for record in records
        ]

    return edit_database


def row_added(issued: Issue) -> Edit:
    return change_database(consumed=lambda rows: (*rows, row(issued.token)))


def row_removed(issued: Issue) -> Edit:
    return change_database(consumed=lambda rows: tuple(kept for kept in rows if kept != row(issued.token)))


def floor_at(position: int | Issue) -> Edit:
    """Return an edit that sets the floor to a time (Unix seconds), or to the claims of a token."""
    floor = row(position.token) if isinstance(position, Issue) else struct.pack(">IIII", position, 0, 0, 0).hex()
    return change_database(floor=lambda _: floor)


def refused(issued: Issue, code: str, *, way: Way = "browser", node: str = "a") -> Redeem:
    """Return an attempt that is refused, 10 s after the token was issued."""
    return redeem(issued.start - START + 10, issued, way, node, code=code)


def clock_fault(issued: Issue, node: str) -> Fault:
    """Return a fault of 0.6 s of a node's clock, 10 s after the token was issued."""
    return Fault(start=issued.start + 9.9, end=issued.start + 10.5, kind="clock ahead", node=node)


def shift(fault: Fault, seconds: float) -> Fault:
    return replace(fault, start=fault.start + seconds, end=fault.end + seconds)


def edited(records: list[AnyRecord], edits: list[Edit]) -> list[AnyRecord]:
    for edit in edits:
        records = edit(records)
    return records
