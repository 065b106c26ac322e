"""Whether a history could have happened in a service that keeps its promises.

    python -m scripts.tools.proof.checker FILE

A rule says what a correct service never does, and finds it in a history. The checker knows the token's layout, the
answers and the promises, and nothing of how they are kept. When a history leaves two readings, the kind one is taken:
what a rule finds has no innocent explanation. Two things are agreed with whoever writes the history: a `Fault` of a
clock has `clock` in its kind and one of the key directory `key`; a fault without a node is one of every node.
"""

import re
import struct
import sys
from base64 import urlsafe_b64decode
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import NamedTuple

from scripts.tools.proof.history import (
    AnyRecord,
    Database,
    Decision,
    Fault,
    Issue,
    Pause,
    Redeem,
    Revocation,
    Run,
    Separation,
    read_history,
    write_line,
)

REVOCATION_TIME = 5.0
"""Seconds of running in which a node learns that a key was revoked."""

REQUEST_TIME = 5.0
"""Seconds of running after which no request that was answered is still on its way."""

CLOCK_ALLOWANCE = 60
"""Seconds by which a token may claim to live longer than tokens do: the clocks of two nodes differ."""

SHOWN = 10
"""How many violations of one rule are printed with their records."""


class Claims(NamedTuple):
    """What a token says. `raw` is the key of the consumed table."""

    raw: bytes
    expires_at: int
    user_id: int
    account_id: int


# 43 characters carry 258 bits, a token has 256: the two spare ones are zero, which leaves 16 last characters.
_form = re.compile(r"[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")


def read_claims(token: str) -> Claims | None:
    """What the token says, if it has the form of one. Nothing is said of who made it."""
    if not _form.fullmatch(token):
        return None
    raw = urlsafe_b64decode(token + "=")[:16]
    return Claims(raw, *struct.unpack_from(">III", raw))


@dataclass(slots=True)
class Life:
    """What happened to one token. `issue` is None for one that nobody was handed."""

    issue: Issue | None = None
    attempts: list[Redeem] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    @property
    def successes(self) -> list[Redeem]:
        """The attempts that signed someone in, handed over the person, or took the token back."""
        return [attempt for attempt in self.attempts if attempt.success]

    @property
    def unknown(self) -> list[Redeem]:
        """The attempts that may have consumed the token without our knowing. All other refusals consume nothing."""
        return [a for a in self.attempts if a.status is None or a.code == "outcome_unknown"]


@dataclass(slots=True)
class Counts:
    """What a history is made of."""

    requests: int = 0
    issued: int = 0
    redemptions: int = 0
    lost: int = 0
    pauses: int = 0
    revocations: int = 0
    successes: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


class History:
    """The records, by what the rules ask for."""

    def __init__(self, records: Iterable[AnyRecord]) -> None:
        self.counts = Counts()
        self.runs: list[Run] = []
        self.run_is_first = False
        self.databases: list[Database] = []
        self.lives: defaultdict[str, Life] = defaultdict(Life)
        self.handed_out_again: list[Issue] = []
        self.unissued: list[Issue] = []
        self.faults: list[Fault] = []
        self.pauses: list[Pause] = []
        self.separations: list[Separation] = []
        self.revocations: list[Revocation] = []
        for number, record in enumerate(records):
            self._add(record)
            if number == 0:
                self.run_is_first = isinstance(record, Run)
        self.run = self.runs[0] if self.runs else None
        self.database = self.databases[-1] if self.databases else None
        self.floor = bytes.fromhex(self.database.floor) if self.database else b""
        self.consumed = frozenset(map(bytes.fromhex, self.database.consumed)) if self.database else frozenset()
        self.revocations_of: defaultdict[str, list[Revocation]] = defaultdict(list)
        for revocation in self.revocations:
            self.revocations_of[revocation.key_id].append(revocation)
        self._pauses_of: defaultdict[tuple[str, int], list[Pause]] = defaultdict(list)
        for pause in sorted(self.pauses, key=lambda pause: pause.start):
            self._pauses_of[pause.node, pause.pid].append(pause)

    def _add(self, record: AnyRecord) -> None:
        match record:
            case Issue():
                self._count_answer(record, success=bool(record.token))
                self.counts.issued += bool(record.token)
                if not record.token:
                    self.unissued.append(record)
                elif (life := self.lives[record.token]).issue is None:
                    life.issue = record
                else:
                    self.handed_out_again.append(record)
            case Redeem():
                self._count_answer(record, success=record.success)
                self.counts.redemptions += 1
                self.counts.successes[record.way] += record.success
                self.lives[record.token].attempts.append(record)
            case Decision():
                self.lives[record.token].decisions.append(record)
            case Run():
                self.runs.append(record)
            case Database():
                self.databases.append(record)
            case Fault():
                self.counts.faults[record.kind] += 1
                self.faults.append(record)
            case Pause():
                self.counts.pauses += 1
                self.pauses.append(record)
            case Revocation():
                self.counts.revocations += 1
                self.revocations.append(record)
            case Separation():
                self.separations.append(record)

    def _count_answer(self, record: Issue | Redeem, *, success: bool) -> None:
        self.counts.requests += 1
        if record.status is None:
            self.counts.lost += 1
        elif not success:
            self.counts.refusals[record.code or f"{record.status} without a code"] += 1

    def issued(self) -> Iterator[tuple[Issue, Claims, Life]]:
        """Every token that was handed out and can be read."""
        for token, life in self.lives.items():
            if life.issue and (claims := read_claims(token)):
                yield life.issue, claims, life

    def ran(self, node: str, pid: int, since: float, until: float) -> float:
        """For how many seconds of that span a process was not paused; negative if it has not begun."""
        paused, seen = 0.0, since
        for pause in self._pauses_of.get((node, pid), ()):
            paused += max(0.0, min(pause.end, until) - max(pause.start, seen))
            seen = max(seen, pause.end)
        return until - since - paused

    def disturbed(self, kinds: tuple[str, ...], nodes: tuple[str, ...], start: float, end: float) -> bool:
        """Whether a fault of these kinds overlaps this span at one of the nodes."""
        return any(
            fault.start <= end
            and fault.end >= start
            and (not fault.node or fault.node in nodes)
            and any(kind in fault.kind for kind in kinds)
            for fault in self.faults
        )


Finding = tuple[str, tuple[AnyRecord, ...]]
Rule = Callable[[History], Iterator[Finding]]


def well_formed(history: History) -> Iterator[Finding]:
    """One `Run`, first, and one `Database`; nothing ends before it starts; a success is an answer that came.

    Of a history that breaks this the other rules cannot be believed.
    """
    if len(history.runs) != 1 or not history.run_is_first:
        yield "a history begins with its one run", tuple(history.runs)
    if len(history.databases) != 1:
        yield "a history has one state of the database", tuple(history.databases)
    spans: list[Fault | Pause | Separation] = [*history.faults, *history.pauses, *history.separations]
    for span in spans:
        if span.end < span.start:
            yield "it ends before it starts", (span,)
    for request in _requests(history):
        if request.end is not None and request.end < request.start:
            yield "the answer came before the request", (request,)
        succeeded = request.success if isinstance(request, Redeem) else bool(request.token)
        if succeeded and (request.end is None or request.status is None):
            yield "a success without an answer", (request,)


def known_answers(history: History) -> Iterator[Finding]:
    """When the service cannot say yes it says 503 and why. Any other failure leaves it open what happened."""
    for request in _requests(history):
        if request.status is not None and request.status >= 500 and request.status != 503:
            yield f"answered {request.status}", (request,)


def distinct(history: History) -> Iterator[Finding]:
    """No two answers hand out one token: its second owner would find it used.

    The nonce has 32 bits, so for two of one user, account and second this is possible, and not to be expected.
    """
    for issue in history.handed_out_again:
        first = history.lives[issue.token].issue
        yield "a token was handed out twice", (first, issue) if first else (issue,)


def issued(history: History) -> Iterator[Finding]:
    """Nothing succeeds but what was handed out in this history, nor is anything else found to be good.

    A token whose answer was lost is known to nobody, so it is presented by nobody.
    """
    for life in history.lives.values():
        good: tuple[AnyRecord, ...] = (*life.decisions, *life.successes)
        if life.issue is None and good:
            yield "a token that nobody was handed is taken for good", good


def single_use(history: History) -> Iterator[Finding]:
    """A token is redeemed once: by a browser, by a frontend that consumes it, or by whoever takes it back."""
    for life in history.lives.values():
        if len(successes := life.successes) > 1:
            yield f"a token was redeemed {len(successes)} times", tuple(successes)


def right_person(history: History) -> Iterator[Finding]:
    """A token names the account that issued it, and signs in whom it names, there.

    Otherwise a login made by one account would open another, or one person would be let in as someone else.
    """
    for token, life in history.lives.items():
        if life.issue is None:
            continue
        claims = read_claims(token)
        if claims is None:
            yield "what was handed out has not the form of a token", (life.issue,)
            continue
        if claims.account_id != life.issue.account_id:
            yield f"the token names account {claims.account_id}", (life.issue,)
        for success in life.successes:
            if success.way != "revoke" and (success.user_id, success.account_id) != (claims.user_id, claims.account_id):
                yield f"the token names user {claims.user_id} in account {claims.account_id}", (life.issue, success)


def kept(history: History) -> Iterator[Finding]:
    """What an answer says is used is in the database at the end, or below the floor, under which nothing is taken.

    An answer is given once the row is durable, and also "used before" is only said of a row that is.
    """
    if history.database is None:
        return
    for _, claims, life in history.issued():
        if claims.raw in history.consumed or claims.raw < history.floor:
            continue
        if told := tuple(attempt for attempt in life.attempts if attempt.success or _says_used(attempt)):
            yield "a used token is not in the database", told


def used_by_somebody(history: History) -> Iterator[Finding]:
    """Who is told that a token was used before can blame somebody: else a login was lost.

    That is the success if there is one: a token that it found to be good had been used by nobody. If there is none, it
    is an attempt whose answer was lost, or that was told that the outcome is unknown; it may have consumed the token
    however late, but not before it began. Refusals, 503 `unavailable` and `overloaded` among them, consume nothing.
    The same holds for the rows of the database, which has none for a token that nobody was handed.
    """
    explained = set()
    for _, claims, life in history.issued():
        takers = life.successes or life.unknown
        if takers:
            explained.add(claims.raw)
        began = min((taker.start for taker in takers), default=inf)
        for attempt in life.attempts:
            if _says_used(attempt) and began > _end(attempt):
                yield "told that it was used, before anybody could have", (attempt, *takers)
    if unexplained := history.consumed - explained:
        refused: dict[bytes, tuple[AnyRecord, ...]] = {
            claims.raw: (issue, *life.attempts) for issue, claims, life in history.issued()
        }
        for row in unexplained:
            yield f"nobody can have consumed {row.hex()}", refused.get(row, ())


def decided(history: History) -> Iterator[Finding]:
    """Nothing is consumed unless the node that was asked checked the token, during that very request.

    If all that is known is the row, one of those whose answer was lost was the request, and it may have taken any time.
    """
    for _, claims, life in history.issued():
        for success in life.successes:
            if not _decided(life, success, _end(success)):
                yield "a success without a decision", (success, *life.decisions)
        unknown = () if life.successes or claims.raw not in history.consumed else tuple(life.unknown)
        if unknown and not any(_decided(life, attempt, inf) for attempt in unknown):
            yield "consumed without a decision", (*unknown, *life.decisions)


def within_its_life(history: History) -> Iterator[Finding]:
    """No node finds a token good a second after it expired, nor one that claims to live longer than tokens do.

    That is judged at the moment and on the clock of the node that checked it, whether that clock was right or not; but
    not where it is moved, since a request may look at it more than once. A success may come later: the row is what
    counts then.
    """
    longest = history.run.token_ttl + CLOCK_ALLOWANCE if history.run else inf
    for _, claims, life in history.issued():
        for decision in life.decisions:
            left = claims.expires_at - decision.now
            if not -1 < left <= longest and not _clock_is_moved(history, decision):
                yield f"found good {left} s before it expires", (decision,)


def revoked(history: History) -> Iterator[Finding]:
    """No node finds a token good with a key that was revoked more than 5 s before.

    The time counts in which the process ran: one that is stopped learns nothing, and says nothing either. A node
    that was separated learns of it within 5 s of coming back. One that never read this directory is not concerned.
    """
    for _, _, life in history.issued():
        for decision in life.decisions:
            for revocation in history.revocations_of.get(decision.key_id, ()):
                reached = _reached(history, revocation, decision)
                lag = history.ran(decision.node, decision.pid, reached, decision.at)
                if lag > REVOCATION_TIME:
                    yield f"found good {lag:.3f} s after its key was revoked", (revocation, decision)


def not_expired_early(history: History) -> Iterator[Finding]:
    """A token is not refused as expired while it lives, on two nodes whose clocks nobody moved.

    Expiry is in whole seconds, rounded down, and one more is for the machine's own clock. The floor only rises: what is
    above the last one was never below it.
    """
    if history.run is None or history.database is None:
        return
    for issue, claims, life in history.issued():
        for attempt in life.attempts:
            if (
                attempt.code == "token_expired"
                and _end(attempt) < issue.start + history.run.token_ttl - 2
                and claims.raw >= history.floor
                and not history.disturbed(("clock",), (issue.node,), issue.start - 1, _end(issue) + 1)
                and not history.disturbed(("clock",), (attempt.node,), attempt.start - 1, _end(attempt) + 1)
            ):
                yield "refused as expired while it lives", (issue, attempt)


def not_taken_for_forged(history: History) -> Iterator[Finding]:
    """A genuine token is not refused as forged: rotation under load loses no login.

    A key that was revoked, a separate or broken key directory and a moved clock are reasons to, so nothing is said near
    them; and a node that was stopped before it issued may have missed a rotation. Only browsers are judged: to an
    API token, one of another account's is answered like a forged one.
    """
    settle = 2 * REVOCATION_TIME
    for issue, _, life in history.issued():
        for attempt in life.attempts:
            if attempt.way != "browser" or attempt.code != "token_invalid":
                continue
            nodes = (issue.node, attempt.node)
            start, end = issue.start - settle, _end(attempt) + settle
            if not (
                any(start <= revocation.at <= end for revocation in history.revocations)
                or any(s.node in nodes and s.start <= end and s.end >= start for s in history.separations)
                or any(p.node == issue.node and p.start <= _end(issue) and p.end >= start for p in history.pauses)
                or history.disturbed(("clock", "key"), nodes, start, end)
            ):
                yield "refused as forged though genuine", (issue, attempt)


def created_once(history: History) -> Iterator[Finding]:
    """Of all first requests for an address one is told that it made the user, and none once another was answered."""
    requests: defaultdict[str, list[Issue]] = defaultdict(list)
    for issue in _handed_out(history):
        requests[issue.email].append(issue)
    for email, issues in requests.items():
        created = tuple(issue for issue in issues if issue.user_created)
        if len(created) > 1:
            yield f"{email} was created {len(created)} times", created
        elif created:
            earlier = min(issues, key=_end)
            if _end(earlier) < created[0].start:
                yield f"{email} was created when it was known", (earlier, created[0])


def one_person(history: History) -> Iterator[Finding]:
    """All tokens of an address name one user, no other address has this user, and the database says the same."""
    by_email: dict[str, tuple[int, Issue]] = {}
    by_id: dict[int, tuple[str, Issue]] = {}
    for issue in _handed_out(history):
        if (claims := read_claims(issue.token)) is None:
            continue
        user_id, earlier = by_email.setdefault(issue.email, (claims.user_id, issue))
        email, other = by_id.setdefault(claims.user_id, (issue.email, issue))
        if user_id != claims.user_id:
            yield f"{issue.email} is user {user_id} and user {claims.user_id}", (earlier, issue)
        elif email != issue.email:
            yield f"user {claims.user_id} is {email} and {issue.email}", (other, issue)
    if history.database is None:
        return
    people = history.database.people
    for what, times in (Counter(p.email for p in people) + Counter(str(p.id) for p in people)).items():
        if times > 1:
            yield f"the database has {what} {times} times", ()
    rows = {person.email: person.id for person in people}
    for email, (user_id, issue) in by_email.items():
        if rows.get(email) != user_id:
            yield f"{email} is user {user_id}, in the database {rows.get(email)}", (issue,)


def low_floor(history: History) -> Iterator[Finding]:
    """The floor stays as far behind the database's clock as it should, so it refuses and forgets nothing that lives.

    If a clock was moved, the floor may have been raised by it, and stays up: logins are lost, none is doubled.
    """
    moved = any("clock" in fault.kind for fault in history.faults)
    if history.run is None or history.database is None or moved:
        return
    ahead = int.from_bytes(history.floor[:4]) - (history.database.now - history.run.retention)
    if ahead > 1:
        yield f"the floor is {ahead} s too high", ()


RULES: tuple[Rule, ...] = (
    well_formed,
    known_answers,
    distinct,
    issued,
    single_use,
    right_person,
    kept,
    used_by_somebody,
    decided,
    within_its_life,
    revoked,
    not_expired_early,
    not_taken_for_forged,
    created_once,
    one_person,
    low_floor,
)
"""All there is to find. A violation bears the name of its rule."""


def _requests(history: History) -> Iterator[Issue | Redeem]:
    yield from history.unissued
    yield from _handed_out(history)
    for life in history.lives.values():
        yield from life.attempts


def _handed_out(history: History) -> Iterator[Issue]:
    yield from (life.issue for life in history.lives.values() if life.issue)
    yield from history.handed_out_again


def _end(request: Issue | Redeem) -> float:
    return inf if request.end is None else request.end


def _says_used(attempt: Redeem) -> bool:
    taken_back_before = attempt.way == "revoke" and attempt.status == 200 and not attempt.success
    return attempt.code == "token_consumed" or taken_back_before


def _decided(life: Life, attempt: Redeem, end: float) -> bool:
    return any(decision.node == attempt.node and attempt.start <= decision.at <= end for decision in life.decisions)


def _clock_is_moved(history: History, decision: Decision) -> bool:
    """Whether the node's clock was moved from a second before until `REQUEST_TIME` after, in which its process ran."""
    return any(
        -1 <= history.ran(decision.node, decision.pid, decision.at, moved) <= REQUEST_TIME
        for fault in history.faults
        if "clock" in fault.kind and fault.node in ("", decision.node)
        for moved in (fault.start, fault.end)
    )


def _reached(history: History, revocation: Revocation, decision: Decision) -> float:
    """When the revocation could first be seen by the node that decided; never, for a node of other keys.

    It is in the common directory, or in the own one of a node that was separated then; and who is separated afterwards
    reads something else for that time.
    """
    here = [s for s in history.separations if s.node == decision.node and s.start <= decision.at]
    if decision.node in revocation.nodes:
        return max((revocation.at, *(s.end for s in here if s.start >= revocation.at)))
    private = any(s.node in revocation.nodes and s.start <= revocation.at < s.end for s in history.separations)
    if private or not any(s.start <= revocation.at < s.end for s in here):
        return inf
    return max(s.end for s in here)


class Violation(NamedTuple):
    """What no correct service does, and the records that show it."""

    rule: str
    words: str
    records: tuple[AnyRecord, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. Its text is for people."""

    violations: list[Violation]
    counts: Counts

    def __str__(self) -> str:
        counts = self.counts
        lines = [
            f"requests      {counts.requests}, {counts.lost} answers lost",
            f"issued        {counts.issued}",
            f"redemptions   {counts.redemptions} attempted, {_listed(counts.successes)} succeeded",
            f"refusals      {_listed(counts.refusals)}",
            f"faults        {_listed(counts.faults)}",
            f"pauses        {counts.pauses}",
            f"revocations   {counts.revocations}",
            f"violations    {_listed(Counter(violation.rule for violation in self.violations))}",
        ]
        printed: Counter[str] = Counter()
        for violation in self.violations:
            printed[violation.rule] += 1
            if printed[violation.rule] <= SHOWN:
                lines.append(f"\n{violation.rule}: {violation.words}")
                lines.extend("    " + write_line(record).decode().rstrip() for record in violation.records)
        return "\n".join(lines)


def _listed(counter: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counter.most_common() if number) or "none"


def check(records: Iterable[AnyRecord], rules: tuple[Rule, ...] = RULES) -> Report:
    """What the rules find in a history, which is read once and may be long."""
    history = History(records)
    violations = [Violation(rule.__name__, words, involved) for rule in rules for words, involved in rule(history)]
    return Report(violations, history.counts)


def main() -> int:
    """Checks the file that is named on the command line: 0 if it shows no violation, else 1."""
    report = check(read_history(Path(sys.argv[1])))
    print(report)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
