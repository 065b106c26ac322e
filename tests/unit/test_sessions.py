"""Session cookies and form tokens: signature, purpose, lifetime, and the refusal of all other texts."""

import hashlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sso_service.errors import InvalidSession, MalformedToken
from sso_service.keyring import SigningKey
from sso_service.sessions import Session, check_form_token, dump_form_token, dump_session, load_session
from sso_service.tokens import Claims, read, sign

NOW = 1_900_000_000
LIFETIME = 43_200
KEY = SigningKey("a", bytes(range(32)), created_at=0, signs_from=0)
OTHER_KEY = SigningKey("b", bytes(32), created_at=0, signs_from=0)
SESSION = Session(user_id=1, account_id=123, issued_at=NOW)
COOKIE = dump_session(SESSION, KEY.session_key)

TOKEN = "cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA"
TARGET = b"/client/123/t/42/posts?page=2"
BROWSER = "k3fZ0Jd1bq8"
FORM = dump_form_token(TOKEN, TARGET, BROWSER, KEY.form_key, now=NOW)

uint32 = st.integers(0, 2**32 - 1)


def load(cookie: str, *keys: bytes, now: int = NOW) -> Session:
    return load_session(cookie, keys or [KEY.session_key], now=now, lifetime=LIFETIME)


def check(form: str = FORM, token: str = TOKEN, target: bytes = TARGET, browser: str = BROWSER, now: int = NOW) -> None:
    check_form_token(form, token, target, browser, [KEY.form_key], now=now)


def alterations(signed: str) -> Iterator[str]:
    """`signed` with each character changed in its highest bit, removed or doubled, truncated anywhere, or extended."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for position, character in enumerate(signed):
        changed = "A" if character == "." else alphabet[alphabet.index(character) ^ 32]
        yield signed[:position] + changed + signed[position + 1 :]
        yield signed[:position] + signed[position + 1 :]
        yield signed[:position] + character + signed[position:]
        yield signed[:position]
    for extra in ("A", "AAAA", ".", signed):
        yield signed + extra
        yield extra + signed


# --- The session cookie ----------------------------------------------------------------------------------------------


@given(st.builds(Session, user_id=uint32, account_id=uint32, issued_at=st.integers(1_700_000_000, 2**32 - 1)))
def test_a_cookie_contains_user_account_and_time_of_issue(session: Session) -> None:
    cookie = dump_session(session, KEY.session_key)
    assert load(cookie, now=session.issued_at) == session
    assert set(cookie) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


@pytest.mark.parametrize("age", [-60, -1, 0, 1, LIFETIME - 1])
def test_a_cookie_is_valid_from_a_minute_before_its_issue_until_its_end(age: int) -> None:
    """The minute allows for a node whose clock is ahead."""
    assert load(COOKIE, now=NOW + age) == SESSION


@pytest.mark.parametrize("age", [-86_400, -61, LIFETIME, LIFETIME + 1, 10 * LIFETIME])
def test_a_cookie_that_is_too_old_or_from_the_future_is_refused(age: int) -> None:
    with pytest.raises(InvalidSession):
        load(COOKIE, now=NOW + age)


def test_a_cookie_of_any_known_key_is_valid() -> None:
    assert load(COOKIE, OTHER_KEY.session_key, KEY.session_key) == SESSION
    assert load(COOKIE, KEY.session_key, OTHER_KEY.session_key) == SESSION


@pytest.mark.parametrize(
    "keys",
    [[], [OTHER_KEY.session_key], [KEY.token_key], [KEY.form_key], [KEY.secret]],
    ids=["no-key", "another-key", "token-key", "form-key", "secret"],
)
def test_a_cookie_verifies_only_with_its_session_key(keys: list[bytes]) -> None:
    with pytest.raises(InvalidSession):
        load_session(COOKIE, keys, now=NOW, lifetime=LIFETIME)


@pytest.mark.parametrize("wrong", [KEY.token_key, KEY.form_key, KEY.secret], ids=["token key", "form key", "secret"])
def test_a_cookie_signed_with_a_key_for_another_purpose_is_refused(wrong: bytes) -> None:
    with pytest.raises(InvalidSession):
        load(dump_session(SESSION, wrong))


def test_none_of_the_altered_cookies_is_accepted() -> None:
    for altered in alterations(COOKIE):
        with pytest.raises(InvalidSession):
            load(altered)


def test_the_parts_of_two_cookies_cannot_be_combined() -> None:
    other = dump_session(Session(user_id=2, account_id=123, issued_at=NOW + 5), KEY.session_key)
    for mine, theirs in ((COOKIE, other), (other, COOKIE)):
        payload, issued, signature = mine.split(".")
        foreign_payload, foreign_issued, _ = theirs.split(".")
        for spliced in (f"{foreign_payload}.{issued}.{signature}", f"{payload}.{foreign_issued}.{signature}"):
            with pytest.raises(InvalidSession):
                load(spliced)


@given(st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape")))
def test_any_text_in_the_cookie_is_refused_with_one_kind_of_error(text: str) -> None:
    with pytest.raises(InvalidSession):
        load(text)
    with pytest.raises(InvalidSession):
        check(form=text)


@pytest.mark.parametrize("signed_text", [COOKIE, FORM], ids=["cookie", "form token"])
def test_the_signature_is_hmac_with_sha_256(signed_text: str) -> None:
    assert len(signed_text.rpartition(".")[2]) == 43  # the default SHA-1 would give 27


# --- The form token --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("age", [-60, 0, 1, 299])
def test_a_form_token_is_valid_for_five_minutes(age: int) -> None:
    check(now=NOW + age)


@pytest.mark.parametrize("age", [-86_400, -61, 300, 301, LIFETIME - 1])
def test_a_form_token_that_is_too_old_or_from_the_future_is_refused(age: int) -> None:
    with pytest.raises(InvalidSession):
        check(now=NOW + age)


@pytest.mark.parametrize(
    "token", ["", TOKEN[:-1], TOKEN + "A", TOKEN.lower(), hashlib.sha256(TOKEN.encode()).hexdigest()]
)
def test_a_form_token_is_bound_to_its_login_token(token: str) -> None:
    with pytest.raises(InvalidSession):
        check(token=token)


@pytest.mark.parametrize("target", [b"", b"/", TARGET[:-1], TARGET + b"0", TARGET.upper(), TARGET.partition(b"?")[0]])
def test_a_form_token_is_bound_to_its_target(target: bytes) -> None:
    with pytest.raises(InvalidSession):
        check(target=target)


@pytest.mark.parametrize("browser", ["", BROWSER[:-1], BROWSER + "A", BROWSER.lower(), "\udcff"])
def test_a_form_token_is_bound_to_its_browser(browser: str) -> None:
    with pytest.raises(InvalidSession):
        check(browser=browser)


@pytest.mark.parametrize(("target", "browser"), [(b"/ab", "c"), (b"/", "abc"), (b"/abc", ""), (b"", "/abc")])
def test_moving_text_between_target_and_browser_invalidates_the_form(target: bytes, browser: str) -> None:
    form = dump_form_token(TOKEN, b"/a", "bc", KEY.form_key, now=NOW)
    check(form, target=b"/a", browser="bc")
    with pytest.raises(InvalidSession):
        check(form, target=target, browser=browser)


binding = st.tuples(st.text(), st.binary().map(lambda raw: b"/" + raw.replace(b"\0", b"")), st.text())


@given(binding, binding)
def test_a_form_token_is_valid_only_for_the_values_it_was_signed_for(
    mine: tuple[str, bytes, str], other: tuple[str, bytes, str]
) -> None:
    form = dump_form_token(*mine, KEY.form_key, now=NOW)
    check(form, *mine)
    if other != mine:
        with pytest.raises(InvalidSession):
            check(form, *other)


def test_none_of_the_altered_form_tokens_is_accepted() -> None:
    for altered in alterations(FORM):
        with pytest.raises(InvalidSession):
            check(altered)


def test_a_form_token_of_any_known_key_is_valid() -> None:
    check_form_token(FORM, TOKEN, TARGET, BROWSER, [OTHER_KEY.form_key, KEY.form_key], now=NOW)


@pytest.mark.parametrize(
    "keys",
    [[], [OTHER_KEY.form_key], [KEY.token_key], [KEY.session_key], [KEY.secret]],
    ids=["no-key", "another-key", "token-key", "session-key", "secret"],
)
def test_a_form_token_verifies_only_with_its_form_key(keys: list[bytes]) -> None:
    with pytest.raises(InvalidSession):
        check_form_token(FORM, TOKEN, TARGET, BROWSER, keys, now=NOW)


# --- Separation of purposes ------------------------------------------------------------------------------------------


def test_cookies_and_form_tokens_differ_even_under_one_key() -> None:
    one_key = KEY.session_key
    with pytest.raises(InvalidSession):
        load(dump_form_token(TOKEN, TARGET, BROWSER, one_key, now=NOW), one_key)
    with pytest.raises(InvalidSession):
        check_form_token(dump_session(SESSION, one_key), TOKEN, TARGET, BROWSER, [one_key], now=NOW)


def test_login_tokens_cookies_and_form_tokens_are_not_interchangeable() -> None:
    token = sign(Claims(expires_at=NOW + 300, user_id=1, account_id=123, nonce=0), KEY.session_key)
    with pytest.raises(InvalidSession):
        load(token)
    with pytest.raises(InvalidSession):
        check(form=token)
    for text in (COOKIE, FORM):
        with pytest.raises(MalformedToken):
            read(text, [KEY.session_key, KEY.form_key], now=NOW, lifetime=300)
