"""What an engine remembers between requests, to look at and to limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mnemos.errors import ConfigError

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine


@dataclass(frozen=True)
class RememberedPages:
    """Cache pages that a later request with the same beginning need not evaluate."""

    count: int

    def __len__(self) -> int:
        return self.count


class CacheManager:
    """The prefix cache of an engine: pages of keys and values, each found again by all tokens up to its end.

    max_entries     the most pages to remember beside those in use; the least recently used are forgotten first
    max_memory_mb   the same limit in MB (2^20 bytes)

    Of a model with sliding-window attention, pages that no position reaches any more are given back while it runs.
    """

    def __init__(
        self, engine: InferenceEngine, max_entries: int | None = None, max_memory_mb: float | None = None
    ) -> None:
        self._engine = engine
        limits = [] if max_entries is None else [_not_negative("max_entries", max_entries)]
        if max_memory_mb is not None:
            limits.append(int(_not_negative("max_memory_mb", max_memory_mb) * 2**20) // self.page_bytes)
        if limits:
            engine.limit_prefix_cache(int(min(limits)))

    @property
    def page_bytes(self) -> int:
        return self._engine.spec.layout.page_bytes

    @property
    def page_size(self) -> int:
        """Tokens of a page; shorter beginnings are not remembered."""
        return self._engine.spec.layout.page_size

    @property
    def sliding_window(self) -> int:
        """How many positions the model's attention reaches back, 0 without such a limit."""
        return self._engine.spec.window

    @property
    def hit_rate(self) -> float:
        """Of all prompts' tokens so far, the share that was found in the cache, 0 to 1."""
        return self._engine.stats().prefix_hit_rate

    @property
    def episodic_cache(self) -> RememberedPages:
        """The pages that are remembered now."""
        return RememberedPages(self._engine.stats().prefix_pages)

    @property
    def memory_usage_mb(self) -> float:
        """What the remembered pages take, in MB (2^20 bytes)."""
        return len(self.episodic_cache) * self.page_bytes / 2**20

    def invalidate(self) -> None:
        """Forgets everything; running requests keep what they use."""
        self._engine.clear_prefix_cache()


def _not_negative(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ConfigError(f"{name} is {value!r}; expected a number of at least 0")
    return value
