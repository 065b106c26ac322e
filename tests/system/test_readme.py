"""Check that README and documentation are true: links, commands, and the output in the tour."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from scripts.tools.ports import free_port
from tests.support.processes import Running, command, serving

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "sso_service" / "docs"
PAGES = [README, *sorted(ROOT.glob(".github/*.md")), *sorted(DOCS.rglob("*.md"))]

SECRET = re.compile(r"wf_live_[A-Za-z0-9_.-]+")


def without_code(text: str) -> str:
    """Return Markdown without code blocks and code spans."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and images, without those to other hosts."""
    text = without_code(page.read_text())
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Return the anchors that Markdown renderers derive from the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_page_of_this_repository(page: Path) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_index_links_to_every_page() -> None:
    linked = {(DOCS / target).resolve() for target in links(DOCS / "index.md")}
    assert [
        str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page not in linked | {DOCS / "index.md"}
    ] == []


def test_the_readme_fits_into_250_lines() -> None:
    assert len(README.read_text().splitlines()) <= 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_script_that_a_page_names_can_be_run(page: Path) -> None:
    scripts = set(re.findall(r"\./(scripts/[a-z-]+)", page.read_text()))
    assert [script for script in sorted(scripts) if not os.access(ROOT / script, os.X_OK)] == []


def test_the_public_names_of_the_client_can_be_imported() -> None:
    (imports,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(imports, names)
    assert {"AsyncSSOClient", "SSOClient", "SSOLogin"} <= names.keys()


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[tuple[str, Running]]:
    """Yield the output of `./scripts/serve` and the service that it starts."""
    env = {"SSO_HOME": str(tmp_path)}
    printed = command("init", "--demo", env=env).stdout  # on the default port, as in the README
    with serving(env, tmp_path / "log", port=free_port()) as running:
        yield printed, running


def test_the_tour_shows_what_the_commands_print(demo: tuple[str, Running], tmp_path: Path) -> None:
    printed, running = demo
    readme = README.read_text()
    secret = SECRET.findall(printed)[0]

    # The request for a login token, as printed by `./scripts/serve`.
    (printed_command,) = re.findall(r"^ *curl .*?\}'$", printed, re.DOTALL | re.MULTILINE)
    (shown_command,) = re.findall(r"^ *curl -s http.*?\}'$", readme, re.DOTALL | re.MULTILINE)
    assert SECRET.sub("SECRET", printed_command).split() == SECRET.sub("SECRET", shown_command).split()
    (body,) = re.findall(r"-d '(.*)'", shown_command)
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    answer = httpx.post(f"{running.url}/v1/sso_tokens", content=body, headers=headers)
    (shown_answer,) = re.findall(r'^    (\{"token":.*\})$', readme, re.MULTILINE)
    token, shown_token = answer.json()["token"], json.loads(shown_answer)["token"]
    assert answer.text.replace(token, shown_token) == shown_answer

    # The login link, and the session.
    (shown_link,) = re.findall(r"curl -i -c jar 'http://127.0.0.1:8000(\S+)'", readme)
    signed_in = httpx.get(running.url + shown_link.replace(shown_token, token))
    (shown_headers,) = re.findall(r"^    HTTP/1.1 303 See Other\n(.*?)\n\n", readme, re.DOTALL | re.MULTILINE)
    assert signed_in.status_code == 303
    for line in shown_headers.splitlines():
        name, _, value = line.strip().partition(": ")
        cookie = r"studio_session=[^;]+"
        assert re.sub(cookie, "cookie", signed_in.headers[name]) == re.sub(cookie, "cookie", value)
    session = httpx.get(f"{running.url}/session", cookies=dict(signed_in.cookies))
    (shown_session,) = re.findall(r'^    (\{"user":.*?\]\})$', readme, re.DOTALL | re.MULTILINE)
    assert session.json() == json.loads(shown_session)

    # The report of `inspect`: the same lines, and the same values except those that depend on time and chance.
    inspected = command("inspect", token, env={"SSO_HOME": str(tmp_path)}).stdout.splitlines()
    shown = re.findall(r"sso-service inspect \S+\n((?:    .+\n)+)", readme)[0].splitlines()
    assert [line.split()[0] for line in inspected] == [line.split()[0] for line in shown]
    same = {"user", "account", "email", "consumed", "refused"}
    assert [line for line in inspected if line.split()[0] in same] == [
        line.strip() for line in shown if line.split()[0] in same
    ]
