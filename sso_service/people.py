"""Validation and normalisation of the name and address that an integration sends. Pure."""

import re
import unicodedata
from collections.abc import Mapping

import email_validator
import msgspec

from sso_service.characters import has_bidi_control, has_visible
from sso_service.errors import FieldError

EMAIL_LENGTH = 254
"""Maximum length of an e-mail address in characters (RFC 5321 section 4.5.3.1.3, without the angle brackets)."""
NAME_LENGTH = 100

# Control characters (C0, DEL and C1), and lone surrogates, which JSON can express but no encoding can.
_NOT_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_JOINERS = re.compile("[\u200c\u200d]")  # ZWNJ and ZWJ

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
        _name(fields, "first_name"),
        _name(fields, "last_name"),
    )


def normalise_email(email: str) -> str:
    """Return the one spelling of an address that identifies its user: ASCII, lower case. Raises `FieldError`.

    The local part must be ASCII. An international domain is converted to its ASCII form (RFC 5891), if case is all that
    has to be mapped. The local part is lower-cased as well: RFC 5321 allows it to be case-sensitive, but in practice
    such addresses belong to the same person.
    """
    if not _fits(email):
        raise FieldError("email", "email")
    try:
        checked = email_validator.validate_email(email, check_deliverability=False, allow_smtputf8=False)
    except email_validator.EmailNotValidError:
        raise FieldError("email", "email") from None
    if checked.ascii_email is None or not _is_unmapped(email.rpartition("@")[2], checked.domain):
        raise FieldError("email", "email")
    return checked.ascii_email.lower()


def _is_unmapped(given: str, domain: str) -> bool:
    """Return whether `domain`, the normalised Unicode form, differs from the given one in case and composition only.

    UTS 46 would map more: full-width and circled letters, ligatures, the ideographic full stop; invisible characters
    disappear. An integration may compare addresses without this mapping, and one that it regards as another address
    would sign in as this one's user.
    """
    if given.isascii():
        return True
    if any(unicodedata.normalize("NFKC", character) != character for character in given):
        return False
    # Each character by itself, as in UTS 46: Python's rule for a final sigma depends on the context.
    folded = unicodedata.normalize("NFC", "".join(character.lower() for character in given)).split(".")
    labels = domain.split(".")
    return len(folded) == len(labels) and all(
        one.isascii() or one == other for one, other in zip(folded, labels, strict=True)
    )


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
        for label in unicodedata.normalize("NFC", domain).split(".")
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

    It has 1 to 100 printable characters, not all of them blank. Escape sequences, for example, could change what a
    terminal displays. Joiners, which Persian, Indic and emoji text needs, are accepted. Only spaces are trimmed: a line
    break at the end is an unprintable character too.
    """
    name = value.strip()
    if not name:
        raise FieldError("name", "required")
    if len(name) > NAME_LENGTH:
        raise FieldError("name", "max_length")
    if not (value.isascii() or has_visible(value)) or not _JOINERS.sub("", value).isprintable():
        raise FieldError("name", "characters")
    return name


def _name(fields: Mapping[str, object], field: str) -> str:
    """Return a trimmed name that a reader sees, and that leaves the text beside it as it is. Raises `FieldError`."""
    name = _text(fields, field, NAME_LENGTH)
    if not name.isascii() and (has_bidi_control(name) or not has_visible(name)):
        raise FieldError(field, "characters")
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
