"""People as integrations send them: one normalised form for each address, and a rule for each invalid field."""

import json
import re
import unicodedata

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sso_service import people
from sso_service.errors import FieldError
from sso_service.people import Person, check_name, normalise_email
from tests.support.addresses import ADDRESSES
from tests.support.data import JANE

NAMES = ["first_name", "last_name"]
FIELDS = ["email", *NAMES]
RULES = ["required", "type", "max_length", "characters", "email"]

LONGEST = f"{'a' * 64}@{'.'.join(['b' * 61] * 3)}.com"
"""An address of the maximum length, 254 characters."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([*JANE.values(), "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def read_person(fields: dict[str, object]) -> Person:
    """Validate as for an unknown person: the fields first, then the address."""
    read = people.read_person(fields)
    return msgspec.structs.replace(read, email=normalise_email(read.email))


def person(**fields: object) -> dict[str, object]:
    return {**JANE, **fields}


def violated_rule(fields: dict[str, object]) -> tuple[str, str]:
    with pytest.raises(FieldError) as caught:
        read_person(fields)
    return caught.value.field, caught.value.rule


# --- Addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "normal_form"),
    [
        ("jane.doe@example.com", "jane.doe@example.com"),
        ("Jane.DOE@Example.COM", "jane.doe@example.com"),
        ("jane@bücher.example", "jane@xn--bcher-kva.example"),
        ("JANE@BÜCHER.example", "jane@xn--bcher-kva.example"),
        ("jane@bu\u0308cher.example", "jane@xn--bcher-kva.example"),  # the umlaut as two characters
        ("jane@XN--BCHER-KVA.example", "jane@xn--bcher-kva.example"),
        ("jane@STRAßE.example", "jane@xn--strae-oqa.example"),
        ("jane@ΟΔΟΣ.example", "jane@xn--pxavbq.example"),
        ("jane@例え.jp", "jane@xn--r8jz45g.jp"),
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
def test_all_forms_of_an_address_are_normalised_to_one(address: str, normal_form: str) -> None:
    assert normalise_email(address) == normal_form
    assert normalise_email(normal_form) == normal_form
    assert read_person(person(email=address)) == Person(normal_form, "Jane", "Doe")


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
        *("jane@xn--", "jane@xn--a.com", "jane@xn--\u00fc.com"),
    ],
)
def test_a_text_that_is_not_an_address_is_refused(email: str) -> None:
    assert violated_rule(person(email=email)) == ("email", "email")
    with pytest.raises(FieldError):
        normalise_email(email)


@pytest.mark.parametrize(
    "domain",
    [
        *("ｅxample.com", "ⓔxample.com", "𝐞xample.com", "exampleﬁ.com", "ⅷ.example", "ªb.example"),  # noqa: RUF001
        *("\u212aelvin.example", "\u212bngstr\u00f6m.example", "\u017ftudio.example", "ｶﾅ.example"),
        *("example。com", "example．com", "example｡com", "bücher。example"),  # noqa: RUF001 - other full stops
        *("ex\u00adample.com", "ex\u200bample.com", "ex\u2060ample.com", "ex\ufe0fample.com", "ex\u034fample.com"),
        *("exam㎏ple.com", "e\u0345xample.com", "½.example", "℀.example", "x².example"),
    ],
)
def test_a_domain_that_compatibility_mapping_changes_is_refused(domain: str) -> None:
    assert violated_rule(person(email=f"jane@{domain}")) == ("email", "email")


def test_an_address_that_becomes_too_long_in_ascii_is_refused() -> None:
    email = f"jane@{'ü.' * 40}example"  # each of these labels has seven characters in ASCII
    field, rule = violated_rule(person(email=email))
    assert field == "email"
    assert rule in {"email", "max_length"}


WELL_FORMED = re.compile(
    r"(?=.{3,254}\Z)[a-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[a-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
    r"@([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
)
"""A dot-atom (RFC 5322 section 3.2.3) in lower-case ASCII, and a host name of at least two labels (RFC 1123)."""

# Letters with several cases, widths, forms or readings; ligatures; characters similar to dots; joiners.
LETTERS = "abcXYZ019-äÖßéÅ\u0301\u0308ſKﬁＡｅ．。İıΣςσЖфאبｶ例え文テ\u200d\u200c\u00ad·"  # noqa: RUF001 - meant to confuse
labels = st.text(LETTERS, min_size=1, max_size=6)
domains = st.lists(labels | labels.map("xn--{}".format), min_size=1, max_size=3).map(".".join)
addresses = st.emails() | ADDRESSES | st.builds("Jane@{}{}".format, domains, st.sampled_from([".test", ".de", ".рф"]))


@given(addresses | st.text())
def test_a_normalised_address_is_ascii_and_normalising_is_idempotent(email: str) -> None:
    try:
        once = normalise_email(email)
    except FieldError:
        return
    assert WELL_FORMED.fullmatch(once)
    assert normalise_email(once) == once
    if email.isascii():  # so that a known user is found without calling the library
        assert once == email.lower()


@given(addresses)
def test_upper_lower_and_decomposed_spellings_have_one_normal_form(email: str) -> None:
    try:
        once = normalise_email(email)
    except FieldError:
        return
    # Each character by itself, because Python chooses between the two small sigmas by their context.
    spellings = [email.swapcase() if email.isascii() else "".join(letter.lower() for letter in email)]
    spellings += [unicodedata.normalize(form, email) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    assert {normalise_email(spelling) for spelling in spellings} == {once}


@given(
    addresses, st.integers(0, 100), st.sampled_from([*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\ud800"])
)
def test_an_address_with_a_control_character_anywhere_is_refused(email: str, position: int, character: str) -> None:
    altered = email[:position] + character + email[position:]
    with pytest.raises(FieldError):
        normalise_email(altered)
    assert violated_rule(person(email=altered)) in {("email", "characters"), ("email", "max_length")}


# --- Rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [None, "", " ", "\t \r\n", "\u00a0\u2003"])
def test_a_field_that_is_null_or_blank_is_missing(field: str, value: object) -> None:
    assert violated_rule(person(**{field: value})) == (field, "required")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_absent_is_missing(field: str) -> None:
    assert violated_rule({name: value for name, value in JANE.items() if name != field}) == (field, "required")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [0, 1, 1.5, True, False, [], ["Jane"], {}, {"email": "jane@example.com"}])
def test_a_field_of_another_type_is_invalid_not_missing(field: str, value: object) -> None:
    assert violated_rule(person(**{field: value})) == (field, "type")


@pytest.mark.parametrize("field", NAMES)
@pytest.mark.parametrize("letter", ["x", "é", "李", "😀"])
def test_a_name_has_at_most_100_characters(field: str, letter: str) -> None:
    assert getattr(read_person(person(**{field: letter * 100})), field) == letter * 100
    assert violated_rule(person(**{field: letter * 101})) == (field, "max_length")


def test_an_address_has_at_most_254_characters() -> None:
    assert len(LONGEST) == 254
    assert read_person(person(email=LONGEST)).email == LONGEST
    assert violated_rule(person(email=f"b{LONGEST}")) == ("email", "max_length")
    assert violated_rule(person(email="x" * 255)) == ("email", "max_length")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "character", ["\0", "\x01", "\t", "\n", "\r", "\x1b", "\x1f", "\x7f", "\x80", "\x85", "\x9f", "\udabc"]
)
def test_control_characters_and_lone_surrogates_are_refused_anywhere(field: str, character: str) -> None:
    value = JANE[field]
    for altered in (character + value, value[:2] + character + value[2:], value + character):
        assert violated_rule(person(**{field: altered})) == (field, "characters"), ascii(altered)


@pytest.mark.parametrize("field", NAMES)
@pytest.mark.parametrize("control", [*"\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"])
def test_a_name_with_a_bidirectional_control_is_refused(field: str, control: str) -> None:
    for name in (f"Jane{control}enaJ", f"{control}Jane", f"Jane{control}", control):
        assert violated_rule(person(**{field: name})) == (field, "characters")


INVISIBLE = [
    *("\u200b", "\u200d", "\u200c\u200d", "\u2060\ufeff", "\u00ad", "\u034f", "\u115f", "\u1160", "\u3164", "\uffa0"),
    *("\u2800", "\u2800 \u2800", "\ufe0f", "\u180e", "\U000e0001", "\U000e0041\U000e007f", "\U000e0100", "\U0001d159"),
    *("\u17b4", "\u200b \u00a0\u200b", "\ufffa", "\u206f", "\U0001bca0", "\U00013441"),
]


@pytest.mark.parametrize("field", NAMES)
@pytest.mark.parametrize("name", INVISIBLE)
def test_a_name_of_invisible_characters_only_is_refused(field: str, name: str) -> None:
    assert violated_rule(person(**{field: name})) == (field, "characters")


@pytest.mark.parametrize(
    "name", [*INVISIBLE, "a\u202eb", "\u2066a", "a\u200fb", "a\u200bb", "a\u2028b", "a\x1bb", "a\x85b"]
)
def test_a_name_that_cannot_be_read_is_refused_for_accounts_and_api_tokens(name: str) -> None:
    with pytest.raises(FieldError) as caught:
        check_name(name)
    assert (caught.value.field, caught.value.rule) == ("name", "characters")


@pytest.mark.parametrize(
    "name",
    [
        "\u0639\u0644\u06cc\u200c\u0631\u0636\u0627",
        "क्\u200dष",
        "👩\u200d🚀",
        "❤\ufe0f",
        "Acme GmbH & Co. (Zürich)",
        "李",
    ],
)
def test_joiners_inside_a_name_are_accepted(name: str) -> None:
    assert check_name(name) == name
    assert read_person(person(first_name=name)).first_name == name


@pytest.mark.parametrize("name", ["Zoë", "Jean-Luc", "O'Neil", "李", "Anna Maria", "محمد", "Ștefan", "👩‍🚀", "x"])
def test_any_other_text_is_a_valid_name(name: str) -> None:
    read = read_person(person(first_name=name, last_name=name))
    assert (read.first_name, read.last_name) == (name, name)


def test_missing_fields_are_reported_before_invalid_ones_in_field_order() -> None:
    assert violated_rule({}) == ("email", "required")
    assert violated_rule({"email": "jane@example.com"}) == ("first_name", "required")
    assert violated_rule({"last_name": "Doe"}) == ("email", "required")
    for wrong in (5, "x" * 255, "\0", "not an address"):
        assert violated_rule(person(email=wrong, last_name=None)) == ("last_name", "required")
    for wrong in (5, "x" * 255, "\0"):
        assert violated_rule(person(first_name=wrong, last_name=" ")) == ("last_name", "required")


def test_unknown_fields_are_ignored() -> None:
    extra = {"role": "admin", "account_id": 1, "Email": "john@example.com", "": None, "note": "\0\ud800", "x": [[{}]]}
    assert read_person(person(**extra)) == Person("jane.doe@example.com", "Jane", "Doe")


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, json_values)))
def test_any_object_is_a_storable_person_or_violates_a_named_rule(fields: dict[str, object]) -> None:
    try:
        read = read_person(fields)
    except FieldError as error:
        assert (error.field in FIELDS, error.rule in RULES) == (True, True)  # noqa: PT017 - success is allowed as well
        return
    assert "@" in read.email
    for name in (read.first_name, read.last_name):
        assert 0 < len(name) <= 100
        assert "\0" not in name
        json.dumps(name, ensure_ascii=False).encode()  # no lone surrogate
