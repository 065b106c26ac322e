"""Login tokens for tests: valid ones, and ones with a single fault."""

import time
from dataclasses import dataclass
from pathlib import Path

from sso_service import tokens
from sso_service.database.directory import AccessQuery
from sso_service.database.ledger import Redemption, Verdict, redeem
from sso_service.database.transactions import Database
from sso_service.keyring import SigningKey
from sso_service.tokens import Claims
from tests.support.data import ACCOUNT
from tests.support.databases import changing


@dataclass(frozen=True, slots=True)
class TokenMaker:
    """A member of `ACCOUNT`, a signing key, and the settings (`env`) of the commands."""

    env: dict[str, str]
    database: Database
    keys: Path
    key: SigningKey
    user_id: int
    now: int

    def claims(self, **changes: int) -> Claims:
        """Return claims that would sign in the member, with some fields changed."""
        fields = {"expires_at": self.now + 300, "user_id": self.user_id, "account_id": ACCOUNT, "nonce": 0xDEADBEEF}
        return Claims(**fields | changes)

    def token(self, **changes: int) -> str:
        """Return a token for these claims, signed with the key."""
        return tokens.sign(self.claims(**changes), self.key.token_key)

    def consume(self, claims: Claims) -> None:
        """Consume the token with these claims."""
        assert self.redeem(claims) is Verdict.REDEEMED

    def redeem(self, claims: Claims) -> Verdict:
        """Try to consume the token with these claims."""
        query = AccessQuery(claims.user_id, claims.account_id)
        with changing(self.database) as connection:
            [redeemed] = redeem(
                self.database, connection, [Redemption(claims.pack(), query, int(time.time()), int(time.time()))]
            )
        return redeemed.verdict
