"""Calls of the two Python clients."""

from collections.abc import Awaitable
from functools import partial
from typing import Any

import anyio.to_thread
import pytest

from sso_service.client import AsyncSSOClient, SSOClient, SSOError

Kind = type[SSOClient] | type[AsyncSSOClient]
SERVICE_URL = "https://sso.example"
API_TOKEN = "wf_live_SecretSecretSecretSecretSecretSecretSecret9"
FORGED = "cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA"
"""A login token in the right form that no key of a test signed."""


async def call(kind: Kind, method: str, url: str = SERVICE_URL, api_token: str = API_TOKEN, **arguments: Any) -> Any:
    """Call a method of a new client. Of `arguments`, the client gets its settings and the method gets the rest."""
    settings = {
        name: arguments.pop(name)
        for name in ("timeout", "retry_for", "ssl_context", "transport", "allow_http")
        if name in arguments
    }
    if kind is SSOClient:
        with SSOClient(url, api_token, **settings) as client:
            return await anyio.to_thread.run_sync(partial(getattr(client, method), **arguments))
    async with AsyncSSOClient(url, api_token, **settings) as client:
        return await getattr(client, method)(**arguments)


async def error_of(call: Awaitable[Any]) -> SSOError:
    """Return the error that a call raises."""
    with pytest.raises(SSOError) as caught:
        await call
    return caught.value
