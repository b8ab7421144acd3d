"""Who may ask: API keys, kept as digests, each with its tenant."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """Whose request it is.

    tenant: tenants take turns in the queue. salt: cached prefixes are shared between callers with the same one.
    """

    name: str
    tenant: str
    salt: str


ANYONE = Caller("anyone", "default", "")


class Keys:
    """The keys that a server accepts; without any, everyone may ask.

    share_cache: callers see in their timings and usage what prefixes others sent; otherwise each has its own cache.
    """

    def __init__(self, keys: Iterable[str] = (), share_cache: bool = False) -> None:
        self._callers = [
            (_digest(key), Caller(f"key{n}", f"key{n}", "" if share_cache else f"key{n}"))
            for n, key in enumerate(keys, 1)
        ]

    def __bool__(self) -> bool:
        return bool(self._callers)

    def caller(self, key: str | None) -> Caller | None:
        """Whose key it is; None for a wrong one. Takes the same time for all keys."""
        if not self._callers:
            return ANYONE
        given, found = _digest(key or ""), None
        for digest, caller in self._callers:
            if hmac.compare_digest(digest, given):
                found = caller
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
