"""Structured logging to stderr; every line passes through redaction."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import structlog

from adc_worker.redaction import redact

CAUSES_KEPT = 20
_TEXT_FIELDS = ("error", "reason", "note", "exit")


@dataclass(frozen=True, slots=True)
class Cause:
    """A warning or error that was logged: how often, and when last (Unix seconds)."""

    event: str
    text: str
    count: int
    last_at: float


_causes: dict[tuple[str, str], Cause] = {}
_causes_lock = threading.Lock()


def recent_causes() -> tuple[Cause, ...]:
    """Return what was logged as a warning or worse, by cause, the latest first."""
    with _causes_lock:
        return tuple(reversed(_causes.values()))


def _remember(_logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if method in {"warning", "error", "critical", "exception"}:
        text = next((str(event[name]) for name in _TEXT_FIELDS if event.get(name)), "")[:300]
        key = (str(event["event"]), text)
        with _causes_lock:
            before = _causes.pop(key, None)  # and back at the end: the latest is last
            _causes[key] = Cause(*key, 1 + (before.count if before else 0), time.time())
            if len(_causes) > CAUSES_KEPT:
                del _causes[next(iter(_causes))]
    return event


def _redact_value(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: _redact_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_value(item) for item in value]
    if isinstance(value, BaseException):
        return redact(f"{type(value).__name__}: {value}")
    return value if isinstance(value, int | float | None) else redact(repr(value))


def _redact_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        event[key] = _redact_value(value)
    return event


def configure(log_format: Literal["console", "color", "json"], level: str) -> None:
    """Send every log line to stderr: readable on a terminal, or one JSON object a line."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=log_format == "color")
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _redact_event,
            _remember,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=Lasting(sys.stderr)),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    # Libraries log whole URLs at INFO and DEBUG; their warnings still reach stderr.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].setFormatter(_RedactingFormatter("%(name)s: %(message)s"))
    logging.captureWarnings(capture=True)
    # What nobody caught is printed by the interpreter, past every formatter: with whole URLs where HTTP failed.
    uncaught = logging.getLogger("uncaught")
    sys.excepthook = lambda kind, error, trace: uncaught.critical("", exc_info=(kind, error, trace))
    threading.excepthook = lambda died: uncaught.critical(
        "in thread %s", died.thread and died.thread.name, exc_info=died.exc_value
    )


class Lasting:
    """A stream to people, which may go: a terminal that was closed, a full disk, a reader that died end no worker."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            if error.errno in {errno.EIO, errno.EPIPE}:  # for good; what is buffered would fail again at exit
                with Path(os.devnull).open("w") as nowhere:
                    os.dup2(nowhere.fileno(), self._stream.fileno())

    def flush(self) -> None:
        """Every line is."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def get_logger(name: str) -> Any:
    """Return a logger whose events are snake_case and whose fields carry units in their names."""
    return structlog.get_logger(module=name.removeprefix("adc_worker."))
