"""Servers and transports that give prepared answers to the Python client."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import httpx

Reply = tuple[int, bytes] | tuple[int, bytes, dict[str, str]] | httpx.HTTPError


class Wire(httpx.MockTransport):
    """Gives these replies in turn, the last one for ever, and remembers what was asked and when."""

    def __init__(self, *replies: Reply) -> None:
        super().__init__(self._reply)
        self.replies = list(replies)
        self.requests: list[httpx.Request] = []
        self.times: list[float] = []

    def _reply(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.times.append(time.monotonic())
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, httpx.HTTPError):
            raise reply
        status, content, *headers = reply
        return httpx.Response(status, content=content, headers=headers[0] if headers else {})


def told(code: str, **details: str) -> bytes:
    """The body of an error of the service."""
    more = ",".join(f'"{name}":"{value}"' for name, value in details.items())
    return (
        f'{{"error":{{"code":"{code}","message":"So it is."' + (f',"details":{{{more}}}' if more else "") + "}}"
    ).encode()


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(talk: Talk, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[str, list[bytes]]]:
    """The URL of a server that reads a request and then does `talk`, and the requests that it got."""
    got: list[bytes] = []
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.readuntil(b"\r\n\r\n"))
        await talk(reader, writer)
        writer.close()
        with suppress(OSError):  # of either kind: how the connection ends is not what is tested
            await writer.wait_closed()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    try:
        scheme = "https" if tls else "http"
        yield f"{scheme}://localhost:{server.sockets[0].getsockname()[1]}", got
    finally:
        server.close()
        await server.wait_closed()
        await asyncio.gather(*serving)  # the client is gone, so they have nothing to wait for


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()  # until the client goes away
