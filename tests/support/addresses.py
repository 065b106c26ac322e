"""A strategy for e-mail addresses."""

from string import ascii_letters, digits

from hypothesis import strategies as st

_ATOMS = st.text(ascii_letters + digits + "!#$%&'*+/=?^_`{|}~-", min_size=1, max_size=16)
_LABELS = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9-]{0,14}[A-Za-z0-9])?", fullmatch=True).filter(
    lambda label: label[2:4] != "--"  # reserved for Punycode
)
_TOP_LABELS = st.sampled_from(["com", "COM", "local", "internal", "corp", "test", "example", "museum"])
_INTERNATIONAL = st.sampled_from(["müller.example", "Straße.test", "例え.jp", "почта.рф"])
ADDRESSES = st.builds(
    "{}@{}".format,
    st.lists(_ATOMS, min_size=1, max_size=3).map(".".join),
    st.builds("{}.{}".format, st.lists(_LABELS, min_size=1, max_size=3).map(".".join), _TOP_LABELS) | _INTERNATIONAL,
)
"""E-mail addresses of every kind that the service accepts."""
