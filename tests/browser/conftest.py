"""A real browser, and HTTPS for it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import trustme
import uvicorn
from playwright.sync_api import Browser, sync_playwright
from starlette.types import ASGIApp

from tests.support import free_port, program, wait_for_port


# Not for the session: Playwright keeps an event loop running in this thread, which no asynchronous test bears.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, in which `*.example` is this machine, and third-party cookies are refused unless partitioned."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program("chromium", "google-chrome", "chrome"),
            args=["--host-resolver-rules=MAP *.example 127.0.0.1", "--test-third-party-cookie-phaseout"],
        )
        yield browser
        browser.close()


@pytest.fixture
def https() -> Iterator[Callable[[ASGIApp, str], str]]:
    """Serves an application under a host name over HTTPS until the test ends; the answer is the origin."""
    authority = trustme.CA()
    with ExitStack() as stack:
        yield lambda app, host: stack.enter_context(_https(authority, app, host))


@contextmanager
def _https(authority: trustme.CA, app: ASGIApp, host: str) -> Iterator[str]:
    certificate = authority.issue_cert(host)
    port = free_port()
    with (
        certificate.private_key_pem.tempfile() as key,
        certificate.cert_chain_pems[0].tempfile() as chain,
    ):
        config = uvicorn.Config(app, port=port, ssl_keyfile=key, ssl_certfile=chain, log_config=None, ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_for_port(port)
            yield f"https://{host}:{port}"
        finally:
            server.should_exit = True
            thread.join()
