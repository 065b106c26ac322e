"""What is written down while the service is tried: one record a line, in JSON.

Times called `start`, `end` and `at` are seconds on this machine's monotonic clock, which no fault moves. A request
whose answer was lost has no `status`. Whoever judges a history needs this file, and nothing of the service.
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
    """What was tried: the first line of every history. The order of the others means nothing.

    `retention` is the number of seconds by which the purge floor stays behind the database's clock.
    """

    seed: int
    database: Kind
    token_ttl: int
    retention: int = 3600


class Issue(Record, frozen=True):
    """A token was asked for. `code` is that of an error, `email` is in the spelling that the database keeps."""

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
    """A token, genuine or not, was presented. `success` if the answer signs in, hands over the person, or takes back.

    `user_id` and `account_id` are whom the answer signs in, as the answer says it; 0 in the way of `revoke`.
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


class Decision(Record, frozen=True):
    """A node found a token to be good, and went to the database with it. Written by the node, before it went.

    `at` is when the signature was checked, `now` what the node's own clock said before it went (Unix seconds), `key_id`
    the key that explained the signature.
    """

    at: float
    node: str
    pid: int
    token: str
    now: int
    key_id: str


class Fault(Record, frozen=True):
    """Something was broken, and mended at `end`. `pid` where it was one process."""

    start: float
    end: float
    kind: str
    node: str
    pid: int = 0


class Pause(Record, frozen=True):
    """A process did not run at all."""

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
    """`node` read a directory of its own, which revocations in the common one did not reach."""

    start: float
    end: float
    node: str


class Person(msgspec.Struct, frozen=True):
    """A row of the users."""

    id: int
    email: str


class Database(Record, frozen=True):
    """What the database held at the end: claims (16 bytes, in hex) that were consumed, the purge floor, the people."""

    consumed: tuple[str, ...]
    floor: str
    people: tuple[Person, ...]
    now: int


AnyRecord = Run | Issue | Redeem | Decision | Fault | Pause | Revocation | Separation | Database

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyRecord)


def write_line(record: AnyRecord) -> bytes:
    """The record as a line."""
    return _encoder.encode(record) + b"\n"


def read_history(path: Path) -> Iterator[AnyRecord]:
    """The records in a file, in its order. A last line without its end, as a killed writer leaves it, is left out."""
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield _decoder.decode(line)
