"""How a node takes its leave: it says that nobody shall be sent to it, and goes on for a while."""

import asyncio
import signal
from collections.abc import Callable


def drain_first(seconds: float, begin: Callable[[], None]) -> None:
    """Lets SIGTERM call `begin`, and stop uvicorn only `seconds` later. Of the event loop that serves."""
    stop = signal.getsignal(signal.SIGTERM)
    if not seconds or not callable(stop):
        return
    loop = asyncio.get_running_loop()

    def leave() -> None:
        begin()
        loop.call_later(seconds, stop, signal.SIGTERM, None)

    loop.add_signal_handler(signal.SIGTERM, leave)
