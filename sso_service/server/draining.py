"""Connection draining: report not ready, keep serving, then stop."""

import asyncio
import signal
from collections.abc import Callable


def drain_first(seconds: float, report_not_ready: Callable[[], None]) -> None:
    """On SIGTERM, call `report_not_ready` and let uvicorn stop only `seconds` later. With 0, uvicorn stops at once.

    Call it in the event loop that serves, once uvicorn has installed its own handler of SIGTERM, as at the start of the
    application's lifespan.
    """
    stop = signal.getsignal(signal.SIGTERM)
    if not seconds or not callable(stop):
        return
    loop = asyncio.get_running_loop()

    def drain() -> None:
        report_not_ready()
        loop.call_later(seconds, stop, signal.SIGTERM, None)

    loop.add_signal_handler(signal.SIGTERM, drain)
