"""Validation and normalisation of the name and address that an integration sends. Pure."""

import re
import unicodedata
from collections.abc import Mapping

import email_validator
import msgspec

from sso_service.errors import FieldError

EMAIL_LENGTH = 254
"""Maximum length of an e-mail address in characters (RFC 5321 section 4.5.3.1.3, without the angle brackets)."""
NAME_LENGTH = 100

# Control characters (C0, DEL and C1), and lone surrogates, which JSON can express but no encoding can.
_NOT_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# The addresses of an intranet's own domains are valid here. The library rejects these domains as undeliverable (RFC
# 6761, RFC 6762), and editing this list is its documented way to accept them. Nothing is looked up in DNS.
email_validator.SPECIAL_USE_DOMAIN_NAMES = [
    name
    for name in email_validator.SPECIAL_USE_DOMAIN_NAMES
    if name not in {"local", "internal", "corp", "test"}
    and not name.endswith((".local", ".internal", ".corp", ".test"))
]


class Person(msgspec.Struct, frozen=True):
    """A name and a normalised e-mail address.

    Only `normalise_email` validates an ASCII address. Finding a user by the address proves it valid as well, because
    only valid addresses are stored. So a new user's address must be passed to `normalise_email` first.
    """

    email: str
    first_name: str
    last_name: str


def read_person(fields: Mapping[str, object]) -> Person:
    """Return the person in `fields`. Unknown fields are ignored. Raises `FieldError`."""
    for name in ("email", "first_name", "last_name"):  # a missing field is reported before an invalid one
        value = fields.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise FieldError(name, "required")
    address = _text(fields, "email", EMAIL_LENGTH)
    return Person(
        # An ASCII address only needs lower case here. Any other needs the library.
        address.lower() if address.isascii() else normalise_email(address),
        _text(fields, "first_name", NAME_LENGTH),
        _text(fields, "last_name", NAME_LENGTH),
    )


def normalise_email(email: str) -> str:
    """Return the one spelling of an address that identifies its user: ASCII, lower case. Raises `FieldError`.

    The local part must be ASCII. An international domain is converted to its ASCII form (RFC 5891). The local part is
    lower-cased as well: RFC 5321 allows it to be case-sensitive, but in practice such addresses belong to the same
    person.
    """
    if not _fits(email):
        raise FieldError("email", "email")
    try:
        checked = email_validator.validate_email(email, check_deliverability=False, allow_smtputf8=False)
    except email_validator.EmailNotValidError:
        raise FieldError("email", "email") from None
    if checked.ascii_email is None:
        raise FieldError("email", "email")
    return checked.ascii_email.lower()


# Dots between labels, also those of East Asian input methods (RFC 3490 section 3.1).
_DOTS = re.compile("[.\u3002\uff0e\uff61]")


def _fits(email: str) -> bool:
    """Return False if a part of the address is longer than any valid one, or if the local part is not ASCII.

    The library checks the lengths last. Until then it takes up to 7 ms for 240 characters, because its time is
    quadratic in the length of a label.
    """
    local, _, domain = email.rpartition("@")
    if not local.isascii() or len(local) > 64:  # octets: RFC 5321 section 4.5.3.1.1
        return False
    # The ASCII form of an international label (RFC 5891 section 4.4) adds `xn--` and has no fewer characters.
    lengths = [
        len(label) + (0 if label.isascii() else len("xn--"))
        for label in _DOTS.split(unicodedata.normalize("NFC", domain))
    ]
    return max(lengths) <= 63 and sum(lengths) + len(lengths) <= 254  # octets: RFC 1035 section 2.3.4


def search_text(email: str, first_name: str, last_name: str) -> str:
    """Return the text in which member search looks for a part of a name or an address, ignoring case.

    It begins with the last name, so it is also the order of lists. First and last name are found in either order. The
    text a user types is folded in the same way by `fold`.
    """
    return fold(f"{last_name} {first_name} {last_name} {email}")


def fold(text: str) -> str:
    """Return `text` without differences of case and of composition (Unicode Standard, section 3.13 D145)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())


def check_name(value: str) -> str:
    """Return the trimmed name of an account, a team or an API token. Raises `FieldError`.

    It has 1 to 100 printable characters. Escape sequences, for example, could change what a terminal displays. Only
    spaces are trimmed: a line break at the end is an unprintable character too.
    """
    name = value.strip()
    if not name:
        raise FieldError("name", "required")
    if len(name) > NAME_LENGTH:
        raise FieldError("name", "max_length")
    if not value.isprintable():
        raise FieldError("name", "characters")
    return name


def _text(fields: Mapping[str, object], field: str, max_length: int) -> str:
    value = fields[field]
    if not isinstance(value, str):
        raise FieldError(field, "type")
    if len(value) > max_length:
        raise FieldError(field, "max_length")
    # Checked before stripping: a trailing newline is a control character too.
    if _NOT_TEXT.search(value):
        raise FieldError(field, "characters")
    return value.strip()
