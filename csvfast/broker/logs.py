"""The broker's log: one JSON object a line, with the correlation id that peers are told and audit records carry.

    {"time": "2026-01-31T12:00:00.000Z", "level": "info", "logger": "csvfast.broker.kbs", "event": "denied", "correlation": "..."}

`event` is the message; further members come from `extra={"fields": {...}}`. Values are shortened, control characters escaped by
JSON. Nobody passes key material here; what looks like one is not searched for.

Thread-safety: as logging.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["JsonFormatter", "event", "new_correlation", "set_up"]

_VALUE_LIMIT: Final = 2000
_AT_ONCE: Final = 256
_correlations: Final[list[str]] = []


def new_correlation() -> str:
    """16 hexadecimal digits that link a peer's answer, the log and the audit record of one request. HOT."""
    try:
        return _correlations.pop()
    except IndexError:
        # Many at once: a system call for each would let other threads run each time. They are public, so they may lie about.
        digits = secrets.token_hex(8 * _AT_ONCE)
        _correlations.extend([digits[at : at + 16] for at in range(16, 16 * _AT_ONCE, 16)])
        return digits[:16]


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without the line feed."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage()[:_VALUE_LIMIT],
        }
        for name, value in getattr(record, "fields", {}).items():
            entry[name] = value if isinstance(value, (int, float, bool)) or value is None else str(value)[:_VALUE_LIMIT]
        if record.exc_info:
            # The traceback's lines name places in the source, its last one the message; neither holds arguments.
            entry["exception"] = self.formatException(record.exc_info)[-2 * _VALUE_LIMIT :]
        return json.dumps(entry, ensure_ascii=True)


def event(logger: logging.Logger, level: int, text: str, **fields: object) -> None:
    """Logs `text` with members of their own."""
    if logger.isEnabledFor(level):
        logger.log(level, text, extra={"fields": fields})


def set_up(level: str = "info", stream: TextIO | None = None) -> None:
    """Sends all that is logged in this process to `stream` (default: standard error) as JSON lines: records of csvfast from
    `level` on, warnings and errors of other libraries, Python's warnings, and exceptions that nobody caught.

    In the main thread, at the start: before gRPC, whose core would write lines of its own.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries' chatter below that may repeat what they were given.
    root.setLevel(logging.WARNING)
    for name, least in (("csvfast", level.upper()), ("uvicorn", "ERROR")):  # its warnings are said again by our protocol
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(least)
        logger.propagate = True
    logging.raiseExceptions = False  # or a log that cannot be written would be complained about, with the record's text
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: _uncaught("uncaught exception", kind, error, trace)
    threading.excepthook = lambda given: _uncaught("a thread failed", given.exc_type, given.exc_value, given.exc_traceback)
    sys.unraisablehook = lambda given: _uncaught("ignored exception", given.exc_type, given.exc_value, given.exc_traceback)


def _uncaught(
    what: str, kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    logging.getLogger(__name__).critical(what, exc_info=(kind, error or kind(), trace))
