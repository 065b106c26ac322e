"""Audit events: who issued, signed in, was refused or changed something, and which login token, by its `ref`.

The events are a closed list. No field can hold a login token, an API token or a key.
"""

import logging
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
    KEY_CREATED = auto()
    KEY_REVOKED = auto()
    KEY_DELETED = auto()


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event. Fields that are unknown or do not apply are left out of the log."""

    event: EventName
    user_id: int | None = None
    """The user whom the event is about."""
    account_id: int | None = None
    by_user_id: int | None = None
    """The admin who made the change."""
    operator: str | None = None
    """The operator who made the change on the command line: the user name on that machine."""
    api_token_id: int | None = None
    ref: str | None = None
    """The login token: see `tokens.ref`."""
    way: str | None = None
    """How the login token was redeemed: `browser` or `api`."""
    reason: str | None = None
    """Why the request was refused."""
    user_created: bool = False
    role: str | None = None
    key_id: str | None = None

    def __str__(self) -> str:
        fields = msgspec.to_builtins(self)
        return " ".join([fields.pop("event"), *(f"{name}={value}" for name, value in fields.items())])


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
