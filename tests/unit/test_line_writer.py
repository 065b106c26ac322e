"""The writer of log lines: order and batching of audit events and log records."""

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from sso_service.observability import audit, logs
from sso_service.observability.audit import Event, EventName
from sso_service.observability.logs import LineWriter, TextFormatter

FIRST, SECOND = Event(event=EventName.LOGIN, user_id=1), Event(event=EventName.LOGIN, user_id=2)


class Stream(io.StringIO):
    """A stream that records each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, content: str) -> int:
        self.writes.append(content)
        return len(content)


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def writer(stream: Stream) -> Iterator[LineWriter]:
    """The only handler of the audit logger, as in a serving process."""
    writer = LineWriter()
    writer.setFormatter(TextFormatter())
    writer.setStream(stream)
    logger = logging.getLogger(logs.AUDIT_LOGGER)
    before, logger.handlers = logger.handlers, [writer]
    yield writer
    logger.handlers = before


def users(text: str) -> list[str]:
    return [line.rpartition("user_id=")[2] for line in text.splitlines()]


@pytest.mark.usefixtures("writer")
def test_events_of_one_turn_of_the_event_loop_are_written_at_once(stream: Stream) -> None:
    async def record() -> None:
        audit.record(FIRST)
        audit.record(SECOND)
        assert stream.writes == []
        await asyncio.sleep(0)
        assert [users(text) for text in stream.writes] == [["1", "2"]]

    asyncio.run(record())


@pytest.mark.usefixtures("writer")
def test_an_event_outside_an_event_loop_is_written_immediately(stream: Stream) -> None:
    audit.record(FIRST)
    audit.record(SECOND)
    assert [users(text) for text in stream.writes] == [["1"], ["2"]]


def test_a_log_record_is_written_after_the_events_before_it(stream: Stream, writer: LineWriter) -> None:
    async def record() -> None:
        audit.record(FIRST)
        writer.handle(logging.LogRecord("x", logging.INFO, "", 0, "stopping", None, None))

    asyncio.run(record())
    event, text = stream.writes
    assert users(event) == ["1"]
    assert "stopping" in text


def test_an_event_without_a_writer_is_an_ordinary_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logs.AUDIT_LOGGER)
    audit.record(FIRST)
    assert [record.msg for record in caplog.records] == [FIRST]
