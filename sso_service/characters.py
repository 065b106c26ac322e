"""Characters that nobody sees, or that change how other text looks: for names, log lines and terminals. Pure."""

import re

# Bidirectional controls (Unicode property Bidi_Control): they reverse the order in which the text around them is shown.
_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
# C0, DEL and C1 (which contains NEL and CSI), the two line ends of Unicode, lone surrogates, and the annotations and
# tags that programs may interpret.
_CONTROLS = "\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f"
# Without a glyph: the property Default_Ignorable_Code_Point, format controls, letters and symbols that are blank
# (fillers of Hangul, Khitan and hieroglyphs, the empty Braille pattern), and spaces other than U+0020.
_BLANK = (
    "\xa0\xad\u034f\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f"
    "\u2000-\u200f\u202f\u205f-\u206f\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U00013441\U00013442\U00016fe4\U0001bca0-\U0001bca3\U0001d159"
    "\U0001d173-\U0001d17a\U000e0080-\U000e0fff"
)
_PRIVATE = "\ue000-\uf8ff\ufffe\uffff\U000f0000-\U0010ffff"

_BIDI_CONTROL = re.compile(f"[{_BIDI}]")
_VISIBLE = re.compile(f"[^ {_BIDI}{_CONTROLS}{_BLANK}]")
_ACTIVE = re.compile(f"[{_BIDI}{_CONTROLS}]")
_HIDDEN = re.compile(f"[{_BIDI}{_CONTROLS}{_BLANK}{_PRIVATE}]")


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
