"""Check whether a history is possible in a service that keeps its promises.

    python -m scripts.tools.proof.checker FILE

Each rule describes what a correct service never does, and finds it in a history. The checker uses the layout of tokens,
the responses and the promises, but nothing of how the promises are kept. If a history has two explanations, the
harmless one is assumed, so a finding has no harmless explanation.

The writer of a history follows two conventions. The kind of a `Fault` contains `clock` if it concerns a clock, and
`key` if it concerns the key directory. A fault without a node concerns every node.
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
    SignOut,
    read_history,
    write_line,
)

REVOCATION_TIME = 5.0
"""Seconds of running time within which a node notices that a key was revoked."""

REQUEST_TIME = 5.0
"""Seconds of running time after which no answered request is still being processed."""

CLOCK_ALLOWANCE = 60
"""Seconds by which a token may exceed the lifetime of tokens, because the clocks of two nodes differ."""

SHOWN = 10
"""Number of violations of a rule that are printed with their records."""


class Claims(NamedTuple):
    """The content of a token. `raw` is its key in the ledger."""

    raw: bytes
    expires_at: int
    user_id: int
    account_id: int


# 43 characters carry 258 bits, a token has 256. The two spare bits are zero, which leaves 16 possible last characters.
_form = re.compile(r"[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")


def read_claims(token: str) -> Claims | None:
    """Return the claims of a well-formed token, or None. The signature is not checked."""
    if not _form.fullmatch(token):
        return None
    raw = urlsafe_b64decode(token + "=")[:16]
    return Claims(raw, *struct.unpack_from(">III", raw))


@dataclass(slots=True)
class Life:
    """All records about one token. `issue` is None if no response contained it."""

    issue: Issue | None = None
    attempts: list[Redeem] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    @property
    def successes(self) -> list[Redeem]:
        """The attempts that signed in, returned the user, or revoked the token."""
        return [attempt for attempt in self.attempts if attempt.success]

    @property
    def unknown(self) -> list[Redeem]:
        """The attempts that may have consumed the token without a confirmation. All other refusals consume nothing."""
        return [a for a in self.attempts if a.status is None or a.code == "outcome_unknown"]


@dataclass(slots=True)
class Counts:
    """The number of records by kind."""

    requests: int = 0
    issued: int = 0
    redemptions: int = 0
    lost: int = 0
    pauses: int = 0
    revocations: int = 0
    sign_outs: int = 0
    successes: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


class History:
    """The records, indexed for the rules."""

    def __init__(self, records: Iterable[AnyRecord]) -> None:
        self.counts = Counts()
        self.runs: list[Run] = []
        self.run_is_first = False
        self.databases: list[Database] = []
        self.lives: defaultdict[str, Life] = defaultdict(Life)
        self.issued_again: list[Issue] = []
        self.unissued: list[Issue] = []
        self.faults: list[Fault] = []
        self.pauses: list[Pause] = []
        self.separations: list[Separation] = []
        self.revocations: list[Revocation] = []
        self.sign_outs_of: defaultdict[tuple[int, int], list[SignOut]] = defaultdict(list)
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
                    self.issued_again.append(record)
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
            case SignOut():
                self.counts.sign_outs += 1
                self.sign_outs_of[record.user_id, record.account_id].append(record)

    def _count_answer(self, record: Issue | Redeem, *, success: bool) -> None:
        self.counts.requests += 1
        if record.status is None:
            self.counts.lost += 1
        elif not success:
            self.counts.refusals[record.code or f"{record.status} without a code"] += 1

    def issued(self) -> Iterator[tuple[Issue, Claims, Life]]:
        """Yield every well-formed token that was issued."""
        for token, life in self.lives.items():
            if life.issue and (claims := read_claims(token)):
                yield life.issue, claims, life

    def ran(self, node: str, pid: int, since: float, until: float) -> float:
        """Return for how many seconds of the span a process was not paused; negative if the span has not begun."""
        paused, seen = 0.0, since
        for pause in self._pauses_of.get((node, pid), ()):
            paused += max(0.0, min(pause.end, until) - max(pause.start, seen))
            seen = max(seen, pause.end)
        return until - since - paused

    def disturbed(self, kinds: tuple[str, ...], nodes: tuple[str, ...], start: float, end: float) -> bool:
        """Return whether a fault of these kinds overlaps the span at one of the nodes."""
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
    """The history is consistent: one `Run` first, one `Database`, no end before its start, no success without response.

    The results of the other rules are not valid for a history that violates this one.
    """
    if len(history.runs) != 1 or not history.run_is_first:
        yield "a history must begin with its only run", tuple(history.runs)
    if len(history.databases) != 1:
        yield "a history must have one state of the database", tuple(history.databases)
    spans: list[Fault | Pause | Separation] = [*history.faults, *history.pauses, *history.separations]
    for span in spans:
        if span.end < span.start:
            yield "the end is before the start", (span,)
    for request in _requests(history):
        if request.end is not None and request.end < request.start:
            yield "the response is before the request", (request,)
        succeeded = request.success if isinstance(request, Redeem) else bool(request.token)
        if succeeded and (request.end is None or request.status is None):
            yield "a success without a response", (request,)


def known_answers(history: History) -> Iterator[Finding]:
    """A server error is always a 503 with a code. Any other 5xx leaves the outcome open."""
    for request in _requests(history):
        if request.status is not None and request.status >= 500 and request.status != 503:
            yield f"answered {request.status}", (request,)


def distinct(history: History) -> Iterator[Finding]:
    """No two responses contain the same token: the second one would be refused as used.

    With a nonce of 32 bits, two tokens of the same user, account and second could be equal, but this is not to be
    expected.
    """
    for issue in history.issued_again:
        first = history.lives[issue.token].issue
        yield "a token was issued twice", (first, issue) if first else (issue,)


def issued(history: History) -> Iterator[Finding]:
    """Only tokens that were issued in this history are found genuine or redeemed.

    A token whose response was lost is unknown to every client, so no client presents it.
    """
    for life in history.lives.values():
        good: tuple[AnyRecord, ...] = (*life.decisions, *life.successes)
        if life.issue is None and good:
            yield "a token that was not issued is accepted", good


def single_use(history: History) -> Iterator[Finding]:
    """A token is redeemed once: by a browser, by a frontend that consumes it, or by revoking it."""
    for life in history.lives.values():
        if len(successes := life.successes) > 1:
            yield f"a token was redeemed {len(successes)} times", tuple(successes)


def right_person(history: History) -> Iterator[Finding]:
    """A token contains the account that issued it, and signs in its user to that account.

    Otherwise a token of one account would open another, or sign in as another user.
    """
    for token, life in history.lives.items():
        if life.issue is None:
            continue
        claims = read_claims(token)
        if claims is None:
            yield "the issued token is not well-formed", (life.issue,)
            continue
        if claims.account_id != life.issue.account_id:
            yield f"the token names account {claims.account_id}", (life.issue,)
        for success in life.successes:
            if success.way != "revoke" and (success.user_id, success.account_id) != (claims.user_id, claims.account_id):
                yield f"the token names user {claims.user_id} in account {claims.account_id}", (life.issue, success)


def kept(history: History) -> Iterator[Finding]:
    """Every token that a response reports as used is finally in the ledger, or below the floor, where all are refused.

    A login is answered only after its row is durable. The same holds for a refusal as used.
    """
    if history.database is None:
        return
    for _, claims, life in history.issued():
        if claims.raw in history.consumed or claims.raw < history.floor:
            continue
        if reports := tuple(attempt for attempt in life.attempts if attempt.success or _reports_used(attempt)):
            yield "a used token is not in the database", reports


def use_explained(history: History) -> Iterator[Finding]:
    """If a response reports a token as used, another request can have consumed it. Otherwise a login was lost.

    That request is the success, if there is one: the token was unused when it succeeded. Otherwise it is an attempt
    without a response or with an unknown outcome. It may have consumed the token at any later time, but not before it
    began. Refusals, including 503 `unavailable` and `overloaded`, consume nothing.

    In the same way, every row of the ledger needs a request that can have inserted it. A token that was not issued has
    no row.
    """
    explained = set()
    for _, claims, life in history.issued():
        consumers = life.successes or life.unknown
        if consumers:
            explained.add(claims.raw)
        began = min((consumer.start for consumer in consumers), default=inf)
        for attempt in life.attempts:
            if _reports_used(attempt) and began > _end(attempt):
                yield "reported as used before any request can have consumed it", (attempt, *consumers)
    if unexplained := history.consumed - explained:
        refused: dict[bytes, tuple[AnyRecord, ...]] = {
            claims.raw: (issue, *life.attempts) for issue, claims, life in history.issued()
        }
        for row in unexplained:
            yield f"no request can have consumed {row.hex()}", refused.get(row, ())


def decided(history: History) -> Iterator[Finding]:
    """A token is consumed only if the node that got the request checked the token during that request.

    If only the row proves that a token was consumed, one of the attempts with an unknown outcome consumed it, after any
    time.
    """
    for _, claims, life in history.issued():
        for success in life.successes:
            if not _decided(life, success, _end(success)):
                yield "a success without a decision", (success, *life.decisions)
        unknown = () if life.successes or claims.raw not in history.consumed else tuple(life.unknown)
        if unknown and not any(_decided(life, attempt, inf) for attempt in unknown):
            yield "consumed without a decision", (*unknown, *life.decisions)


def within_its_life(history: History) -> Iterator[Finding]:
    """A node accepts no token a second or more after its expiry, and none that exceeds the lifetime of tokens.

    The time is that of the check, on the clock of the node that made it, correct or not. Checks near a change of that
    clock are left out, because a request may read the clock more than once. The success may come later, because then
    the row counts.
    """
    longest = history.run.token_ttl + CLOCK_ALLOWANCE if history.run else inf
    for _, claims, life in history.issued():
        for decision in life.decisions:
            left = claims.expires_at - decision.now
            if not -1 < left <= longest and not _clock_is_moved(history, decision):
                yield f"accepted {left} s before its expiry", (decision,)


def revoked(history: History) -> Iterator[Finding]:
    """No node accepts a token more than 5 s after its key was revoked.

    Only the time in which the process runs counts: a paused process reads no keys and sends no responses. A node that
    was separated notices the revocation within 5 s after its return. Nodes that never read this directory are not
    concerned.
    """
    for _, _, life in history.issued():
        for decision in life.decisions:
            for revocation in history.revocations_of.get(decision.key_id, ()):
                reached = _reached(history, revocation, decision)
                lag = history.ran(decision.node, decision.pid, reached, decision.at)
                if lag > REVOCATION_TIME:
                    yield f"accepted {lag:.3f} s after its key was revoked", (revocation, decision)


def ended(history: History) -> Iterator[Finding]:
    """No link signs in if its user signed out everywhere in the account after it was issued.

    Clocks must have been correct, because links and sign-outs are dated. The session that signs out must have been
    valid. So sign-outs are left out if its key may have been revoked, or another sign-out may have ended it.
    """
    for issue, claims, life in history.issued():
        for sign_out in history.sign_outs_of.get((claims.user_id, claims.account_id), ()):
            if sign_out.status != 204 or sign_out.end is None or _end(issue) > sign_out.start:
                continue
            nodes = (issue.node, sign_out.node)
            doubtful = (
                history.disturbed(("clock",), nodes, issue.start - 1, sign_out.end + 1)
                or any(sign_out.began <= r.at + REVOCATION_TIME and r.at <= sign_out.end for r in history.revocations)
                or any(s.start <= sign_out.end and s.end >= sign_out.began for s in history.separations)
                or any(
                    other is not sign_out and other.start <= sign_out.end and _end(other) >= sign_out.began
                    for other in history.sign_outs_of[claims.user_id, claims.account_id]
                )
            )
            for success in life.successes:
                if success.way != "revoke" and success.start > sign_out.end and not doubtful:
                    yield "a link signs in after its user signed out everywhere", (issue, sign_out, success)


def not_expired_early(history: History) -> Iterator[Finding]:
    """A valid token is not refused as expired, if the clocks of both nodes were correct.

    Two seconds are allowed: the expiry is rounded down to a second, and the machine's own clock may drift by one. The
    floor only rises, so a token above the final floor was never below it. Tokens from before a sign-out are left out.
    """
    if history.run is None or history.database is None:
        return
    for issue, claims, life in history.issued():
        sign_outs = history.sign_outs_of.get((claims.user_id, claims.account_id), ())
        for attempt in life.attempts:
            if (
                attempt.code == "token_expired"
                and not any(s.start <= _end(attempt) and _end(s) >= issue.start for s in sign_outs)
                and _end(attempt) < issue.start + history.run.token_ttl - 2
                and claims.raw >= history.floor
                and not history.disturbed(("clock",), (issue.node,), issue.start - 1, _end(issue) + 1)
                and not history.disturbed(("clock",), (attempt.node,), attempt.start - 1, _end(attempt) + 1)
            ):
                yield "refused as expired before its expiry", (issue, attempt)


def not_taken_for_forged(history: History) -> Iterator[Finding]:
    """A genuine token is not refused as forged: rotating keys under load loses no login.

    Revoked keys, separated or broken key directories and changed clocks may cause such a refusal, so attempts near
    these are left out. So are tokens from a node that was paused before issuing, because it may have missed a rotation.
    Only browsers are checked: to an API token, the tokens of other accounts look forged.
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
                yield "a genuine token was refused as forged", (issue, attempt)


def created_once(history: History) -> Iterator[Finding]:
    """At most one first request for an address reports a new user, and none does after another one was answered."""
    requests: defaultdict[str, list[Issue]] = defaultdict(list)
    for issue in _issued(history):
        requests[issue.email].append(issue)
    for email, issues in requests.items():
        created = tuple(issue for issue in issues if issue.user_created)
        if len(created) > 1:
            yield f"{email} was created {len(created)} times", created
        elif created:
            earlier = min(issues, key=_end)
            if _end(earlier) < created[0].start:
                yield f"{email} was created although it existed", (earlier, created[0])


def one_person(history: History) -> Iterator[Finding]:
    """All tokens of an address name one user, no other address has this user, and the database agrees."""
    by_email: dict[str, tuple[int, Issue]] = {}
    by_id: dict[int, tuple[str, Issue]] = {}
    for issue in _issued(history):
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
    """The floor stays as far behind the database's clock as intended, so no valid token is refused or purged.

    If a clock was changed, it may have raised the floor, which then stays up. Logins are lost, but no token is used
    twice.
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
    use_explained,
    decided,
    within_its_life,
    revoked,
    ended,
    not_expired_early,
    not_taken_for_forged,
    created_once,
    one_person,
    low_floor,
)
"""All rules. A violation has the name of its rule."""


def _requests(history: History) -> Iterator[Issue | Redeem]:
    yield from history.unissued
    yield from _issued(history)
    for life in history.lives.values():
        yield from life.attempts


def _issued(history: History) -> Iterator[Issue]:
    yield from (life.issue for life in history.lives.values() if life.issue)
    yield from history.issued_again


def _end(request: Issue | Redeem | SignOut) -> float:
    return inf if request.end is None else request.end


def _reports_used(attempt: Redeem) -> bool:
    revoked_before = attempt.way == "revoke" and attempt.status == 200 and not attempt.success
    return attempt.code == "token_consumed" or revoked_before


def _decided(life: Life, attempt: Redeem, end: float) -> bool:
    return any(decision.node == attempt.node and attempt.start <= decision.at <= end for decision in life.decisions)


def _clock_is_moved(history: History, decision: Decision) -> bool:
    """Return whether the node's clock was changed between 1 s before and `REQUEST_TIME` after, in running time."""
    return any(
        -1 <= history.ran(decision.node, decision.pid, decision.at, moved) <= REQUEST_TIME
        for fault in history.faults
        if "clock" in fault.kind and fault.node in ("", decision.node)
        for moved in (fault.start, fault.end)
    )


def _reached(history: History, revocation: Revocation, decision: Decision) -> float:
    """Return when the deciding node could first see the revocation: infinity if it reads other keys.

    A revocation is in the common directory, or in the own directory of a node that was separated then. A node that is
    separated afterwards does not see it until it returns.
    """
    here = [s for s in history.separations if s.node == decision.node and s.start <= decision.at]
    if decision.node in revocation.nodes:
        return max((revocation.at, *(s.end for s in here if s.start >= revocation.at)))
    private = any(s.node in revocation.nodes and s.start <= revocation.at < s.end for s in history.separations)
    if private or not any(s.start <= revocation.at < s.end for s in here):
        return inf
    return max(s.end for s in here)


class Violation(NamedTuple):
    """Something that no correct service does, with the records that show it."""

    rule: str
    words: str
    records: tuple[AnyRecord, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The violations and counts. `str` makes it readable."""

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
            f"sign-outs     {counts.sign_outs}",
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
    """Return what the rules find in a history. The records are read once, because there may be many."""
    history = History(records)
    violations = [Violation(rule.__name__, words, involved) for rule in rules for words, involved in rule(history)]
    return Report(violations, history.counts)


def main() -> int:
    """Check the file that is named on the command line. Return 0 if it shows no violation, otherwise 1."""
    report = check(read_history(Path(sys.argv[1])))
    print(report)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
