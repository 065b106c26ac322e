"""What an integration sends about a person, checked and normalised. Pure."""

import re
from collections.abc import Mapping

import email_validator
import msgspec

from sso_service.errors import FieldError

EMAIL_LENGTH = 254
"""Characters in an e-mail address (RFC 5321 section 4.5.3.1.3, less the angle brackets)."""
NAME_LENGTH = 100

# Control characters (C0, DEL and C1) and lone surrogates, which JSON can spell and no encoding can.
_NOT_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# An intranet's own domains are addresses like any other. The library lists them as undeliverable (RFC 6761, RFC 6762)
# and offers this way to say otherwise; nothing is looked up in DNS anyway.
email_validator.SPECIAL_USE_DOMAIN_NAMES = [
    name
    for name in email_validator.SPECIAL_USE_DOMAIN_NAMES
    if name not in {"local", "internal", "corp", "test"}
    and not name.endswith((".local", ".internal", ".corp", ".test"))
]


class Person(msgspec.Struct, frozen=True):
    """A name, and an address in the spelling under which its user would be known.

    That the address is valid is certain once a user is found by it, since only valid ones are ever stored. A stranger's
    has still to go through `normalise_email`.
    """

    email: str
    first_name: str
    last_name: str


def read_person(fields: Mapping[str, object]) -> Person:
    """The person that `fields` describe; fields that are not known are ignored. Raises `FieldError`."""
    for name in ("email", "first_name", "last_name"):  # what is missing is reported before what is wrong
        value = fields.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise FieldError(name, "required")
    address = _text(fields, "email", EMAIL_LENGTH)
    return Person(
        # Beyond ASCII only the library knows the one spelling.
        address.lower() if address.isascii() else normalise_email(address),
        _text(fields, "first_name", NAME_LENGTH),
        _text(fields, "last_name", NAME_LENGTH),
    )


def normalise_email(email: str) -> str:
    """The one spelling of an address under which its user is known: ASCII, lower case. Raises `FieldError`.

    The local part must be ASCII; an international domain becomes its ASCII form (RFC 5891). Case is dropped in the
    local part too: RFC 5321 allows it to matter, but addresses that differ in nothing else are one person everywhere.
    """
    try:
        checked = email_validator.validate_email(email, check_deliverability=False, allow_smtputf8=False)
    except email_validator.EmailNotValidError:
        raise FieldError("email", "email") from None
    if checked.ascii_email is None:
        raise FieldError("email", "email")
    return checked.ascii_email.lower()


def check_name(value: str) -> str:
    """Return the trimmed name of an account, a team or an API token. Raises `FieldError`.

    It has 1 to 100 printable characters. Escape sequences, for example, could change what a terminal displays.
    """
    name = value.strip()
    if not name:
        raise FieldError("name", "required")
    if len(name) > NAME_LENGTH:
        raise FieldError("name", "max_length")
    if not name.isprintable():
        raise FieldError("name", "characters")
    return name


def _text(fields: Mapping[str, object], field: str, max_length: int) -> str:
    value = fields[field]
    if not isinstance(value, str):
        raise FieldError(field, "type")
    if len(value) > max_length:
        raise FieldError(field, "max_length")
    # Before the blanks are cut off: a newline at the end is a control character too.
    if _NOT_TEXT.search(value):
        raise FieldError(field, "characters")
    return value.strip()
