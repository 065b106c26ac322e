"""Characters that are invisible, or that change how other text looks: for names, log lines and terminals. Pure."""

import re

# These constants are parts of character classes in regular expressions.

BIDI_CONTROLS = r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
"""Bidirectional controls (Unicode property Bidi_Control): they reverse the order in which text around them is shown."""
CONTROLS = r"\u0000-\u001f\u007f-\u009f"
"""C0, DEL and C1, which contains NEL and CSI (property Cc)."""
UNSEEN = (
    # Spaces other than U+0020, line ends, format controls, fillers of Hangul, and the empty Braille pattern.
    r"\u00a0\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f"
    r"\u2000-\u200f\u2028-\u202f\u205f-\u206f\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    # Blanks and controls of some scripts and of music; tags and variation selectors.
    r"\U000110bd\U000110cd\U00013430-\U0001343f\U00013441\U00013442\U00016fe4\U0001bca0-\U0001bca3\U0001d159"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""Characters without a glyph: the properties Default_Ignorable_Code_Point, Cf, Zs, Zl and Zp, and blank letters."""
# Lone surrogates, noncharacters, and the private use areas.
_UNASSIGNED = r"\ud800-\udfff\ue000-\uf8ff\ufffe\uffff\U000f0000-\U0010ffff"
# Annotations and tags: some programs interpret them.
_INTERPRETED = r"\u2028\u2029\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f"

_BIDI_CONTROL = re.compile(f"[{BIDI_CONTROLS}]")
_VISIBLE = re.compile(f"[^ {CONTROLS}{UNSEEN}]")
_ACTIVE = re.compile(f"[{BIDI_CONTROLS}{CONTROLS}{_INTERPRETED}]")
_HIDDEN = re.compile(f"[{CONTROLS}{UNSEEN}{_UNASSIGNED}]")


def has_bidi_control(text: str) -> bool:
    """Return whether `text` contains a character that reverses text around it."""
    return _BIDI_CONTROL.search(text) is not None


def has_visible(text: str) -> bool:
    """Return whether `text` contains at least one character that a reader sees."""
    return _VISIBLE.search(text) is not None


def escape_active(text: str) -> str:
    r"""Return `text` for a terminal: control characters, line ends and bidi controls become `\uXXXX`.

    Joiners and variation selectors stay, because Persian, Indic and emoji text needs them.
    """
    return text if text.isascii() and text.isprintable() else _ACTIVE.sub(_escape, text)


def escape_hidden(text: str) -> str:
    r"""Return `text` for a log: every character that is not visible becomes `\uXXXX`, except the space."""
    return text if text.isascii() and text.isprintable() else _HIDDEN.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    # UTF-16 code units, as JSON escapes them (RFC 8259 section 7), so escaping inside a JSON string keeps its value.
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{int.from_bytes(units[at : at + 2], 'big'):04x}" for at in range(0, len(units), 2))
