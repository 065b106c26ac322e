"""A TCP proxy that simulates a slow, silent or broken network."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

Address = tuple[str, int] | str
"""Host and port, or the path of a socket."""


class Proxy:
    """Forwards the connections of one port to `target`.

    `delay` (seconds) is added to all data. While `silent`, connections are accepted and kept, and their data is held
    back until the silence ends. `cut` resets all connections.
    """

    def __init__(self, target: Address) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._speaks = asyncio.Event()
        self._speaks.set()
        self.refuses = False
        self.delay = 0.0
        self.cut_after_request: Callable[[], float | None] = lambda: None
        """Called for each piece of data from a client. Returns the seconds after which to cut its connection, or None.
        """

    async def start(self) -> int:
        """Begin to listen. Return the port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Stop listening, and reset all connections."""
        if self._server:
            self._server.close()
            self.silent = False
            self.cut()
            await self._server.wait_closed()

    @property
    def silent(self) -> bool:
        """Whether all data is held back."""
        return not self._speaks.is_set()

    @silent.setter
    def silent(self, silent: bool) -> None:
        (self._speaks.clear if silent else self._speaks.set)()

    def cut(self) -> None:
        """Reset all connections. Data in transit is lost."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there: asyncio.StreamWriter | None = None
        self._writers.add(writer)
        try:
            if self.refuses:
                return
            if isinstance(self._target, str):
                back, there = await asyncio.open_unix_connection(self._target)
            else:
                back, there = await asyncio.open_connection(*self._target)
            self._writers.add(there)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, there, writer))
                group.create_task(self._pass_on(back, writer))
        except* (OSError, RuntimeError):
            pass
        finally:
            for end in (writer, there):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()

    async def _pass_on(
        self, source: asyncio.StreamReader, to: asyncio.StreamWriter, client: asyncio.StreamWriter | None = None
    ) -> None:
        while piece := await source.read(65536):
            if self.delay:
                await asyncio.sleep(self.delay)
            await self._speaks.wait()
            to.write(piece)
            await to.drain()
            if client is not None and (seconds := self.cut_after_request()) is not None:
                asyncio.get_running_loop().call_later(seconds, client.transport.abort)
        await self._speaks.wait()
        with suppress(OSError):
            to.write_eof()
