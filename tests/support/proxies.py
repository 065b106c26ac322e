"""nginx and Caddy with the configuration of `scripts/deploy`."""

import os
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path

import trustme

from scripts.tools.ports import free_port
from tests.support.client import Answer
from tests.support.processes import wait_for_port
from tests.support.programs import program
from tests.support.repository import DEPLOY
from tests.support.waiting import PATIENCE

HOST = "studio.example"


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy, and a TLS context that trusts its certificate."""

    port: int
    http_port: int
    directory: Path
    tls: ssl.SSLContext

    def connect(self) -> ssl.SSLSocket:
        connection = socket.create_connection(("127.0.0.1", self.port), 10)
        # Nagle's algorithm would delay the request by 40 ms, until the handshake is acknowledged.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.tls.wrap_socket(connection, server_hostname=HOST)

    def request(
        self,
        target: str | bytes,
        *headers: tuple[str, str],
        method: str = "GET",
        body: bytes = b"",
        cookie: str = "",
        host: str = "",
    ) -> Answer:
        """Send a request with exactly these bytes on a new connection, and return the response."""
        lines = [("Host", host or f"{HOST}:{self.port}"), *headers]
        if cookie:
            lines.append(("Cookie", cookie))
        if body and not any(name == "Transfer-Encoding" for name, _ in headers):
            lines.append(("Content-Length", str(len(body))))
        if not any(name == "Connection" for name, _ in headers):
            lines.append(("Connection", "close"))
        raw = target.encode() if isinstance(target, str) else target
        head = "".join(f"{name}: {value}\r\n" for name, value in lines)
        with closing(self.connect()) as connection:
            connection.sendall(
                method.encode() + b" " + raw + b" HTTP/1.1\r\n" + head.encode("latin-1") + b"\r\n" + body
            )
            response = HTTPResponse(connection, method=method)
            with closing(response):
                response.begin()
                fields = [(name.lower(), value) for name, value in response.getheaders()]
                return Answer(response.status, fields, response.read())

    def logged(self) -> str:
        """Return the contents of all log files of the proxy."""
        return "".join(path.read_text("latin-1") for path in sorted(self.directory.glob("*.log")))


@contextmanager
def started(arguments: Sequence[str], port: int, directory: Path, env: dict[str, str]) -> Iterator[None]:
    with (directory / "output.log").open("w") as output:
        process = subprocess.Popen(arguments, cwd=directory, env=os.environ | env, stdout=output, stderr=output)
        try:
            try:
                wait_for_port(port)
            except AssertionError:
                raise AssertionError((directory / "output.log").read_text()) from None
            yield
        finally:
            process.terminate()
            process.wait(PATIENCE)


NGINX = """
daemon off;
master_process off;
pid nginx.pid;
error_log error.log;
events {}
http {
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include site.conf;
}
"""


@contextmanager
def nginx(
    services: Sequence[str], ports: dict[str, int], directory: Path, certificate: Path, key: Path
) -> Iterator[None]:
    """Run nginx with `scripts/deploy/nginx.conf`; only addresses and paths are replaced."""
    site = (DEPLOY / "nginx.conf").read_text()
    for pattern, count, replacement in [
        (r"    server 127\.0\.0\.1:8000;", 1, "".join(f"    server {each} fail_timeout=1s;\n" for each in services)),
        (r"127\.0\.0\.1:3000", 1, f"127.0.0.1:{ports['studio']}"),
        (r"listen \[::\]:.*", 3, ""),
        (r"listen 443 ", 2, f"listen 127.0.0.1:{ports['https']} "),
        (r"listen 80 ", 1, f"listen 127.0.0.1:{ports['http']} "),
        (r"/etc/ssl/studio\.example/fullchain\.pem", 1, str(certificate)),
        (r"/etc/ssl/studio\.example/privkey\.pem", 1, str(key)),
        (r"/var/log/nginx/", 1, ""),
    ]:
        site, replaced = re.subn(pattern, replacement, site)
        assert replaced == count, pattern
    (directory / "site.conf").write_text(site)
    (directory / "nginx.conf").write_text(NGINX)
    arguments = [program("nginx"), "-p", str(directory), "-c", "nginx.conf", "-e", "error.log"]
    with started(arguments, ports["https"], directory, {}):
        yield


@contextmanager
def caddy(
    services: Sequence[str], ports: dict[str, int], directory: Path, certificate: Path, key: Path
) -> Iterator[None]:
    """Run Caddy with the unchanged `scripts/deploy/Caddyfile`. Its health checks are enabled for several nodes only."""
    config = DEPLOY / "Caddyfile"
    if len(services) > 1:
        config, site = directory / "Caddyfile", config.read_text()
        assert site.count("\t#health_") == 3
        config.write_text(site.replace("\t#health_", "\thealth_"))
    env = {
        "HOME": str(directory),
        "XDG_DATA_HOME": str(directory),
        "XDG_CONFIG_HOME": str(directory),
        "STUDIO_ADMIN": "off",
        "STUDIO_BIND": "127.0.0.1",
        "STUDIO_HTTP_PORT": str(ports["http"]),
        "STUDIO_HTTPS_PORT": str(ports["https"]),
        "STUDIO_TLS": f"{certificate} {key}",
        "STUDIO_SERVICE": " ".join(services),
        "STUDIO_UPSTREAM": f"127.0.0.1:{ports['studio']}",
    }
    arguments = [program("caddy"), "run", "--adapter", "caddyfile", "--config", str(config)]
    with started(arguments, ports["https"], directory, env):
        yield


PROXIES = {"nginx": nginx, "caddy": caddy}


@contextmanager
def proxying(kind: str, services: Sequence[str], studio: int, directory: Path) -> Iterator[Proxy]:
    """Run a proxy in front of the nodes `services` and of a Studio on the port `studio`."""
    directory.mkdir()
    authority = trustme.CA()
    issued = authority.issue_cert(HOST)
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    for number, pem in enumerate(issued.cert_chain_pems):
        pem.write_to_path(certificate, append=number > 0)
    issued.private_key_pem.write_to_path(key)
    tls = ssl.create_default_context()
    authority.configure_trust(tls)
    ports = {"studio": studio, "https": free_port(), "http": free_port()}
    with PROXIES[kind](services, ports, directory, certificate, key):
        yield Proxy(ports["https"], ports["http"], directory, tls)
