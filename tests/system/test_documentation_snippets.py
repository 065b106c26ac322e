"""Run the programs in the documentation, as they are printed there, against a real service."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from scripts.tools.ports import free_port
from sso_service.settings import Settings
from tests.support.data import JANE, PAGE
from tests.support.processes import Running, serving
from tests.support.programs import program

DOCS = Path(__file__).parents[2] / "sso_service" / "docs"
STUDIO = "https://studio.example"

# Paths that lead to another host when a program joins them with the Studio's URL carelessly.
FOREIGN_PATHS = ["https://evil.example/", "//evil.example/", "/\\evil.example/", "@evil.example/", ".evil.example/"]

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def snippet(page: str, title: str) -> str:
    """Return the only code block of a documentation page with this title."""
    text = (DOCS / page).read_text()
    (code,) = re.findall(rf'^```[a-z]+ title="{re.escape(title)}"\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    return str(code)


@pytest.fixture
def running(settings: Settings, keys_dir: Path, tmp_path: Path) -> Iterator[Running]:
    env = {"SSO_HOME": settings.home, "SSO_DATABASE_URL": settings.database_url}
    with serving(env, tmp_path / "log") as running:
        yield running


@pytest.fixture
def variables(running: Running, api_token: str, tmp_path: Path) -> dict[str, str]:
    """The environment that the pages ask for."""
    return {
        **os.environ,
        "SSO_SERVICE_URL": running.url,
        "SSO_API_TOKEN": api_token,
        "STUDIO_URL": STUDIO,
        # Programs run in a directory of their own and must find this checkout nevertheless.
        "PYTHONPATH": str(DOCS.parents[1]),
    }


def run(arguments: Sequence[str | Path], env: Mapping[str, str], directory: Path) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end."""
    return subprocess.run(arguments, env=env, cwd=directory, capture_output=True, text=True, timeout=120, check=False)


@contextmanager
def listening(
    arguments: Sequence[str | Path], env: Mapping[str, str], directory: Path, port: int
) -> Iterator[httpx.Client]:
    """Run a server until the end of the block; yields a client for it that does not follow redirects."""
    with (directory / "output").open("w") as output:
        process = subprocess.Popen(
            arguments, env={**env, "PORT": str(port)}, cwd=directory, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait_until_it_listens(process, port, directory / "output")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_it_listens(process: "subprocess.Popen[bytes]", port: int, output: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)


def assert_it_signs_in(running: Running, link: str, studio: str = STUDIO) -> None:
    """Follow a login link; the running service takes the place of the Studio's host."""
    assert link.startswith(f"{studio}{PAGE}?sso=")
    answer = httpx.get(link.replace(studio, running.url))
    assert (answer.status_code, answer.headers["location"]) == (303, PAGE)


def assert_it_redirects(answer: httpx.Response, running: Running, studio: str = STUDIO) -> None:
    """Check the status and headers of a redirect to the Studio, and its login link."""
    assert answer.status_code == 303, answer.text
    assert "no-store" in answer.headers["cache-control"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert_it_signs_in(running, answer.headers["location"], studio)


def assert_it_stays_on_the_studio(answer: httpx.Response) -> None:
    """A path that names another host is refused, or its login link stays on the Studio's host."""
    if "location" in answer.headers:
        assert httpx.URL(answer.headers["location"]).host == httpx.URL(STUDIO).host
    else:
        assert answer.status_code in {400, 502}
        assert "not a page of the Studio" in answer.text


def assert_it_redirects_safely(client: httpx.Client, running: Running, path: str = "/studio") -> None:
    """Check a program's redirect, and that a request cannot choose the host."""
    assert_it_redirects(client.get(path, params={"path": PAGE}), running)
    for foreign in FOREIGN_PATHS:
        assert_it_stays_on_the_studio(client.get(path, params={"path": foreign}))


# --- Node ------------------------------------------------------------------------------------------------------------


def write_node_programs(directory: Path) -> None:
    for title in ("studio.mjs", "server.mjs"):
        (directory / title).write_text(snippet("how-to/integrate-node.md", title))


def test_the_node_program_redirects_to_the_studio(running: Running, variables: dict[str, str], tmp_path: Path) -> None:
    write_node_programs(tmp_path)
    with listening([program("node"), "server.mjs"], variables, tmp_path, free_port()) as client:
        assert_it_redirects_safely(client, running)


def test_the_node_program_shows_the_error_code(variables: dict[str, str], tmp_path: Path) -> None:
    write_node_programs(tmp_path)
    env = {**variables, "SSO_API_TOKEN": "wf_live_unknown"}
    with listening([program("node"), "server.mjs"], env, tmp_path, free_port()) as client:
        answer = client.get("/studio", params={"path": PAGE})
    assert (answer.status_code, answer.text) == (502, "The Studio cannot be opened: missing_token")


# --- SharePoint: the Azure Function, with a replacement for Azure's library ------------------------------------------

AZURE_FUNCTIONS = """
export const app = {
  http(name, { handler }) {
    const [query, headers] = process.argv.slice(2).map((text) => JSON.parse(text));
    const request = { query: new URLSearchParams(query), headers: new Headers(headers) };
    handler(request, { error: console.error }).then((answer) => console.log(JSON.stringify(answer)));
  },
};
"""


def call_azure_function(
    env: Mapping[str, str], directory: Path, path: str = PAGE, headers: Mapping[str, str] | None = None
) -> httpx.Response:
    """Call the function once, in a process of its own."""
    package = directory / "node_modules" / "@azure" / "functions"
    package.mkdir(parents=True, exist_ok=True)
    (package / "package.json").write_text('{"type": "module", "main": "index.js"}')
    (package / "index.js").write_text(AZURE_FUNCTIONS)
    (directory / "studio.mjs").write_text(snippet("how-to/integrate-sharepoint.md", "studio.mjs"))
    done = run([program("node"), "studio.mjs", json.dumps({"path": path}), json.dumps(headers or {})], env, directory)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return httpx.Response(answer["status"], headers=answer["headers"], text=answer.get("body", ""))


def principal(**claims: str) -> dict[str, str]:
    """The header in which App Service reports the user."""
    content = {"auth_typ": "aad", "claims": [{"typ": name, "val": value} for name, value in claims.items()]}
    return {"x-ms-client-principal": b64encode(json.dumps(content).encode()).decode()}


JANE_AS_CLAIMS = principal(email=JANE["email"], given_name=JANE["first_name"], family_name=JANE["last_name"])


def test_the_azure_function_redirects_to_the_studio(
    running: Running, variables: dict[str, str], tmp_path: Path
) -> None:
    env = {**variables, "WEBSITE_AUTH_ENABLED": "True"}
    assert_it_redirects(call_azure_function(env, tmp_path, headers=JANE_AS_CLAIMS), running)
    assert_it_stays_on_the_studio(call_azure_function(env, tmp_path, "//evil.example/", JANE_AS_CLAIMS))


def test_the_azure_function_refuses_a_visitor_without_a_user(variables: dict[str, str], tmp_path: Path) -> None:
    env = {**variables, "WEBSITE_AUTH_ENABLED": "True"}
    assert call_azure_function(env, tmp_path).status_code == 401


def test_the_azure_function_needs_app_service_authentication(variables: dict[str, str], tmp_path: Path) -> None:
    answer = call_azure_function(variables, tmp_path, headers=JANE_AS_CLAIMS)
    assert (answer.status_code, "location" in answer.headers) == (502, False)
    assert "App Service authentication is off" in answer.text


# --- Python ----------------------------------------------------------------------------------------------------------


def write_python_programs(directory: Path) -> None:
    for title in ("studio.py", "main.py"):
        (directory / title).write_text(snippet("how-to/integrate-python.md", title))


def test_the_python_program_prints_a_login_link(running: Running, variables: dict[str, str], tmp_path: Path) -> None:
    write_python_programs(tmp_path)
    done = run([sys.executable, "studio.py"], variables, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_it_signs_in(running, done.stdout.strip())


def test_the_fastapi_program_redirects_to_the_studio(
    running: Running, variables: dict[str, str], tmp_path: Path
) -> None:
    write_python_programs(tmp_path)
    port = free_port()
    with listening([sys.executable, "-m", "uvicorn", "main:app", "--port", str(port)], variables, tmp_path, port) as c:
        assert_it_redirects_safely(c, running)


def test_the_fastapi_program_shows_the_error_code(variables: dict[str, str], tmp_path: Path) -> None:
    write_python_programs(tmp_path)
    port = free_port()
    env = {**variables, "SSO_API_TOKEN": "wf_live_unknown"}
    with listening([sys.executable, "-m", "uvicorn", "main:app", "--port", str(port)], env, tmp_path, port) as client:
        answer = client.get("/studio", params={"path": PAGE})
    assert (answer.status_code, answer.json()) == (502, {"detail": "The Studio cannot be opened: missing_token"})


def test_the_intranet_of_the_tutorial_opens_the_studio(
    running: Running, variables: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "intranet.py").write_text(snippet("tutorial/intranet-page.md", "intranet.py"))
    env = {**variables, "STUDIO_URL": running.url}
    with listening([sys.executable, "intranet.py"], env, tmp_path, free_port()) as client:
        (link,) = re.findall(r'href="([^"]+)"', client.get("/").text)
        assert_it_redirects(client.get(link), running, running.url)
        assert client.get("/studio", params={"path": ".evil.example/"}).status_code == 400


def test_the_tutorial_shows_the_error_code(variables: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "intranet.py").write_text(snippet("tutorial/intranet-page.md", "intranet.py"))
    env = {**variables, "SSO_API_TOKEN": "wf_live_wrong"}
    with listening([sys.executable, "intranet.py"], env, tmp_path, free_port()) as client:
        answer = client.get("/studio", params={"path": PAGE})
    assert (answer.status_code, answer.text) == (502, "The Studio cannot be opened: missing_token")


@pytest.fixture
def all_scopes(variables: dict[str, str], settings: Settings) -> dict[str, str]:
    """The environment, with an API token that may both issue and verify."""
    env = {**variables, "SSO_HOME": settings.home, "SSO_DATABASE_URL": settings.database_url}
    command = ["api-token", "create", "--account", "123", "--name", "all"]
    scopes = ["--scope", "write:sso", "--scope", "verify:sso"]
    done = run([sys.executable, "-m", "sso_service", *command, *scopes], env, Path(settings.home))
    (secret,) = re.findall(r"wf_live_[A-Za-z0-9_-]{43}", done.stdout)
    return {**variables, "SSO_API_TOKEN": secret}


def test_the_client_program_creates_verifies_and_consumes(all_scopes: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(snippet("how-to/python-client.md", "client.py"))
    done = run([sys.executable, "example.py"], all_scopes, tmp_path)
    assert done.returncode == 0, done.stderr
    link, created, verification, login, refusal = done.stdout.splitlines()
    assert link.startswith(f"{STUDIO}{PAGE}?chromeless=1&sso=")
    assert (created, refusal) == ("False", "token_consumed")
    assert verification.startswith("Verification(active=True")
    assert login.startswith("Login(user=")


def test_the_asynchronous_client_program_creates_a_token(variables: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(snippet("how-to/python-client.md", "asynchronous.py"))
    done = run([sys.executable, "example.py"], variables, tmp_path)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_the_python_frontend_signs_in_with_a_login_link(
    running: Running, variables: dict[str, str], verifier: str, tmp_path: Path
) -> None:
    (tmp_path / "frontend.py").write_text(snippet("how-to/python-frontend.md", "frontend.py"))
    answer = httpx.post(
        f"{running.url}/v1/sso_tokens", json=JANE, headers={"Authorization": f"Bearer {variables['SSO_API_TOKEN']}"}
    )
    token = answer.json()["token"]
    port = free_port()
    env = {**variables, "SSO_API_TOKEN": verifier}
    arguments = [sys.executable, "-m", "uvicorn", "frontend:app", "--port", str(port)]
    with listening(arguments, env, tmp_path, port) as client:
        assert client.get(PAGE).status_code == 403
        signed_in = client.get(PAGE, params={"sso": token})
        assert (signed_in.status_code, signed_in.headers["location"]) == (303, PAGE)
        assert client.get(PAGE).json() == {"email": JANE["email"], "role": "editor"}
        client.post("/sign-out")
        assert client.get(PAGE).status_code == 403


# --- PHP -------------------------------------------------------------------------------------------------------------

# The intranet's own login, which has run before the program of the page.
INTRANET_LOGIN = f"""<?php
session_save_path(__DIR__);
session_start();
$_SESSION['user'] = json_decode('{json.dumps(JANE)}', true);
session_write_close();
"""


@contextmanager
def php(env: Mapping[str, str], directory: Path, *, signed_in: bool = True) -> Iterator[httpx.Client]:
    """Serve the PHP program."""
    php = program("php")
    (directory / "studio.php").write_text(snippet("how-to/integrate-php.md", "studio.php"))
    (directory / "login.php").write_text(INTRANET_LOGIN)
    port = free_port()
    options = ["-d", f"auto_prepend_file={directory / 'login.php'}"] if signed_in else []
    with listening([php, *options, "-S", f"127.0.0.1:{port}"], env, directory, port) as client:
        yield client


def test_the_php_program_redirects_to_the_studio(running: Running, variables: dict[str, str], tmp_path: Path) -> None:
    with php(variables, tmp_path) as client:
        assert_it_redirects_safely(client, running, "/studio.php")


def test_the_php_program_shows_the_error_code(variables: dict[str, str], tmp_path: Path) -> None:
    with php({**variables, "SSO_API_TOKEN": "wf_live_unknown"}, tmp_path) as client:
        answer = client.get("/studio.php", params={"path": PAGE})
    assert (answer.status_code, answer.text) == (502, "The Studio cannot be opened: missing_token")


def test_the_php_program_refuses_a_visitor_without_a_user(variables: dict[str, str], tmp_path: Path) -> None:
    with php(variables, tmp_path, signed_in=False) as client:
        assert client.get("/studio.php", params={"path": PAGE}).status_code == 401


# --- curl ------------------------------------------------------------------------------------------------------------


def test_the_curl_command_prints_a_login_token(running: Running, variables: dict[str, str], tmp_path: Path) -> None:
    program("curl")
    done = run(["sh", "-c", snippet("how-to/integrate-curl.md", "request")], variables, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_it_signs_in(running, f"{STUDIO}{PAGE}?sso={json.loads(done.stdout)['token']}")


def test_the_curl_command_shows_the_error_code(variables: dict[str, str], tmp_path: Path) -> None:
    program("curl")
    env = {**variables, "SSO_API_TOKEN": "wf_live_unknown"}
    done = run(["sh", "-c", snippet("how-to/integrate-curl.md", "request")], env, tmp_path)
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (22, "missing_token")


def studio_link(env: Mapping[str, str], directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the script of the page."""
    program("curl")
    program("jq")
    (directory / "studio-link").write_text(snippet("how-to/integrate-curl.md", "studio-link"))
    return run([program("bash"), "studio-link", *arguments], env, directory)


def test_the_curl_script_prints_a_login_link(running: Running, variables: dict[str, str], tmp_path: Path) -> None:
    done = studio_link(variables, tmp_path, JANE["email"], 'Jane "JD"', "Doe", PAGE)
    assert done.returncode == 0, done.stderr
    assert_it_signs_in(running, done.stdout.strip())


def test_the_curl_script_shows_the_error_code(variables: dict[str, str], tmp_path: Path) -> None:
    env = {**variables, "SSO_API_TOKEN": "wf_live_unknown"}
    done = studio_link(env, tmp_path, *JANE.values(), PAGE)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "missing_token\n")


@pytest.mark.parametrize("path", [path for path in FOREIGN_PATHS if not path.startswith("/")])
def test_the_curl_script_refuses_a_path_of_another_host(variables: dict[str, str], tmp_path: Path, path: str) -> None:
    done = studio_link(variables, tmp_path, *JANE.values(), path)
    assert (done.returncode, done.stdout) == (2, "")
