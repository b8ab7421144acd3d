"""Who may ask, and how much: API keys, kept as digests, each with its tenant and its limits."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mnemos.errors import ConfigError
from mnemos.rules import COUNT, hint, text
from mnemos.serve.refusal import Refusal
from mnemos.serve.toml import parse_toml

logger = logging.getLogger("mnemos.serve")
MINUTE = 60.0
RELOAD = 1.0  # seconds between two looks at the file
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent")


@dataclass(frozen=True)
class Caller:
    """Whose request it is.

    tenant               tenants take turns in the queue
    salt                 cached prefixes are shared between callers with the same one
    requests_per_minute  at most this number in any minute; None: any number
    tokens_per_minute    of prompts and answers, in any minute
    concurrent           requests at the same time
    """

    name: str
    tenant: str
    salt: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    usage: Usage = field(default_factory=lambda: Usage(), compare=False)

    def enter(self) -> None:
        """Counts a request that begins. Refusal if it is one too many."""
        used = self.usage
        if self.concurrent is not None and used.running >= self.concurrent:
            raise _too_many(f"{self.concurrent} requests at the same time", 1.0)
        for limit, window, what in self._limits():
            if window.total >= limit:
                raise _too_many(f"{limit} {what} a minute", window.seconds)
        used.running += 1
        used.requests.add(1)

    def leave(self, tokens: int) -> None:
        """Counts a request that has ended, with the tokens that it used."""
        self.usage.running -= 1
        self.usage.tokens.add(tokens)

    def headers(self) -> dict[str, str]:
        """What is left, under the names that OpenAI's clients read."""
        shown = {}
        for limit, window, what in self._limits():
            shown[f"x-ratelimit-limit-{what}"] = str(limit)
            shown[f"x-ratelimit-remaining-{what}"] = str(max(limit - window.total, 0))
        return shown

    def _limits(self) -> list[tuple[int, Window, str]]:
        """The limits by the minute that there are, and what they limit."""
        used = self.usage
        rows = ((self.requests_per_minute, used.requests, "requests"), (self.tokens_per_minute, used.tokens, "tokens"))
        return [(limit, window, what) for limit, window, what in rows if limit is not None]


class Window:
    """A sum over the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._parts: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, amount: int) -> None:
        """Adds an amount, which is forgotten in a minute."""
        self._forget()
        if amount:
            self._parts.append((self._clock(), amount))
            self._total += amount

    @property
    def total(self) -> int:
        """What was added in the last minute."""
        self._forget()
        return self._total

    @property
    def seconds(self) -> float:
        """After which the oldest amount is forgotten."""
        return self._parts[0][0] + MINUTE - self._clock() if self._parts else 0.0

    def _forget(self) -> None:
        now = self._clock()
        while self._parts and self._parts[0][0] <= now - MINUTE:
            self._total -= self._parts.popleft()[1]


@dataclass
class Usage:
    """What a caller uses: requests and tokens of the last minute, and requests that run. In the event loop only."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    running: int = 0


ANYONE = Caller("anyone", "default", "")


class Keys:
    """The keys that a server accepts; without any, everyone may ask.

    keys: the keys themselves. path: a file of keys that is read again when it changes: a key a line, as it is or as
    `sha256:` and the digest's 64 hexadecimal digits; or TOML with a table for each key (see `read_keys`).
    share_cache: callers may find prefixes in the cache that others sent; otherwise each has its own.
    """

    def __init__(self, keys: Iterable[str] = (), share_cache: bool = False, path: str | Path | None = None) -> None:
        self._share = share_cache
        rows = [(_digest(key), Caller(f"key{n}", f"key{n}", "")) for n, key in enumerate(keys, 1)]
        self._fixed = [self._salted(row) for row in rows]
        self._path = None if path is None else Path(path)
        self._stamp: tuple[int, int] | None = None
        self._looked = 0.0
        self._callers = self._fixed
        if self._path is not None:
            self._read(self._path)

    def __bool__(self) -> bool:
        return bool(self._callers)

    def caller(self, key: str | None) -> Caller | None:
        """Whose key it is; None for a wrong one. Takes the same time for all keys."""
        self._refresh()
        if not self._callers:
            return ANYONE
        given, found = _digest(key or ""), None
        for digest, caller in self._callers:
            if hmac.compare_digest(digest, given):
                found = caller
        return found

    def _refresh(self) -> None:
        """Reads the file again if it has changed; a file that cannot be read keeps the keys as they are."""
        if self._path is None or time.monotonic() - self._looked < RELOAD:
            return
        self._looked = time.monotonic()
        try:
            if _stamp(self._path) != self._stamp:
                self._read(self._path)
        except (OSError, ConfigError) as error:
            logger.warning("the file of keys cannot be read; the keys stay as they were: %s", error)

    def _read(self, path: Path) -> None:
        stamp = _stamp(path)
        known = {caller.name: caller.usage for _, caller in self._callers}
        rows = [self._salted(row) for row in read_keys(path)]
        # What a caller has used stays counted.
        kept = [(digest, replace(one, usage=known.get(one.name, one.usage))) for digest, one in rows]
        self._callers, self._stamp = [*self._fixed, *kept], stamp

    def _salted(self, row: tuple[bytes, Caller]) -> tuple[bytes, Caller]:
        digest, caller = row
        return digest, replace(caller, salt="" if self._share else caller.tenant)


def read_keys(path: Path) -> list[tuple[bytes, Caller]]:
    """The keys in a file, each with its caller. ConfigError if there is none or something is wrong.

    In a TOML file (`.toml`) each table is a caller: its name is the table's; `key` or `sha256` is its key; `tenant`,
    `requests_per_minute`, `tokens_per_minute` and `concurrent` may be left out.
    """
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        rows = [_row(name, table, path) for name, table in parse_toml(content, path).items()]
    else:
        lines = [line.strip() for line in content.splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        rows = [(_stored(key, path), Caller(f"line{n}", f"line{n}", "")) for n, key in enumerate(keys, 1)]
    if not rows:
        raise ConfigError(f"{path} has no keys; write one a line")
    return rows


def _row(name: str, table: Any, path: Path) -> tuple[bytes, Caller]:
    known = ("key", "sha256", "tenant", *_LIMITS)
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: {name} is not a table; write [{name}] and its key below")
    for field_name in table:
        if field_name not in known:
            raise ConfigError(f"{path}: {name}.{field_name} is unknown; {hint(field_name, known, 'the names are')}")
    if ("key" in table) == ("sha256" in table):
        raise ConfigError(f"{path}: {name} must have either key or sha256")
    stored = f"sha256:{table['sha256']}" if "sha256" in table else table["key"]
    tenant = text(255).apply(f"{name}.tenant", table.get("tenant", name))
    limits = {limit: COUNT.apply(f"{name}.{limit}", table[limit]) for limit in _LIMITS if limit in table}
    return _stored(stored, path), Caller(name, tenant, "", **limits)


def _stored(key: Any, path: Path) -> bytes:
    if not isinstance(key, str) or not key:
        raise ConfigError(f"{path}: a key is empty or no text")
    kind, colon, digest = key.partition(":")
    if kind != "sha256" or not colon:
        return _digest(key)
    try:
        raw = bytes.fromhex(digest)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise ConfigError(f"{path}: a sha256: line does not have 64 hexadecimal digits")
    return raw


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _too_many(what: str, seconds: float) -> Refusal:
    return Refusal(
        429,
        f"Rate limit reached: this key may use {what}",
        code="rate_limit_exceeded",
        retry_after=max(1, round(seconds + 0.5)),
    )
