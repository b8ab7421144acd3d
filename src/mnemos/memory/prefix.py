"""Cached prefixes: a tree of full cache pages, compared token by token."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from mnemos.memory.pages import PagePool

Tokens = tuple[int, ...]
_MOST_USES = 15  # that count: a page that nobody asks for any more is spared four times at most


class Node:
    """The tokens of one full page; a root has none. The path from the root spells the prefix that ends with it.

    pages  the page that the tree holds for these tokens in each layer group, None where it holds none
    ended  a prompt has ended here
    uses   how often a text was found to begin with it, halved whenever it was spared for that; see `weighted`
    """

    __slots__ = ("children", "ended", "pages", "parent", "salt", "tokens", "uses")

    def __init__(self, parent: Node | None, tokens: Tokens, salt: str | None, groups: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.salt = salt
        self.pages: list[int | None] = [None] * groups
        self.ended = False
        self.uses = 0
        self.children: dict[Tokens, Node] = {}


class Match(NamedTuple):
    """The longest cached prefix that a sequence can continue from.

    end    its length in pages
    pages  for each layer group, the last of its pages, as many as the next position sees
    """

    end: int
    pages: list[list[int]]


class PrefixTree:
    """Full pages by the tokens that lead to them, one tree per salt.

    A child is found by its page's exact tokens (a dictionary compares keys after hashing them), so two texts never
    share a page by accident. The tree holds every page once; a page without other holders is evicted when room is
    needed, the least recently used first and, in a group without a window, children before their parents.

    In a group with a window, a text can continue from the end of a page if the pages within the window before it are
    there. The tree holds those before the end of each text, before the last prompt's end on its path, and before places
    where texts part, always with one page more; others it gives back, as their sequences do when they move on.

    windows: of the layer groups, see KVLayout.groups; a group without one is the first.
    """

    def __init__(self, pools: Sequence[PagePool], page_size: int, windows: Sequence[int] = (0,)) -> None:
        self.pools = pools
        self.page_size = page_size
        self.windows = windows
        self.held = [0] * len(pools)  # the number of pages that the tree holds in each group
        self.evicted = 0  # pages evicted so far
        self.limit: int | None = None  # the most pages of the first group to keep besides those in use
        # Whether pages that were found often are spared by eviction, half as often each time (generalized CLOCK).
        self.weighted = False
        self._roots: dict[str | None, Node] = {}
        # Least recently used first. A touched path is moved to the end leaf first, so that a node always comes after
        # its descendants and the first nodes are leaves.
        self._recency: OrderedDict[Node, None] = OrderedDict()

    def __len__(self) -> int:
        return self.held[0]

    def match(self, salt: str | None, tokens: Sequence[int], skip: int = 0) -> Match:
        """The longest cached prefix of `tokens` to continue from, if it is longer than the first `skip` pages.

        The caller has what a position after those sees, and the match has pages after them only. The caller does not
        hold these yet: share them before anything else is allocated.
        """
        path = self.path(salt, tokens)
        end = self._usable(path, skip)
        self.touch(path[:end])
        if self.weighted:
            for node in path[:end]:
                node.uses = min(node.uses + 1, _MOST_USES)
        firsts = [max(skip, first) for first in self.firsts(end)]
        return Match(end, [_held(path[first:end], group) for group, first in enumerate(firsts)])

    def covered(self, salt: str | None, tokens: Sequence[int]) -> int:
        """How many pages of a text it could continue after; that does not count as a use."""
        return self._usable(self.path(salt, tokens), 0)

    def insert(
        self,
        salt: str | None,
        tokens: Sequence[int],
        held: Sequence[tuple[Sequence[int], int]],
        ended: bool = False,
    ) -> None:
        """Adds the full pages that hold `tokens` to the tree.

        held: for each layer group, the caller's pages and how many pages of the text it lacks before them.
        ended: a prompt ends here; see the class.

        If the tree already has a page for the same tokens that has no other holder, the caller's page replaces it:
        otherwise the content would be stored twice, and could not be evicted while the caller holds a page below it.
        """
        size = self.page_size
        node = self.root(salt)
        path = []
        for index in range(min(len(tokens) // size, held[0][1] + len(held[0][0]))):
            key = tuple(tokens[index * size : (index + 1) * size])
            node = node.children.get(key) or self.grow(node, key)
            path.append(node)
        self._mark(path, ended)
        for group, (pages, skip) in enumerate(held):
            self._hold(path, group, pages, skip)
        self.touch(path)
        self._prune(node)
        self.shrink()

    def root(self, salt: str | None) -> Node:
        """The root of a salt's texts."""
        node = self._roots.get(salt)
        if node is None:
            node = self._roots[salt] = Node(None, (), salt, len(self.pools))
        return node

    def attach(self, parent: Node, tokens: Tokens, pages: Sequence[int | None]) -> Node:
        """A new node below `parent` with a page for each group; touch its path before anything is evicted."""
        node = self.grow(parent, tokens)
        for group, page in enumerate(pages):
            if page is not None:
                self.keep(node, group, page)
        return node

    def touch(self, path: Sequence[Node]) -> None:
        """Marks these nodes, parents first, as the most recently used."""
        for node in reversed(path):
            self._recency.move_to_end(node)

    def evict(self, count: int, group: int = 0) -> int:
        """Frees up to `count` pages of a group that only the tree holds; returns how many were freed.

        A sequence that frees its first pages but keeps later ones must not block the first ones from eviction: the
        tree drops the later ones, which stay with the sequence.
        """
        if self.windows[group]:
            return self._evict_window(count, group)
        victims = self._seldom_used(count)
        if len(victims) < count and self._forget_stranded():
            victims = self._seldom_used(count)
        for node in victims:
            self._remove(node)
        self.evicted += len(victims)
        return len(victims)

    def restrict(self, limit: int, weighted: bool = False) -> None:
        """Keeps at most `limit` pages besides those in use from now on; `weighted`: see the attribute."""
        self.limit, self.weighted = limit, weighted
        self.shrink()

    def shrink(self) -> None:
        """Drops unused pages beyond the limit."""
        if self.limit is not None and len(self) > self.limit:
            self.evict(len(self) - self.limit)

    def firsts(self, end: int) -> list[int]:
        """For each layer group, the first page that the position after a text's first `end` pages sees."""
        return [self._first_seen(group, end) for group in range(len(self.pools))]

    def forget(self, salt: str | None, tokens: Sequence[int], keep: int = 0) -> None:
        """Drops the pages of a text from its end to where another text parts from it, or to its first `keep` pages."""
        for node in reversed(self.path(salt, tokens)[keep:]):
            if node in self._recency:  # not gone with its only child
                if node.children:
                    return
                self._remove(node)

    def clear(self) -> None:
        """Drops everything; pages that sequences still hold stay with them."""
        for node in self._recency:
            for group in range(len(self.pools)):
                self._drop(node, group)
        self._recency.clear()
        self._roots.clear()

    def nodes(self) -> Iterator[Node]:
        """All nodes, the least recently used first."""
        return iter(self._recency)

    def path(self, salt: str | None, tokens: Sequence[int]) -> list[Node]:
        """The nodes of a text's full pages, as far as there are any."""
        path: list[Node] = []
        node = self._roots.get(salt)
        size = self.page_size
        for start in range(0, len(tokens) - size + 1, size):
            node = node.children.get(tuple(tokens[start : start + size])) if node else None
            if node is None:
                break
            path.append(node)
        return path

    def _first_seen(self, group: int, end: int) -> int:
        """The first page of a group that the position after the first `end` pages sees."""
        window = self.windows[group]
        return max(0, end * self.page_size - window + 1) // self.page_size if window else 0

    def _usable(self, path: Sequence[Node], skip: int) -> int:
        """After how many of a path's pages a sequence can continue, at least `skip`."""
        sliding = [group for group, window in enumerate(self.windows) if window]
        if not sliding:
            return max(len(path), skip)
        usable = skip
        begins = dict.fromkeys(sliding, skip)  # where each group's unbroken run of pages begins
        for index, node in enumerate(path[skip:], skip):
            for group in sliding:
                if node.pages[group] is None:
                    begins[group] = index + 1
            if all(begin <= max(skip, self._first_seen(group, index + 1)) for group, begin in begins.items()):
                usable = index + 1
        return usable

    def grow(self, parent: Node, tokens: Tokens) -> Node:
        """A new node below `parent` without pages; in a tree whose first group has no window, give it one of that."""
        node = parent.children[tokens] = Node(parent, tokens, parent.salt, len(self.pools))
        self._recency[node] = None
        return node

    def _mark(self, path: Sequence[Node], ended: bool) -> None:
        """Leaves one prompt's end on a path, the last."""
        if ended and path:
            path[-1].ended = True
        for node in [node for node in path if node.ended][:-1]:
            node.ended = False

    def _hold(self, path: Sequence[Node], group: int, pages: Sequence[int], skip: int) -> None:
        """Holds the pages of a group that texts can continue with, and gives back those that they cannot."""
        window, references = self.windows[group], self.pools[group].references
        wanted = len(path) if window else 0  # the first page, of those up to the present one, that is
        for index in range(len(path) - 1, -1, -1):
            node = path[index]
            if window and (index == len(path) - 1 or node.ended or len(node.children) > 1):
                wanted = self._first_seen(group, index + 1) - 1
            known = node.pages[group]
            if index < wanted:
                self._drop(node, group)
            elif skip <= index < skip + len(pages) and (known is None or references[known] == 1):
                own = pages[index - skip]
                if own != known:
                    self._drop(node, group)
                    self.keep(node, group, own)

    def keep(self, node: Node, group: int, page: int) -> None:
        """Holds a page, which its caller holds too, for a node that has none in the group."""
        self.pools[group].cache(page)
        self.held[group] += 1
        node.pages[group] = page

    def _drop(self, node: Node, group: int) -> None:
        page = node.pages[group]
        if page is not None:
            self.pools[group].uncache(page)
            self.held[group] -= 1
            node.pages[group] = None

    def _evict_window(self, count: int, group: int) -> int:
        references = self.pools[group].references
        held = ((node, node.pages[group]) for node in self._recency)
        unused = list(islice((node for node, page in held if page is not None and references[page] == 1), count))
        for node in unused:
            self._drop(node, group)
            self._prune(node)
        self.evicted += len(unused)
        return len(unused)

    def _seldom_used(self, count: int) -> list[Node]:
        """`_victims`, after those that were found often have been spared."""
        victims = self._victims(count)
        while spared := [node for node in victims if node.uses] if self.weighted else []:
            for node in spared:
                node.uses //= 2
                path = [node]
                while (parent := path[0].parent) is not None and parent.parent is not None:
                    path.insert(0, parent)
                self.touch(path)
            victims = self._victims(count)
        return victims

    def _victims(self, count: int) -> list[Node]:
        """The least recently used nodes that only the tree holds and whose children are victims too."""
        references = self.pools[0].references
        victims: list[Node] = []
        doomed: dict[Node, int] = {}  # how many of a node's children are victims
        for node in self._recency:
            if len(victims) == count:
                break
            page = node.pages[0]
            assert page is not None and node.parent is not None
            if references[page] == 1 and len(node.children) == doomed.get(node, 0):
                victims.append(node)
                doomed[node.parent] = doomed.get(node.parent, 0) + 1
        return victims

    def _forget_stranded(self) -> int:
        """Drops pages in use that follow one held only by the tree; returns how many."""
        references = self.pools[0].references
        in_use = [node for node in self._recency if (page := node.pages[0]) is not None and references[page] > 1]
        stranded = [node for node in in_use if self._follows_unused(node)]
        for node in stranded:  # children before their parents
            if not node.children:
                self._remove(node)
        return len(stranded)

    def _follows_unused(self, node: Node) -> bool:
        parent = node.parent
        while parent is not None and parent.parent is not None:
            page = parent.pages[0]
            if page is not None and self.pools[0].references[page] == 1:
                return True
            parent = parent.parent
        return False

    def _remove(self, node: Node) -> None:
        """Removes a leaf, and its parents as far as they hold nothing."""
        for group in range(len(self.pools)):
            self._drop(node, group)
        self._prune(node)

    def _prune(self, node: Node) -> None:
        """Removes a node that holds no page and leads to none, and its parents likewise."""
        while not node.children and not any(page is not None for page in node.pages):
            parent = node.parent
            if parent is None:
                self._roots.pop(node.salt, None)
                return
            del parent.children[node.tokens]
            del self._recency[node]
            node = parent


def _held(path: Sequence[Node], group: int) -> list[int]:
    return [page for node in path if (page := node.pages[group]) is not None]
