"""What is written down about each issue, login, refusal and change: who, where, and which token, by its `ref`.

The events are a closed list. None has a field that could hold a token, an API token or a key.
"""

import logging
from enum import StrEnum, auto

import msgspec

from sso_service.logs import Lines

log = logging.getLogger(__name__)


class EventName(StrEnum):
    """All that is written down."""

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
    """Something that happened. What is not known, or does not apply, is left out."""

    event: EventName
    user_id: int | None = None
    """Whom it is about."""
    account_id: int | None = None
    by_user_id: int | None = None
    """The admin who did it."""
    operator: str | None = None
    """Who did it on the command line: their name on the machine."""
    api_token_id: int | None = None
    ref: str | None = None
    """The login token: see `tokens.ref`."""
    way: str | None = None
    """How a token was redeemed: `browser` or `api`."""
    reason: str | None = None
    """Why it was refused."""
    user_created: bool = False
    role: str | None = None
    key_id: str | None = None

    def __str__(self) -> str:
        fields = msgspec.to_builtins(self)
        return " ".join([fields.pop("event"), *(f"{name}={value}" for name, value in fields.items())])


def record(event: Event) -> None:
    """Writes the event down, as a line of the log."""
    if Lines.installed:
        Lines.installed.say(event)
    else:
        log.info(event)  # a struct, of which each format makes what it needs
