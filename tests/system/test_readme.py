"""The examples of the README, run as they stand there, against a real service."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sso_service.settings import Settings
from tests.support.data import PAGE
from tests.support.processes import Running, serving
from tests.support.programs import program
from tests.support.repository import README

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def example(language: str) -> str:
    """The only example in this language."""
    (code,) = re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)
    return str(code)


@pytest.fixture
def running(settings: Settings, keys_dir: Path, tmp_path: Path) -> Iterator[Running]:
    env = {"SSO_HOME": settings.home, "SSO_DATABASE_URL": settings.database_url}
    with serving(env, tmp_path / "log") as running:
        yield running


def variables(running: Running, api_token: str) -> dict[str, str]:
    return {
        **os.environ,
        "SSO_SERVICE_URL": running.url,
        "SSO_API_TOKEN": api_token,
        "STUDIO_URL": "https://studio.example",
    }


def assert_it_signs_in(running: Running, link: str) -> None:
    """Follows a link to the Studio, at the service that stands behind its host name."""
    assert link.startswith(f"https://studio.example{PAGE}?sso=")
    answer = httpx.get(link.replace("https://studio.example", running.url))
    assert (answer.status_code, answer.headers["location"]) == (303, PAGE)


JANE = '{ email: "jane.doe@example.com", firstName: "Jane", lastName: "Doe" }'


def javascript(call: str, env: dict[str, str], directory: Path) -> "subprocess.CompletedProcess[str]":
    (directory / "studio.mjs").write_text(example("js"))
    (directory / "call.mjs").write_text(f'import {{ openStudio, studioLink }} from "./studio.mjs";\n{call}\n')
    return subprocess.run(
        [program("node"), directory / "call.mjs"], env=env, capture_output=True, text=True, timeout=30, check=False
    )


def test_the_javascript_example_signs_in(running: Running, api_token: str, tmp_path: Path) -> None:
    call = f'console.log(await studioLink({JANE}, "{PAGE}"));'
    done = javascript(call, variables(running, api_token), tmp_path)
    assert done.returncode == 0, done.stderr
    assert_it_signs_in(running, done.stdout.strip())


def test_the_javascript_example_redirects_from_the_intranet(running: Running, api_token: str, tmp_path: Path) -> None:
    call = f"""
        const response = {{
          writeHead(status, headers) {{ console.log(status, headers.Location); return this; }}, end() {{}},
        }};
        await openStudio({JANE}, {{ url: "/studio?path={PAGE}" }}, response);
    """
    done = javascript(call, variables(running, api_token), tmp_path)
    assert done.returncode == 0, done.stderr
    status, location = done.stdout.split()
    assert status == "303"
    assert_it_signs_in(running, location)


@pytest.mark.parametrize("path", ["https://evil.example/", "//evil.example/", "/\\\\evil.example/"])
def test_the_javascript_example_leads_nowhere_but_to_the_studio(
    running: Running, api_token: str, tmp_path: Path, path: str
) -> None:
    done = javascript(f'await studioLink({JANE}, "{path}");', variables(running, api_token), tmp_path)
    assert "not a page of the Studio" in done.stderr


def test_the_javascript_example_says_what_is_wrong(running: Running, tmp_path: Path) -> None:
    done = javascript(f'await studioLink({JANE}, "{PAGE}");', variables(running, "wf_live_unknown"), tmp_path)
    assert "missing_token" in done.stderr


def test_the_python_example_signs_in(running: Running, api_token: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", example("python")],
        env=variables(running, api_token),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_it_signs_in(running, done.stdout.strip())
