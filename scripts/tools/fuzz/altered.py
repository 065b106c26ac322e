"""`python -m scripts.tools.fuzz.altered [COUNT] [SEED]`: check that altered login tokens are refused.

COUNT is 10 million by default. The tokens depend only on the seed, which is printed.
"""

import hashlib
import hmac
import secrets
import sys
import time
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing import Pool
from random import Random

from scripts.tools.fuzz.tokens import ALPHABET, KEY, LIFETIME, OTHER_KEYS
from sso_service.errors import ForgedToken, MalformedToken
from sso_service.tokens import Claims, read, sign

NOW = 1_900_000_000
CHUNK = 10_000


def encoded(raw: bytes | bytearray) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


class Genuine:
    """A genuine token with its claims and tag."""

    def __init__(self, random: Random) -> None:
        user, account, nonce = (random.getrandbits(32) for _ in range(3))
        self.claims = Claims(NOW + random.randint(1, LIFETIME), user, account, nonce)
        self.packed = self.claims.pack()
        self.tag = hmac.digest(KEY, self.packed, "sha256")[:16]
        self.token = encoded(self.packed + self.tag)


def flipped_bits(random: Random, a: Genuine, b: Genuine) -> str:
    bits = sum({1 << random.randrange(256) for _ in range(random.choice((1, 1, 2, 8)))})
    return encoded((int.from_bytes(a.packed + a.tag, "big") ^ bits).to_bytes(32, "big"))


def other_bytes(random: Random, a: Genuine, b: Genuine) -> str:
    raw = bytearray(a.packed + a.tag)
    start, length = random.randrange(32), random.choice((1, 2, 4, 16))
    raw[start : start + length] = random.choice((bytes, random.randbytes))(len(raw[start : start + length]))
    return encoded(raw)


def other_characters(random: Random, a: Genuine, b: Genuine) -> str:
    at = random.randrange(43)
    other = random.choice(ALPHABET) if random.random() < 0.8 else chr(random.choice((0x100, 0xD800, 0x110000)) - 1)
    return a.token[:at] + other + a.token[at + 1 :]


def moved_characters(random: Random, a: Genuine, b: Genuine) -> str:
    characters = list(a.token)
    i, j = random.sample(range(43), 2)
    characters[i], characters[j] = characters[j], characters[i]
    return random.choice(("".join(characters), a.token[i:] + a.token[:i], a.token[::-1], a.token.swapcase()))


def parts_of_two_tokens(random: Random, a: Genuine, b: Genuine) -> str:
    cut = random.randrange(44)
    return random.choice((encoded(a.packed + b.tag), encoded(a.tag + a.packed), a.token[:cut] + b.token[cut:]))


def other_claims_with_its_tag(random: Random, a: Genuine, b: Genuine) -> str:
    fields = [a.claims.expires_at, a.claims.user_id, a.claims.account_id, a.claims.nonce]
    at = random.randrange(4)
    fields[at] = random.choice((fields[at] + 1, fields[at] - 1, random.getrandbits(32), 0, fields[at - 1])) % 2**32
    return encoded(Claims(*fields).pack() + a.tag)


def other_spellings(random: Random, a: Genuine, b: Genuine) -> str:
    last = ALPHABET.index(a.token[-1])
    return random.choice(
        (
            a.token[:-1] + ALPHABET[last + random.randint(1, 3)],  # the spare bits of the last character
            a.token.translate(str.maketrans("-_", "+/")),
            a.token + "=" * random.randint(1, 2),
            f"%{ord(a.token[0]):02X}{a.token[1:]}",
            chr(ord(a.token[0]) + 0xFEE0) + a.token[1:],  # the full-width form of the same letter
            (a.packed + a.tag).hex(),
        )
    )


def other_lengths(random: Random, a: Genuine, b: Genuine) -> str:
    at, extra = random.randrange(43), random.choice((*ALPHABET, *"=\0\n\r\t &.\xa0\u2028", a.token))
    return random.choice((a.token[:at], a.token[at + 1 :], a.token[:at] + extra + a.token[at:], a.token + extra))


def other_keys(random: Random, a: Genuine, b: Genuine) -> str:
    return sign(a.claims, random.choice((*OTHER_KEYS, random.randbytes(32))))


def other_tags(random: Random, a: Genuine, b: Genuine) -> str:
    return encoded(
        a.packed
        + random.choice(
            (
                hashlib.sha256(a.packed).digest()[:16],
                hashlib.sha256(KEY + a.packed).digest()[:16],
                hmac.digest(KEY, a.packed, "md5"),
                hmac.digest(KEY, a.packed, "sha256")[16:],
                hmac.digest(KEY, a.token.encode(), "sha256")[:16],
                random.randbytes(16),
            )
        )
    )


ALTERATIONS: list[Callable[[Random, Genuine, Genuine], str]] = [
    flipped_bits,
    other_bytes,
    other_characters,
    moved_characters,
    parts_of_two_tokens,
    other_claims_with_its_tag,
    other_spellings,
    other_lengths,
    other_keys,
    other_tags,
]


def refused(count: int, seed: str) -> Counter[str]:
    """Return the number of refused tokens by alteration, `count` in total.

    Raises `AssertionError` if one is not refused.
    """
    random = Random(seed)
    tally: Counter[str] = Counter()
    while True:
        a, b = Genuine(random), Genuine(random)
        assert read(a.token, [KEY], now=NOW, lifetime=LIFETIME) == a.claims
        for alteration in ALTERATIONS * 5:
            altered = alteration(random, a, b)
            if altered in {a.token, b.token}:  # for example two parts of which one is the complete token
                continue
            try:
                read(altered, [KEY], now=NOW, lifetime=LIFETIME)
            except (MalformedToken, ForgedToken):
                tally[alteration.__name__] += 1
            else:
                raise AssertionError(f"{alteration.__name__} of {a.token}, {b.token}: {altered}")
            if tally.total() == count:
                return tally


def main(total: str = "10000000", seed: str = "") -> None:
    seed = seed or secrets.token_hex(8)
    print(f"{total} altered tokens, seed {seed}", flush=True)
    begun = time.monotonic()
    tally: Counter[str] = Counter()
    seeds = (f"{seed}/{number}" for number in range(max(1, int(total) // CHUNK)))
    with Pool() as pool:
        for part in pool.imap_unordered(partial(refused, min(CHUNK, int(total))), seeds):
            tally += part
    for name, number in tally.most_common():
        print(f"{number:>10,}  {name.replace('_', ' ')}")
    print(f"{tally.total():>10,}  refused, none accepted, in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
