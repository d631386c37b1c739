"""Logs as JSON, one object a line, with the request's id in each. What callers send and get is never in them.

An exception is logged as its type and where it happened: its message can quote a prompt.
"""

from __future__ import annotations

import json
import logging
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object; ``extra={"fields": {...}}`` adds to it.

    Args:
        with_messages: also log the messages of exceptions, for debugging only.
    """

    def __init__(self, *, with_messages: bool = False) -> None:
        super().__init__()
        self._with_messages = with_messages

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": REQUEST_ID.get(),
        }
        entry |= vars(record).get("fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            entry["exception"] = self._chain(record.exc_info[1])
        return json.dumps(entry, default=str)

    def _chain(self, error: BaseException) -> list[dict[str, Any]]:
        """The error and what it came from, innermost last."""
        chain: list[dict[str, Any]] = []
        at: BaseException | None = error
        while at is not None and len(chain) < 8:
            frames = traceback.extract_tb(at.__traceback__)
            said = {"message": str(at)} if self._with_messages else {}
            where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
            chain.append({"type": type(at).__name__, "frames": where} | said)
            at = at.__cause__ or at.__context__
        return chain


def configure(level: str, stream: IO[str]) -> logging.Handler:
    """Sends the process's logs to ``stream``; returns the handler so that a test can take it off again."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(with_messages=level == "debug"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())
    return handler
