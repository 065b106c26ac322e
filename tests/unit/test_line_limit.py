"""The limit on log lines that anonymous clients can cause."""

import asyncio
import logging

import pytest

from sso_service.observability import limit
from sso_service.observability.limit import LINES, LimitedMessage, LineLimit
from sso_service.observability.logs import RequestContext, current_request
from tests.support.clock import Clock
from tests.support.waiting import until


def test_lines_above_the_limit_are_omitted_and_their_number_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit, "REPORT", 0.01)
    clock = Clock(5.0)
    lines = LineLimit("refusals", clock)

    async def flood() -> None:
        assert [lines.admits() for _ in range(LINES + 3)] == [True] * LINES + [False] * 3
        clock.advance(0.9)
        assert not lines.admits()
        clock.advance(0.1)
        assert lines.admits()
        await until(lambda: bool(caplog.messages))
        assert [lines.admits() for _ in range(LINES)] == [True] * (LINES - 1) + [False]
        await until(lambda: len(caplog.messages) == 2)

    asyncio.run(flood())
    assert caplog.messages == ["4 refusals in 0 s were not logged", "1 refusals in 0 s were not logged"]


def test_the_number_of_omitted_lines_is_not_logged_as_of_one_request(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit, "REPORT", 0.01)
    lines, requests = LineLimit("refusals", Clock(5.0)), []
    monkeypatch.setattr(caplog.handler, "emit", lambda record: requests.append(current_request.get()))

    async def flood() -> None:
        current_request.set(RequestContext("some-request", "192.0.2.1"))
        assert not all(lines.admits() for _ in range(LINES + 1))
        await until(lambda: bool(requests))

    asyncio.run(flood())
    assert requests == [None]


def test_without_an_event_loop_no_line_is_omitted() -> None:
    lines = LineLimit("refusals", Clock(5.0))
    assert all(lines.admits() for _ in range(5 * LINES))


def test_only_the_named_message_of_a_library_is_limited() -> None:
    limited = LimitedMessage("Invalid HTTP request received.", "requests")

    def record(message: str) -> logging.LogRecord:
        return logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, message, None, None)

    async def flood() -> None:
        assert sum(bool(limited.filter(record("Invalid HTTP request received."))) for _ in range(50)) <= 2 * LINES
        assert all(limited.filter(record("Started")) for _ in range(50))

    asyncio.run(flood())
