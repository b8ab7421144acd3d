"""Stored pages on their way into the cache: which are taken, and what happens to the others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mnemos.contract import KVLayout, Recall
from mnemos.errors import CapacityError
from mnemos.memory import session_pages
from mnemos.memory.pages import PagePool
from mnemos.memory.prefix import PrefixTree
from mnemos.memory.session_file import SessionFile
from mnemos.memory.session_pages import Claim, Content, adopt, claim, collect, fill, missing
from mnemos.memory.session_records import Binding, StoredPage, Turn

SIZE, LENGTH = 4, 10  # positions in a page, and pages of the text
TEXT = list(range(SIZE * LENGTH))
LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=1, page_size=SIZE)
RECALL = Recall(window=4, recall=4, sinks=0, heads=((0,),), components=(0,))


def stored(number: int) -> bytes:
    return bytes([number + 1] * 6)


class ToyCache:
    """Pages as arrays."""

    def __init__(self, pages: int) -> None:
        self.layout = LAYOUT
        self.pages = (pages,)
        self.contents: dict[int, bytes] = {}

    def copy(self, sources: object, targets: object, group: int = 0) -> None:
        raise AssertionError("nothing is copied")

    def read(self, page: int, group: int = 0) -> Content:
        return np.frombuffer(self.contents[page], np.uint8)

    def write(self, page: int, content: Content, group: int = 0) -> None:
        self.contents[page] = content.tobytes()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SessionFile]:
    opened = SessionFile(tmp_path / "one", Binding("toy", "print", {}, [6], SIZE), "one")
    opened.append(Turn(0, TEXT), [StoredPage(0, number, stored(number)) for number in range(LENGTH)])
    yield opened
    opened.close()


def made(pages: int) -> tuple[PrefixTree, PagePool, ToyCache]:
    pool = PagePool(pages)
    return PrefixTree([pool], SIZE), pool, ToyCache(pages)


def claimed_in(tree: PrefixTree, cache: ToyCache) -> Claim:
    return claim(tree, cache, None, TEXT, missing(tree, None, TEXT, LENGTH))


def check_cached(tree: PrefixTree, pool: PagePool, cache: ToyCache, length: int) -> None:
    """The tree has the text's first pages, with their contents, and nothing else is in use."""
    pages = tree.match(None, TEXT).pages[0]
    assert [cache.contents[page] for page in pages] == [stored(number) for number in range(length)]
    assert (pool.used, pool.reclaimable) == (length, length)


def test_pages_are_brought_into_the_cache(file: SessionFile) -> None:
    tree, pool, cache = made(LENGTH)
    claimed = claimed_in(tree, cache)
    assert (len(claimed.pages), pool.used, len(tree)) == (LENGTH, LENGTH, 0)  # nobody finds them yet
    assert fill(claimed, file, cache.write) == LENGTH
    adopt(tree, cache, None, TEXT, claimed, LENGTH)
    check_cached(tree, pool, cache, LENGTH)
    assert collect(tree, cache, None, TEXT, file.keys) == []


def test_threads_share_the_work(file: SessionFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_pages, "_THREADS", 4)
    monkeypatch.setattr(session_pages, "_PIECE", 6)
    cache, count = ToyCache(2000), 2000
    claimed = Claim([(0, number % LENGTH) for number in range(count)], list(range(count)), [], None)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that they get in each other's way
    try:
        assert fill(claimed, file, cache.write) == count
    finally:
        sys.setswitchinterval(interval)
    assert cache.contents == {number: stored(number % LENGTH) for number in range(count)}


def test_a_cache_with_less_room_takes_the_first_ones(file: SessionFile) -> None:
    tree, pool, cache = made(6)
    used, unused = pool.allocate(), pool.allocate()
    tree.insert(None, [90] * SIZE, [([unused], 0)])
    pool.release([unused])
    claimed = claimed_in(tree, cache)
    assert claimed.keys == [(0, number) for number in range(5)]
    adopt(tree, cache, None, TEXT, claimed, fill(claimed, file, cache.write))
    pool.release([used])
    check_cached(tree, pool, cache, 5)


def test_what_follows_a_damaged_page_is_left_out(file: SessionFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_pages, "_PIECE", 12)
    whole = file.path.read_bytes()
    at = whole.index(stored(6))
    with file.path.open("r+b") as content:
        content.seek(at + 2)
        content.write(b"?")
    tree, pool, cache = made(LENGTH)
    claimed = claimed_in(tree, cache)
    filled = fill(claimed, file, cache.write)
    assert filled == 6 and (0, 6) not in file.keys
    adopt(tree, cache, None, TEXT, claimed, filled)
    check_cached(tree, pool, cache, 6)


def test_an_error_of_any_thread_is_the_callers(file: SessionFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_pages, "_THREADS", 3)
    monkeypatch.setattr(session_pages, "_PIECE", 6)
    tree, pool, cache = made(LENGTH)
    claimed = claimed_in(tree, cache)

    def write(page: int, content: Content, group: int) -> None:
        if content[0] == 8:
            raise CapacityError("no room")
        cache.write(page, content, group)

    with pytest.raises(CapacityError, match="no room"):
        fill(claimed, file, write)
    adopt(tree, cache, None, TEXT, claimed, 0)
    assert (pool.used, len(tree)) == (0, 0)


def test_pages_that_another_request_has_read_meanwhile_stay(file: SessionFile) -> None:
    tree, pool, cache = made(2 * LENGTH)
    claimed = claimed_in(tree, cache)
    own = [pool.allocate() for _ in range(3)]
    for number, page in enumerate(own):
        cache.contents[page] = stored(number)
    tree.insert(None, TEXT[: 3 * SIZE], [(own, 0)])
    pool.release(own)
    adopt(tree, cache, None, TEXT, claimed, fill(claimed, file, cache.write))
    assert tree.match(None, TEXT).pages[0][:3] == own
    check_cached(tree, pool, cache, LENGTH)


def test_pages_before_them_stay_until_they_are_there(file: SessionFile) -> None:
    tree, pool, cache = made(2 * LENGTH)
    own = [pool.allocate() for _ in range(3)]
    for number, page in enumerate(own):
        cache.contents[page] = stored(number)
    tree.insert(None, TEXT[: 3 * SIZE], [(own, 0)])
    pool.release(own)
    claimed = claimed_in(tree, cache)
    assert claimed.keys[0] == (0, 3) and tree.evict(3) == 0
    adopt(tree, cache, None, TEXT, claimed, fill(claimed, file, cache.write))
    check_cached(tree, pool, cache, LENGTH)


def test_pages_without_the_index_that_others_have_by_now_are_not_used(file: SessionFile) -> None:
    tree, pool, cache = made(LENGTH)
    claimed = claimed_in(tree, cache)
    filled = fill(claimed, file, cache.write)
    cache.layout = replace(cache.layout, recall=RECALL)
    adopt(tree, cache, None, TEXT, claimed, filled)
    assert (pool.used, len(tree)) == (0, 0)
