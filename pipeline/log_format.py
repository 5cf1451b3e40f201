"""What processes say on stderr: lines for people, or JSON objects, one a line, for whoever collects logs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import Annotated, Any, TextIO

import typer

LOG_FORMAT = "COUNTERWEIGHT_LOG_FORMAT"


class LogFormat(Enum):
    """How lines on stderr look."""

    TEXT = "text"
    JSON = "json"


Format = Annotated[
    LogFormat,
    typer.Option(
        "--log-format", envvar=LOG_FORMAT, help="Of what is said on stderr: for people, or JSON, one object a line."
    ),
]


def json_line(logger: str, level: str, message: str, at: float, **fields: object) -> str:
    """A line. at: seconds since 1970."""
    moment = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return json.dumps(
        {"time": moment, "level": level, "logger": logger, "message": message, **fields},
        ensure_ascii=False,
        default=str,
    )


def teller(chosen: LogFormat, logger: str) -> Callable[[str], None]:
    """Says a line on stderr."""
    if chosen is LogFormat.TEXT:
        return lambda text: typer.echo(text, err=True)
    return lambda text: typer.echo(json_line(logger, "info", text, time.time()), err=True)


class JsonFormatter(logging.Formatter):
    """Records of Python's logging."""

    def format(self, record: logging.LogRecord) -> str:
        more = {} if record.exc_info is None else {"exception": self.formatException(record.exc_info)}
        return json_line(record.name, record.levelname.lower(), record.getMessage(), record.created, **more)


def logging_config(chosen: LogFormat, stream: TextIO) -> Mapping[str, Any] | None:
    """For uvicorn and for the service, as `logging.config.dictConfig` has it; None: as they are."""
    if chosen is LogFormat.TEXT:
        return None
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": stream}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {"uvicorn": {"handlers": ["stderr"], "level": "INFO", "propagate": False}},
    }
