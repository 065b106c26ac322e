"""Edits of the hand-written history: violations of every rule, and changes that violate none."""

from msgspec.structs import replace

from scripts.tools.proof.history import Fault, Pause, Person, Revocation, Separation
from tests.support.proof_history import (
    ADA,
    BEFORE_REVOCATION,
    BEN,
    END,
    FIRST,
    FIRST_AGAIN,
    FIRST_DECISION,
    FIRST_LOGIN,
    FORGED,
    FORGERY,
    KILL,
    LATE,
    LOST,
    LOST_AGAIN,
    LOST_ATTEMPT,
    LOST_DECISION,
    NEW_KEY,
    NEW_KEY_DECISION,
    NEW_KEY_LOGIN,
    NEW_KEY_UNUSED,
    PAUSE,
    REJOINED_DECISION,
    REJOINED_LOGIN,
    RESUMED_DECISION,
    RESUMED_LOGIN,
    RETRIED,
    RETRIED_LOGIN,
    REVOKED,
    RUN,
    START,
    TTL,
    UNUSED,
    WALL,
    Edit,
    add,
    change,
    change_database,
    clock_fault,
    decision,
    drop,
    floor_at,
    make_token,
    redeem,
    refused,
    row_added,
    row_removed,
    shift,
    sign_out,
)

VIOLATIONS: list[tuple[str, str, list[Edit]]] = [
    ("well_formed", "the run is missing", [lambda records: records[1:]]),
    ("well_formed", "there are two runs", [add(RUN)]),
    ("well_formed", "a record precedes the run", [lambda records: [KILL, *records]]),
    ("well_formed", "the database record is missing", [lambda records: records[:-1]]),
    ("well_formed", "a fault ends before it starts", [change(KILL, end=KILL.start - 1)]),
    ("well_formed", "a response precedes its request", [change(UNUSED, end=UNUSED.start - 1)]),
    ("well_formed", "a success has no status", [change(NEW_KEY_LOGIN, status=None)]),
    ("well_formed", "a success has no end", [change(NEW_KEY_LOGIN, end=None)]),
    ("known_answers", "a failure has no code", [add(redeem(20, UNUSED, "browser", status=500))]),
    ("distinct", "two requests receive the same token", [add(replace(UNUSED, node="b"))]),
    ("issued", "a forged token signs in", [change(FORGERY, status=303, success=True)]),
    ("issued", "a forged token is accepted by a node", [add(decision(620, FORGED))]),
    (
        "issued",
        "another spelling of a token signs in",
        [
            change(FIRST_LOGIN, token=FIRST.token[:-1] + chr(ord(FIRST.token[-1]) + 1)),
            drop(FIRST_AGAIN),
            row_removed(FIRST),
        ],
    ),
    (
        "single_use",
        "a token signs in twice",
        [change(FIRST_AGAIN, status=303, success=True, user_id=ADA, account_id=ADA)],
    ),
    (
        "single_use",
        "a used token is revoked",
        [add(redeem(1.5, FIRST, "revoke", status=200), decision(1.5, FIRST))],
    ),
    (
        "single_use",
        "a token is consumed twice at once",
        [
            change(LOST_ATTEMPT, status=200, end=START + 6, success=True, user_id=BEN, account_id=BEN),
            change(LOST_AGAIN, status=200, code="", success=True, user_id=BEN, account_id=BEN),
        ],
    ),
    ("right_person", "another user is signed in", [change(FIRST_LOGIN, user_id=BEN)]),
    ("right_person", "another account is signed in to", [change(REJOINED_LOGIN, account_id=BEN)]),
    ("right_person", "a token contains another account than its issuer's", [change(UNUSED, account_id=BEN)]),
    ("right_person", "a token is malformed", [change(UNUSED, token="token")]),
    ("kept", "the row of a login is missing", [row_removed(NEW_KEY)]),
    ("kept", "the row of a revoked token is missing", [row_removed(REVOKED)]),
    ("kept", "a token reported as used has no row", [row_removed(LOST)]),
    (
        "kept",
        "the row at the floor is missing",
        [row_removed(FIRST), floor_at(FIRST), add(clock_fault(UNUSED, "b"))],
    ),
    (
        "use_explained",
        "an unused token is refused as used",
        [add(refused(UNUSED, "token_consumed")), row_added(UNUSED)],
    ),
    (
        "use_explained",
        "an unused token cannot be revoked",
        [add(replace(redeem(20, UNUSED, "revoke", status=200), success=False)), row_added(UNUSED)],
    ),
    (
        "use_explained",
        "a token cannot be revoked before it is redeemed",
        [add(replace(redeem(11.7, RETRIED, "revoke", status=200), success=False))],
    ),
    (
        "use_explained",
        "an overloaded node consumes",
        [
            add(redeem(20, UNUSED, "consume", status=503, code="overloaded"), refused(UNUSED, "token_consumed")),
            row_added(UNUSED),
        ],
    ),
    (
        "use_explained",
        "a token is reported as used before it is redeemed",
        [add(redeem(11.7, RETRIED, "browser", "b", code="token_consumed"))],
    ),
    (
        "use_explained",
        "a token is reported as used before the lost attempt began",
        [add(redeem(3.5, LOST, "browser", code="token_consumed"))],
    ),
    ("use_explained", "a token is reported as used without an earlier attempt", [drop(LOST_ATTEMPT)]),
    ("use_explained", "a row belongs to a token without an attempt", [row_added(UNUSED)]),
    ("use_explained", "a row belongs to a forged token", [row_added(FORGED)]),
    ("decided", "a login has no decision", [drop(FIRST_DECISION)]),
    ("decided", "the decision is another node's", [change(FIRST_DECISION, node="b")]),
    ("decided", "the decision precedes the request", [change(FIRST_DECISION, at=FIRST_LOGIN.start - 0.01)]),
    ("decided", "a row has no decision", [drop(LOST_DECISION)]),
    (
        "within_its_life",
        "a clock was moved long before and after",
        [
            change(NEW_KEY_DECISION, now=WALL + 600 + TTL + 1),
            add(Fault(start=START + 590, end=START + 610, kind="clock", node="b")),
        ],
    ),
    (
        "within_its_life",
        "the fault was of another kind",
        [
            change(NEW_KEY_DECISION, now=WALL + 600 - 61),
            add(Fault(start=START + 601, end=START + 601, kind="kill -9", node="b")),
        ],
    ),
    (
        "within_its_life",
        "another clock was moved",
        [
            change(NEW_KEY_DECISION, now=WALL + 600 - 61),
            add(Fault(start=START + 601, end=START + 601, kind="clock", node="a")),
        ],
    ),
    (
        "within_its_life",
        "a token is accepted a second after it expired",
        [change(NEW_KEY_DECISION, now=WALL + 600 + TTL + 1)],
    ),
    ("within_its_life", "a token from the far future is accepted", [change(NEW_KEY_DECISION, now=WALL + 600 - 61)]),
    ("revoked", "a revoked key is accepted after 5 s", [change(NEW_KEY_DECISION, key_id="old")]),
    (
        "revoked",
        "a resumed node accepts a revoked key too long",
        [change(RESUMED_DECISION, at=START + 435.1), change(RESUMED_LOGIN, end=START + 436)],
    ),
    ("revoked", "the pause was of another process", [change(PAUSE, pid=1)]),
    (
        "revoked",
        "overlapping pauses are counted once",
        [
            add(replace(PAUSE, start=START + 412, end=START + 430)),
            change(RESUMED_DECISION, at=START + 435.1),
            change(RESUMED_LOGIN, end=START + 436),
        ],
    ),
    (
        "revoked",
        "a node is separated after the deadline",
        [change(NEW_KEY_DECISION, key_id="old"), add(Separation(start=START + 700, end=START + 800, node="b"))],
    ),
    (
        "revoked",
        "a separation ended before the revocation",
        [
            change(REJOINED_DECISION, at=START + 445.1),
            change(REJOINED_LOGIN, end=START + 446),
            add(Separation(start=START + 300, end=START + 310, node="a")),
        ],
    ),
    (
        "revoked",
        "a separated node revoked the key itself",
        [
            add(
                Separation(start=START + 590, end=START + 700, node="b"),
                Revocation(at=START + 595, key_id="new", nodes=("b",)),
            )
        ],
    ),
    (
        "revoked",
        "a rejoined node accepts a revoked key too long",
        [change(REJOINED_DECISION, at=START + 445.1), change(REJOINED_LOGIN, end=START + 446)],
    ),
    ("ended", "a link signs in after a sign-out", [add(sign_out(600.3, 590, BEN, BEN))]),
    (
        "ended",
        "the other sign-out was in another account",
        [add(sign_out(600.3, 590, BEN, BEN), sign_out(600.2, 590, BEN, ADA))],
    ),
    (
        "ended",
        "the clock was wrong before and after",
        [add(sign_out(600.3, 590, BEN, BEN), *(shift(clock_fault(NEW_KEY, "a"), by) for by in (-13, -8)))],
    ),
    (
        "not_expired_early",
        "the sign-out came before",
        [add(refused(UNUSED, "token_expired"), sign_out(12, 9, ADA, ADA))],
    ),
    (
        "not_expired_early",
        "the sign-out was in another account",
        [add(refused(UNUSED, "token_expired"), sign_out(20, 19, ADA, BEN))],
    ),
    (
        "not_expired_early",
        "a fresh token is refused as expired",
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
        "the fault was not of a clock",
        [add(refused(UNUSED, "token_expired"), replace(clock_fault(UNUSED, "a"), kind="kill -9"))],
    ),
    (
        "not_expired_early",
        "a token is refused as expired in its last seconds",
        [add(redeem(13 + TTL - 2.3, UNUSED, "browser", code="token_expired"))],
    ),
    (
        "not_expired_early",
        "a token at the floor is refused as expired",
        [add(refused(UNUSED, "token_expired"), clock_fault(UNUSED, "b")), floor_at(UNUSED)],
    ),
    ("not_taken_for_forged", "a genuine token is refused as forged", [add(refused(NEW_KEY_UNUSED, "token_invalid"))]),
    (
        "not_taken_for_forged",
        "the separation was of another node",
        [add(refused(NEW_KEY_UNUSED, "token_invalid"), Separation(start=START + 600, end=START + 700, node="c"))],
    ),
    (
        "not_taken_for_forged",
        "the node was separated before and after",
        [
            add(
                refused(NEW_KEY_UNUSED, "token_invalid"),
                *(Separation(start=START + at, end=START + at + 1, node="a") for at in (590, 623)),
            )
        ],
    ),
    (
        "not_taken_for_forged",
        "the pause was of another node",
        [add(refused(NEW_KEY_UNUSED, "token_invalid"), Pause(start=START + 600, end=START + 602, node="b", pid=1))],
    ),
    (
        "not_taken_for_forged",
        "the node was paused before and after",
        [
            add(
                refused(NEW_KEY_UNUSED, "token_invalid"),
                *(Pause(start=START + at, end=START + at + 1, node="a", pid=1) for at in (590, 603)),
            )
        ],
    ),
    ("created_once", "a user is created twice", [change(LATE, user_created=True)]),
    (
        "created_once",
        "a known user is created",
        [change(FIRST, user_created=False), change(LATE, user_created=True)],
    ),
    ("one_person", "one address has two users", [change(UNUSED, token=make_token(WALL + 313, BEN + 1, ADA, 0))]),
    ("one_person", "two addresses have one user", [change(UNUSED, email="eve@intranet.test")]),
    ("one_person", "a user is missing in the database", [change_database(people=lambda people: people[:-1])]),
    (
        "one_person",
        "a user has another id in the database",
        [change_database(people=lambda people: (*people[:-1], Person(99, "ben@intranet.test")))],
    ),
    (
        "one_person",
        "an address occurs twice in the database",
        [change_database(people=lambda people: (Person(99, "ada@intranet.test"), *people))],
    ),
    (
        "one_person",
        "a user id occurs twice in the database",
        [change_database(people=lambda people: (*people, Person(1, "eve@intranet.test")))],
    ),
    ("low_floor", "the floor is too high", [floor_at(WALL + END - 3598)]),
]
HARMLESS_CHANGES: list[tuple[str, list[Edit]]] = [
    ("a sign-out in another account", [add(sign_out(600.3, 590, BEN, ADA))]),
    ("a sign-out without a response", [add(sign_out(600.3, 590, BEN, BEN, status=None))]),
    ("a sign-out during the login", [add(sign_out(600.95, 590, BEN, BEN))]),
    ("a sign-out before the link", [add(sign_out(599.9, 590, BEN, BEN))]),
    ("a sign-out with a key that was revoked", [add(sign_out(600.3, 400, BEN, BEN))]),
    (
        "a sign-out by a session that another sign-out ended",
        [add(*(sign_out(at, 590, BEN, BEN) for at in (599, 600.3)))],
    ),
    ("a sign-out by a wrong clock", [add(sign_out(600.3, 590, BEN, BEN), shift(clock_fault(NEW_KEY, "a"), -9.7))]),
    ("a link from before a sign-out has expired", [add(refused(UNUSED, "token_expired"), sign_out(20, 19, ADA, ADA))]),
    ("a sign-out may come late", [add(refused(UNUSED, "token_expired"), sign_out(14, 9, ADA, ADA, status=None))]),
    (
        "a row below the floor is purged",
        [row_removed(FIRST), floor_at(WALL + 301), add(clock_fault(UNUSED, "b"))],
    ),
    (
        "a clock is moved during the request",
        [change(NEW_KEY_DECISION, now=WALL), add(Fault(start=START + 500, end=START + 603, kind="clock", node="b"))],
    ),
    (
        "a clock is moved just before the request",
        [change(NEW_KEY_DECISION, now=WALL), add(Fault(start=START + 600.5, end=START + 700, kind="clock", node=""))],
    ),
    (
        "a clock is moved while the request is paused",
        [
            change(NEW_KEY_DECISION, now=WALL),
            add(
                Fault(start=START + 500, end=START + 630, kind="clock", node="b"),
                replace(PAUSE, start=START + 602, end=START + 640),
            ),
        ],
    ),
    (
        "a revocation by a separated node does not reach others",
        [
            add(
                Separation(start=START + 590, end=START + 605, node="a"),
                Separation(start=START + 590, end=START + 700, node="b"),
                Revocation(at=START + 595, key_id="new", nodes=("b",)),
                decision(620, NEW_KEY_UNUSED, key_id="new"),
                decision(620, NEW_KEY_UNUSED, "c", "new"),
            ),
            drop(NEW_KEY_DECISION, NEW_KEY_LOGIN),
            row_removed(NEW_KEY),
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
        "a node is separated before the deadline",
        [change(NEW_KEY_DECISION, key_id="old"), add(Separation(start=START + 410, end=START + 700, node="b"))],
    ),
    (
        "some responses do not imply that a token was used",
        [
            add(
                replace(redeem(11.7, RETRIED, "browser", status=200), success=False),
                redeem(11.7, RETRIED, "revoke", status=503, code="unavailable"),
            )
        ],
    ),
    ("an event may take no time", [change(KILL, end=KILL.start), change(UNUSED, end=UNUSED.start)]),
    ("the database's clock advances a second", [floor_at(WALL + END - 3599)]),
    ("one of two lost attempts explains a use", [add(redeem(6, LOST, "consume", "c", status=None))]),
    ("a lost attempt beside a success may never have arrived", [add(redeem(0.5, FIRST, "browser", "c", status=None))]),
    (
        "a revoked key is accepted for exactly 5 s",
        [change(RESUMED_DECISION, at=START + 435), change(RESUMED_LOGIN, end=START + 436)],
    ),
    (
        "an earlier separation of a node is ignored",
        [add(decision(700, NEW_KEY_UNUSED, "d"), Separation(start=START + 300, end=START + 310, node="d"))],
    ),
    ("an expiry is rounded to a second", [add(redeem(13 + TTL - 2.1, UNUSED, "browser", code="token_expired"))]),
    (
        "a token was issued by a clock that is behind",
        [add(refused(UNUSED, "token_expired", node="b"), shift(clock_fault(UNUSED, "a"), -10))],
    ),
    (
        "one of two revocations explains a refusal",
        [
            add(
                refused(BEFORE_REVOCATION, "token_invalid", node="b"),
                Revocation(at=START + 800, key_id="other", nodes=("a",)),
            )
        ],
    ),
    ("a run may have a shorter retention", [floor_at(WALL + END - 3000), change(RUN, retention=3000)]),
    ("a moved clock may have raised the floor", [floor_at(WALL + END), add(clock_fault(UNUSED, "b"))]),
    (
        "an unknown outcome explains a use",
        [drop(RETRIED_LOGIN), add(redeem(12, RETRIED, "browser", "b", code="token_consumed"))],
    ),
    (
        "a lost attempt may end late",
        [change(LOST_ATTEMPT, start=START + 5.1), change(LOST_DECISION, at=START + 6)],
    ),
    (
        "a token is still valid after a lost attempt",
        [change(LOST_AGAIN, status=200, code="", success=True, user_id=BEN, account_id=BEN)],
    ),
    ("a lost attempt may have no effect", [add(redeem(20, UNUSED, "consume", status=None))]),
    ("a fast clock accepts a token until its expiry", [change(NEW_KEY_DECISION, now=WALL + 600 + TTL)]),
    ("a clock is slow by the allowance", [change(NEW_KEY_DECISION, now=WALL + 600 - 60)]),
    ("a clock that is ahead expires a token early", [add(refused(UNUSED, "token_expired"), clock_fault(UNUSED, "a"))]),
    (
        "a node whose clock is wrong refuses as forged",
        [add(refused(NEW_KEY_UNUSED, "token_invalid"), clock_fault(NEW_KEY_UNUSED, "a"))],
    ),
    ("a fault without a node affects every node", [add(refused(UNUSED, "token_expired"), clock_fault(UNUSED, ""))]),
    (
        "a broken key directory refuses as forged",
        [
            add(
                refused(NEW_KEY_UNUSED, "token_invalid"),
                replace(clock_fault(NEW_KEY_UNUSED, "a"), kind="keys unreadable"),
            )
        ],
    ),
    (
        "a token below the floor is expired",
        [add(refused(UNUSED, "token_expired"), clock_fault(UNUSED, "b")), floor_at(WALL + END)],
    ),
    ("a token of a revoked key is refused as forged", [add(refused(BEFORE_REVOCATION, "token_invalid", node="b"))]),
    (
        "a separated node refuses as forged",
        [
            add(
                refused(NEW_KEY_UNUSED, "token_invalid", node="c"),
                Separation(start=START + 600, end=START + 700, node="c"),
            )
        ],
    ),
    (
        "a resumed node signs with an old key",
        [add(refused(NEW_KEY_UNUSED, "token_invalid"), Pause(start=START + 500, end=START + 601.9, node="a", pid=1))],
    ),
    (
        "a token of another account is refused as forged",
        [add(refused(NEW_KEY_UNUSED, "token_invalid", way="consume"))],
    ),
    ("a node with other keys ignores a revocation", [add(decision(700, NEW_KEY_UNUSED, "d"))]),
    (
        "the request that created the user may be answered last",
        [change(FIRST, user_created=False), change(UNUSED, start=FIRST.end, user_created=True)],
    ),
]
