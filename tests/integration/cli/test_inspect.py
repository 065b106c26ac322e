"""The command `inspect`."""

import hashlib
import re
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from sso_service import keyring, tokens
from sso_service.database.ledger import floor_at
from sso_service.services.node import Node
from sso_service.tokens import Claims
from sso_service.web.app import create_app
from tests.support.client import Client
from tests.support.command_line import EMAIL, run, succeed
from tests.support.data import ACCOUNT, OTHER_ACCOUNT
from tests.support.databases import changing, on_sqlite
from tests.support.token_maker import TokenMaker

ABSENT = 4_000_000_000


def good(maker: TokenMaker) -> str:
    return maker.token()


def consumed(maker: TokenMaker) -> str:
    maker.consume(maker.claims())
    return maker.token()


def expired(maker: TokenMaker) -> str:
    return maker.token(expires_at=maker.now - 1)


def forged(maker: TokenMaker) -> str:
    token = maker.token()
    return token[:30] + ("A" if token[30] != "A" else "B") + token[31:]


def signed_for_another_purpose(maker: TokenMaker) -> str:
    return tokens.sign(maker.claims(), maker.key.session_key)


def signed_by_the_secret_itself(maker: TokenMaker) -> str:
    return tokens.sign(maker.claims(), maker.key.secret)


def overlong(maker: TokenMaker) -> str:
    return maker.token(expires_at=maker.now + 600)


def of_a_retired_key(maker: TokenMaker) -> str:
    token = maker.token()
    keyring.rotate(maker.keys, now=maker.now - 1000, lead=0)
    return token


def expired_of_a_retired_key(maker: TokenMaker) -> str:
    token = maker.token(expires_at=maker.now - 700)
    keyring.rotate(maker.keys, now=maker.now - 1000, lead=0)
    return token


def of_the_previous_key(maker: TokenMaker) -> str:
    token = maker.token()
    keyring.rotate(maker.keys, now=maker.now - 100, lead=0)
    return token


def of_a_revoked_key(maker: TokenMaker) -> str:
    token = maker.token()
    keyring.revoke(maker.keys, maker.key.id, now=maker.now)
    return token


def of_a_disabled_user(maker: TokenMaker) -> str:
    succeed("user", "disable", EMAIL, env=maker.env)
    return maker.token()


def of_a_removed_member(maker: TokenMaker) -> str:
    succeed("user", "remove", EMAIL, "--account", str(ACCOUNT), env=maker.env)
    return maker.token()


def of_another_account(maker: TokenMaker) -> str:
    return maker.token(account_id=OTHER_ACCOUNT)


def of_an_unknown_user(maker: TokenMaker) -> str:
    return maker.token(user_id=ABSENT)


def from_before_a_sign_out(maker: TokenMaker) -> str:
    succeed("user", "sign-out", EMAIL, env=maker.env)
    shown = succeed("user", "show", EMAIL, env=maker.env)
    assert "sessions and login links from before" in shown
    return maker.token()


def older_than_its_user(maker: TokenMaker) -> str:
    assert "have ended" not in succeed("user", "show", EMAIL, env=maker.env)
    return maker.token(expires_at=maker.now + 200)


def below_the_floor(maker: TokenMaker) -> str:
    with changing(maker.database) as connection:
        connection.execute(text("UPDATE consumed_floor SET claims = :floor"), {"floor": floor_at(maker.now + 301)})
    return maker.token()


DECIDED_BY_KEYS: list[tuple[Callable[[TokenMaker], str], str, int]] = [
    (of_the_previous_key, "would sign in", 303),
    (forged, "signature", 401),
    (signed_for_another_purpose, "signature", 401),
    (signed_by_the_secret_itself, "signature", 401),
    (overlong, "longer", 401),
    (of_a_retired_key, "key", 401),
    (expired_of_a_retired_key, "expired", 401),
    (of_a_revoked_key, "signature", 401),
]
DECIDED_BY_THE_DATABASE: list[tuple[Callable[[TokenMaker], str], str, int]] = [
    (good, "would sign in", 303),
    (consumed, "used", 401),
    (expired, "expired", 401),
    (below_the_floor, "expired", 401),
    (from_before_a_sign_out, "signed out", 401),
    (older_than_its_user, "joined", 401),
    (of_a_disabled_user, "disabled", 403),
    (of_a_removed_member, "account", 403),
    (of_another_account, "account", 403),
    (of_an_unknown_user, "user", 403),
]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("database_url", "make", "verdict", "status"),
    [
        pytest.param(database, *kind, id=f"{database}-{kind[0].__name__}")
        for database, kinds in (
            ("sqlite", DECIDED_BY_KEYS + DECIDED_BY_THE_DATABASE),
            ("postgresql", DECIDED_BY_THE_DATABASE),
        )
        for kind in kinds
    ],
    indirect=["database_url"],
)
async def test_inspect_predicts_the_result_of_a_login(
    maker: TokenMaker, service: Node, make: Callable[[TokenMaker], str], verdict: str, status: int
) -> None:
    token = make(maker)
    secret = urlsafe_b64encode(maker.key.secret).decode().rstrip("=")

    printed = [succeed("inspect", token, env=maker.env) for _ in range(2)]
    answer = await Client(create_app(service)).get(f"/?sso={token}")

    for output in printed:
        conclusion = output.splitlines()[-1]
        assert verdict in conclusion
        assert conclusion.startswith("refused") == (status != 303)
        assert token not in output
        assert token[22:] not in output  # the tag
        assert secret not in output
    assert answer.status == status


@on_sqlite
def test_inspect_prints_ref_claims_key_and_age(maker: TokenMaker) -> None:
    token = maker.token(expires_at=maker.now + 200)
    printed = succeed("inspect", token, env=maker.env)
    assert hashlib.sha256(token.encode()).hexdigest()[:12] in printed
    fields = dict(re.split(r" {2,}", line, maxsplit=1) for line in printed.splitlines())
    assert fields["user"] == str(maker.user_id)
    assert fields["email"] == EMAIL
    assert fields["account"] == str(ACCOUNT)
    assert fields["nonce"] == "deadbeef"
    assert fields["consumed"] == "no"
    assert time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(maker.now + 200)) in fields["expires"]
    age = re.search(r"(\d+) s ago", fields["issued"])
    assert age is not None
    assert 100 <= int(age[1]) <= 130
    assert maker.key.id in printed


def test_inspect_reports_that_an_expired_token_was_used(maker: TokenMaker) -> None:
    claims = maker.claims(expires_at=maker.now - 100)
    maker.consume(claims)
    printed = succeed("inspect", tokens.sign(claims, maker.key.token_key), env=maker.env)
    assert re.search(r"^consumed +yes$", printed, re.MULTILINE)
    assert "expired" in printed.splitlines()[-1]


@on_sqlite
def test_inspect_warns_that_unsigned_claims_may_be_forged(maker: TokenMaker) -> None:
    printed = succeed("inspect", forged(maker), env=maker.env)
    assert "forged" in printed
    assert EMAIL not in printed


@pytest.mark.parametrize(
    "change",
    [
        lambda token: "",
        lambda token: "x",
        lambda token: token[:-1],
        lambda token: token + "=",
        lambda token: token + "A",
        lambda token: f" {token}",
        lambda token: token + "\n",
        lambda token: token[:-1] + "B",  # has spare bits
        lambda token: token[:20] + "+" + token[21:],
        lambda token: token[:20] + "\u0100" + token[21:],
        lambda token: token[:20] + "\udcff" + token[21:],
        lambda token: f"https://studio.example/?sso={token}",
    ],
)
def test_inspecting_malformed_text_needs_no_keys_and_no_database(tmp_path: Path, change: Callable[[str], str]) -> None:
    text_given = change(tokens.sign(Claims(1_900_000_000, 1, 123, 7), bytes(32)))
    printed = succeed("inspect", text_given, env={"SSO_HOME": str(tmp_path)})
    assert printed.splitlines()[-1].startswith("refused")
    assert "malformed" in printed
    assert len(text_given) < 2 or text_given not in printed


@on_sqlite
def test_inspect_without_a_database_calls_no_token_good(maker: TokenMaker, tmp_path: Path) -> None:
    outcome = run("inspect", maker.token(), env=maker.env | {"SSO_DATABASE_URL": "sqlite:///absent.db"})
    assert outcome.code == 1
    assert "sign in" not in outcome.out
    assert len(outcome.err.splitlines()) == 1
