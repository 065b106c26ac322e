"""A history of the proof, made by hand, and edits of it."""

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
    Way,
)

TTL = 300


def make_token(expires_at: int, user_id: int, account_id: int, nonce: int) -> str:
    """A token as far as its form goes. What signed it is not for the checker to know."""
    claims = struct.pack(">IIII", expires_at, user_id, account_id, nonce)
    return urlsafe_b64encode(claims + hashlib.md5(claims).digest()).decode().rstrip("=")


def row(token: str) -> str:
    claims = read_claims(token)
    assert claims
    return claims.raw.hex()


def found(records: list[AnyRecord]) -> set[str]:
    return {violation.rule for violation in check(records).violations}


START = 1_000_000.0
WALL = 1_900_000_000
END = 900
ADA, BEN = 7, 8


def issue(at: float, user_id: int, node: str = "a", *, created: bool = False) -> Issue:
    """A token for one of the two, in the account of their own number."""
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
    """An attempt that takes 0.2 s and is refused, unless `status` says that it was not."""
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


def decision(at: float, issued: Issue, node: str = "a", key_id: str = "old") -> Decision:
    """The node's word in the middle of an attempt that began at `at`."""
    now = WALL + int(at)
    return Decision(at=START + at + 0.1, node=node, pid=ord(node), token=issued.token, now=now, key_id=key_id)


# Ada signs in, and tries again.
FIRST = issue(0, ADA, created=True)
FIRST_DECISION = decision(1, FIRST)
FIRST_LOGIN = redeem(1, FIRST, "browser", status=303)
FIRST_AGAIN = redeem(2, FIRST, "browser", "b", code="token_consumed")
# Ben's frontend hears nothing, asks again, and hears that the token was used.
LOST = issue(3, BEN, "b", created=True)
LOST_DECISION = decision(4, LOST)
LOST_ATTEMPT = redeem(4, LOST, "consume", status=None)
LOST_AGAIN = redeem(5, LOST, "consume", "b", status=410, code="token_consumed")
# One is taken back, and cannot be taken back twice.
TAKEN_BACK = issue(6, BEN)
TAKING_BACK = redeem(7, TAKEN_BACK, "revoke", status=200)
NOT_TAKING_BACK = replace(redeem(8, TAKEN_BACK, "revoke", status=200), success=False)
# One is good after two failures that promise nothing was consumed, and one of which nobody knew.
PATIENT = issue(9, ADA)
OVERLOADED = redeem(10, PATIENT, "browser", "b", status=503, code="overloaded")
UNKNOWN = redeem(11, PATIENT, "consume", "b", status=503, code="outcome_unknown")
PATIENT_LOGIN = redeem(12, PATIENT, "browser", "b", status=303)
PATIENT_DECISION = decision(12, PATIENT, "b")
# One is never used, and one too late.
UNUSED = issue(13, ADA)
LATE = issue(14, ADA)
TOO_LATE = redeem(14 + TTL, LATE, "browser", code="token_expired")
# A key is revoked while "b" does not run, and "c" does not read this directory.
BEFORE_REVOCATION = issue(400, ADA)
BACK = issue(401, ADA)
REVOCATION = Revocation(at=START + 410, key_id="old", nodes=("a", "b"))
PAUSE = Pause(start=START + 411, end=START + 431, node="b", pid=ord("b"))
SEPARATION = Separation(start=START + 405, end=START + 440, node="c")
RESUMED_LOGIN = redeem(434, BEFORE_REVOCATION, "browser", "b", status=303)
RESUMED_DECISION = decision(434, BEFORE_REVOCATION, "b")
REJOINED_LOGIN = redeem(444, BACK, "consume", "c", status=200)
REJOINED_DECISION = decision(444, BACK, "c")
# Something breaks, and long after that all is well with the new key.
KILL = Fault(start=START + 500, end=START + 501, kind="kill -9", node="a", pid=ord("a"))
CALM = issue(600, BEN)
CALM_DECISION = decision(601, CALM, "b", "new")
CALM_LOGIN = redeem(601, CALM, "browser", "b", status=303)
CALM_UNUSED = issue(602, BEN)
# A token of which nobody knows, and one that nobody made.
UNHEARD = replace(issue(610, BEN), end=None, status=None, token="")
FORGED = replace(issue(620, ADA), token=make_token(WALL + 900, ADA, ADA, 1))
FORGERY = redeem(620, FORGED, "browser", code="token_invalid")
USED = (FIRST, LOST, TAKEN_BACK, PATIENT, BEFORE_REVOCATION, BACK, CALM)
RUN = Run(seed=1, database="sqlite", token_ttl=TTL)
HISTORY: list[AnyRecord] = [
    RUN,
    *(FIRST, FIRST_DECISION, FIRST_LOGIN, FIRST_AGAIN, decision(2, FIRST, "b")),
    *(LOST, LOST_DECISION, LOST_ATTEMPT, LOST_AGAIN, decision(5, LOST, "b")),
    *(TAKEN_BACK, TAKING_BACK, NOT_TAKING_BACK, decision(7, TAKEN_BACK), decision(8, TAKEN_BACK)),
    *(PATIENT, OVERLOADED, UNKNOWN, PATIENT_LOGIN, PATIENT_DECISION, decision(11, PATIENT, "b")),
    *(UNUSED, LATE, TOO_LATE),
    *(BEFORE_REVOCATION, BACK, REVOCATION, PAUSE, SEPARATION),
    *(RESUMED_LOGIN, RESUMED_DECISION, REJOINED_LOGIN, REJOINED_DECISION),
    *(KILL, CALM, CALM_DECISION, CALM_LOGIN, CALM_UNUSED, UNHEARD, FORGERY),
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
    """Each named field becomes what its function makes of it."""

    def change_it(records: list[AnyRecord]) -> list[AnyRecord]:
        return [
            replace(record, **{name: edit(getattr(record, name)) for name, edit in edits.items()})
            if isinstance(record, Database)
            else record
            for record in records
        ]

    return change_it


def row_added(issued: Issue) -> Edit:
    return change_database(consumed=lambda rows: (*rows, row(issued.token)))


def row_gone(issued: Issue) -> Edit:
    return change_database(consumed=lambda rows: tuple(there for there in rows if there != row(issued.token)))


def floor_at(place: int | Issue) -> Edit:
    """The floor is at this time, or just at this token."""
    floor = row(place.token) if isinstance(place, Issue) else struct.pack(">IIII", place, 0, 0, 0).hex()
    return change_database(floor=lambda _: floor)


def refused(issued: Issue, code: str, *, way: Way = "browser", node: str = "a") -> Redeem:
    """The token is refused 10 s after it was issued."""
    return redeem(issued.start - START + 10, issued, way, node, code=code)


def clock_fault(issued: Issue, node: str) -> Fault:
    """A clock is wrong for a moment, 10 s after the token was issued."""
    return Fault(start=issued.start + 9.9, end=issued.start + 10.5, kind="clock ahead", node=node)


def shift(fault: Fault, seconds: float) -> Fault:
    return replace(fault, start=fault.start + seconds, end=fault.end + seconds)


def edited(records: list[AnyRecord], edits: list[Edit]) -> list[AnyRecord]:
    for edit in edits:
        records = edit(records)
    return records
