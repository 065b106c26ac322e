"""Deployments: a proxy with the service and a Studio behind it."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sso_service import keyring
from sso_service.database import open_database
from sso_service.permissions import Scope
from sso_service.settings import read_settings
from tests.support import administration
from tests.support.data import ACCOUNT, JANE, PAGE
from tests.support.databases import changing
from tests.support.processes import command, serving
from tests.support.proxies import Proxy, proxying
from tests.support.studio_server import Application, application
from tests.support.waiting import PATIENCE

IDENTITY = ["x-studio-user", "x-studio-email", "x-studio-account", "x-studio-role"]
"""The headers in which a proxy forwards the user's identity to the Studio."""
NAVIGATION = [("Sec-Fetch-Mode", "navigate"), ("Sec-Fetch-Dest", "document"), ("Accept", "text/html,*/*;q=0.8")]


@dataclass(frozen=True, slots=True)
class Deployment:
    """A running proxy with the service and a Studio behind it."""

    proxy: Proxy
    studio: Application
    env: dict[str, str]
    api_token: str

    def issue(self, person: dict[str, str] = JANE) -> str:
        """Issue a login token through the proxy."""
        answer = self.proxy.request(
            "/v1/sso_tokens",
            ("Authorization", f"Bearer {self.api_token}"),
            ("Content-Type", "application/json"),
            method="POST",
            body=json.dumps(person).encode(),
        )
        assert answer.status == 201, answer
        token: str = answer.json()["token"]
        return token

    def sign_in(self, person: dict[str, str] = JANE) -> str:
        """Sign in with a new login link, and return the session cookie."""
        answer = self.proxy.request(f"{PAGE}?sso={self.issue(person)}", *NAVIGATION)
        assert (answer.status, answer.header("location")) == (303, PAGE), answer
        return (answer.header("set-cookie") or "").partition(";")[0]

    def accepts(self, token: str) -> bool:
        """Return whether `token` signs in. Consumes it."""
        return self.proxy.request(f"{PAGE}?sso={token}").status == 303

    def run(self, *arguments: str) -> None:
        done = command(*arguments, env=self.env)
        assert done.returncode == 0, done


@contextmanager
def running_deployment(kind: str, template: Path, directory: Path) -> Iterator[tuple[Deployment, Callable[[], None]]]:
    """Run a deployment. Yields it, and a function that stops the service."""
    shutil.copy(template, directory / "sso.db")
    env = {"SSO_HOME": str(directory), "SSO_DATABASE_URL": "sqlite:///sso.db", "SSO_STUDIO_PAGES": "0"}
    (directory / "keys").mkdir(mode=0o700)
    keyring.rotate(directory / "keys", now=int(time.time()) - 3600, lead=0)
    database = open_database(read_settings(env))
    with changing(database) as connection:
        scopes = frozenset({Scope.WRITE_SSO})
        _, secret = administration.create_api_token(
            connection, account_id=ACCOUNT, name="tests", scopes=scopes, now=int(time.time())
        )
    database.close()
    with application() as studio, serving(env, directory / "service.log") as running:
        port = int(running.url.rpartition(":")[2])

        def stop() -> None:
            running.process.terminate()
            running.process.wait(PATIENCE)

        with proxying(kind, [f"127.0.0.1:{port}"], studio.port, directory / "proxy") as proxy:
            yield Deployment(proxy, studio, env, secret), stop
