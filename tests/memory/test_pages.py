"""The page pool: reference counts that never leak."""

from __future__ import annotations

from mnemos.memory.pages import PagePool


def test_low_pages_are_given_out_first() -> None:
    pool = PagePool(4)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    assert (pool.free, pool.used) == (1, 3)


def test_a_page_is_free_when_its_last_holder_lets_go() -> None:
    pool = PagePool(2)
    page = pool.allocate()
    pool.share([page])
    assert pool.is_shared(page)
    pool.release([page])
    assert not pool.is_shared(page)
    assert pool.free == 1
    pool.release([page])
    assert pool.free == 2


def test_a_cached_page_is_reclaimable_while_only_the_cache_holds_it() -> None:
    pool = PagePool(2)
    page = pool.allocate()
    pool.cache(page)
    assert pool.reclaimable == 0
    pool.release([page])
    assert (pool.reclaimable, pool.free) == (1, 1)
    pool.share([page])
    assert pool.reclaimable == 0
    pool.release([page])
    pool.uncache(page)
    assert (pool.reclaimable, pool.free) == (0, 2)


def test_a_page_in_use_outlives_its_place_in_the_cache() -> None:
    pool = PagePool(1)
    page = pool.allocate()
    pool.cache(page)
    pool.uncache(page)
    assert pool.references[page] == 1
    pool.release([page])
    assert pool.free == 1
