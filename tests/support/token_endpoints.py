"""The endpoints that take a login token: `verify`, `consume` and `revoke`."""

from dataclasses import dataclass

from sso_service.permissions import Scope
from tests.support.api import (
    NEEDS_VERIFY_SCOPE,
    NEEDS_WRITE_SCOPE,
    TOKEN_CONSUMED,
    TOKEN_EXPIRED,
    TOKEN_INVALID,
    Refusal,
    refusal,
)
from tests.support.client import Answer, Client
from tests.support.redeeming import ref

GOOD, CONSUMED, EXPIRED, INVALID, NO_ACCESS = "good", "consumed", "expired", "invalid", "no access"
REASONS = {
    "bad_signature": INVALID,
    "expired": EXPIRED,
    "consumed": CONSUMED,
    "no_access": NO_ACCESS,
}
REFUSALS = {
    TOKEN_INVALID: INVALID,
    TOKEN_EXPIRED: EXPIRED,
    TOKEN_CONSUMED: CONSUMED,
    Refusal(403, "no_access"): NO_ACCESS,
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of the three endpoints: its name, and the scope that it requires."""

    name: str
    scope: Scope

    @property
    def url(self) -> str:
        return f"/v1/sso_tokens/{self.name}"

    @property
    def consumes(self) -> bool:
        """True if the endpoint consumes a valid token."""
        return self.name != "verify"

    @property
    def needs_scope(self) -> Refusal:
        return NEEDS_VERIFY_SCOPE if self.scope == Scope.VERIFY_SSO else NEEDS_WRITE_SCOPE

    async def ask(self, client: Client, token: object, secret: str) -> Answer:
        """The response for `token`. Checks that it neither signs in nor redirects, and does not contain the token."""
        answer = await client.post_json(self.url, {"token": token}, token=secret)
        assert answer.header("set-cookie") is None
        assert answer.header("location") is None
        assert len(str(token)) < 40 or str(token) not in answer.text
        return answer

    async def outcome(self, client: Client, token: str, secret: str) -> str:
        """One of the five outcomes. Checks the format of the response as well."""
        answer = await self.ask(client, token, secret)
        if self.name == "verify":
            assert answer.status == 200, answer
            content = answer.json()
            if content["active"] is True:
                return GOOD
            assert content == {"active": False, "reason": content["reason"], "ref": ref(token)}
            return REASONS[content["reason"]]
        if answer.status != 200:
            return REFUSALS[refusal(answer)]
        content = answer.json()
        if self.name == "consume":
            assert content["active"] is True
            return GOOD
        assert content in ({"revoked": True}, {"revoked": False})
        assert isinstance(content["revoked"], bool)
        return GOOD if content["revoked"] else CONSUMED


ENDPOINTS = [
    Endpoint("verify", Scope.VERIFY_SSO),
    Endpoint("consume", Scope.VERIFY_SSO),
    Endpoint("revoke", Scope.WRITE_SSO),
]
CONSUMING = [endpoint for endpoint in ENDPOINTS if endpoint.consumes]
