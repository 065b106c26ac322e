"""The log of a process: one line for each record or event, as text or as JSON, with the request that caused it.

The formatters treat everything that they write as text from outside. No value can add a line or a field, none can
change how a terminal shows the log, and none can contain a secret: see `characters` and `redaction`. So callers need
not check.
"""

import asyncio
import json
import logging
import logging.config
import re
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import msgspec

from sso_service.characters import escape_hidden
from sso_service.observability.limit import LimitedMessage
from sso_service.observability.redaction import needs_attention, redact
from sso_service.settings import LogFormat

AUDIT_LOGGER = "sso_service.audit"
"""The name of the logger of audit events. Part of the configuration, so it does not follow the module layout."""

_INVALID_HTTP = "Invalid HTTP request received."
"""The message of the server for data that is not HTTP."""


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
        every = (head, message, request, *parts) if request else (head, message, *parts)
        try:
            # One object with the fields of all parts. Encoding each part is faster than merging them first.
            line = b"{%b}" % b",".join([self._encode(part)[1:-1] for part in every])
        except UnicodeEncodeError:  # a lone surrogate
            return _safe_object(every)
        return _safe_object(every) if needs_attention(line) else line.decode()


def _safe_object(parts: Sequence[object]) -> str:
    """Return the fields of all parts as one JSON object without secrets. Invisible characters are escaped."""
    fields = {name: value for part in parts for name, value in msgspec.to_builtins(part).items()}
    safe = {name: redact(value) if isinstance(value, str) else value for name, value in fields.items()}
    return escape_hidden(json.dumps(safe, ensure_ascii=False, separators=(",", ":")))


class SystemLogFormatter(JsonFormatter):
    """The same JSON behind the name of the program, as the system log requires it (RFC 3164 section 4.1.3)."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its end."""
        return f"sso-service: {super().format(record)}"


# Neither a blank nor `=` nor a quote, so such a value cannot look like several fields. The short ones cannot contain a
# secret either, and nothing in them is an escape sequence.
_SHORT_WORD = re.compile(r"[A-Za-z0-9._:/+@-]{1,42}", re.ASCII).fullmatch
_WORD = re.compile(r"[A-Za-z0-9._:/+@-]+", re.ASCII).fullmatch


class TextFormatter(logging.Formatter):
    """Time, level, message and request on one line. The fields of a struct, such as an audit event, are `name=value`.

    A value with other characters than letters, digits and `._:/+@-` is a JSON string in quotes. So is a message that
    contains `=`, quotes or invisible characters: outside quotes, a line has only the fields that the service wrote.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its end. The traceback of an exception follows on lines that begin with blanks."""
        message: object = record.msg
        if not isinstance(message, msgspec.Struct):
            message = record.getMessage()
        line = self.line(message, record.levelname, record.created, current_request.get())
        if not record.exc_info:
            return line
        # The text of an exception may contain line ends. Indented, none of its lines looks like a line of the log.
        traceback = redact(self.formatException(record.exc_info)).split("\n")
        return "\n    ".join([line, *map(escape_hidden, traceback)])

    def line(self, message: object, level: str, at: float, request: RequestContext | None) -> str:
        """Return the line of a message, a struct or text, that was logged at `at` (Unix seconds)."""
        text = _fields(message) if isinstance(message, msgspec.Struct) else _sentence(str(message))
        line = f"{_time(at)} {level:<7} {text}"
        if request is None:
            return line
        return f"{line} request_id={_value(request.request_id)} client={_value(request.client)}"


def _fields(struct: msgspec.Struct) -> str:
    fields = msgspec.to_builtins(struct)
    return " ".join([fields.pop("event"), *[f"{name}={_value(value)}" for name, value in fields.items()]])


def _value(value: object) -> object:
    if not isinstance(value, str) or _SHORT_WORD(value):
        return value
    text = redact(value)
    return text if _WORD(text) else _quoted(text)


def _sentence(text: str) -> str:
    text = redact(text.rstrip("\n"))
    return _quoted(text) if "=" in text or '"' in text or escape_hidden(text) != text else text


def _quoted(text: str) -> str:
    return escape_hidden(json.dumps(text, ensure_ascii=False))


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

    def handleError(self, record: logging.LogRecord) -> None:
        """Log that a record was lost. The inherited method would print its arguments as they are."""
        with suppress(Exception):
            self.stream.write(f"{_time(record.created)} WARNING a record of {_value(record.name)} was not written\n")

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
        "filters": {"invalid": {"()": LimitedMessage, "message": _INVALID_HTTP, "kind": "requests that are not HTTP"}},
        "handlers": {"stderr": {"()": LineWriter, "formatter": "lines"}},
        "root": {"handlers": ["stderr"], "level": "INFO"},
        # This replaces the handler of `config_of_commands`, because `serve` is a command as well.
        "loggers": {
            AUDIT_LOGGER: {"handlers": ["stderr"], "level": "INFO", "propagate": False},
            "uvicorn.error": {"filters": ["invalid"]},
        },
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
