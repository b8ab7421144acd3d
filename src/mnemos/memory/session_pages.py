"""The cache pages of a session, from the prefix tree into its file and back.

Pages are read from the file in three steps: `claim` takes room for them, `fill` reads them, `adopt` makes them a part
of the cache. All functions but `fill` use the tree, which belongs to the engine's thread: they are called there,
between two steps, and take little enough time for other requests not to wait long.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mnemos.contract import Cache, Recall
from mnemos.memory.prefix import PrefixTree
from mnemos.memory.session_file import SessionFile
from mnemos.memory.session_records import PageKey, StoredPage

Content = npt.NDArray[np.uint8]
_MOST = 8 << 20  # bytes that `collect` copies at once
_PIECE = 4 << 20  # bytes that a thread reads at once
_THREADS = min(4, os.cpu_count() or 1)


def collect(
    tree: PrefixTree, cache: Cache, salt: str | None, tokens: Sequence[int], known: Container[PageKey]
) -> list[StoredPage]:
    """Copies of the pages that the tree holds for a text, without those that are known: at most _MOST bytes."""
    found: list[StoredPage] = []
    size = 0
    for number, node in enumerate(tree.path(salt, tokens)):
        for group, page in enumerate(node.pages):
            if page is not None and (group, number) not in known:
                content = cache.read(page, group).tobytes()
                found.append(StoredPage(group, number, content))
                size += len(content)
        if size >= _MOST:
            break
    return found


def usable(keys: Container[PageKey], tree: PrefixTree, most: int) -> int:
    """After how many pages of a text, at most `most`, it can be continued with the pages of these keys."""
    unlimited = [group for group, window in enumerate(tree.windows) if not window]
    reach = next((n for n in range(most) if any((group, n) not in keys for group in unlimited)), most)
    for end in range(reach, 0, -1):
        if all((group, n) in keys for group, first in enumerate(tree.firsts(end)) for n in range(first, end)):
            return end
    return 0


def missing(tree: PrefixTree, salt: str | None, tokens: Sequence[int], end: int) -> list[PageKey]:
    """The pages that a text's first `end` pages lack before it can be continued after them, in their order."""
    if tree.match(salt, tokens[: end * tree.page_size]).end == end:
        return []
    path = tree.path(salt, tokens)[:end]
    firsts = tree.firsts(end)
    return [
        (group, number)
        for number in range(end)
        for group, first in enumerate(firsts)
        if number >= first and (number >= len(path) or path[number].pages[group] is None)
    ]


@dataclass
class Claim:
    """Pages that nobody else uses, for the first of a text's pages that are missing.

    keys, pages  what is to come into which page
    held         for each layer group, these pages, and those that the text has in the cache already
    recall       of the cache when they were claimed
    """

    keys: list[PageKey]
    pages: list[int]
    held: list[list[int]]
    recall: Recall | None


def claim(tree: PrefixTree, cache: Cache, salt: str | None, tokens: Sequence[int], keys: Sequence[PageKey]) -> Claim:
    """Takes pages for what `missing` has named, in that order, as far as there is room; give them to `adopt`.

    Unused pages of other texts make room for them.
    """
    nodes = tree.path(salt, tokens)
    held = [[page for node in nodes if (page := node.pages[group]) is not None] for group in range(len(tree.pools))]
    claimed = Claim([], [], held, cache.layout.recall)
    wanted = Counter(group for group, _ in keys)
    for group, (pool, own) in enumerate(zip(tree.pools, held, strict=True)):
        pool.share(own)
        if wanted[group] > pool.free:
            tree.evict(wanted[group] - pool.free, group)
    for group, number in keys:
        if not tree.pools[group].free:
            break
        page = tree.pools[group].allocate()
        held[group].append(page)
        claimed.keys.append((group, number))
        claimed.pages.append(page)
    return claimed


def fill(claimed: Claim, file: SessionFile, write: Callable[[int, Content, int], None]) -> int:
    """Reads stored pages into those that were claimed; returns how many, up to one that is damaged.

    write: that of the cache, for any thread. Several threads share the work, since most of it is waiting: for the disk,
    and for the system to hand out memory that is touched for the first time.
    """
    pieces = deque(_pieces([file.binding.page_bytes[group] for group, _ in claimed.keys]))
    damaged: list[int] = []  # lists and deques, since each change of one is whole before another thread sees it
    failures: list[BaseException] = []

    def next_piece() -> range:
        try:
            return range(0) if failures else pieces.popleft()
        except IndexError:
            return range(0)

    def work() -> None:
        buffer = memoryview(bytearray(max(file.binding.page_bytes)))
        try:
            while piece := next_piece():
                for index in piece:
                    key = claimed.keys[index]
                    content = file.page(key, buffer)
                    if content is None:
                        damaged.append(index)
                        return
                    write(claimed.pages[index], np.frombuffer(content, np.uint8), key[0])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, name="mnemos-pages") for _ in range(_THREADS - 1)]
    try:
        for thread in threads:
            thread.start()
        work()
    except BaseException as error:
        failures.append(error)
    for thread in threads:
        while thread.is_alive():  # also when interrupted: they write to pages that are about to be given back
            try:
                thread.join()
            except BaseException as error:
                failures.append(error)
    if failures:
        raise failures[0]
    return min(damaged, default=len(claimed.keys))


def adopt(tree: PrefixTree, cache: Cache, salt: str | None, tokens: Sequence[int], claimed: Claim, filled: int) -> None:
    """Puts the first `filled` of the pages that were claimed for a text into the tree, and gives back all others."""
    size = tree.page_size
    nodes = tree.path(salt, tokens)
    if cache.layout.recall != claimed.recall:  # they lack the index that the cache has by now
        filled = 0
    for (group, number), page in zip(claimed.keys[:filled], claimed.pages[:filled], strict=True):
        if number > len(nodes) and not tree.windows[0]:
            break  # what comes before it has gone
        while len(nodes) <= number:
            key = tuple(tokens[len(nodes) * size : (len(nodes) + 1) * size])
            nodes.append(tree.grow(nodes[-1] if nodes else tree.root(salt), key))
        if nodes[number].pages[group] is None:  # else another request has read it meanwhile
            tree.keep(nodes[number], group, page)
    for pool, own in zip(tree.pools, claimed.held, strict=True):
        pool.release(own)
    tree.touch(nodes)
    tree.shrink()


def _pieces(sizes: Sequence[int]) -> Iterator[range]:
    """Numbers of pages of these sizes, in pieces that are large enough to have large pages of memory of their own."""
    begin = total = 0
    for number, size in enumerate(sizes, 1):
        total += size
        if total >= _PIECE or number == len(sizes):
            yield range(begin, number)
            begin, total = number, 0
