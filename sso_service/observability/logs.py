"""How the log looks: a line for each event, as text or as JSON, with the request that it belongs to."""

import asyncio
import logging
import logging.config
import sys
import time
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Literal, TextIO

import msgspec

LogFormat = Literal["text", "json"]


class RequestContext(msgspec.Struct, frozen=True):
    """The request that is being answered: its id, and the address that it came from."""

    request_id: str
    client: str


current_request: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)


class JsonLines(logging.Formatter):
    """One JSON object a line. A message that is a struct, such as an audit event, gives its fields."""

    _encode = msgspec.json.Encoder().encode

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        message: object = record.msg
        if not isinstance(message, msgspec.Struct):
            message = {"logger": record.name, "message": record.getMessage()}
        parts = [{"exception": self.formatException(record.exc_info)}] if record.exc_info else []
        return self.line(message, record.levelname, record.created, current_request.get(), *parts)

    def line(self, message: object, level: str, at: float, request: RequestContext | None, *parts: object) -> str:
        """The line of a message that is a struct or a dictionary, said `at` (Unix seconds)."""
        head = {"time": _time(at), "level": level.lower()}
        # One object of all their fields. To encode each by itself is faster than to make one dictionary of them.
        every = (head, message, request, *parts) if request else (head, message, *parts)
        return f"{{{b','.join(self._encode(part)[1:-1] for part in every).decode()}}}"


class SystemLogLines(JsonLines):
    """The same, named as the system log wants it (RFC 3164 section 4.1.3)."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, behind the name of the program."""
        return f"sso-service: {super().format(record)}"


class TextLines(logging.Formatter):
    """Time, level, message, and the id of the request."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end; an exception's traceback follows in lines of its own."""
        line = self.line(record.getMessage(), record.levelname, record.created, current_request.get())
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    def line(self, message: object, level: str, at: float, request: RequestContext | None) -> str:
        """The line of a message, said `at` (Unix seconds)."""
        line = f"{_time(at)} {level:<7} {message}"
        return f"{line} request_id={request.request_id} client={request.client}" if request else line


class Lines(logging.StreamHandler[TextIO]):
    """Writes to stderr: records at once, and what is said during one turn of the event loop in one go.

    Each time that a thread writes it lets the others run, and here that would be once or twice for each request.
    """

    installed: "Lines | None" = None
    """The one of this process, if it logs in this way."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._said: list[tuple[msgspec.Struct, float, RequestContext | None]] = []
        Lines.installed = self

    def say(self, message: msgspec.Struct) -> None:
        """Writes the message as if it were logged, only faster: what can be done later is."""
        with self.lock or nullcontext():
            self._said.append((message, time.time(), current_request.get()))
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
        else:
            if len(self._said) == 1:
                loop.call_soon(self.flush)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes what was said before, and the record: it may be the last words of this process."""
        self.flush()
        super().emit(record)

    def flush(self) -> None:
        """Writes what was said. That the log's disk is full, or its reader gone, keeps nobody from signing in."""
        with self.lock or nullcontext(), suppress(OSError):
            said, self._said = self._said, []
            if said:
                self.stream.write("\n".join([*(self._line(*each) for each in said), ""]))
            super().flush()

    def _line(self, message: msgspec.Struct, at: float, request: RequestContext | None) -> str:
        formatter = self.formatter
        assert isinstance(formatter, JsonLines | TextLines)  # nosec B101 # noqa: S101 - see `config`
        return formatter.line(message, "INFO", at, request)


def _time(at: float) -> str:
    second, part = divmod(at, 1)
    return f"{_second(int(second))}.{int(part * 1000):03}Z"


@lru_cache(maxsize=1)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def config(log_format: LogFormat) -> dict[str, object]:
    """What `logging.config.dictConfig` is told: everything to stderr, in `log_format`."""
    formatter = JsonLines if log_format == "json" else TextLines
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": formatter}},
        "handlers": {"stderr": {"()": Lines, "formatter": "lines"}},
        "root": {"handlers": ["stderr"], "level": "INFO"},
        # What a command had set up, which `serve` is as well.
        "loggers": {"sso_service.audit": {"handlers": [], "level": "INFO", "propagate": True}},
    }


def config_of_commands(system_log: str = "/dev/log") -> dict[str, object]:
    """Likewise for commands, which talk to a person: only audit events, as JSON, to the system log if there is one."""
    there = Path(system_log).is_socket()
    handler = {"class": "logging.handlers.SysLogHandler", "address": system_log, "formatter": "lines"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": SystemLogLines}},
        "handlers": {"audit": handler if there else {"class": "logging.NullHandler"}},
        "loggers": {"sso_service.audit": {"handlers": ["audit"], "level": "INFO", "propagate": False}},
    }
