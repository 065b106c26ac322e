"""What an integration says about a person: one spelling for each address, and a rule named for whatever is wrong."""

import json
import re
import unicodedata

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sso_service import people
from sso_service.errors import FieldError
from sso_service.people import Person, normalise_email
from tests.support.addresses import ADDRESSES
from tests.support.data import JANE

NAMES = ["first_name", "last_name"]
FIELDS = ["email", *NAMES]
RULES = ["required", "type", "max_length", "characters", "email"]

LONGEST = f"{'a' * 64}@{'.'.join(['b' * 61] * 3)}.com"
"""An address of 254 characters, the most that there may be."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([*JANE.values(), "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def read_person(fields: dict[str, object]) -> Person:
    """What a stranger goes through: the fields, then the address."""
    read = people.read_person(fields)
    return msgspec.structs.replace(read, email=normalise_email(read.email))


def person(**fields: object) -> dict[str, object]:
    return {**JANE, **fields}


def rule_broken_by(fields: dict[str, object]) -> tuple[str, str]:
    with pytest.raises(FieldError) as caught:
        read_person(fields)
    return caught.value.field, caught.value.rule


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_as", "known_as"),
    [
        ("jane.doe@example.com", "jane.doe@example.com"),
        ("Jane.DOE@Example.COM", "jane.doe@example.com"),
        ("jane@bücher.example", "jane@xn--bcher-kva.example"),
        ("JANE@BÜCHER.example", "jane@xn--bcher-kva.example"),
        ("jane@bu\u0308cher.example", "jane@xn--bcher-kva.example"),  # the umlaut as two characters
        ("jane@XN--BCHER-KVA.example", "jane@xn--bcher-kva.example"),
        ("jane@ｅxample.com", "jane@example.com"),  # noqa: RUF001 - a letter of full width
        ("jane@intranet.local", "jane@intranet.local"),
        ("jane@mail.intranet.LOCAL", "jane@mail.intranet.local"),
        ("jane@intranet.internal", "jane@intranet.internal"),
        ("jane@intranet.corp", "jane@intranet.corp"),
        ("jane@intranet.test", "jane@intranet.test"),
        ("jane@bücher.local", "jane@xn--bcher-kva.local"),
        ("o'neil+studio_1@example.com", "o'neil+studio_1@example.com"),
        ("1@example.com", "1@example.com"),
        (LONGEST, LONGEST),
    ],
)
def test_an_address_has_one_spelling_whatever_way_it_is_given(given_as: str, known_as: str) -> None:
    assert normalise_email(given_as) == known_as
    assert normalise_email(known_as) == known_as
    assert read_person(person(email=given_as)) == Person(known_as, "Jane", "Doe")


@pytest.mark.parametrize(
    "email",
    [
        "jane",
        "jane@",
        "@example.com",
        "jane.example.com",
        "jane@@example.com",
        "jane@doe@example.com",
        "jane@example",
        "jane@localhost",
        "jane@local",
        "jane@corp",
        "jane@internal",
        "jane@test",
        "jäne@example.com",
        "jаne@example.com",  # noqa: RUF001 - a Cyrillic letter that looks like the Latin one
        '"jane doe"@example.com',
        '"jane"@example.com',
        "jane@[127.0.0.1]",
        "jane@[IPv6:::1]",
        "jane@127.0.0.1",
        "jane@example.com.",
        "jane@.example.com",
        "jane@example..com",
        "jane@-example.com",
        "jane..doe@example.com",
        ".jane@example.com",
        "jane.@example.com",
        "jane doe@example.com",
        "jane(comment)@example.com",
        "Jane <jane@example.com>",
        "mailto:jane@example.com,john@example.com",
        "jane@example.com,john@example.com",
        f"jane@{'b' * 64}.com",
    ],
)
def test_what_is_not_an_address_is_refused(email: str) -> None:
    assert rule_broken_by(person(email=email)) == ("email", "email")
    with pytest.raises(FieldError):
        normalise_email(email)


def test_an_address_that_grows_too_long_in_ascii_is_refused() -> None:
    email = f"jane@{'ü.' * 40}example"  # each of these labels takes seven characters
    field, rule = rule_broken_by(person(email=email))
    assert field == "email"
    assert rule in {"email", "max_length"}


WELL_FORMED = re.compile(
    r"(?=.{3,254}\Z)[a-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[a-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
    r"@([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
)
"""A dot-atom (RFC 5322 section 3.2.3) of ASCII in lower case, and a host name of at least two labels (RFC 1123)."""

# Letters of two cases, widths, forms or readings; ligatures; dots that are none; joiners.
LETTERS = "abcXYZ019-äÖßéÅ\u0301\u0308ſKﬁＡｅ．。İıΣςσЖфאبｶ例え文テ\u200d\u200c\u00ad·"  # noqa: RUF001 - meant to confuse
labels = st.text(LETTERS, min_size=1, max_size=6)
domains = st.lists(labels | labels.map("xn--{}".format), min_size=1, max_size=3).map(".".join)
addresses = st.emails() | ADDRESSES | st.builds("Jane@{}{}".format, domains, st.sampled_from([".test", ".de", ".рф"]))


@given(addresses | st.text())
def test_a_normalised_address_is_well_formed_ascii_and_normalising_it_again_changes_nothing(email: str) -> None:
    try:
        once = normalise_email(email)
    except FieldError:
        return
    assert WELL_FORMED.fullmatch(once)
    assert normalise_email(once) == once
    if email.isascii():  # so that who is known is found without asking the library
        assert once == email.lower()


@given(addresses)
def test_all_spellings_of_an_address_are_normalised_to_one(email: str) -> None:
    try:
        once = normalise_email(email)
    except FieldError:
        return
    # Of each character by itself: Python looks at a whole word to choose between the two small sigmas.
    spellings = [email.swapcase() if email.isascii() else "".join(letter.lower() for letter in email)]
    spellings += [unicodedata.normalize(form, email) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    assert {normalise_email(spelling) for spelling in spellings} == {once}


@given(
    addresses, st.integers(0, 100), st.sampled_from([*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\ud800"])
)
def test_no_address_has_a_control_character_wherever_it_stands(email: str, position: int, character: str) -> None:
    altered = email[:position] + character + email[position:]
    with pytest.raises(FieldError):
        normalise_email(altered)
    assert rule_broken_by(person(email=altered)) in {("email", "characters"), ("email", "max_length")}


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [None, "", " ", "\t \r\n", "\u00a0\u2003"])
def test_a_field_that_is_null_or_blank_is_missing(field: str, value: object) -> None:
    assert rule_broken_by(person(**{field: value})) == (field, "required")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_absent_is_missing(field: str) -> None:
    assert rule_broken_by({name: value for name, value in JANE.items() if name != field}) == (field, "required")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [0, 1, 1.5, True, False, [], ["Jane"], {}, {"email": "jane@example.com"}])
def test_a_field_of_another_type_is_refused_and_not_taken_for_missing(field: str, value: object) -> None:
    assert rule_broken_by(person(**{field: value})) == (field, "type")


@pytest.mark.parametrize("field", NAMES)
@pytest.mark.parametrize("letter", ["x", "é", "李", "😀"])
def test_a_name_has_a_hundred_characters_at_most(field: str, letter: str) -> None:
    assert getattr(read_person(person(**{field: letter * 100})), field) == letter * 100
    assert rule_broken_by(person(**{field: letter * 101})) == (field, "max_length")


def test_an_address_has_254_characters_at_most() -> None:
    assert len(LONGEST) == 254
    assert read_person(person(email=LONGEST)).email == LONGEST
    assert rule_broken_by(person(email=f"b{LONGEST}")) == ("email", "max_length")
    assert rule_broken_by(person(email="x" * 255)) == ("email", "max_length")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "character", ["\0", "\x01", "\t", "\n", "\r", "\x1b", "\x1f", "\x7f", "\x80", "\x85", "\x9f", "\udabc"]
)
def test_control_characters_and_lone_surrogates_are_refused_wherever_they_stand(field: str, character: str) -> None:
    value = JANE[field]
    for altered in (character + value, value[:2] + character + value[2:], value + character):
        assert rule_broken_by(person(**{field: altered})) == (field, "characters"), ascii(altered)


@pytest.mark.parametrize("name", ["Zoë", "Jean-Luc", "O'Neil", "李", "Anna Maria", "محمد", "Ștefan", "👩‍🚀", "x"])
def test_any_other_text_is_a_name(name: str) -> None:
    read = read_person(person(first_name=name, last_name=name))
    assert (read.first_name, read.last_name) == (name, name)


def test_what_is_missing_is_reported_before_what_is_wrong_and_in_the_order_of_the_fields() -> None:
    assert rule_broken_by({}) == ("email", "required")
    assert rule_broken_by({"email": "jane@example.com"}) == ("first_name", "required")
    assert rule_broken_by({"last_name": "Doe"}) == ("email", "required")
    for wrong in (5, "x" * 255, "\0", "not an address"):
        assert rule_broken_by(person(email=wrong, last_name=None)) == ("last_name", "required")
    for wrong in (5, "x" * 255, "\0"):
        assert rule_broken_by(person(first_name=wrong, last_name=" ")) == ("last_name", "required")


def test_fields_that_are_not_known_are_ignored() -> None:
    extra = {"role": "admin", "account_id": 1, "Email": "john@example.com", "": None, "note": "\0\ud800", "x": [[{}]]}
    assert read_person(person(**extra)) == Person("jane.doe@example.com", "Jane", "Doe")


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, json_values)))
def test_any_object_makes_a_storable_person_or_names_a_field_and_a_rule(fields: dict[str, object]) -> None:
    try:
        read = read_person(fields)
    except FieldError as error:
        assert (error.field in FIELDS, error.rule in RULES) == (True, True)  # noqa: PT017 - it may as well be good
        return
    assert "@" in read.email
    for name in (read.first_name, read.last_name):
        assert 0 < len(name) <= 100
        assert "\0" not in name
        json.dumps(name, ensure_ascii=False).encode()  # no lone surrogate
