"""Cached prefixes: a tree of full cache pages, compared token by token."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from mnemos.memory.pages import PagePool

Tokens = tuple[int, ...]


class Node:
    """One full page; a root has none. The path from the root spells the tokens of the prefix that ends with it."""

    __slots__ = ("children", "page", "parent", "salt", "tokens")

    def __init__(self, parent: Node | None, tokens: Tokens, page: int, salt: str | None) -> None:
        self.parent = parent
        self.tokens = tokens
        self.page = page
        self.salt = salt
        self.children: dict[Tokens, Node] = {}


class PrefixTree:
    """Full pages by the tokens that lead to them, one tree per salt.

    A child is found by its page's exact tokens (a dictionary compares keys after hashing them), so two texts never
    share a page by accident. The tree holds every page once; a page without other holders is evicted when room is
    needed, the least recently used first and children before their parents.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self.evicted = 0  # pages evicted so far
        self.limit: int | None = None  # the most pages to keep besides those in use
        self._roots: dict[str | None, Node] = {}
        # Least recently used first. A touched path is moved to the end leaf first, so that a node always comes after
        # its descendants and the first nodes are leaves.
        self._recency: OrderedDict[Node, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recency)

    def match(self, salt: str | None, tokens: Sequence[int], skip: int = 0) -> list[int]:
        """The pages of the longest cached prefix of `tokens`, without the first `skip` pages.

        The caller does not hold these pages yet: share them before anything else is allocated.
        """
        path = self._path(salt, tokens)
        self.touch(path)
        return [node.page for node in path[skip:]]

    def insert(self, salt: str | None, tokens: Sequence[int], pages: Sequence[int], skip: int = 0) -> None:
        """Adds the full pages that hold `tokens`, apart from the first `skip` ones, to the tree.

        Adds nothing if the tree no longer has those: the caller has freed them.

        If the tree already has a page for the same tokens that has no other holder, the caller's page replaces it:
        otherwise the content would be stored twice, and could not be evicted while the caller holds a page below it.
        """
        node = self.root(salt)
        path = []
        for index in range(min(len(tokens) // self.page_size, skip + len(pages))):
            key = tuple(tokens[index * self.page_size : (index + 1) * self.page_size])
            child = node.children.get(key)
            if child is None:
                if index < skip:
                    break
                child = self.attach(node, key, pages[index - skip])
            elif index >= skip and pages[index - skip] != child.page and self.pool.references[child.page] == 1:
                self.pool.uncache(child.page)
                child.page = pages[index - skip]
                self.pool.cache(child.page)
            path.append(child)
            node = child
        self.touch(path)
        if not self._roots[salt].children:
            del self._roots[salt]
        self.shrink()

    def root(self, salt: str | None) -> Node:
        """The root of a salt's texts."""
        node = self._roots.get(salt)
        if node is None:
            node = self._roots[salt] = Node(None, (), -1, salt)
        return node

    def attach(self, parent: Node, tokens: Tokens, page: int) -> Node:
        """A new node below `parent`; its path must be touched before anything is evicted."""
        node = parent.children[tokens] = Node(parent, tokens, page, parent.salt)
        self._recency[node] = None
        self.pool.cache(page)
        return node

    def touch(self, path: Sequence[Node]) -> None:
        """Marks these nodes, parents first, as the most recently used."""
        for node in reversed(path):
            self._recency.move_to_end(node)

    def evict(self, count: int) -> int:
        """Frees up to `count` pages that only the tree holds; returns how many were freed.

        A sequence that frees its first pages but keeps later ones must not block the first ones from eviction: the
        tree drops the later ones, which stay with the sequence.
        """
        victims = self._victims(count)
        if len(victims) < count and self._forget_stranded():
            victims = self._victims(count)
        for node in victims:
            self._remove(node)
            self.evicted += 1
        return len(victims)

    def restrict(self, limit: int) -> None:
        """Keeps at most `limit` pages besides those in use from now on."""
        self.limit = limit
        self.shrink()

    def shrink(self) -> None:
        """Drops unused pages beyond the limit."""
        if self.limit is not None and len(self) > self.limit:
            self.evict(len(self) - self.limit)

    def clear(self) -> None:
        """Drops everything; pages that sequences still hold stay with them."""
        for node in self._recency:
            self.pool.uncache(node.page)
        self._recency.clear()
        self._roots.clear()

    def nodes(self) -> Iterator[Node]:
        """All nodes, the least recently used first."""
        return iter(self._recency)

    def _path(self, salt: str | None, tokens: Sequence[int]) -> list[Node]:
        path: list[Node] = []
        node = self._roots.get(salt)
        size = self.page_size
        for start in range(0, len(tokens) - size + 1, size):
            node = node.children.get(tuple(tokens[start : start + size])) if node else None
            if node is None:
                break
            path.append(node)
        return path

    def _victims(self, count: int) -> list[Node]:
        """The least recently used nodes that only the tree holds and whose children are victims too."""
        references = self.pool.references
        victims: list[Node] = []
        doomed: dict[Node, int] = {}  # how many of a node's children are victims
        for node in self._recency:
            if len(victims) == count:
                break
            if references[node.page] == 1 and len(node.children) == doomed.get(node, 0):
                assert node.parent is not None
                victims.append(node)
                doomed[node.parent] = doomed.get(node.parent, 0) + 1
        return victims

    def _forget_stranded(self) -> int:
        """Drops pages in use that follow one held only by the tree; returns how many."""
        references = self.pool.references
        stranded = [node for node in self._recency if references[node.page] > 1 and self._follows_unused(node)]
        for node in stranded:  # children before their parents
            if not node.children:
                self._remove(node)
        return len(stranded)

    def _follows_unused(self, node: Node) -> bool:
        parent = node.parent
        while parent is not None and parent.parent is not None:
            if self.pool.references[parent.page] == 1:
                return True
            parent = parent.parent
        return False

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens]
        del self._recency[node]
        self.pool.uncache(node.page)
        if parent.parent is None and not parent.children:
            del self._roots[parent.salt]
