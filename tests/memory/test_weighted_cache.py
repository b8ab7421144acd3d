"""The cache of values that drops what is used least, compared with the policy's definition."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mnemos.memory.weighted_cache import WeightedCache, size_of


def test_the_least_recently_used_goes_first() -> None:
    cache: WeightedCache[int] = WeightedCache(2)
    assert cache.put("a", 1) == []
    cache.put("b", 2)
    assert cache.get("a") == 1
    assert cache.put("c", 3) == ["b"]
    assert (cache.get("b"), cache.peek("c"), list(cache)) == (None, 3, ["a", "c"])
    assert (cache.hits, cache.misses, cache.dropped) == (1, 1, 1)


def test_what_was_used_often_survives_a_scan_and_is_forgotten_in_the_end() -> None:
    cache: WeightedCache[int] = WeightedCache(10, half_life=20)
    cache.put("often", 0)
    for _ in range(8):
        cache.get("often")
    for number in range(50):
        cache.put(f"once {number}", number)
    assert "often" in cache
    for number in range(200):
        cache.put(f"later {number}", number)
    assert "often" not in cache


@pytest.mark.parametrize("half_life", [3.0, 17.0])
def test_the_order_is_that_of_the_decayed_numbers_of_uses(half_life: float) -> None:
    generator = random.Random(int(half_life))
    cache: WeightedCache[int] = WeightedCache(6, half_life=half_life)
    uses: dict[str, list[int]] = {}
    for time in range(1, 400):
        name = f"n{min(generator.randrange(12), generator.randrange(12))}"
        if name in cache:
            cache.get(name)
        elif len(cache) == 6:
            weights = {held: sum(2 ** ((use - time) / half_life) for use in uses[held]) for held in cache}
            weights[name] = 1.0
            dropped = cache.put(name, time)
            assert weights[dropped[0]] == pytest.approx(min(weights.values()))
            uses.pop(dropped[0], None)
            if dropped[0] == name:
                continue
        else:
            cache.put(name, time)
        uses.setdefault(name, []).append(time)
        assert len(cache) <= 6


def test_bytes_are_limited() -> None:
    cache: WeightedCache[np.ndarray] = WeightedCache(100, most_bytes=1000)
    for name in "abc":
        cache.put(name, np.zeros(50))
    assert (list(cache), cache.bytes) == (["b", "c"], 800)
    cache.put("b", np.zeros(5))
    assert cache.bytes == 440
    assert cache.put("d", np.zeros(200)) == ["d"]  # too large by itself: nothing else goes
    assert list(cache) == ["c", "b"]
    cache.most_bytes = 50
    assert cache.shrink() == ["c"]
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_sizes() -> None:
    assert size_of(np.zeros((3, 4), dtype=np.float32)) == 48
    assert size_of([np.zeros(100), "x" * 50]) > 850
    assert size_of({"a": np.zeros(100)}) > 800
