"""Servers and transports with prepared responses for the Python client."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import httpx

Reply = tuple[int, bytes] | tuple[int, bytes, dict[str, str]] | httpx.HTTPError


class Wire(httpx.MockTransport):
    """Sends these replies in turn, then repeats the last one. Records all requests and their times."""

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


def error_body(code: str, **details: str) -> bytes:
    """Return the body of an error from the service."""
    more = ",".join(f'"{name}":"{value}"' for name, value in details.items())
    return (
        f'{{"error":{{"code":"{code}","message":"Some reason."' + (f',"details":{{{more}}}' if more else "") + "}}"
    ).encode()


Responder = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(respond: Responder, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Run a server that reads the head of a request and then calls `respond`. Yields its URL and the heads."""
    received: list[bytes] = []
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.readuntil(b"\r\n\r\n"))
        await respond(reader, writer)
        writer.close()
        with suppress(OSError):  # how the connection ends is not under test
            await writer.wait_closed()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    try:
        scheme = "https" if tls else "http"
        yield f"{scheme}://localhost:{server.sockets[0].getsockname()[1]}", received
    finally:
        server.close()
        await server.wait_closed()
        await asyncio.gather(*serving)  # the clients have disconnected, so these end


async def never_responds(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()  # until the client disconnects
