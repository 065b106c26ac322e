"""OpenTelemetry traces: one span for each request, within the trace of the caller. For the extra `tracing`.

The usual instrumentation records the whole URL, and with it login tokens. This one records the path without the query,
and without anything in it that could be a secret.
"""

import re
from collections.abc import Callable

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sso_service.characters import escape_hidden
from sso_service.observability.redaction import redact

_IDS = re.compile("[0-9a-f-]*").fullmatch
"""Matches ids of traces and spans, such as in `traceparent` and `b3`. Their shape is that of a token."""


class Traced:
    """ASGI middleware that records one span for each request. The `OTEL_*` variables name the collector.

    `route` returns the name of a request's route. There are few names, and none contains anything that a client sent.
    """

    def __init__(self, app: ASGIApp, route: Callable[[Scope], str]) -> None:
        self._app = app
        self._route = route
        resource = Resource.create({SERVICE_NAME: "sso-service"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("sso_service")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            self._provider.shutdown()  # the lifespan is over: send the spans that are left before the worker ends
            return
        route = self._route(scope)
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        span = self._tracer.start_span(
            f"{scope['method']} {route}",
            # Some of these become part of the span, such as `tracestate`.
            propagate.extract({name: value for name, value in headers if _IDS(value) or redact(value) == value}),
            SpanKind.SERVER,
            {
                "http.request.method": scope["method"],
                "http.route": route,
                "url.path": escape_hidden(redact(scope["raw_path"].decode("latin-1"))),
                "url.scheme": scope["scheme"],
            },
        )

        async def send_and_record(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(Status(StatusCode.ERROR))
            await send(message)

        try:
            await self._app(scope, receive, send_and_record)
        finally:
            span.end()
