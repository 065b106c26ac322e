"""The log of a process: one line for each record or event, as text or as JSON, with the request that caused it."""

import asyncio
import logging
import logging.config
import sys
import time
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import msgspec

from sso_service.settings import LogFormat

AUDIT_LOGGER = "sso_service.audit"
"""The name of the logger of audit events. Part of the configuration, so it does not follow the module layout."""


class RequestContext(msgspec.Struct, frozen=True):
    """The request that is being processed: its ID and the address of the client."""

    request_id: str
    client: str


current_request: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)


class JsonFormatter(logging.Formatter):
    """One JSON object a line. The fields of a message that is a struct, such as an audit event, become its fields."""

    _encode = msgspec.json.Encoder().encode

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its end."""
        message: object = record.msg
        if not isinstance(message, msgspec.Struct):
            message = {"logger": record.name, "message": record.getMessage()}
        parts = [{"exception": self.formatException(record.exc_info)}] if record.exc_info else []
        return self.line(message, record.levelname, record.created, current_request.get(), *parts)

    def line(self, message: object, level: str, at: float, request: RequestContext | None, *parts: object) -> str:
        """Return the line of a message, a struct or a dictionary, that was logged at `at` (Unix seconds)."""
        head = {"time": _time(at), "level": level.lower()}
        # One object with the fields of all parts. Encoding each part is faster than merging them into one dictionary.
        every = (head, message, request, *parts) if request else (head, message, *parts)
        return f"{{{b','.join(self._encode(part)[1:-1] for part in every).decode()}}}"


class SystemLogFormatter(JsonFormatter):
    """The same JSON behind the name of the program, as the system log requires it (RFC 3164 section 4.1.3)."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its end."""
        return f"sso-service: {super().format(record)}"


class TextFormatter(logging.Formatter):
    """Time, level, message and request on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its end. The traceback of an exception follows on lines of its own."""
        line = self.line(record.getMessage(), record.levelname, record.created, current_request.get())
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    def line(self, message: object, level: str, at: float, request: RequestContext | None) -> str:
        """Return the line of a message that was logged at `at` (Unix seconds)."""
        line = f"{_time(at)} {level:<7} {message}"
        return f"{line} request_id={request.request_id} client={request.client}" if request else line


class LineWriter(logging.StreamHandler[TextIO]):
    """Writes log records to stderr at once, and all events of one turn of the event loop in one system call.

    Each write releases the interpreter lock. Without batching, that would happen once or twice for each request.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._pending: list[tuple[msgspec.Struct, float, RequestContext | None]] = []

    def write_event(self, event: msgspec.Struct) -> None:
        """Write `event` as if it were logged, without the cost of a log record.

        Inside an event loop the line is formatted and written at the end of the current turn.
        """
        with self.lock or nullcontext():
            self._pending.append((event, time.time(), current_request.get()))
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
        else:
            if len(self._pending) == 1:
                loop.call_soon(self.flush)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the pending events and then the record: it may be the last one of this process."""
        self.flush()
        super().emit(record)

    def flush(self) -> None:
        """Write the pending events. Errors are ignored: logins succeed on a full disk or with a closed log pipe."""
        with self.lock or nullcontext(), suppress(OSError):
            pending, self._pending = self._pending, []
            if pending:
                self.stream.write("\n".join([*(self._line(*each) for each in pending), ""]))
            super().flush()

    def _line(self, event: msgspec.Struct, at: float, request: RequestContext | None) -> str:
        formatter = self.formatter
        assert isinstance(formatter, JsonFormatter | TextFormatter)  # nosec B101 # noqa: S101 - set by `config`
        return formatter.line(event, "INFO", at, request)


def _time(at: float) -> str:
    second, part = divmod(at, 1)
    return f"{_second(int(second))}.{int(part * 1000):03}Z"


@lru_cache(maxsize=1)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def config(log_format: LogFormat) -> dict[str, object]:
    """Return the configuration of a serving process for `logging.config.dictConfig`: everything to stderr."""
    formatter = JsonFormatter if log_format == "json" else TextFormatter
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": formatter}},
        "handlers": {"stderr": {"()": LineWriter, "formatter": "lines"}},
        "root": {"handlers": ["stderr"], "level": "INFO"},
        # This replaces the handler of `config_of_commands`, because `serve` is a command as well.
        "loggers": {AUDIT_LOGGER: {"handlers": ["stderr"], "level": "INFO", "propagate": False}},
    }


def config_of_commands(system_log: str = "/dev/log") -> dict[str, object]:
    """Return the configuration of a command: audit events go to the system log as JSON, if there is a system log.

    `system_log` is the path of its socket. Other messages of a command are for its user and are not logged.
    """
    exists = Path(system_log).is_socket()
    handler = {"class": "logging.handlers.SysLogHandler", "address": system_log, "formatter": "lines"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": SystemLogFormatter}},
        "handlers": {"audit": handler if exists else {"class": "logging.NullHandler"}},
        "loggers": {AUDIT_LOGGER: {"handlers": ["audit"], "level": "INFO", "propagate": False}},
    }
