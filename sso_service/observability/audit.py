"""Audit events: who issued, signed in, was refused or changed something, and which login token, by its `ref`.

The events are a closed list. No field can hold a login token, an API token or a key.
"""

import logging
from datetime import datetime
from enum import StrEnum, auto

import msgspec

from sso_service.observability.logs import AUDIT_LOGGER, LineWriter

log = logging.getLogger(AUDIT_LOGGER)


class EventName(StrEnum):
    """Every audit event."""

    TOKEN_ISSUED = auto()
    API_REFUSED = auto()
    LOGIN = auto()
    LOGIN_REFUSED = auto()
    TOKEN_REVOKED = auto()
    SIGNED_OUT_EVERYWHERE = auto()
    ROLE_CHANGED = auto()
    MEMBER_REMOVED = auto()
    USER_DISABLED = auto()
    USER_ENABLED = auto()
    ACCOUNT_ADDED = auto()
    TEAM_ADDED = auto()
    API_TOKEN_CREATED = auto()
    API_TOKEN_REVOKED = auto()
    API_TOKEN_EXPIRING = auto()
    KEY_CREATED = auto()
    KEY_REVOKED = auto()
    KEY_DELETED = auto()


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event. Fields that are unknown or do not apply are left out of the log."""

    event: EventName
    user_id: int | None = None
    """The user that the event is about."""
    account_id: int | None = None
    """The account that the event is about."""
    by_user_id: int | None = None
    """The admin who made the change on the settings pages."""
    operator: str | None = None
    """The system user who made the change on the command line."""
    api_token_id: int | None = None
    """The API token of the request, the one that was changed, or the one that expires."""
    ref: str | None = None
    """The login token, by the first 12 hex digits of its SHA-256."""
    way: str | None = None
    """How the login token was presented: `browser` or `api`."""
    reason: str | None = None
    """Why the request or the login token was refused."""
    user_created: bool = False
    """Present and true if the user was created for this login token."""
    role: str | None = None
    """The new role."""
    expires_at: datetime | None = None
    """When the API token expires."""
    key_id: str | None = None
    """The signing key; `all` if all keys were revoked."""


_CHANGED_BY = ("by_user_id", "operator")
DESCRIPTIONS: dict[EventName, tuple[str, tuple[str, ...]]] = {
    EventName.TOKEN_ISSUED: (
        "A login token was issued.",
        ("user_id", "account_id", "api_token_id", "ref", "user_created"),
    ),
    EventName.API_REFUSED: (
        "A request with an API token was refused. The identifiers are present as far as they are known. Refusals "
        "without an API token are logged at a limited rate.",
        ("reason", "api_token_id", "account_id", "user_id"),
    ),
    EventName.LOGIN: ("A login token was redeemed.", ("user_id", "account_id", "api_token_id", "ref", "way")),
    EventName.LOGIN_REFUSED: (
        "A login token was refused. User and account are present only if the signature is genuine. Refusals with "
        "neither a user nor an API token are logged at a limited rate, and so are further refusals of the same genuine "
        "token.",
        ("user_id", "account_id", "api_token_id", "ref", "way", "reason"),
    ),
    EventName.TOKEN_REVOKED: (
        "An unused login token was revoked by the API.",
        ("user_id", "account_id", "api_token_id", "ref"),
    ),
    EventName.SIGNED_OUT_EVERYWHERE: (
        "All sessions and login links of a user were ended, in the account if there is one: by the user, an admin or "
        "an operator.",
        ("user_id", "account_id", *_CHANGED_BY),
    ),
    EventName.ROLE_CHANGED: ("A member got another role.", ("user_id", "account_id", "role", *_CHANGED_BY)),
    EventName.MEMBER_REMOVED: ("A member was removed from an account.", ("user_id", "account_id", *_CHANGED_BY)),
    EventName.USER_DISABLED: ("A user was disabled.", ("user_id", "operator")),
    EventName.USER_ENABLED: ("A disabled user was enabled.", ("user_id", "operator")),
    EventName.ACCOUNT_ADDED: ("An account was added.", ("account_id", "operator")),
    EventName.TEAM_ADDED: ("A team was added to an account.", ("account_id", "operator")),
    EventName.API_TOKEN_CREATED: ("An API token was created.", ("api_token_id", "account_id", *_CHANGED_BY)),
    EventName.API_TOKEN_REVOKED: ("An API token was revoked.", ("api_token_id", "account_id", *_CHANGED_BY)),
    EventName.API_TOKEN_EXPIRING: (
        "An active API token expires within 14 days. Logged once a day for each, by one of the nodes.",
        ("api_token_id", "account_id", "expires_at"),
    ),
    EventName.KEY_CREATED: ("A signing key was created.", ("key_id", "operator")),
    EventName.KEY_REVOKED: ("A signing key was revoked.", ("key_id", "operator")),
    EventName.KEY_DELETED: ("A signing key or tombstone was deleted.", ("key_id", "operator")),
}
"""The meaning of each event and the fields that it may have. The reference page is generated from this."""


def record(event: Event) -> None:
    """Write the event to the log.

    A serving process installs one `LineWriter` as the only handler of this logger, and the event goes straight to it.
    Otherwise the event becomes an ordinary record, whose message is the struct.
    """
    handlers = log.handlers
    if handlers and isinstance(writer := handlers[0], LineWriter):
        writer.write_event(event)
    else:
        log.info(event)
