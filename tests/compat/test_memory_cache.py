"""MemoryCache alone, and over an engine's caches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mnemos import ConceptCache, ContextCache, InferenceEngine, LRUCache, MemoryCache, OptimizedInferenceEngine
from mnemos.errors import ConfigError

TEXTS = [" ".join(f"word{(7 * n + k) % 97}" for k in range(60)) for n in range(6)]


@pytest.fixture
def engine(smollm2: Path, tmp_path: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine.from_pretrained(smollm2, cache_tokens=8192, session_dir=tmp_path) as made:
        yield made


def pages_of(engine: InferenceEngine, text: str) -> int:
    assert engine.tokenizer is not None
    return len(engine.tokenizer.encode(text)) // engine.spec.layout.page_size


def test_lru_cache() -> None:
    cache = LRUCache(2)
    cache["a"] = [1]
    cache["b"] = np.zeros(2**17)
    assert cache["a"] == [1]
    cache["c"] = 3
    assert "b" not in cache
    with pytest.raises(KeyError):
        cache["b"]
    assert cache.hit_rate == 0.5
    del cache["c"]
    with pytest.raises(KeyError):
        del cache["c"]
    small = LRUCache(100, max_memory_mb=1)
    small["x"], small["y"] = np.zeros(2**16), np.zeros(2**16)
    small["z"] = np.zeros(8)
    assert (list(small), small.memory_usage_mb < 1) == (["y", "z"], True)
    with pytest.raises(ConfigError, match="cache_size is -1; it must be a whole number of at least 0"):
        LRUCache(-1)


def test_concepts_by_words_and_by_an_encoder() -> None:
    cache = ConceptCache(2)
    cache["how to bake bread"] = "bread"
    cache["orbit of the moon"] = "moon"
    first, *rest = cache.match("The moon's orbit, please")
    assert (first.concept, first.pattern, rest) == ("orbit of the moon", "moon", [])
    cache["sourdough bread"] = "sourdough"  # the least recently used one goes
    assert [match.pattern for match in cache.match("bread")] == ["sourdough"]
    del cache["sourdough bread"]
    assert cache.match("bread") == []
    vowels = ConceptCache(encoder=lambda text: [text.count(letter) for letter in "aeiou"])
    vowels["banana"], vowels["kiwi"] = 1, 2
    assert [(match.pattern, round(match.score, 3)) for match in vowels.match("panama", k=1)] == [(1, 1.0)]


def test_contexts_with_the_same_beginning() -> None:
    cache = ContextCache()
    a, b, c = (cache.note(text) for text in ("the cat sat", "the cat ran", "a dog"))
    assert cache.note("the cat sat") == a
    assert cache[a].uses == 2
    assert cache.similar(b) == [a]
    assert cache.similar(c) == []
    assert cache.similar("unknown") == []


def test_alone() -> None:
    cache = MemoryCache(cache_size=2)
    assert cache.preload({"good morning": "greeting", "good night": "farewell"}) == 2
    cache.semantic_cache["morning"] = "a time of day"
    found = cache.get_cached_patterns(cache.context_hash("good morning"))
    assert found
    assert (found.pattern, found.cached_tokens) == ("greeting", 0)
    assert [match.pattern for match in found.concepts] == ["a time of day"]
    assert found.similar == [cache.context_hash("good night")]
    assert not cache.get_cached_patterns(cache.context_hash("good day"))
    assert (cache.hit_rate, len(cache.episodic_cache)) == (0.5, 2)
    assert cache.memory_usage_mb > 0
    with pytest.raises(ConfigError, match="texts is a list; without an engine, expected a mapping"):
        cache.preload(["text"])
    with pytest.raises(ConfigError, match=r"no engine; create it with one: MemoryCache\(1000, engine\)"):
        cache.refresh_when_idle()
    cache.invalidate()
    assert (len(cache.episodic_cache), len(cache.context_cache)) == (0, 0)


def test_an_engines_pages_are_the_episodes(engine: InferenceEngine) -> None:
    cache = MemoryCache(engine=engine)
    pages = pages_of(engine, TEXTS[0])
    assert cache.preload(TEXTS[:1]) == pages * engine.spec.layout.page_size > 0
    assert len(cache.episodic_cache) == pages
    assert TEXTS[0] in cache.episodic_cache  # type: ignore[operator]
    assert TEXTS[1] not in cache.episodic_cache  # type: ignore[operator]
    assert cache.memory_usage_mb == pytest.approx(pages * cache.page_bytes / 2**20)
    cache.semantic_cache["word3 and word4"] = "small numbers"
    found = cache.get_cached_patterns(cache.context_hash(TEXTS[0]))
    assert (found.cached_tokens, found.pattern) == (pages * cache.page_size, None)
    assert [match.pattern for match in found.concepts] == ["small numbers"]
    before = engine.stats().cached_tokens
    engine.generate(TEXTS[0] + " and then", max_new_tokens=1)
    assert engine.stats().cached_tokens - before >= (pages - 1) * cache.page_size
    cache.invalidate()
    assert (len(cache.episodic_cache), TEXTS[0] in cache.episodic_cache) == (0, False)  # type: ignore[operator]


@pytest.mark.parametrize("half_life", [1000, 0])
def test_what_is_asked_for_often_survives_many_single_texts(engine: InferenceEngine, half_life: float) -> None:
    pages = pages_of(engine, TEXTS[0])
    cache = MemoryCache(3 * pages, engine, half_life=half_life)
    for _ in range(4):
        engine.generate(TEXTS[0], max_new_tokens=1)
    for text in TEXTS[1:]:
        engine.generate(text, max_new_tokens=1)
    assert len(cache.episodic_cache) <= 3 * pages
    assert (TEXTS[0] in cache.episodic_cache) == (half_life > 0)  # type: ignore[operator]


def test_what_was_dropped_is_read_again_in_idle_time(engine: InferenceEngine) -> None:
    pages = pages_of(engine, TEXTS[0])
    cache = MemoryCache(3 * pages, engine, half_life=0)
    cache.preload(TEXTS[:1])
    cache.note(TEXTS[0])  # twice by now
    for text in TEXTS[1:]:
        engine.generate(text, max_new_tokens=1)
    assert TEXTS[0] not in cache.episodic_cache  # type: ignore[operator]
    cache.refresh_when_idle(after=0.05)
    end = time.monotonic() + 60
    while TEXTS[0] not in cache.episodic_cache and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.01)
    cache.stop_refreshing()
    assert TEXTS[0] in cache.episodic_cache  # type: ignore[operator]
    assert cache.refresh() == 0  # nothing else came twice


def test_an_automatic_size_follows_free_memory(engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = pages_of(engine, TEXTS[0])
    free = [8 * 5 * pages * engine.spec.layout.page_bytes]
    monkeypatch.setattr("mnemos.compat.memory_cache.free_memory", lambda: free[0])
    cache = MemoryCache(None, engine)
    tree = engine._thread.prefix_tree()
    assert tree.limit == 5 * pages
    cache.preload(TEXTS)
    assert len(cache.episodic_cache) <= 5 * pages
    free[0] = 0
    cache.refresh()
    assert len(cache.episodic_cache) <= pages
    alone = MemoryCache(None)
    alone.preload({"text": np.zeros(100)})
    assert len(alone.episodic_cache) == 0


def test_prompts_of_an_optimized_engine_are_its_contexts(smollm2: Path) -> None:
    with OptimizedInferenceEngine(smollm2, cache_size=100, cache_tokens=8192) as engine:
        cache = engine.memory_cache
        engine.generate_response(TEXTS[0], max_length=None, max_new_tokens=1)
        engine.generate(TEXTS[1], max_new_tokens=1, cache_salt="private")
        assert len(cache.context_cache) == 1
        found = cache.get_cached_patterns(cache.context_hash(TEXTS[0]))
        assert found.cached_tokens == pages_of(engine, TEXTS[0]) * cache.page_size
        assert not cache.get_cached_patterns(cache.context_hash(TEXTS[1]))
        assert (cache.sliding_window, cache is engine.memory_cache) == (0, True)


def test_texts_that_an_engine_keeps_are_ranked_beside_concepts(smollm2: Path, tmp_path: Path) -> None:
    with InferenceEngine.from_pretrained(smollm2, cache_tokens=1024, session_dir=tmp_path) as engine:
        cache = MemoryCache(engine=engine)
        engine.memory.add("The shop opens at nine on Mondays.", "hours")
        cache.semantic_cache["closing time"] = "at six"
        assert [(one.concept, one.pattern) for one in cache.semantic_cache.match("When does the shop open?")] == [
            ("hours", "The shop opens at nine on Mondays.")
        ]
        patterns = [one.pattern for one in cache.semantic_cache.match("closing time of the shop", k=2)]
        assert patterns == ["at six", "The shop opens at nine on Mondays."]
        assert cache.semantic_cache.match("quantum") == cache.semantic_cache.match("shop", k=0) == []


def test_kept_answers_are_counted_and_forgotten(smollm2: Path, tmp_path: Path) -> None:
    options = {"cache_tokens": 1024, "response_cache": 10, "session_dir": tmp_path}
    with OptimizedInferenceEngine(smollm2, **options) as engine:  # type: ignore[arg-type]
        cache = engine.memory_cache
        for length in (2, 3, 3):
            engine.generate(TEXTS[0], max_new_tokens=length)
        key = cache.context_hash(TEXTS[0])
        assert cache.get_cached_patterns(key).answers == 2
        cache.invalidate()
        cache.note(TEXTS[0])
        assert cache.get_cached_patterns(key).answers == 0
