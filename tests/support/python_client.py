"""Calls of the Python client, in both kinds."""

from collections.abc import Awaitable
from functools import partial
from typing import Any

import anyio.to_thread
import pytest

from sso_service.client import AsyncSSOClient, SSOClient, SSOError

Kind = type[SSOClient] | type[AsyncSSOClient]
SERVICE_URL = "https://sso.example"
API_TOKEN = "wf_live_SecretSecretSecretSecretSecretSecretSecret9"


async def call(kind: Kind, method: str, url: str = SERVICE_URL, api_token: str = API_TOKEN, **given: Any) -> Any:
    """What a method of a new client returns. Of `given`, the client gets its settings and the method the rest."""
    settings = {name: given.pop(name) for name in ("timeout", "retry_for", "ssl_context", "transport") if name in given}
    if kind is SSOClient:
        with SSOClient(url, api_token, **settings) as client:
            return await anyio.to_thread.run_sync(partial(getattr(client, method), **given))
    async with AsyncSSOClient(url, api_token, **settings) as client:
        return await getattr(client, method)(**given)


async def error_of(call: Awaitable[Any]) -> SSOError:
    """The error that a call ends with."""
    with pytest.raises(SSOError) as caught:
        await call
    return caught.value
