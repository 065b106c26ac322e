"""Target: the parser of key files. A valid key lies beside the file that is fuzzed."""

import json
import string
from pathlib import Path
from tempfile import TemporaryDirectory

from sso_service.key_directory import KeyDirectory
from sso_service.keyring import FILE_LIMIT, Entry, KeyRing, SigningKey, Tombstone, load

NOW = 1_900_000_000
GOOD = {"id": "good", "secret": "A" * 43, "created_at": 900, "signs_from": 1000}
ODD = {"id": "odd", "secret": "B" * 42 + "A", "created_at": 1900, "signs_from": 2000}
TOMB = {"id": "odd", "signs_from": 2000, "revoked_at": 2100}
MESSAGES = {
    "is larger than 4 KiB",
    "is not JSON",
    "does not contain an object whose id is the file name",
    "has no secret of 32 bytes in base64url without padding",
    *(f"has no {name} in Unix seconds" for name in ("signs_from", "created_at", "revoked_at")),
}
"""All messages about a broken file. None contains anything of the file."""

_home = TemporaryDirectory(prefix="fuzz-keys-")
_directory = Path(_home.name)
(_directory / "good.json").write_text(json.dumps(GOOD))


def specified(content: bytes) -> Entry | None:
    """Return the entry that the specification of a key file finds in `content`, or None."""
    try:
        if len(content) > FILE_LIMIT:
            return None
        value = json.loads(content)
        if type(value) is not dict or value["id"] != "odd":
            return None
        times = [value[name] for name in ("signs_from", "revoked_at" if "revoked_at" in value else "created_at")]
        if any(type(time) is not int or time not in range(2**32) for time in times):
            return None
        if "revoked_at" in value:
            return Tombstone("odd", *times)
        alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
        letters = [alphabet.index(letter) for letter in value["secret"]]
        bits = "".join(f"{letter:06b}" for letter in letters)
        secret = int(bits[:256], 2).to_bytes(32, "big") if len(letters) == 43 and type(value["secret"]) is str else None
        return SigningKey("odd", secret, times[1], times[0]) if secret else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def check(data: bytes) -> None:
    """Check `data` as the content of a key file."""
    (_directory / "odd.json").write_bytes(data)
    entries, broken = load(_directory)
    good = entries.pop("good")
    assert isinstance(good, SigningKey)
    assert good.secret == bytes(32)
    expected = specified(data)
    assert entries == ({"odd": expected} if expected else {})
    assert broken.keys() == (set() if expected else {"odd"})
    assert set(broken.values()) <= MESSAGES
    # A running service reads the same keys and orders them correctly.
    keys = KeyDirectory(_directory)
    assert keys.refresh()
    assert keys.ring.entries == KeyRing([good, *entries.values()]).entries
    assert good in keys.ring.known_keys()
    assert good in keys.ring.verifying_keys(1000, 300)


_NUMBERS: tuple[object, ...] = (0, -1, 2**32 - 1, 2**32, 1.0, True, "1", None, [])
_SECRETS: tuple[object, ...] = ("", "B" * 43, "=" * 43, "é" * 43, ["B"] * 43, None, 0)
SEEDS = [
    *(json.dumps(content).encode() for content in (ODD, TOMB, GOOD, [ODD], ODD | {"revoked_at": None}, {"id": "odd"})),
    *(json.dumps(ODD | {"signs_from": number}).encode() for number in _NUMBERS),
    *(json.dumps(ODD | {"secret": secret}).encode() for secret in _SECRETS),
    *(json.dumps(ODD).encode(encoding) for encoding in ("utf-16", "utf-32-le", "utf-8-sig")),
    b'{"id": "good", "id": "odd", "signs_from": NaN}',
    b'{"id": "odd", "signs_from": 1e999, "revoked_at": -0}',
    b'{"\\ud800": "\\u0000"}',
    b"[" * 2000,
    *(json.dumps(ODD).encode().ljust(FILE_LIMIT + more) for more in (-1, 0, 1)),
    b"9" * FILE_LIMIT,
    b"",
]
