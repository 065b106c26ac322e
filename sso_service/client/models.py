"""Values that the clients return."""

import msgspec


class Created(msgspec.Struct, frozen=True):
    """A new login token (43 characters), and whether its user was created with it."""

    token: str
    user_created: bool

    def __repr__(self) -> str:
        return f"Created(token=<hidden>, user_created={self.user_created})"  # a log line must not contain a login token


class User(msgspec.Struct, frozen=True):
    """A user of the Studio."""

    id: int
    email: str
    first_name: str
    last_name: str


class Login(msgspec.Struct, frozen=True):
    """A consumed login token: the user who signs in, the account, the role, and the permissions (`section:action`).

    `expires_at` (Unix seconds) is the end of the login token's lifetime. `ref` names the login token in the service's
    logs.
    """

    user: User
    account_id: int
    role: str
    permissions: tuple[str, ...]
    expires_at: int
    ref: str


class Verification(msgspec.Struct, frozen=True):
    """The state of a login token. If it is not `active`, `reason` is set and all fields below `reason` are empty.

    The reason is `malformed`, `bad_signature`, `expired`, `consumed` or `no_access`. The other fields are those of
    `Login`.
    """

    active: bool
    ref: str
    reason: str | None = None
    user: User | None = None
    account_id: int | None = None
    role: str | None = None
    permissions: tuple[str, ...] = ()
    expires_at: int | None = None
