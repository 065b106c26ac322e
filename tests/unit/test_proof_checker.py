"""The checker of histories finds every planted violation under the name of its rule, and no other."""

import pytest
from msgspec.structs import replace

from scripts.tools.proof.checker import RULES, check, read_claims
from tests.support.proof_edits import HARMLESS_CHANGES, VIOLATIONS
from tests.support.proof_history import (
    FIRST_DECISION,
    FIRST_LOGIN,
    FORGED,
    HISTORY,
    NEW_KEY_DECISION,
    REVOCATION,
    UNUSED,
    Edit,
    change,
    drop,
    edited,
    found,
    redeem,
    row_added,
)


def test_the_claims_of_a_token_are_read_in_the_documented_layout() -> None:
    claims = read_claims("cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA")
    assert claims == (bytes.fromhex("713fb300000000010000007bdeadbeef"), 1_900_000_000, 1, 123)


@pytest.mark.parametrize("token", ["", "A" * 42, "A" * 44, "A" * 42 + "B", "A" * 42 + "=", "+" + "A" * 42])
def test_a_malformed_token_has_no_claims(token: str) -> None:
    assert read_claims(token) is None


# --- edits of a hand-written history ---------------------------------------------------------------------------------


def test_a_correct_history_has_no_violations() -> None:
    assert check(HISTORY).violations == []


@pytest.mark.parametrize(("rule", "edits"), [pytest.param(rule, edits, id=name) for rule, name, edits in VIOLATIONS])
def test_a_planted_violation_is_found_by_exactly_one_rule(rule: str, edits: list[Edit]) -> None:
    assert found(edited(HISTORY, edits)) == {rule}


@pytest.mark.parametrize("edits", [pytest.param(edits, id=name) for name, edits in HARMLESS_CHANGES])
def test_a_harmless_change_is_not_a_violation(edits: list[Edit]) -> None:
    assert edited(HISTORY, edits) != HISTORY
    assert found(edited(HISTORY, edits)) == set()


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, _, _ in VIOLATIONS} == {rule.__name__ for rule in RULES}


def test_a_violation_contains_its_records() -> None:
    (violation,) = check(edited(HISTORY, [drop(FIRST_DECISION)])).violations
    assert violation.records[0] == FIRST_LOGIN
    (violation,) = check(edited(HISTORY, [change(NEW_KEY_DECISION, key_id="old")])).violations
    assert violation.records == (REVOCATION, replace(NEW_KEY_DECISION, key_id="old"))
    (violation,) = check(edited(HISTORY, [row_added(FORGED), row_added(UNUSED)])).violations[:1]
    assert violation.words.startswith("no request can have consumed")


def test_the_report_counts_the_records_of_a_history() -> None:
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


def test_the_report_shows_ten_violations_of_a_rule() -> None:
    failures = [redeem(at, UNUSED, "browser", status=500) for at in range(20, 50)]
    report = str(check([*HISTORY, *failures]))
    assert "violations    30 known_answers" in report
    assert report.count("answered 500") == 10
