"""Traces as a collector receives them: one span for each request, within the caller's trace, without query or token."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.data import JANE, PAGE
from tests.support.databases import on_sqlite
from tests.support.processes import serving
from tests.support.spelling import contains, headers_with, targets_with

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """A collector that receives traces by OTLP over HTTP."""

    def __init__(self) -> None:
        self.received: Queue[bytes] = Queue()
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                received.put(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def spans(self) -> Iterator[Any]:
        """Yield the received spans."""
        while not self.received.empty():
            for resource in ExportTraceServiceRequest.FromString(self.received.get()).resource_spans:
                assert {each.key: each.value.string_value for each in resource.resource.attributes}[
                    "service.name"
                ] == "sso-service"
                for scope in resource.scope_spans:
                    yield from scope.spans


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    yield collector
    collector.server.shutdown()
    thread.join()
    collector.server.server_close()


@on_sqlite
def test_each_request_is_a_span_in_the_callers_trace_without_token(
    collector: Collector, database_url: str, tmp_path: Path, keys_dir: Path, api_token: str
) -> None:
    env = {
        "SSO_HOME": str(tmp_path),
        "SSO_DATABASE_URL": database_url,
        "SSO_KEYS_DIR": str(keys_dir),
        "SSO_TRACING": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
    }
    with serving(env, tmp_path / "log") as running:
        caller = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        bearer = {"Authorization": f"Bearer {api_token}"}
        issued = httpx.post(f"{running.url}/v1/sso_tokens", json=JANE, headers={**bearer, **caller})
        token = issued.json()["token"]
        httpx.get(f"{running.url}{PAGE}?sso={token}")
        httpx.get(f"{running.url}/readyz")
        for target in targets_with(token):
            httpx.get(f"{running.url}{target}")
        for header in headers_with(token):
            httpx.get(f"{running.url}/x", headers=[header, ("traceparent", f"00-{TRACE}-{PARENT}-01")])
    # The service sends its last spans before it ends.
    received = b"".join(collector.received.queue)
    every = list(collector.spans())
    spans = {span.name: span for span in reversed(every)}
    assert set(spans) == {"POST /v1/sso_tokens", "GET login", "GET /readyz", "GET page"}
    assert len([span for span in every if span.trace_id.hex() == TRACE]) > len(headers_with(token))
    issue = spans["POST /v1/sso_tokens"]
    assert (issue.trace_id.hex(), issue.parent_span_id.hex()) == (TRACE, PARENT)
    attributes = {each.key: each.value for each in spans["GET login"].attributes}
    assert attributes["url.path"].string_value == PAGE
    assert attributes["http.response.status_code"].int_value == 303
    assert not contains(received.decode("utf-8", "replace"), token)
    assert api_token.encode() not in received
    assert "Traceback" not in running.log.read_text()
