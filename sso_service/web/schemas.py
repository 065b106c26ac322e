"""The JSON bodies of requests and responses. Endpoints decode and encode them; the OpenAPI document describes them.

A field that is added, renamed or removed here changes both. Its description, constraints and examples stand beside it.
Constraints are given as JSON Schema (`extra_json_schema`), which msgspec does not check while it decodes. So decoding
accepts every string, and `people.py` and `tokens.py` alone decide and name the rule that a value breaks. All errors
have the body `ErrorBody` of `http.py`.

Docstrings of the classes are part of the document.
"""

import re
from typing import Annotated, Literal

import email_validator
from msgspec import UNSET, Meta, Struct, UnsetType

from sso_service.characters import BIDI_CONTROLS, CONTROLS, UNSEEN
from sso_service.errors import ForgedToken, MalformedToken, NoAccess, TokenConsumed, TokenExpired
from sso_service.people import EMAIL_LENGTH, NAME_LENGTH
from sso_service.permissions import Role, permissions

# --- patterns --------------------------------------------------------------------------------------------------------

_SPACE = r" \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_NOT_IN_NAMES = CONTROLS + BIDI_CONTROLS
# JavaScript has no `\\U`, so characters above U+FFFF stand for themselves.
_SEEN = "[^ " + CONTROLS + re.sub(r"\\U([0-9a-f]{8})", lambda found: chr(int(found[1], 16)), UNSEEN) + "]"
_NAME = f"^[^{_NOT_IN_NAMES}]*{_SEEN}[^{_NOT_IN_NAMES}]*$"
_NOT_BLANK = rf"[^\t-\r\u001c-\u001f\u0085{_SPACE}]"

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
# ASCII letters and digits, and every character beyond ASCII because a domain may be international.
_LETTER = r"[^\u0000-@\[-`{-\u007f]"
_ALPHANUMERIC = r"[^\u0000-/:-@\[-`{-\u007f]"
_ALPHANUMERIC_OR_HYPHEN = r"[^\u0000-,./:-@\[-`{-\u007f]"
_LABEL = f"{_ALPHANUMERIC}(?:{_ALPHANUMERIC_OR_HYPHEN}{{0,61}}{_ALPHANUMERIC})?"
_TOP_LABEL = f"(?:{_ALPHANUMERIC}{_ALPHANUMERIC_OR_HYPHEN}{{0,61}})?{_LETTER}"
_ADDRESS = rf"^{_ATOM}(?:\.{_ATOM})*@(?:{_LABEL}\.)+{_TOP_LABEL}$"


def _in_any_case(name: str) -> str:
    return "".join(f"[{letter}{letter.upper()}]" for letter in name)


# Reserved domains (RFC 6761), and labels with the hyphens of Punycode but another prefix (RFC 5890 section 2.3.1).
_RESERVED = "|".join(_in_any_case(name) for name in sorted(email_validator.SPECIAL_USE_DOMAIN_NAMES) if "." not in name)
_NOT_A_DOMAIN = rf"[@.](?:(?:{_RESERVED})$|[^xX].--|[xX][^nN]--)"

# --- values ----------------------------------------------------------------------------------------------------------

EXAMPLE_TOKEN = "cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA"  # nosec B105 # noqa: S105 - a public test vector
EXAMPLE_TARGET = "/client/123/t/42/posts"

Email = Annotated[
    str,
    Meta(
        description="Identifies the user; case does not matter. The part before the `@` is ASCII. The domain may be "
        "international, but without full-width or other compatibility characters, or internal (`.local`, `.internal`, "
        "`.corp`, `.test`). White space around it is removed.",
        examples=["jane.doe@example.com"],
        extra_json_schema={
            "format": "idn-email",
            "maxLength": EMAIL_LENGTH,
            "pattern": _ADDRESS,
            "allOf": [{"pattern": "^[^@]{1,64}@"}],
            "not": {"pattern": _NOT_A_DOMAIN},
        },
    ),
]
_NAME_SCHEMA = {"minLength": 1, "maxLength": NAME_LENGTH, "pattern": _NAME}
_NAME_DESCRIPTION = (
    "Not blank or invisible, without control characters, also bidirectional ones. Stored only if the user is new."
)
FirstName = Annotated[str, Meta(description=_NAME_DESCRIPTION, examples=["Jane"], extra_json_schema=_NAME_SCHEMA)]
LastName = Annotated[str, Meta(description=_NAME_DESCRIPTION, examples=["Doe"], extra_json_schema=_NAME_SCHEMA)]

LoginToken = Annotated[
    str,
    Meta(
        description="A login token: 43 characters that are safe in URLs.",
        examples=[EXAMPLE_TOKEN],
        extra_json_schema={"pattern": "^[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]$"},
    ),
]
AnyText = Annotated[
    str,
    Meta(
        description="Any text that is not blank. The response reports whether it is a login token.",
        examples=[EXAMPLE_TOKEN],
        extra_json_schema={"pattern": _NOT_BLANK},
    ),
]
Ref = Annotated[
    str,
    Meta(
        description="A name of the login token for logs: the first 12 hex digits of its SHA-256.",
        examples=["d2d61bd6a15c"],
        extra_json_schema={"pattern": "^[0-9a-f]{12}$"},
    ),
]
AccountId = Annotated[int, Meta(description="The account of the session.", ge=1, le=2**32 - 1, examples=[123])]
RoleInAccount = Annotated[Role, Meta(description="The user's role in this account.")]
Permissions = Annotated[
    list[Annotated[str, Meta(extra_json_schema={"enum": permissions(Role.ADMIN)})]],
    Meta(
        description="The permissions of the role, sorted.",
        examples=[permissions(Role.EDITOR)],
        extra_json_schema={"uniqueItems": True},
    ),
]

# --- requests --------------------------------------------------------------------------------------------------------


class PersonBody(Struct, frozen=True):
    """The person to issue a login token for."""

    email: Email
    first_name: FirstName
    last_name: LastName


class TokenBody(Struct, frozen=True):
    """A text that may be a login token."""

    token: AnyText


class LoginTokenBody(TokenBody, frozen=True):
    """A login token."""

    token: LoginToken


class LoginForm(Struct, frozen=True):
    """The form of the page that asks before signing in. It is sent as a form, not as JSON."""

    token: LoginToken
    target: Annotated[str, Meta(description="Path and query to redirect to.", examples=[EXAMPLE_TARGET])]
    replaces: Annotated[
        str,
        Meta(
            description="Id of the user whose session is replaced, or `0`.",
            examples=["0"],
            extra_json_schema={"pattern": "^[0-9]+$"},
        ),
    ]
    form: Annotated[str, Meta(description="Form token, signed for this browser, login token and target.")]


# --- responses -------------------------------------------------------------------------------------------------------


class NewToken(Struct, frozen=True):
    """A new login token."""

    token: LoginToken
    user_created: Annotated[bool, Meta(description="Whether the user is new.", examples=[True])]


class UserBody(Struct, frozen=True):
    """A user."""

    id: Annotated[int, Meta(ge=1, le=2**32 - 1, examples=[3])]
    email: Annotated[str, Meta(examples=["jane.doe@example.com"], extra_json_schema={"format": "email"})]
    first_name: Annotated[str, Meta(examples=["Jane"])]
    last_name: Annotated[str, Meta(examples=["Doe"])]


class ActiveToken(Struct, frozen=True, kw_only=True):
    """A login token that signs in, with its user and what the user may do."""

    active: Annotated[bool, Meta(extra_json_schema={"const": True})] = True
    ref: Ref
    user: UserBody
    account_id: AccountId
    role: RoleInAccount
    permissions: Permissions
    expires_at: Annotated[int, Meta(description="Unix seconds.", examples=[1900000000])]


class InactiveToken(Struct, frozen=True, kw_only=True):
    """A login token that does not sign in, or a text that is not a login token."""

    active: Annotated[bool, Meta(extra_json_schema={"const": False})] = False
    ref: Ref
    reason: Annotated[
        str,
        Meta(
            description="The reason. For the API token of an account, login tokens of other accounts are "
            "`bad_signature`.",
            extra_json_schema={
                "enum": [error.reason for error in (MalformedToken, ForgedToken, TokenExpired, TokenConsumed, NoAccess)]
            },
        ),
    ]


class RevokedToken(Struct, frozen=True):
    """The result of a revocation."""

    revoked: Annotated[
        bool,
        Meta(
            description="`false` if the login token was used before, by a sign-in or by an earlier revocation.",
            examples=[True],
        ),
    ]


class SessionBody(Struct, frozen=True):
    """The user who is signed in, and what the user may do."""

    user: UserBody
    account_id: AccountId
    role: RoleInAccount
    permissions: Permissions


class Healthy(Struct, frozen=True):
    """The process responds."""

    status: Literal["ok"] = "ok"


class Ready(Struct, frozen=True):
    """The node can serve requests."""

    status: Literal["ready"] = "ready"


class NotReady(Struct, frozen=True):
    """The node should not get requests."""

    status: Literal["not ready"] = "not ready"
    problems: (
        Annotated[
            dict[str, str],
            Meta(
                description="The problems by subject: `keys`, `database` or `clock`; `node` while the node is being "
                "stopped. Absent unless the request may read them.",
                examples=[{"database": "connection refused"}],
                extra_json_schema={
                    "minProperties": 1,
                    "propertyNames": {"enum": ["node", "keys", "database", "clock"]},
                },
            ),
        ]
        | UnsetType
    ) = UNSET
