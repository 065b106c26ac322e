"""The records of a trial: one JSON object per line.

`start`, `end` and `at` are seconds on this machine's monotonic clock, which no fault changes. A request without a
response has no `status`. A checker of a history needs this module but nothing of the service.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

Way = Literal["browser", "consume", "revoke"]
Kind = Literal["sqlite", "postgresql"]


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="record", tag=str.lower):
    """Something that happened."""


class Run(Record, frozen=True):
    """The parameters of the trial: the first line of every history. The order of the other lines has no meaning.

    `retention` is the number of seconds by which the purge floor stays behind the database's clock.
    """

    seed: int
    database: Kind
    token_ttl: int
    retention: int = 3600


class Issue(Record, frozen=True):
    """A request for a token. `code` is the error code, `email` is spelled as in the database."""

    start: float
    end: float | None
    node: str
    account_id: int
    email: str
    status: int | None
    code: str = ""
    token: str = ""
    user_created: bool = False


class Redeem(Record, frozen=True):
    """An attempt to redeem a token, genuine or not.

    `success`: the response signs in, returns the user, or revokes the token. `user_id` and `account_id` are those in
    the response; they are 0 for `revoke`.
    """

    start: float
    end: float | None
    node: str
    way: Way
    token: str
    status: int | None
    code: str = ""
    success: bool = False
    user_id: int = 0
    account_id: int = 0


class SignOut(Record, frozen=True):
    """A sign-out everywhere, by a session that began between `began` and `start`. It ends this account's links."""

    began: float
    start: float
    end: float | None
    node: str
    user_id: int
    account_id: int
    status: int | None


class Decision(Record, frozen=True):
    """A node found a token genuine and passed it to the database. The node writes the record before it does so.

    `at` is the time of the signature check, `now` the time on the node's own clock afterwards (Unix seconds), `key_id`
    the key that made the signature.
    """

    at: float
    node: str
    pid: int
    token: str
    now: int
    key_id: str


class Fault(Record, frozen=True):
    """A fault that was repaired at `end`. `pid` is set if it concerned one process."""

    start: float
    end: float
    kind: str
    node: str
    pid: int = 0


class Pause(Record, frozen=True):
    """A process was paused: it did not run at all."""

    start: float
    end: float
    node: str
    pid: int


class Revocation(Record, frozen=True):
    """A key was revoked in the directory that `nodes` read."""

    at: float
    key_id: str
    nodes: tuple[str, ...]


class Separation(Record, frozen=True):
    """`node` read its own key directory, without the revocations in the common one."""

    start: float
    end: float
    node: str


class Person(msgspec.Struct, frozen=True):
    """A row of the table of users."""

    id: int
    email: str


class Database(Record, frozen=True):
    """The final content of the database: consumed claims (16 bytes, in hex), purge floor, users, and its time."""

    consumed: tuple[str, ...]
    floor: str
    people: tuple[Person, ...]
    now: int


AnyRecord = Run | Issue | Redeem | SignOut | Decision | Fault | Pause | Revocation | Separation | Database

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyRecord)


def write_line(record: AnyRecord) -> bytes:
    """Return the record as a line."""
    return _encoder.encode(record) + b"\n"


def read_history(path: Path) -> Iterator[AnyRecord]:
    """Yield the records in a file, in order. An incomplete last line, as a killed writer leaves it, is skipped."""
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield _decoder.decode(line)
