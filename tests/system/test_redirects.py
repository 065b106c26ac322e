"""Hostile login links: no browser is sent to another host by any of them. Judged by a browser's rules, not by ours."""

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from sso_service.client import SSOClient
from sso_service.settings import Settings
from tests.support.data import ACCOUNT, JANE, PAGE
from tests.support.processes import Running, serving
from tests.support.programs import program
from tests.support.repository import SUPPORT
from tests.support.waiting import PATIENCE

HOST = "studio.example"
EVIL = b"evil.example"

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

TARGETS = [
    b"//evil.example",
    b"//evil.example/",
    b"///evil.example",
    b"////evil.example/a",
    b"/\\evil.example",
    b"\\\\evil.example",
    b"/\\/evil.example",
    b"//\\evil.example",
    b"/%2fevil.example",
    b"/%2Fevil.example/",
    b"/%5cevil.example",
    b"/%5C%5Cevil.example",
    b"/%252fevil.example",
    b"/%255cevil.example",
    b"/%25252fevil.example",
    b"/%09/evil.example",
    b"/\t/evil.example",
    b"/%0a/evil.example",
    b"/%0d%0aLocation:%20https://evil.example/",
    b"/\x0b/evil.example",
    b"/\x00/evil.example",
    b"/%00//evil.example",
    b"/.//evil.example",
    b"/..//evil.example",
    b"/%2e%2e//evil.example",
    b"/a/..//evil.example",
    b"/.evil.example",
    b"/@evil.example",
    b"//@evil.example",
    b"//studio.example@evil.example",
    b"/studio.example:@evil.example",
    b"//evil.example\\@studio.example",
    b"https://evil.example/",
    b"https:evil.example",
    b"https:/evil.example",
    b"http://evil.example\\studio.example/",
    b"javascript:alert(1)",
    b"/javascript:alert(1)",
    b"data:text/html,evil.example",
    b"/https://evil.example",
    b"/;//evil.example",
    b"/;@evil.example",
    b"/\xff/evil.example",
    b"/%ff%2f%2fevil.example",
    b"/\xe2\x80\xae//evil.example",
    b"/\xef\xbc\x8f\xef\xbc\x8fevil.example",
    b"/%E2%80%A5//evil.example",
    b"/?next=//evil.example",
    b"/?//evil.example",
    b"/#//evil.example",
    b"/" + b"a" * 4000 + b"//evil.example",
    b"/" + b"a/" * 3000,
    b"/client/%d//evil.example" % ACCOUNT,
    PAGE.encode() + b"/..//..//evil.example",
    PAGE.encode() + b"?url=https://evil.example/",
]
HOSTS = [
    [],
    [b"X-Forwarded-Host: evil.example", b"Forwarded: host=evil.example", b"X-Original-Host: evil.example"],
    [b"X-Forwarded-Prefix: //evil.example", b"X-Forwarded-Proto: javascript", b"X-Forwarded-Server: evil.example"],
]


@pytest.fixture
def running(settings: Settings, keys_dir: Path, tmp_path: Path) -> Iterator[Running]:
    env = {"SSO_HOME": settings.home, "SSO_DATABASE_URL": settings.database_url}
    with serving(env, tmp_path / "log") as running:
        yield running


def location_of(url: str, target: bytes, host: bytes, headers: list[bytes]) -> bytes | None:
    """The `Location` that the service answers, if it does, to a request line with exactly these bytes."""
    parts = urlsplit(url)
    request = [b"GET " + target + b" HTTP/1.1", b"Host: " + host, *headers, b"Connection: close", b"", b""]
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=PATIENCE) as connection:
        connection.sendall(b"\r\n".join(request))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    status, *lines = answer.partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert status.split()[1] in {b"303", b"400", b"401", b"403", b"404"}, (target, status)
    locations = [line.partition(b":")[2].strip(b" ") for line in lines if line.lower().startswith(b"location:")]
    assert len(locations) <= 1
    return locations[0] if locations else None


def destinations(locations: list[bytes]) -> list[str | None]:
    """Where a browser on a page of the Studio is led by each of them."""
    page = f"https://{HOST}{PAGE}"
    # A browser reads the header's bytes as Latin-1 (Fetch standard, section 2.2.2: isomorphic decode).
    cases = json.dumps([[page, location.decode("latin-1")] for location in locations])
    done = subprocess.run(
        [program("node"), SUPPORT / "whatwg.mjs"], input=cases, capture_output=True, text=True, check=True
    )
    answer: list[str | None] = json.loads(done.stdout)
    return answer


def leaves(destination: str | None) -> bool:
    """True if that is anywhere but a page of the Studio."""
    return destination is None or not destination.startswith(f"https://{HOST}/")


def test_no_link_leads_a_browser_to_another_host(running: Running, api_token: str) -> None:
    followed: list[bytes] = []
    with SSOClient(running.url, api_token) as client:
        for target in TARGETS:
            joint = b"&" if b"?" in target else b"?"
            for headers in HOSTS:
                for host in (HOST.encode(), EVIL):
                    token = client.create_token(**JANE).token.encode()
                    location = location_of(running.url, target + joint + b"sso=" + token, host, headers)
                    if location is not None:
                        assert token not in location
                        followed.append(location)
    assert len(followed) > len(HOSTS)  # some of them are harmless, or this would test nothing
    for location, destination in zip(followed, destinations(followed), strict=True):
        assert not leaves(destination), (location, destination)


def test_the_judge_of_these_tests_knows_where_browsers_go(running: Running) -> None:
    bad = [
        b"//evil.example",
        b"/\\evil.example",
        b"/\t/evil.example",
        b"https:\\\\evil.example",
        b"javascript:1",
        b"//",
    ]
    assert all(map(leaves, destinations(bad)))
    good = [b"/", b"", b"/%2fevil.example", b"https:evil", b"?//evil.example", b"/a//evil.example", b"/@evil.example"]
    assert not any(map(leaves, destinations(good)))
    assert httpx.get(f"{running.url}/healthz").status_code == 200  # nor has anything of it brought the service down
