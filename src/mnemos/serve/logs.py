"""The server's log: one line an event, as JSON or as text, in which nothing that a client sent can start a new line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

FORMATS = ("text", "json")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class LineFormatter(logging.Formatter):
    """Writes a record with all its extra values. `as_json`: as one JSON object, otherwise as words."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        if self._as_json:
            head = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
            return json.dumps({**head, **values}, ensure_ascii=True, default=str)
        words = [f"{key}={_word(value)}" for key, value in values.items() if key != "traceback"]
        line = " ".join([moment[11:23], record.levelname.lower(), _plain(record.getMessage()), *words])
        return line + ("\n" + values["traceback"] if "traceback" in values else "")


def set_up(as_json: bool, level: int = logging.INFO) -> None:
    """Sends the server's log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json))
    logger = logging.getLogger("mnemos.serve")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return json.dumps(text) if " " in text or not text.isprintable() else text


def _plain(text: str) -> str:
    """A text whose control characters are visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
