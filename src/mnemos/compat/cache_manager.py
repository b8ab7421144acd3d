"""Inspects and limits what an engine keeps between requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mnemos.errors import ConfigError

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine


@dataclass(frozen=True)
class RememberedPages:
    """Cache pages that spare a later request with the same beginning their evaluation."""

    count: int

    def __len__(self) -> int:
        return self.count


class CacheManager:
    """An engine's prefix cache: pages of keys and values, each found by all the tokens up to its end.

    max_entries     the most pages to keep besides those in use; the least recently used are dropped first
    max_memory_mb   the same limit in MB (2^20 bytes)

    With sliding-window attention, pages that no position can reach any more are freed while the model runs.
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
        """The most bytes that one page takes, of all layers; those with a window keep fewer pages."""
        return self._engine.spec.layout.page_bytes

    @property
    def page_size(self) -> int:
        """Tokens per page; shorter beginnings are not cached."""
        return self._engine.spec.layout.page_size

    @property
    def sliding_window(self) -> int:
        """How many positions back attention reaches, 0 without a limit; a memory without recall is such a window."""
        spec = self._engine.spec
        recall = spec.layout.recall
        return recall.window if recall is not None and not recall.recall else spec.window

    @property
    def hit_rate(self) -> float:
        """The share of all prompt tokens so far that was found in the cache, 0 to 1."""
        return self._engine.stats().prefix_hit_rate

    @property
    def episodic_cache(self) -> RememberedPages:
        """The pages in the cache now."""
        return RememberedPages(self._engine.stats().prefix_pages)

    @property
    def memory_usage_mb(self) -> float:
        """The memory of the cached pages, in MB (2^20 bytes)."""
        return self._engine.stats().prefix_bytes / 2**20

    def invalidate(self) -> None:
        """Empties the cache; running requests keep the pages that they use."""
        self._engine.clear_prefix_cache()


def _not_negative(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ConfigError(f"{name} is {value!r}; expected a number of at least 0")
    return value
