"""The proof's checker on random histories of a model of the service."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
from tests.support.proof_edits import VIOLATIONS
from tests.support.proof_history import HISTORY, TTL, Edit, change_database, edited, found, make_token

MODEL_WALL = 1_000_000_000
Fate = Literal["answered", "lost", "lost but done", "unknown", "unknown but done", "unavailable"]


@dataclass
class Node:
    """A node with one process. It applies a key's revocation after running for the seconds in `unread`."""

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
    """A correct service: users, consumed claims, keys and clocks. It records its own history."""

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
        """Advance the time, and apply delayed writes to the database."""
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
        """Revoke the signing key. Nodes that read the directory sign with a new key at once."""
        key = self.keys[-1]
        self.keys.append(f"key {len(self.keys)}")
        readers = [node for node in self.nodes.values() if node.separated_since is None]
        self.records.append(Revocation(at=self.at, key_id=key, nodes=tuple(node.name for node in readers)))
        for node in readers:
            node.known = len(self.keys)
        for node in self.nodes.values():
            node.unread[key] = 5.0

    def kill(self, name: str) -> None:
        """Kill and restart a node, which then reads its key directory."""
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

    def repair(self) -> None:
        for name, node in self.nodes.items():
            self.move_clock(name, 0)
            if node.paused_since is not None:
                self.pause(name)
            if node.separated_since is not None:
                self.separate(name)

    def end(self) -> list[AnyRecord]:
        """Repair all faults, and return the complete history."""
        self.repair()
        self.wait(1)
        database = Database(
            consumed=tuple(claims.hex() for claims in self.consumed),
            floor=self.floor.hex(),
            people=tuple(Person(user_id, email) for email, user_id in self.people.items()),
            now=MODEL_WALL + int(self.at),
        )
        return [Run(seed=0, database="sqlite", token_ttl=TTL), *self.records, database]


def model_operations(*, clocks: bool) -> st.SearchStrategy[list[Callable[[Model], None]]]:
    """Return a strategy for lists of operations. Requests take time before and after their effect, so they overlap."""
    names, spans = st.sampled_from("xyz"), st.floats(0, 3)
    fates = st.sampled_from([*["answered"] * 12, *get_args(Fate)])

    def op(method: Callable[..., None], *values: st.SearchStrategy[Any]) -> st.SearchStrategy[Callable[[Model], None]]:
        return st.tuples(*values).map(lambda drawn: lambda model: method(model, *drawn))

    common = [
        op(Model.issue, names, st.integers(0, 3), st.integers(1, 2), spans, spans, fates),
        op(Model.redeem, names, st.sampled_from(get_args(Way)), st.integers(0, 4), spans, spans, fates),
        op(Model.redeem, names, st.just("browser"), st.integers(1, 2), spans, spans, st.just("answered")),
        op(Model.wait, st.floats(0.1, 6)),
    ]
    rare = [
        op(Model.wait, st.sampled_from([60, TTL, 4000])),
        op(Model.pause, names),
        op(Model.separate, names),
        op(Model.revoke),
        op(Model.kill, names),
        op(Model.purge),
    ]
    if clocks:
        rare.append(op(Model.move_clock, names, st.sampled_from([-5000, -100, -1, 0, 1, 100, 5000])))
    one = st.sampled_from([*common * 8, *rare, *[op(Model.repair)] * 2]).flatmap(
        lambda chosen: chosen
    )  # one_of() would ignore the repetitions
    return st.lists(one, min_size=30, max_size=60)


# On a busy machine, slow examples are not failures.
without_deadline = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run_model(operations: list[Callable[[Model], None]]) -> list[AnyRecord]:
    model = Model()
    for operation in operations:
        operation(model)
    return model.end()


@pytest.mark.slow
@without_deadline
@given(model_operations(clocks=True))
def test_a_correct_service_has_no_violations(operations: list[Callable[[Model], None]]) -> None:
    assert check(run_model(operations)).violations == []


@pytest.mark.slow
@without_deadline
@given(model_operations(clocks=False), st.sampled_from(VIOLATIONS))
def test_a_planted_violation_is_found_in_a_random_history(
    operations: list[Callable[[Model], None]], violation: tuple[str, str, list[Edit]]
) -> None:
    rule, _, edits = violation
    run, *others, database = run_model(operations)
    assert isinstance(database, Database)
    joined = change_database(
        consumed=lambda rows: rows + database.consumed, people=lambda people: database.people + people
    )
    assert found(edited([run, *others, *joined(HISTORY[1:])], edits)) == {rule}
