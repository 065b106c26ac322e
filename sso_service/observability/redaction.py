"""Removing secrets from text that leaves the service by another way than a response: logs, traces, messages."""

import re
from string import ascii_letters, digits
from urllib.parse import unquote_to_bytes

REDACTED = "[redacted]"
SECRET_LENGTH = 43
"""The length of a login token, of the random part of an API token, and of the signature in a session cookie. All have
the alphabet of base64url. No other value that the service logs is so long and has no other character."""

_DECODINGS = 8
"""How many nested encodings are undone. Text with more of them is not shown."""

_MANY = 32
"""Secrets in encoded text that are looked for one by one. Text with more of them is not shown."""

_RUN = re.compile(rf"[A-Za-z0-9_-]{{{SECRET_LENGTH},}}", re.ASCII)
# Every other byte becomes a blank. A search for a constant is many times faster than one for a class of characters.
_ALPHABET = (ascii_letters + digits + "_-").encode()
_SHAPE = bytes(ord("x") if byte in _ALPHABET else ord(" ") for byte in range(256))
_SHAPE_OF_SECRET = b"x" * SECRET_LENGTH
# The bytes with which an encoded character begins, and all that are not visible ASCII.
_SHAPE_OF_LINE = bytes(
    ord("!") if byte in b"%\\#" or not 0x20 <= byte < 0x7F else shape for byte, shape in enumerate(_SHAPE)
)

# JavaScript, JSON and Python write a character as \u0041 or \x41, HTML as &#65; or &#x41;. Within another text of that
# kind, the backslash is doubled, and the `&` is `&amp;`.
_ESCAPE = re.compile(
    r"(?<!\\)\\+(?:u00|x)([0-9A-Fa-f]{2})|&(?:amp;)*#(?:[xX]0{0,5}([0-9A-Fa-f]{2})|0{0,5}([0-9]{2,3}));"
)


def redact(text: str) -> str:
    """Return `text` with every login token, API token and signature of a cookie replaced.

    The names of parameters do not matter. Each run of 43 or more characters of base64url counts as a secret, also if
    it appears only after decoding. In that case the result is the decoded text. The time is linear in the length.
    """
    if "%" in text or _may_have_escapes(text):
        layers = _layers(text)
        if layers is None:
            return REDACTED
        decoded = layers[-1]
        # A decoding can destroy a secret of the text before it: in `%f6...`, two characters of a token become one. Such
        # a text is not shown, since a reader could put the secret together again.
        before = [run for layer in layers[:-1] if has_secret_shape(layer) for run in _RUN.findall(layer)]
        if len(before) > _MANY or any(run not in decoded for run in before):
            return REDACTED
        if has_secret_shape(decoded):
            text = decoded
    return _RUN.sub(REDACTED, text) if has_secret_shape(text) else text


def has_secret_shape(text: str) -> bool:
    """Return whether `text`, as it is, contains a run that could be a secret."""
    return len(text) >= SECRET_LENGTH and _SHAPE_OF_SECRET in text.encode("utf-8", "surrogatepass").translate(_SHAPE)


def needs_attention(line: bytes) -> bool:
    """Return whether a line in JSON may contain a secret or an invisible character. Takes half a microsecond."""
    shape = line.translate(_SHAPE_OF_LINE)
    return b"!" in shape or _SHAPE_OF_SECRET in shape


def _layers(text: str) -> list[str] | None:
    """Return `text`, then with its percent-encodings and escapes decoded, and so on. None if nested too deeply."""
    layers = [text]
    for _ in range(_DECODINGS):
        decoded = text
        if "%" in decoded:
            decoded = unquote_to_bytes(decoded.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
        if _may_have_escapes(decoded):
            decoded = _ESCAPE.sub(_character, decoded)
        if decoded == text:
            return layers
        layers.append(text := decoded)
    return None


def _may_have_escapes(text: str) -> bool:
    return "\\" in text or "&#" in text or "&amp;" in text


def _character(found: re.Match[str]) -> str:
    hexadecimal = found[1] or found[2]
    return chr(int(hexadecimal, 16) if hexadecimal else int(found[3]))
