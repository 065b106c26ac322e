"""The judge of histories: it finds every violation that is planted, under its name, and none in what is right."""

import hashlib
import struct
import subprocess
import sys
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from scripts.tools.proof.checker import RULES, check, read_claims
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
    read_history,
    write_line,
)
from tests.support.repository import ROOT

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


def test_a_token_is_read_as_the_design_lays_it_out() -> None:
    claims = read_claims("cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA")
    assert claims == (bytes.fromhex("713fb300000000010000007bdeadbeef"), 1_900_000_000, 1, 123)


@pytest.mark.parametrize("token", ["", "A" * 42, "A" * 44, "A" * 42 + "B", "A" * 42 + "=", "+" + "A" * 42])
def test_nothing_is_read_from_what_has_not_the_form_of_a_token(token: str) -> None:
    assert read_claims(token) is None


# --- a history by hand -----------------------------------------------------------------------------------------------
# Two nodes with one key directory, and "c", which at times has its own. The times are seconds after START.

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


# --- what is done to it ----------------------------------------------------------------------------------------------

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


PLANTS: list[tuple[str, str, list[Edit]]] = [
    ("well_formed", "there is no run", [lambda records: records[1:]]),
    ("well_formed", "there are two runs", [add(RUN)]),
    ("well_formed", "something comes before the run", [lambda records: [KILL, *records]]),
    ("well_formed", "the database was never read", [lambda records: records[:-1]]),
    ("well_formed", "a fault ends before it starts", [change(KILL, end=KILL.start - 1)]),
    ("well_formed", "an answer comes before its request", [change(UNUSED, end=UNUSED.start - 1)]),
    ("well_formed", "a success has no answer", [change(CALM_LOGIN, status=None)]),
    ("well_formed", "a success never ends", [change(CALM_LOGIN, end=None)]),
    ("known_answers", "a failure has no name", [add(redeem(20, UNUSED, "browser", status=500))]),
    ("distinct", "two requests get one token", [add(replace(UNUSED, node="b"))]),
    ("issued", "a forgery signs in", [change(FORGERY, status=303, success=True)]),
    ("issued", "a forgery is found good", [add(decision(620, FORGED))]),
    (
        "issued",
        "another spelling of a token signs in",
        [
            change(FIRST_LOGIN, token=FIRST.token[:-1] + chr(ord(FIRST.token[-1]) + 1)),
            drop(FIRST_AGAIN),
            row_gone(FIRST),
        ],
    ),
    (
        "single_use",
        "a token signs in twice",
        [change(FIRST_AGAIN, status=303, success=True, user_id=ADA, account_id=ADA)],
    ),
    (
        "single_use",
        "a token that signed in is taken back",
        [add(redeem(1.5, FIRST, "revoke", status=200), decision(1.5, FIRST))],
    ),
    (
        "single_use",
        "a token is handed over twice at once",
        [
            change(LOST_ATTEMPT, status=200, end=START + 6, success=True, user_id=BEN, account_id=BEN),
            change(LOST_AGAIN, status=200, code="", success=True, user_id=BEN, account_id=BEN),
        ],
    ),
    ("right_person", "someone else is signed in", [change(FIRST_LOGIN, user_id=BEN)]),
    ("right_person", "another account is entered", [change(REJOINED_LOGIN, account_id=BEN)]),
    ("right_person", "a token names another account than issued it", [change(UNUSED, account_id=BEN)]),
    ("right_person", "a token is not a token", [change(UNUSED, token="token")]),
    ("kept", "the row of a login is gone", [row_gone(CALM)]),
    ("kept", "the row of a token taken back is gone", [row_gone(TAKEN_BACK)]),
    ("kept", "a token that was said to be used has no row", [row_gone(LOST)]),
    (
        "kept",
        "the row is gone whose token is the floor",
        [row_gone(FIRST), floor_at(FIRST), add(clock_fault(UNUSED, "b"))],
    ),
    (
        "used_by_somebody",
        "an unused token is refused as used",
        [add(refused(UNUSED, "token_consumed")), row_added(UNUSED)],
    ),
    (
        "used_by_somebody",
        "an unused token cannot be taken back",
        [add(replace(redeem(20, UNUSED, "revoke", status=200), success=False)), row_added(UNUSED)],
    ),
    (
        "used_by_somebody",
        "it cannot be taken back before it is good",
        [add(replace(redeem(11.7, PATIENT, "revoke", status=200), success=False))],
    ),
    (
        "used_by_somebody",
        "an overloaded node consumes",
        [
            add(redeem(20, UNUSED, "consume", status=503, code="overloaded"), refused(UNUSED, "token_consumed")),
            row_added(UNUSED),
        ],
    ),
    (
        "used_by_somebody",
        "a token is used before it is good",
        [add(redeem(11.7, PATIENT, "browser", "b", code="token_consumed"))],
    ),
    (
        "used_by_somebody",
        "it is used before the lost attempt began",
        [add(redeem(3.5, LOST, "browser", code="token_consumed"))],
    ),
    ("used_by_somebody", "nobody else has tried it", [drop(LOST_ATTEMPT)]),
    ("used_by_somebody", "a row belongs to a token that nobody tried", [row_added(UNUSED)]),
    ("used_by_somebody", "a row belongs to a token that nobody made", [row_added(FORGED)]),
    ("decided", "a login is answered without a look at the token", [drop(FIRST_DECISION)]),
    ("decided", "another node has looked", [change(FIRST_DECISION, node="b")]),
    ("decided", "the look came before the request", [change(FIRST_DECISION, at=FIRST_LOGIN.start - 0.01)]),
    ("decided", "a row is there without a look", [drop(LOST_DECISION)]),
    (
        "within_its_life",
        "a clock was moved well before and after",
        [
            change(CALM_DECISION, now=WALL + 600 + TTL + 1),
            add(Fault(start=START + 590, end=START + 610, kind="clock", node="b")),
        ],
    ),
    (
        "within_its_life",
        "something else was broken then",
        [
            change(CALM_DECISION, now=WALL + 600 - 61),
            add(Fault(start=START + 601, end=START + 601, kind="kill -9", node="b")),
        ],
    ),
    (
        "within_its_life",
        "another clock was moved",
        [
            change(CALM_DECISION, now=WALL + 600 - 61),
            add(Fault(start=START + 601, end=START + 601, kind="clock", node="a")),
        ],
    ),
    ("within_its_life", "a token is good a second after it expired", [change(CALM_DECISION, now=WALL + 600 + TTL + 1)]),
    ("within_its_life", "a token of the far future is good", [change(CALM_DECISION, now=WALL + 600 - 61)]),
    ("revoked", "a revoked key is good after 5 s", [change(CALM_DECISION, key_id="old")]),
    (
        "revoked",
        "a stopped node learns of it too late",
        [change(RESUMED_DECISION, at=START + 435.1), change(RESUMED_LOGIN, end=START + 436)],
    ),
    ("revoked", "only another process was stopped", [change(PAUSE, pid=1)]),
    (
        "revoked",
        "two pauses of one time count once",
        [
            add(replace(PAUSE, start=START + 412, end=START + 430)),
            change(RESUMED_DECISION, at=START + 435.1),
            change(RESUMED_LOGIN, end=START + 436),
        ],
    ),
    (
        "revoked",
        "a node is separated after it should have learnt of it",
        [change(CALM_DECISION, key_id="old"), add(Separation(start=START + 700, end=START + 800, node="b"))],
    ),
    (
        "revoked",
        "a node was separated and back before the revocation",
        [
            change(REJOINED_DECISION, at=START + 445.1),
            change(REJOINED_LOGIN, end=START + 446),
            add(Separation(start=START + 300, end=START + 310, node="a")),
        ],
    ),
    (
        "revoked",
        "a separated node has revoked it itself",
        [
            add(
                Separation(start=START + 590, end=START + 700, node="b"),
                Revocation(at=START + 595, key_id="new", nodes=("b",)),
            )
        ],
    ),
    (
        "revoked",
        "a node that came back learns of it too late",
        [change(REJOINED_DECISION, at=START + 445.1), change(REJOINED_LOGIN, end=START + 446)],
    ),
    (
        "not_expired_early",
        "a token is expired when it is young",
        [add(refused(UNUSED, "token_expired", way="consume"))],
    ),
    (
        "not_expired_early",
        "another node's clock was wrong",
        [add(refused(UNUSED, "token_expired"), clock_fault(UNUSED, "b"))],
    ),
    (
        "not_expired_early",
        "a clock was wrong before and after",
        [add(refused(UNUSED, "token_expired"), *(shift(clock_fault(UNUSED, "a"), by) for by in (-5, 5)))],
    ),
    (
        "not_expired_early",
        "something else was broken",
        [add(refused(UNUSED, "token_expired"), replace(clock_fault(UNUSED, "a"), kind="kill -9"))],
    ),
    (
        "not_expired_early",
        "a token is expired in its last seconds",
        [add(redeem(13 + TTL - 2.3, UNUSED, "browser", code="token_expired"))],
    ),
    (
        "not_expired_early",
        "the token is the floor",
        [add(refused(UNUSED, "token_expired"), clock_fault(UNUSED, "b")), floor_at(UNUSED)],
    ),
    ("not_taken_for_forged", "a genuine token is refused as forged", [add(refused(CALM_UNUSED, "token_invalid"))]),
    (
        "not_taken_for_forged",
        "another node was separated",
        [add(refused(CALM_UNUSED, "token_invalid"), Separation(start=START + 600, end=START + 700, node="c"))],
    ),
    (
        "not_taken_for_forged",
        "it was separated before and after",
        [
            add(
                refused(CALM_UNUSED, "token_invalid"),
                *(Separation(start=START + at, end=START + at + 1, node="a") for at in (590, 623)),
            )
        ],
    ),
    (
        "not_taken_for_forged",
        "another node was stopped",
        [add(refused(CALM_UNUSED, "token_invalid"), Pause(start=START + 600, end=START + 602, node="b", pid=1))],
    ),
    (
        "not_taken_for_forged",
        "it was stopped before and after",
        [
            add(
                refused(CALM_UNUSED, "token_invalid"),
                *(Pause(start=START + at, end=START + at + 1, node="a", pid=1) for at in (590, 603)),
            )
        ],
    ),
    ("created_once", "a person is created twice", [change(LATE, user_created=True)]),
    (
        "created_once",
        "a person is created who was known",
        [change(FIRST, user_created=False), change(LATE, user_created=True)],
    ),
    ("one_person", "one address becomes two people", [change(UNUSED, token=make_token(WALL + 313, BEN + 1, ADA, 0))]),
    ("one_person", "two addresses become one person", [change(UNUSED, email="eve@intranet.test")]),
    ("one_person", "a person is not in the database", [change_database(people=lambda people: people[:-1])]),
    (
        "one_person",
        "a person has another number in the database",
        [change_database(people=lambda people: (*people[:-1], Person(99, "ben@intranet.test")))],
    ),
    (
        "one_person",
        "an address is twice in the database",
        [change_database(people=lambda people: (Person(99, "ada@intranet.test"), *people))],
    ),
    (
        "one_person",
        "a number is twice in the database",
        [change_database(people=lambda people: (*people, Person(1, "eve@intranet.test")))],
    ),
    ("low_floor", "the floor is too high", [floor_at(WALL + END - 3598)]),
]

EXCUSES: list[tuple[str, list[Edit]]] = [
    (
        "a row is purged when its token is below the floor",
        [row_gone(FIRST), floor_at(WALL + 301), add(clock_fault(UNUSED, "b"))],
    ),
    (
        "a clock is moved during the request",
        [change(CALM_DECISION, now=WALL), add(Fault(start=START + 500, end=START + 603, kind="clock", node="b"))],
    ),
    (
        "a clock is moved just before the request",
        [change(CALM_DECISION, now=WALL), add(Fault(start=START + 600.5, end=START + 700, kind="clock", node=""))],
    ),
    (
        "a clock is moved while the request stands still",
        [
            change(CALM_DECISION, now=WALL),
            add(
                Fault(start=START + 500, end=START + 630, kind="clock", node="b"),
                replace(PAUSE, start=START + 602, end=START + 640),
            ),
        ],
    ),
    (
        "what a separated node revokes is not revoked for others",
        [
            add(
                Separation(start=START + 590, end=START + 605, node="a"),
                Separation(start=START + 590, end=START + 700, node="b"),
                Revocation(at=START + 595, key_id="new", nodes=("b",)),
                decision(620, CALM_UNUSED, key_id="new"),
                decision(620, CALM_UNUSED, "c", "new"),
            ),
            drop(CALM_DECISION, CALM_LOGIN),
            row_gone(CALM),
        ],
    ),
    (
        "a node is separated twice",
        [
            change(REJOINED_DECISION, at=START + 446),
            change(REJOINED_LOGIN, end=START + 447),
            add(Separation(start=START + 443, end=START + 460, node="c")),
        ],
    ),
    (
        "a node is separated before it should have learnt of it",
        [change(CALM_DECISION, key_id="old"), add(Separation(start=START + 410, end=START + 700, node="b"))],
    ),
    (
        "only some answers say that a token was used",
        [
            add(
                replace(redeem(11.7, PATIENT, "browser", status=200), success=False),
                redeem(11.7, PATIENT, "revoke", status=503, code="unavailable"),
            )
        ],
    ),
    ("what happens at once takes no time", [change(KILL, end=KILL.start), change(UNUSED, end=UNUSED.start)]),
    ("the database's clock ticks once more", [floor_at(WALL + END - 3599)]),
    ("of two lost attempts one need have begun and been decided", [add(redeem(6, LOST, "consume", "c", status=None))]),
    ("a lost attempt beside a success may never have arrived", [add(redeem(0.5, FIRST, "browser", "c", status=None))]),
    (
        "a key is revoked for exactly 5 s",
        [change(RESUMED_DECISION, at=START + 435), change(RESUMED_LOGIN, end=START + 436)],
    ),
    (
        "a node that was separated before is not concerned for that",
        [add(decision(700, CALM_UNUSED, "d"), Separation(start=START + 300, end=START + 310, node="d"))],
    ),
    ("seconds are rounded", [add(redeem(13 + TTL - 2.1, UNUSED, "browser", code="token_expired"))]),
    (
        "a token was issued by a clock that is behind",
        [add(refused(UNUSED, "token_expired", node="b"), shift(clock_fault(UNUSED, "a"), -10))],
    ),
    (
        "of two revocations one is near",
        [
            add(
                refused(BEFORE_REVOCATION, "token_invalid", node="b"),
                Revocation(at=START + 800, key_id="other", nodes=("a",)),
            )
        ],
    ),
    ("a run may forget sooner", [floor_at(WALL + END - 3000), change(RUN, retention=3000)]),
    ("a moved clock may have raised the floor", [floor_at(WALL + END), add(clock_fault(UNUSED, "b"))]),
    (
        "an unknown outcome may be why a token is used",
        [drop(PATIENT_LOGIN), add(redeem(12, PATIENT, "browser", "b", code="token_consumed"))],
    ),
    (
        "a lost attempt need only have begun",
        [change(LOST_ATTEMPT, start=START + 5.1), change(LOST_DECISION, at=START + 6)],
    ),
    (
        "a token whose answer was lost may still be good",
        [change(LOST_AGAIN, status=200, code="", success=True, user_id=BEN, account_id=BEN)],
    ),
    ("a lost attempt may have done nothing", [add(redeem(20, UNUSED, "consume", status=None))]),
    ("a clock runs fast and the token still lives on it", [change(CALM_DECISION, now=WALL + 600 + TTL)]),
    ("a clock runs slow by what is allowed", [change(CALM_DECISION, now=WALL + 600 - 60)]),
    ("a clock that is ahead expires a token early", [add(refused(UNUSED, "token_expired"), clock_fault(UNUSED, "a"))]),
    (
        "a clock that is ahead refuses as forged",
        [add(refused(CALM_UNUSED, "token_invalid"), clock_fault(CALM_UNUSED, "a"))],
    ),
    ("a fault without a node is everybody's", [add(refused(UNUSED, "token_expired"), clock_fault(UNUSED, ""))]),
    (
        "a broken key directory refuses as forged",
        [add(refused(CALM_UNUSED, "token_invalid"), replace(clock_fault(CALM_UNUSED, "a"), kind="keys unreadable"))],
    ),
    (
        "what is below the floor is expired",
        [add(refused(UNUSED, "token_expired"), clock_fault(UNUSED, "b")), floor_at(WALL + END)],
    ),
    ("a token of a revoked key is refused as forged", [add(refused(BEFORE_REVOCATION, "token_invalid", node="b"))]),
    (
        "a separated node refuses as forged",
        [
            add(
                refused(CALM_UNUSED, "token_invalid", node="c"),
                Separation(start=START + 600, end=START + 700, node="c"),
            )
        ],
    ),
    (
        "a node that was stopped signs with an old key",
        [add(refused(CALM_UNUSED, "token_invalid"), Pause(start=START + 500, end=START + 601.9, node="a", pid=1))],
    ),
    (
        "another account's token is answered like a forged one",
        [add(refused(CALM_UNUSED, "token_invalid", way="consume"))],
    ),
    ("a node of other keys knows nothing of a revocation", [add(decision(700, CALM_UNUSED, "d"))]),
    (
        "the request that made the user may be answered last",
        [change(FIRST, user_created=False), change(UNUSED, start=FIRST.end, user_created=True)],
    ),
]


def edited(records: list[AnyRecord], edits: list[Edit]) -> list[AnyRecord]:
    for edit in edits:
        records = edit(records)
    return records


def test_a_history_that_is_right_has_no_violations() -> None:
    assert check(HISTORY).violations == []


@pytest.mark.parametrize(("rule", "edits"), [pytest.param(rule, edits, id=name) for rule, name, edits in PLANTS])
def test_a_planted_violation_is_found_under_the_name_of_its_rule_and_no_other(rule: str, edits: list[Edit]) -> None:
    assert found(edited(HISTORY, edits)) == {rule}


@pytest.mark.parametrize("edits", [pytest.param(edits, id=name) for name, edits in EXCUSES])
def test_what_has_an_innocent_explanation_is_no_violation(edits: list[Edit]) -> None:
    assert edited(HISTORY, edits) != HISTORY
    assert found(edited(HISTORY, edits)) == set()


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, _, _ in PLANTS} == {rule.__name__ for rule in RULES}


def test_the_records_that_show_a_violation_are_named() -> None:
    (violation,) = check(edited(HISTORY, [drop(FIRST_DECISION)])).violations
    assert violation.records[0] == FIRST_LOGIN
    (violation,) = check(edited(HISTORY, [change(CALM_DECISION, key_id="old")])).violations
    assert violation.records == (REVOCATION, replace(CALM_DECISION, key_id="old"))
    (violation,) = check(edited(HISTORY, [row_added(FORGED), row_added(UNUSED)])).violations[:1]
    assert violation.words.startswith("nobody can have consumed")


def test_the_report_says_what_the_history_is_made_of() -> None:
    counts = check(HISTORY).counts
    assert (counts.requests, counts.issued, counts.redemptions, counts.lost) == (25, 10, 14, 2)
    assert (counts.pauses, counts.revocations) == (1, 1)
    assert counts.successes == {"browser": 4, "consume": 1, "revoke": 1}
    assert counts.faults == {"kill -9": 1}
    assert counts.refusals == {
        "token_consumed": 2,
        "token_expired": 1,
        "token_invalid": 1,
        "overloaded": 1,
        "outcome_unknown": 1,
        "200 without a code": 1,
    }


def test_of_many_violations_of_a_rule_ten_are_shown() -> None:
    failures = [redeem(at, UNUSED, "browser", status=500) for at in range(20, 50)]
    report = str(check([*HISTORY, *failures]))
    assert "violations    30 known_answers" in report
    assert report.count("answered 500") == 10


# --- from a file -----------------------------------------------------------------------------------------------------


def judge(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.tools.proof.checker", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_file_without_violations_exits_0(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_bytes(b"".join(map(write_line, HISTORY)) + write_line(KILL).rstrip())
    assert list(read_history(path)) == HISTORY
    judged = judge(path)
    assert (judged.returncode, judged.stderr) == (0, "")
    assert "violations    none" in judged.stdout


def test_a_file_with_a_violation_exits_1_and_shows_its_records(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_bytes(b"".join(map(write_line, edited(HISTORY, [drop(FIRST_DECISION)]))))
    judged = judge(path)
    assert judged.returncode == 1
    assert "violations    1 decided" in judged.stdout
    assert write_line(FIRST_LOGIN).decode() in judged.stdout


def test_the_judge_knows_nothing_of_the_service() -> None:
    program = "import sys, scripts.tools.proof.checker; print([name for name in sys.modules if name.startswith('sso')])"
    judged = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert judged.stdout == "[]\n"


# --- histories of a model --------------------------------------------------------------------------------------------

MODEL_WALL = 1_000_000_000

Fate = Literal["answered", "lost", "lost but done", "unknown", "unknown but done", "unavailable"]


@dataclass
class Node:
    """One process at a time, which learns of a revocation when it has run for the seconds in `unread`."""

    name: str
    pid: int = 1
    ahead: int = 0
    ahead_since: float = 0.0
    paused_since: float | None = None
    separated_since: float | None = None
    known: int = 1
    unread: dict[str, float] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)

    def run(self, seconds: float) -> None:
        if self.paused_since is None and self.separated_since is None:
            self.unread = {key: left - seconds for key, left in self.unread.items()}
            self.dead.update(key for key, left in self.unread.items() if left <= 0)


class Model:
    """A correct service: a dictionary of people, a set of what was consumed, and clocks. It writes its own history."""

    def __init__(self) -> None:
        self.at = 100.0
        self.records: list[AnyRecord] = []
        self.nodes = {name: Node(name) for name in "xyz"}
        self.people: dict[str, int] = {}
        self.consumed: set[bytes] = set()
        self.late: set[bytes] = set()
        self.floor = bytes(16)
        self.keys = ["key 0"]
        self.tokens: list[tuple[str, str]] = []

    def wait(self, seconds: float) -> None:
        """Time passes, and what was on its way to the database arrives."""
        self.at += seconds
        self.consumed |= {claims for claims in self.late if claims >= self.floor}
        self.late.clear()
        for node in self.nodes.values():
            node.run(seconds)

    def issue(self, name: str, person: int, account_id: int, before: float, after: float, fate: Fate) -> None:
        node, email = self.nodes[name], f"{person}@model.test"
        start, end = self.at - before, self.at + after
        request = Issue(start=start, end=end, node=name, account_id=account_id, email=email, status=201)
        if node.paused_since is not None or fate == "lost":
            self.records.append(replace(request, end=None, status=None))
            return
        if fate in ("unavailable", "unknown"):
            code = "outcome_unknown" if fate == "unknown" else fate
            self.records.append(replace(request, status=503, code=code))
            return
        created = email not in self.people
        user_id = self.people.setdefault(email, 1000 + len(self.people))
        if fate == "lost but done":
            self.records.append(replace(request, end=None, status=None))
            return
        if fate == "unknown but done":
            self.records.append(replace(request, status=503, code="outcome_unknown"))
            return
        token = make_token(self.clock(node) + TTL, user_id, account_id, len(self.records))
        key = next(key for key in reversed(self.keys[: node.known]) if key not in node.dead)
        self.tokens.append((token, key))
        self.records.append(replace(request, token=token, user_created=created))

    def redeem(self, name: str, way: Way, number: int, before: float, after: float, fate: Fate) -> None:
        node = self.nodes[name]
        forged = make_token(MODEL_WALL + int(self.at) + TTL, 1000, 1, len(self.records)), ""
        token, key = self.tokens[-number] if 0 < number <= len(self.tokens) else forged
        request = Redeem(start=self.at - before, end=self.at + after, node=name, way=way, token=token, status=401)
        if node.paused_since is not None or fate == "lost":
            self.records.append(replace(request, end=None, status=None))
            return
        now, claims = self.clock(node), read_claims(token)
        assert claims
        known = self.keys[: node.known] if node.separated_since is not None else self.keys
        if key in node.dead or key not in known or claims.expires_at > now + TTL + 60:
            self.records.append(replace(request, code="token_invalid"))
            return
        if now >= claims.expires_at:
            self.records.append(replace(request, code="token_expired"))
            return
        self.records.append(Decision(at=self.at, node=name, pid=node.pid, token=token, now=now, key_id=key))
        if fate == "unavailable":
            self.records.append(replace(request, status=503, code=fate))
        elif fate == "unknown":
            self.records.append(replace(request, status=503, code="outcome_unknown"))
        elif fate == "lost but done":
            self.late.add(claims.raw)
            self.records.append(replace(request, end=None, status=None))
        elif fate == "unknown but done":
            self.late.add(claims.raw)
            self.records.append(replace(request, status=503, code="outcome_unknown"))
        elif claims.raw < self.floor:
            self.records.append(replace(request, code="token_expired"))
        elif claims.raw not in self.consumed:
            self.consumed.add(claims.raw)
            user_id, account_id = (0, 0) if way == "revoke" else (claims.user_id, claims.account_id)
            self.records.append(replace(request, status=200, success=True, user_id=user_id, account_id=account_id))
        elif way == "revoke":
            self.records.append(replace(request, status=200))
        else:
            self.records.append(replace(request, code="token_consumed"))

    def move_clock(self, name: str, ahead: int) -> None:
        node = self.nodes[name]
        if node.ahead:
            self.records.append(Fault(start=node.ahead_since, end=self.at, kind="clock", node=name))
        node.ahead, node.ahead_since = ahead, self.at

    def pause(self, name: str) -> None:
        node = self.nodes[name]
        if node.paused_since is None:
            node.paused_since = self.at
        else:
            self.records.append(Pause(start=node.paused_since, end=self.at, node=name, pid=node.pid))
            node.paused_since = None

    def separate(self, name: str) -> None:
        node = self.nodes[name]
        if node.separated_since is None:
            node.separated_since = self.at
            return
        self.records.append(Separation(start=node.separated_since, end=self.at, node=name))
        node.separated_since, node.known = None, len(self.keys)
        node.unread = {key: 5.0 for key in node.unread if key not in node.dead}

    def revoke(self) -> None:
        """The key that signs is revoked, and another signs at once, where it is read."""
        key = self.keys[-1]
        self.keys.append(f"key {len(self.keys)}")
        readers = [node for node in self.nodes.values() if node.separated_since is None]
        self.records.append(Revocation(at=self.at, key_id=key, nodes=tuple(node.name for node in readers)))
        for node in readers:
            node.known = len(self.keys)
        for node in self.nodes.values():
            node.unread[key] = 5.0

    def kill(self, name: str) -> None:
        """A node starts anew, and reads its directory."""
        node = self.nodes[name]
        if node.paused_since is not None:
            return
        self.records.append(Fault(start=self.at, end=self.at + 1, kind="kill -9", node=name, pid=node.pid))
        node.pid += 1
        if node.separated_since is None:
            node.dead.update(node.unread)

    def purge(self) -> None:
        self.consumed = {claims for claims in self.consumed if claims >= self.floor}
        self.floor = max(self.floor, struct.pack(">IIII", MODEL_WALL + int(self.at) - 3600, 0, 0, 0))

    def clock(self, node: Node) -> int:
        return MODEL_WALL + int(self.at) + node.ahead

    def mend(self) -> None:
        for name, node in self.nodes.items():
            self.move_clock(name, 0)
            if node.paused_since is not None:
                self.pause(name)
            if node.separated_since is not None:
                self.separate(name)

    def end(self) -> list[AnyRecord]:
        """What is broken is mended, and the history is whole."""
        self.mend()
        self.wait(1)
        database = Database(
            consumed=tuple(claims.hex() for claims in self.consumed),
            floor=self.floor.hex(),
            people=tuple(Person(user_id, email) for email, user_id in self.people.items()),
            now=MODEL_WALL + int(self.at),
        )
        return [Run(seed=0, database="sqlite", token_ttl=TTL), *self.records, database]


def operations(*, clocks: bool) -> st.SearchStrategy[list[Callable[[Model], None]]]:
    """What may happen to the model. Requests take time before and after the moment that counts, so they overlap."""
    names, spans = st.sampled_from("xyz"), st.floats(0, 3)
    fates = st.sampled_from([*["answered"] * 12, *get_args(Fate)])

    def op(method: Callable[..., None], *values: st.SearchStrategy[Any]) -> st.SearchStrategy[Callable[[Model], None]]:
        return st.tuples(*values).map(lambda drawn: lambda model: method(model, *drawn))

    often = [
        op(Model.issue, names, st.integers(0, 3), st.integers(1, 2), spans, spans, fates),
        op(Model.redeem, names, st.sampled_from(get_args(Way)), st.integers(0, 4), spans, spans, fates),
        op(Model.redeem, names, st.just("browser"), st.integers(1, 2), spans, spans, st.just("answered")),
        op(Model.wait, st.floats(0.1, 6)),
    ]
    seldom = [
        op(Model.wait, st.sampled_from([60, TTL, 4000])),
        op(Model.pause, names),
        op(Model.separate, names),
        op(Model.revoke),
        op(Model.kill, names),
        op(Model.purge),
    ]
    if clocks:
        seldom.append(op(Model.move_clock, names, st.sampled_from([-5000, -100, -1, 0, 1, 100, 5000])))
    one = st.sampled_from([*often * 8, *seldom, *[op(Model.mend)] * 2]).flatmap(
        lambda chosen: chosen
    )  # one_of() would count each once
    return st.lists(one, min_size=30, max_size=60)


# A machine that is busy with something else finds nothing wrong.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def play(happenings: list[Callable[[Model], None]]) -> list[AnyRecord]:
    model = Model()
    for happening in happenings:
        happening(model)
    return model.end()


@unhurried
@given(operations(clocks=True))
def test_whatever_happens_to_a_correct_service_is_no_violation(happenings: list[Callable[[Model], None]]) -> None:
    assert check(play(happenings)).violations == []


@unhurried
@given(operations(clocks=False), st.sampled_from(PLANTS))
def test_a_violation_is_found_in_whatever_else_happened(
    happenings: list[Callable[[Model], None]], plant: tuple[str, str, list[Edit]]
) -> None:
    rule, _, edits = plant
    run, *others, there = play(happenings)
    assert isinstance(there, Database)
    joined = change_database(consumed=lambda rows: rows + there.consumed, people=lambda people: there.people + people)
    assert found(edited([run, *others, *joined(HISTORY[1:])], edits)) == {rule}
