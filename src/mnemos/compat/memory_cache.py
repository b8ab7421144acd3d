"""What is remembered between requests, by the names of MLoT-Spark: episodes, concepts and contexts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mnemos.compat.cache_manager import CacheManager
from mnemos.compat.caches import (
    SIZE,
    ConceptCache,
    ConceptMatch,
    Context,
    ContextCache,
    LRUCache,
    checked_size,
    context_hash,
)
from mnemos.compat.idle_refresh import IdleRefresh
from mnemos.engine.prompts import listed
from mnemos.errors import ConfigError
from mnemos.machine.memory import free_memory
from mnemos.rules import LARGEST_INT

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine
    from mnemos.memory.response_cache import ResponseCache

_SHARE_OF_FREE = 8  # an automatic size takes one part in so many of the memory that is free
_OFTEN = 2  # uses after which a context is worth evaluating again


@dataclass(frozen=True)
class CachedPatterns:
    """What is remembered of a context; false if that is nothing.

    context        the context itself
    cached_tokens  how many of its first tokens an engine has keys and values of, so that they need no evaluation
    answers        how many answers to it an engine keeps in its `response_cache`
    pattern        what `episodic_cache` holds for it, without an engine
    concepts       the concepts that suit its text
    similar        hashes of contexts with the same beginning
    """

    context: Context | None = None
    cached_tokens: int = 0
    answers: int = 0
    pattern: Any = None
    concepts: list[ConceptMatch] = field(default_factory=list)
    similar: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.context is not None or self.pattern is not None


class EngineConcepts(ConceptCache):
    """Concepts beside the texts that an engine keeps (`engine.memory`), which `match` ranks together.

    A stored text is a pattern whose concept is its name.
    """

    def __init__(
        self, engine: InferenceEngine, cache_size: int, half_life: float, encoder: Callable[[str], Any] | None
    ) -> None:
        super().__init__(cache_size, half_life=half_life, encoder=encoder)
        self._engine = engine
        self._recall_encoder = encoder

    def match(self, text: str, k: int = 3) -> list[ConceptMatch]:
        """The at most `k` concepts and stored texts that suit a text best, the best first.

        Scores by words depend on what else there is: those of concepts and of texts can be compared only roughly.
        """
        if k < 1:
            return []
        stored = self._engine.memory.recall(text, k, kinds=("text",), encoder=self._recall_encoder)
        found = [ConceptMatch(one.name, one.text, one.score) for one in stored if one.score > 0]
        return sorted([*super().match(text, k), *found], key=lambda one: -one.score)[:k]


class EpisodicPages:
    """An engine's prefix cache: pages of keys and values of texts that it has read; `len` is their number."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine

    def __len__(self) -> int:
        return self._engine.stats().prefix_pages

    def __contains__(self, text: str) -> bool:
        """Whether all full pages of a text are there."""
        ids = _token_ids(self._engine, text)
        size = self._engine.spec.layout.page_size
        return len(ids) >= size and self.cached_tokens(ids) == len(ids) // size * size

    def cached_tokens(self, context: str | Sequence[int]) -> int:
        """How many of a text's first tokens are there; asking does not count as a use."""
        stats = self._engine.stats()
        if not stats.prefix_pages:
            return 0
        ids = _token_ids(self._engine, context)
        tree = self._engine._thread.prefix_tree()
        return self._engine._thread.call(lambda: tree.covered(None, ids)) * self._engine.spec.layout.page_size

    @property
    def hit_rate(self) -> float:
        """The share of all prompt tokens so far that was found, 0 to 1."""
        return self._engine.stats().prefix_hit_rate

    @property
    def memory_usage_mb(self) -> float:
        """The pages' memory, in MB (2^20 bytes)."""
        return self._engine.stats().prefix_bytes / 2**20


class MemoryCache:
    """Episodes, concepts and contexts, each with a limit of its own.

    With an engine, episodes are its prefix cache, and contexts the prompts of an `OptimizedInferenceEngine` and what
    `preload` was given, without those that have a cache_salt. Without one it holds whatever a program puts into it:
    `cache.episodic_cache[cache.context_hash(text)] = pattern`.

    cache_size     most episodes (pages, with an engine); None: as many as an eighth of the free memory holds, adjusted
                   by every `refresh`
    semantic_size  most concepts; context_size: most contexts; by default 1000 each
    half_life      of a use, in uses, so that what was used often stays longer; 0: the least recently used goes first
    encoder        see `ConceptCache`
    """

    def __init__(
        self,
        cache_size: int | None = SIZE,
        engine: InferenceEngine | None = None,
        *,
        semantic_size: int = SIZE,
        context_size: int = SIZE,
        half_life: float = SIZE,
        encoder: Callable[[str], Any] | None = None,
    ) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._automatic = cache_size is None
        self._weighted = half_life > 0
        self._idle: IdleRefresh | None = None
        self.semantic_cache = (
            ConceptCache(semantic_size, half_life=half_life, encoder=encoder)
            if engine is None
            else EngineConcepts(engine, semantic_size, half_life, encoder)
        )
        self.context_cache = ContextCache(context_size, half_life=half_life)
        self.episodic_cache: EpisodicPages | LRUCache
        size = LARGEST_INT if cache_size is None else checked_size("cache_size", cache_size)
        if engine is None:
            self.episodic_cache = LRUCache(size, half_life=half_life)
        else:
            self.episodic_cache = EpisodicPages(engine)
            if _remembers(engine):
                engine.limit_prefix_cache(size, self._weighted)
        if self._automatic:
            self.adjust_size()

    def context_hash(self, context: str | Sequence[int]) -> str:
        """What a context, a text or token ids, is found by."""
        return context_hash(context if self._engine is None else _token_ids(self._engine, context))

    def get_cached_patterns(self, context_hash: str) -> CachedPatterns:
        """What is remembered of the context with this hash."""
        with self._lock:
            context = self.context_cache.get(context_hash)
            similar = self.context_cache.similar(context_hash)
            pattern = self.episodic_cache.get(context_hash) if isinstance(self.episodic_cache, LRUCache) else None
        if context is None:
            return CachedPatterns(pattern=pattern)
        text, cached = context.text, 0
        if isinstance(self.episodic_cache, EpisodicPages):
            cached = self.episodic_cache.cached_tokens(context.token_ids.tolist())
        if text is None and self._engine is not None and self._engine.tokenizer is not None:
            text = self._engine.tokenizer.decode(context.token_ids.tolist())
        with self._lock:
            concepts = self.semantic_cache.match(text) if text else []
        answers = self._answers
        known = 0 if answers is None else answers.answers_to(context.token_ids.tolist())
        return CachedPatterns(context, cached, known, pattern, concepts, similar)

    @property
    def _answers(self) -> ResponseCache | None:
        return None if self._engine is None else self._engine._launcher.answers

    def note(self, context: str | Sequence[int]) -> str:
        """Counts a use of a context; returns its hash."""
        with self._lock:
            return self.context_cache.note(context if self._engine is None else _token_ids(self._engine, context))

    def preload(self, texts: Iterable[str] | Mapping[str, Any]) -> int:
        """Fills the cache before it is needed.

        With an engine: it reads these texts, after other requests; returns how many tokens' keys and values are there
        in the end. Without one: texts with their patterns; returns how many.
        """
        if isinstance(self.episodic_cache, LRUCache):
            if not isinstance(texts, Mapping):
                raise ConfigError(
                    f"texts is a {type(texts).__name__}; without an engine, expected a mapping from texts to patterns"
                )
            for text, pattern in texts.items():
                key = self.note(text)
                with self._lock:
                    self.episodic_cache[key] = pattern
            return len(texts)
        wanted = [_token_ids(self._checked, text) for text in listed(texts)]
        for ids in wanted:
            self._read(ids)
            with self._lock:
                self.context_cache.note(ids)
        return sum(map(self.episodic_cache.cached_tokens, wanted))

    def refresh(self, most: int | None = None) -> int:
        """Has the engine read anew, after other requests, what came up several times and has been dropped since.

        The contexts used most come first, as long as they fit in the cache together. most: at most so many. Returns how
        many it was. An automatic size is adjusted first. `refresh_when_idle` calls it.
        """
        if self._automatic:
            self.adjust_size()
        pages = self.episodic_cache
        if not isinstance(pages, EpisodicPages) or not _remembers(self._checked):
            return 0
        engine = self._checked
        room, size = engine._thread.prefix_tree().limit or LARGEST_INT, engine.spec.layout.page_size
        with self._lock:
            contexts: list[Context] = [context for _, context in reversed(self.context_cache.items())]
        done = 0
        for context in contexts:
            full = len(context.token_ids) // size if context.uses >= _OFTEN else 0
            room -= full
            if not full or room < 0:
                continue
            ids = context.token_ids.tolist()
            if pages.cached_tokens(ids) < full * size and (most is None or done < most):
                self._read(ids)
                done += 1
        return done

    def refresh_when_idle(self, after: float = 5.0) -> None:
        """Refreshes in the background, one context at a time, whenever the engine has had no work for some seconds."""
        self.stop_refreshing()
        self._idle = IdleRefresh(self._checked, lambda: self.refresh(1), after)

    def stop_refreshing(self) -> None:
        """Ends `refresh_when_idle`."""
        if self._idle is not None:
            self._idle.close()
            self._idle = None

    def adjust_size(self) -> int:
        """Limits episodes to an eighth of the memory that is free or taken by them; returns the bytes."""
        held = int(self.episodic_cache.memory_usage_mb * 2**20)
        most = (free_memory() + held) // _SHARE_OF_FREE
        if isinstance(self.episodic_cache, LRUCache):
            with self._lock:
                self.episodic_cache.most_bytes = most
                self.episodic_cache.shrink()
        elif _remembers(self._checked):
            page_bytes = self._checked.spec.layout.page_bytes
            self._checked.limit_prefix_cache(most // page_bytes, self._weighted)
        return most

    @property
    def hit_rate(self) -> float:
        """The share that was found, 0 to 1: of prompt tokens, with an engine, else of the episodes asked for."""
        return self.episodic_cache.hit_rate

    @property
    def memory_usage_mb(self) -> float:
        """The episodes' memory, in MB (2^20 bytes); the other caches have the same property."""
        return self.episodic_cache.memory_usage_mb

    @property
    def page_bytes(self) -> int:
        """See `CacheManager`, as for the next two, of an engine's cache."""
        return CacheManager(self._checked).page_bytes

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return CacheManager(self._checked).page_size

    @property
    def sliding_window(self) -> int:
        """How many positions back the model's attention reaches, 0 without a limit."""
        return CacheManager(self._checked).sliding_window

    def invalidate(self) -> None:
        """Empties all three, and the engine's cache of answers; running requests keep what they use."""
        with self._lock:
            self.semantic_cache.clear()
            self.context_cache.clear()
        if self._answers is not None:
            self._answers.clear()
        if isinstance(self.episodic_cache, LRUCache):
            self.episodic_cache.clear()
        elif _remembers(self._checked):
            self._checked.clear_prefix_cache()

    @property
    def _checked(self) -> InferenceEngine:
        if self._engine is None:
            raise ConfigError("the memory cache has no engine; create it with one: MemoryCache(1000, engine)")
        return self._engine

    def _read(self, token_ids: list[int]) -> None:
        self._checked.submit(token_ids, max_new_tokens=1, ignore_eos=True, priority=LARGEST_INT).result()


def _token_ids(engine: InferenceEngine, context: str | Sequence[int]) -> list[int]:
    from mnemos.engine.prompts import read_prompts

    return list(read_prompts(context, None, engine.tokenizer).only)


def _remembers(engine: InferenceEngine) -> bool:
    """Whether the engine keeps prefixes at all."""
    return engine._thread.core.scheduler.tables.tree is not None
