"""The judge of histories: it finds every violation that is planted, under its name, and none in what is right."""

import pytest
from msgspec.structs import replace

from scripts.tools.proof.checker import RULES, check, read_claims
from tests.support.proof_history import (
    CALM_DECISION,
    FIRST_DECISION,
    FIRST_LOGIN,
    FORGED,
    HISTORY,
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
from tests.support.proof_plants import EXCUSES, PLANTS


def test_a_token_is_read_as_the_design_lays_it_out() -> None:
    claims = read_claims("cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA")
    assert claims == (bytes.fromhex("713fb300000000010000007bdeadbeef"), 1_900_000_000, 1, 123)


@pytest.mark.parametrize("token", ["", "A" * 42, "A" * 44, "A" * 42 + "B", "A" * 42 + "=", "+" + "A" * 42])
def test_nothing_is_read_from_what_has_not_the_form_of_a_token(token: str) -> None:
    assert read_claims(token) is None


# --- a history by hand -----------------------------------------------------------------------------------------------
# Two nodes with one key directory, and "c", which at times has its own. The times are seconds after START.


# --- what is done to it ----------------------------------------------------------------------------------------------


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
    assert violation.words.startswith("no request can have consumed")


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
