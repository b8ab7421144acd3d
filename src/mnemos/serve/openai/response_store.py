"""Stored responses, by which a later request continues a conversation: an SQLite database of bounded size and age."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mnemos.errors import ConfigError

_TABLE = """
CREATE TABLE IF NOT EXISTS responses (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT UNIQUE NOT NULL,
    caller TEXT NOT NULL,
    created REAL NOT NULL,
    previous TEXT,
    response TEXT NOT NULL,
    input TEXT NOT NULL,
    size INTEGER NOT NULL
)
"""


@dataclass(frozen=True)
class Stored:
    """A response with the items that it answers. previous: the id of the response that it continues."""

    response: dict[str, Any]
    input: list[dict[str, Any]]
    previous: str | None


class ResponseStore:
    """Responses by caller and id. Its methods block, and may be called from any thread.

    file   of the database, or :memory:
    most   bytes of all responses together; beyond that, the oldest are forgotten
    keep   seconds after which a response is forgotten
    """

    def __init__(self, file: str = ":memory:", most: int = 64 << 20, keep: float = 30 * 86400.0) -> None:
        self._most = most
        self._keep = keep
        self._lock = threading.Lock()
        try:
            self._base = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
            if file != ":memory:":
                with suppress(OSError):
                    os.chmod(file, 0o600)  # conversations are nobody else's business
            self._base.execute(_TABLE)
        except sqlite3.Error as error:
            raise ConfigError(f"responses is {file!r}, which cannot be used: {error}; name an SQLite file") from error

    def put(self, caller: str, stored: Stored) -> None:
        """Stores a response under its id."""
        response, given = json.dumps(stored.response), json.dumps(stored.input)
        now = time.time()
        row = (stored.response["id"], caller, now, stored.previous, response, given, len(response) + len(given))
        with self._lock:
            self._base.execute(
                "INSERT INTO responses (id, caller, created, previous, response, input, size)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            self._forget(now)

    def get(self, caller: str, name: str) -> Stored | None:
        """The caller's response of this id; None if there is none, or no longer."""
        with self._lock:
            row = self._base.execute(
                "SELECT response, input, previous FROM responses WHERE id = ? AND caller = ? AND created >= ?",
                (name, caller, time.time() - self._keep),
            ).fetchone()
        return None if row is None else Stored(json.loads(row[0]), json.loads(row[1]), row[2])

    def history(self, caller: str, name: str) -> list[dict[str, Any]] | None:
        """All items of a conversation up to and including a response; None if a part of it is not stored."""
        turns: list[list[dict[str, Any]]] = []
        following: str | None = name
        while following is not None:
            stored = self.get(caller, following)
            if stored is None:
                return None
            turns.append([*stored.input, *stored.response["output"]])
            following = stored.previous
        return [item for turn in reversed(turns) for item in turn]

    def delete(self, caller: str, name: str) -> bool:
        """Forgets a response; False if there is none."""
        with self._lock:
            return self._base.execute("DELETE FROM responses WHERE id = ? AND caller = ?", (name, caller)).rowcount > 0

    def close(self) -> None:
        """Closes the database."""
        with self._lock:
            self._base.close()

    def _forget(self, now: float) -> None:
        self._base.execute("DELETE FROM responses WHERE created < ?", (now - self._keep,))
        (size,) = self._base.execute("SELECT coalesce(sum(size), 0) FROM responses").fetchone()
        while size > self._most:
            number, freed = self._base.execute(
                "SELECT number, size FROM responses ORDER BY number LIMIT 1"
            ).fetchone()  # fmt: skip
            self._base.execute("DELETE FROM responses WHERE number = ?", (number,))
            size -= freed
