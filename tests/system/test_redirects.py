"""Hostile login links never redirect a browser to another host, according to the WHATWG URL standard."""

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
    """Send a request line with exactly these bytes, and return the `Location` of the response, if any."""
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
    """Return the URL to which each `Location` leads a browser on a page of the Studio; None if invalid."""
    page = f"https://{HOST}{PAGE}"
    # Browsers decode the header as Latin-1 (Fetch standard, section 2.2.2: isomorphic decode).
    cases = json.dumps([[page, location.decode("latin-1")] for location in locations])
    done = subprocess.run(
        [program("node"), SUPPORT / "whatwg.mjs"], input=cases, capture_output=True, text=True, check=True
    )
    answer: list[str | None] = json.loads(done.stdout)
    return answer


def leaves_the_studio(destination: str | None) -> bool:
    """Return whether a destination is not a page of the Studio."""
    return destination is None or not destination.startswith(f"https://{HOST}/")


def test_no_login_link_redirects_to_another_host(running: Running, api_token: str) -> None:
    redirects: list[bytes] = []
    with SSOClient(running.url, api_token) as client:
        for target in TARGETS:
            joint = b"&" if b"?" in target else b"?"
            for headers in HOSTS:
                for host in (HOST.encode(), EVIL):
                    token = client.create_token(**JANE).token.encode()
                    location = location_of(running.url, target + joint + b"sso=" + token, host, headers)
                    if location is not None:
                        assert token not in location
                        redirects.append(location)
    assert len(redirects) > len(HOSTS)  # otherwise, the loop below would check almost nothing
    for location, destination in zip(redirects, destinations(redirects), strict=True):
        assert not leaves_the_studio(destination), (location, destination)


def test_the_url_parser_of_these_tests_finds_other_hosts(running: Running) -> None:
    bad = [
        b"//evil.example",
        b"/\\evil.example",
        b"/\t/evil.example",
        b"https:\\\\evil.example",
        b"javascript:1",
        b"//",
    ]
    assert all(map(leaves_the_studio, destinations(bad)))
    good = [b"/", b"", b"/%2fevil.example", b"https:evil", b"?//evil.example", b"/a//evil.example", b"/@evil.example"]
    assert not any(map(leaves_the_studio, destinations(good)))
    assert httpx.get(f"{running.url}/healthz").status_code == 200  # the service still runs
