"""How the log looks: a line for each event, as text or as JSON, with the request that it belongs to."""

import logging
import logging.config
import time
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Literal

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
        parts: list[object] = [{"time": _time(record), "level": record.levelname.lower()}]
        if isinstance(record.msg, msgspec.Struct):
            parts.append(record.msg)
        else:
            parts.append({"logger": record.name, "message": record.getMessage()})
        if request := current_request.get():
            parts.append(request)
        if record.exc_info:
            parts.append({"exception": self.formatException(record.exc_info)})
        # One object of all their fields. To encode each by itself is faster than to make one dictionary of them.
        return f"{{{b','.join(self._encode(part)[1:-1] for part in parts).decode()}}}"


class SystemLogLines(JsonLines):
    """The same, named as the system log wants it (RFC 3164 section 4.1.3)."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, behind the name of the program."""
        return f"sso-service: {super().format(record)}"


class TextLines(logging.Formatter):
    """Time, level, message, and the id of the request."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end; an exception's traceback follows in lines of its own."""
        line = f"{_time(record)} {record.levelname:<7} {record.getMessage()}"
        if request := current_request.get():
            line += f" request_id={request.request_id} client={request.client}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _time(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03}Z"


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
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines"}},
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
