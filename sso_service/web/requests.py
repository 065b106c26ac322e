"""Reading request bodies, with limits on their size and time."""

import asyncio
import re
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from sso_service.errors import BodyTooLarge, BodyTooSlow
from sso_service.http import form_fields, header

T = TypeVar("T")

SESSION_COOKIE = "studio_session"
FORM_COOKIE = "studio_form"

_BODY_LIMIT = 16 * 1024
"""Maximum size of a request body in bytes."""
_BODY_TIMEOUT = 10.0
"""Seconds that a request body may take. Without a limit, a slow sender could keep a connection busy indefinitely."""
_MAX_FIELDS = 20
"""Fields of a form, at most. The forms of this service have fewer than ten."""
_LENGTH = re.compile(r"[0-9]+")


async def body(scope: Scope, receive: Receive) -> bytes:
    """Return the whole body.

    Raises `BodyTooLarge` as soon as that is certain, `BodyTooSlow`, or `ClientDisconnect`.
    """
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            return await _whole_body(scope, receive)
    except TimeoutError:
        raise BodyTooSlow from None


async def _whole_body(scope: Scope, receive: Receive) -> bytes:
    declared = header(scope, b"content-length")
    if _LENGTH.fullmatch(declared) and int(declared[:20]) > _BODY_LIMIT:
        raise BodyTooLarge
    received = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        received += message.get("body", b"")
        if len(received) > _BODY_LIMIT:
            raise BodyTooLarge
        if not message.get("more_body", False):
            return bytes(received)


async def unless_disconnected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return the result of `work`, which is cancelled if the client disconnects. The body must have been read.

    Raises what `work` raises, or `ClientDisconnect`.
    """
    tasks = working, watching = asyncio.create_task(work), asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.wait(tasks)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def form(scope: Scope, receive: Receive, encoding: str = "utf-8") -> dict[str, list[str]]:
    """Return the fields of a form in the body, none if it is not one of this service. Raises what `body` raises."""
    content = await body(scope, receive)
    return form_fields(content, encoding) if content.count(b"&") < _MAX_FIELDS else {}
