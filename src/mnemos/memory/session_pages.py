"""The cache pages of a session, from the prefix tree into its file and back.

These functions use the tree and the cache, which belong to the engine's thread: they are called there, between two
steps, and each moves few enough bytes for the steps of other requests not to wait long.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np

from mnemos.contract import Cache
from mnemos.memory.prefix import PrefixTree
from mnemos.memory.session_records import PageKey, StoredPage

MOST = 8 << 20  # bytes that are moved at once


def collect(
    tree: PrefixTree, cache: Cache, salt: str | None, tokens: Sequence[int], known: Container[PageKey]
) -> list[StoredPage]:
    """Copies of the pages that the tree holds for a text, without those that are known: at most MOST bytes."""
    found: list[StoredPage] = []
    size = 0
    for number, node in enumerate(tree.path(salt, tokens)):
        for group, page in enumerate(node.pages):
            if page is not None and (group, number) not in known:
                content = cache.read(page, group).tobytes()
                found.append(StoredPage(group, number, content))
                size += len(content)
        if size >= MOST:
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


def restore(
    tree: PrefixTree, cache: Cache, salt: str | None, tokens: Sequence[int], pages: Sequence[StoredPage]
) -> bool:
    """Puts pages that `missing` has named into the tree, in that order; False if there is no room for all.

    Unused pages of other texts make room for them.
    """
    size = tree.page_size
    nodes = tree.path(salt, tokens)
    held = [[page for node in nodes if (page := node.pages[group]) is not None] for group in range(len(tree.pools))]
    for pool, own in zip(tree.pools, held, strict=True):
        pool.share(own)
    try:
        for stored in pages:
            pool = tree.pools[stored.group]
            gap = stored.number - len(nodes)
            if gap > 0 and not tree.windows[0]:
                return False  # what comes before it has gone
            if not pool.free and not tree.evict(1, stored.group):
                return False
            while len(nodes) <= stored.number:
                key = tuple(tokens[len(nodes) * size : (len(nodes) + 1) * size])
                nodes.append(tree.grow(nodes[-1] if nodes else tree.root(salt), key))
            page = pool.allocate()
            held[stored.group].append(page)
            cache.write(page, np.frombuffer(stored.content, np.uint8), stored.group)
            tree.keep(nodes[stored.number], stored.group, page)
    finally:
        for pool, own in zip(tree.pools, held, strict=True):
            pool.release(own)
        tree.touch(nodes)
        tree.shrink()
    return True
