"""Fixtures: Chromium, applications over HTTPS, and services in their own processes with the demo account."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trustme
import uvicorn
from playwright.sync_api import Browser, BrowserContext, sync_playwright
from starlette.types import ASGIApp

from scripts.tools.ports import free_port
from sso_service.client import SSOClient
from tests.support.demo import Demo
from tests.support.processes import command, serving, wait_for_port
from tests.support.programs import program


# Not for the session: Playwright keeps an event loop running in this thread, so asynchronous tests would fail.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. `*.example` resolves to this machine, and third-party cookies are blocked unless partitioned."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program("chromium", "google-chrome", "chrome"),
            args=["--host-resolver-rules=MAP *.example 127.0.0.1", "--test-third-party-cookie-phaseout"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Demo]]:
    """Return a function that starts a service with the demo account. Arguments are its environment variables.

    The services run until the end of the test module.
    """
    with ExitStack() as stack:
        yield lambda **env: stack.enter_context(_demo(tmp_path_factory.mktemp("demo"), env))


@pytest.fixture
def browsers(browser: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """Return a function that starts a browser context without cookies and JavaScript, closed after the test."""
    with ExitStack() as stack:

        def start(**options: object) -> BrowserContext:
            context = browser.new_context(**{"java_script_enabled": False, **options})  # type: ignore[arg-type]  # any
            stack.callback(context.close)
            return context

        yield start


@pytest.fixture
def https() -> Iterator[Callable[[ASGIApp, str], str]]:
    """Return a function that serves an application under a host name over HTTPS, and returns the origin."""
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


@contextmanager
def _demo(home: Path, variables: Mapping[str, str]) -> Iterator[Demo]:
    env = {"SSO_HOME": str(home), **variables}
    assert command("init", env=env).returncode == 0
    with serving(env, home / "log") as running:
        # The link contains the port, which is known only now.
        port = running.url.rpartition(":")[2]
        printed = command("init", "--demo", env={**env, "SSO_PORT": port}).stdout
        (link,) = re.findall(r"http://\S+sso=[\w-]{43}", printed)
        (api_token,) = set(re.findall(r"wf_live_[\w-]{43}", printed))
        with SSOClient(running.url, api_token) as client:
            yield Demo(running.url, env, link, client)
