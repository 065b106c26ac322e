"""Edits of a history: violations of each rule, and changes that violate none."""

from msgspec.structs import replace

from scripts.tools.proof.history import Fault, Pause, Person, Revocation, Separation
from tests.support.proof_history import (
    ADA,
    BEFORE_REVOCATION,
    BEN,
    CALM,
    CALM_DECISION,
    CALM_LOGIN,
    CALM_UNUSED,
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
    PATIENT,
    PATIENT_LOGIN,
    PAUSE,
    REJOINED_DECISION,
    REJOINED_LOGIN,
    RESUMED_DECISION,
    RESUMED_LOGIN,
    RUN,
    START,
    TAKEN_BACK,
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
    row_gone,
    shift,
)

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
        "use_explained",
        "an unused token is refused as used",
        [add(refused(UNUSED, "token_consumed")), row_added(UNUSED)],
    ),
    (
        "use_explained",
        "an unused token cannot be taken back",
        [add(replace(redeem(20, UNUSED, "revoke", status=200), success=False)), row_added(UNUSED)],
    ),
    (
        "use_explained",
        "it cannot be taken back before it is good",
        [add(replace(redeem(11.7, PATIENT, "revoke", status=200), success=False))],
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
        "a token is used before it is good",
        [add(redeem(11.7, PATIENT, "browser", "b", code="token_consumed"))],
    ),
    (
        "use_explained",
        "it is used before the lost attempt began",
        [add(redeem(3.5, LOST, "browser", code="token_consumed"))],
    ),
    ("use_explained", "nobody else has tried it", [drop(LOST_ATTEMPT)]),
    ("use_explained", "a row belongs to a token that nobody tried", [row_added(UNUSED)]),
    ("use_explained", "a row belongs to a token that nobody made", [row_added(FORGED)]),
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
