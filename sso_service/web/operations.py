"""`/healthz`, `/readyz` and `/metrics`, for operating the service."""

import asyncio
import re
from hmac import compare_digest
from ipaddress import IPv6Address, ip_address

from msgspec import UNSET
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sso_service.errors import NotAuthenticated
from sso_service.http import bearer
from sso_service.observability.metrics import Gauges, exposition
from sso_service.problems import RETRY_AFTER
from sso_service.server.listening import UNIX
from sso_service.services.node import Node
from sso_service.settings import Settings
from sso_service.web.problems import json_response
from sso_service.web.schemas import Healthy, NotReady, Ready

SCRAPE_INTERVAL = 0.25
"""Seconds between the beginnings of two computations of the metrics, at least. Later scrapes wait for the next one."""


async def healthz(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 200 while the event loop runs. The database is not checked: a restart would not repair it."""
    await json_response(Healthy())(scope, receive, send)


class Readyz:
    """Report whether this node should get requests: keys, database, schema, clocks. 200, or 503 with the problems."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problems = (await self._node.condition()).problems
        response = json_response(Ready())
        if problems:
            shown = problems if _is_authorized(scope, self._node.settings) else UNSET
            response = json_response(NotReady(problems=shown), 503, {"Retry-After": RETRY_AFTER})
        await response(scope, receive, send)


class Metrics:
    """Metrics for Prometheus: the counters of all workers of this node, and its condition.

    Adding up the counters takes several milliseconds, so a thread does it. Any number of scrapes at the same time costs
    no more than one: they share the next result. No result is older than the request for it.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._one_at_a_time = asyncio.Lock()
        self._next: asyncio.Task[bytes] | None = None
        self._next_from = 0.0
        """Time of the event loop before which the next result is not begun."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_authorized(scope, self._node.settings):
            raise NotAuthenticated
        if self._next is None:
            self._next = asyncio.create_task(self._make())
        headers = {"Content-Type": CONTENT_TYPE_LATEST, "Cache-Control": "no-store"}
        await Response(await asyncio.shield(self._next), headers=headers)(scope, receive, send)

    async def _make(self) -> bytes:
        loop = asyncio.get_running_loop()
        async with self._one_at_a_time:
            await asyncio.sleep(self._next_from - loop.time())
            self._next = None  # requests from now on get the one after this
            self._next_from = loop.time() + SCRAPE_INTERVAL
            condition = await self._node.condition()
            expiring = self._node.expiring
            next_expiry = None if expiring is None else expiring.next_expiry
            gauges = Gauges(
                {
                    "sso_ready": not condition.problems,
                    "sso_signing_key_age_seconds": condition.signing_key_age,
                    "sso_key_files_unusable": condition.unusable_key_files,
                    "sso_clock_difference_seconds": condition.clock_difference,
                    "sso_consumed_rows": self._node.consumed_rows,
                    "sso_api_tokens_expiring": None if expiring is None else expiring.count,
                    "sso_api_token_next_expiry_seconds": next_expiry and max(0, next_expiry - self._node.trust.now()),
                }
            )
            return await asyncio.to_thread(exposition, gauges)


# Proxies send at least one of these (RFC 7239; RFC 9110 section 7.6.3; the usual names before these standards).
_FORWARDING = re.compile(rb"forwarded|via|x-real-ip|x-client-ip|x-cluster-client-ip|x-original-.*|x-forwarded-.*")


def _is_authorized(scope: Scope, settings: Settings) -> bool:
    if settings.metrics_token:
        return compare_digest((bearer(scope) or "").encode(), settings.metrics_token.encode())
    return _is_local(scope)


def _is_local(scope: Scope) -> bool:
    """Return whether the request comes from this machine, and not by way of a proxy on it.

    Without a forwarding header, `client` is the address of the connection itself. With one, the request is from another
    client, wherever that client claims to be.
    """
    if not scope.get("client") or any(_FORWARDING.fullmatch(name) for name, _ in scope["headers"]):
        return False
    host = scope["client"][0]
    try:
        address = ip_address(host)
    except ValueError:
        return bool(host == UNIX)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
