"""The prefix tree against a simple model of it: a set of texts."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mnemos.memory.pages import PagePool
from mnemos.memory.prefix import PrefixTree

SIZE = 2
texts = st.lists(st.integers(0, 2), max_size=9)
salts = st.sampled_from([None, "a"])


def fill(pool: PagePool, tree: PrefixTree, salt: str | None, tokens: list[int]) -> None:
    pages = [pool.allocate() for _ in range(len(tokens) // SIZE)]
    tree.insert(salt, tokens, pages)
    pool.release(pages)


def test_only_whole_pages_of_the_same_tokens_and_salt_match() -> None:
    pool = PagePool(8)
    tree = PrefixTree(pool, SIZE)
    fill(pool, tree, None, [1, 2, 3, 4, 5])
    assert len(tree.match(None, [1, 2, 3, 4, 5, 6])) == 2
    assert len(tree.match(None, [1, 2, 3, 9])) == 1
    assert tree.match(None, [1]) == []
    assert tree.match("other", [1, 2, 3, 4]) == []
    assert tree.match(None, [1, 2, 3, 4], skip=1) == tree.match(None, [1, 2, 3, 4])[1:]


def test_the_least_recently_used_leaf_goes_first_and_its_parent_after_it() -> None:
    pool = PagePool(8)
    tree = PrefixTree(pool, SIZE)
    fill(pool, tree, None, [1, 1, 2, 2])
    fill(pool, tree, None, [1, 1, 3, 3])
    tree.match(None, [1, 1, 2, 2])
    assert tree.evict(1) == 1
    assert len(tree.match(None, [1, 1, 3, 3])) == 1
    assert len(tree.match(None, [1, 1, 2, 2])) == 2
    assert tree.evict(5) == 2
    assert (len(tree), pool.free) == (0, 8)


def test_pages_in_use_stay() -> None:
    pool = PagePool(4)
    tree = PrefixTree(pool, SIZE)
    fill(pool, tree, None, [1, 1, 2, 2])
    held = tree.match(None, [1, 1, 2, 2])
    pool.share(held)
    assert tree.evict(4) == 0
    pool.release(held)
    assert tree.evict(4) == 2


def test_the_first_pages_of_a_text_are_free_for_others_when_it_has_left_them() -> None:
    pool = PagePool(4)
    tree = PrefixTree(pool, SIZE)
    pages = [pool.allocate() for _ in range(4)]
    tree.insert(None, [1, 1, 2, 2, 3, 3, 4, 4], pages)
    pool.release(pages[:2])
    assert tree.evict(1) == 1 and pool.free == 1
    assert tree.evict(2) == 1 and pool.free == 2
    assert tree.match(None, [1, 1, 2, 2, 3, 3, 4, 4]) == [] and len(tree) == 0
    assert [pool.references[page] for page in pages[2:]] == [1, 1]


def test_a_page_that_only_the_tree_holds_gives_way_to_the_same_one_in_use() -> None:
    """A known text is evaluated again and needs all the room."""
    pool = PagePool(4)
    tree = PrefixTree(pool, SIZE)
    fill(pool, tree, None, [1, 1, 2, 2])
    own = [pool.allocate(), pool.allocate()]
    tree.insert(None, [1, 1, 2, 2], own)
    assert tree.match(None, [1, 1, 2, 2]) == own
    assert (pool.free, pool.reclaimable, len(tree)) == (2, 0, 2)
    tree.insert(None, [1, 1, 2, 2], [pool.allocate(), pool.allocate()])  # both are in use: the tree's stay
    assert tree.match(None, [1, 1, 2, 2]) == own
    pool.release(own)
    assert tree.evict(4) == 2 == pool.free


class Tree(RuleBasedStateMachine):
    """Every prefix that was inserted and not evicted is found, and no other; pages add up."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(24)
        self.tree = PrefixTree(self.pool, SIZE)
        self.known: dict[tuple[str | None, tuple[int, ...]], int] = {}
        self.held: list[list[int]] = []

    @rule(salt=salts, tokens=texts)
    def insert(self, salt: str | None, tokens: list[int]) -> None:
        if self.pool.free < len(tokens) // SIZE:
            return
        fill(self.pool, self.tree, salt, tokens)
        path = self.tree.match(salt, tokens)
        assert len(path) == len(tokens) // SIZE
        for index, page in enumerate(path):
            key = (salt, tuple(tokens[: (index + 1) * SIZE]))
            old = self.known.get(key)
            assert (old == page) == any(old in pages for pages in self.held)  # a page in use stays, others are replaced
            self.known[key] = page

    @rule(salt=salts, tokens=texts)
    def match(self, salt: str | None, tokens: list[int]) -> None:
        expected = []
        for end in range(SIZE, len(tokens) + 1, SIZE):
            if (salt, tuple(tokens[:end])) not in self.known:
                break
            expected.append(self.known[salt, tuple(tokens[:end])])
        assert self.tree.match(salt, tokens) == expected
        self.pool.share(expected)
        self.held.append(expected)

    @rule()
    def let_go(self) -> None:
        if self.held:
            self.pool.release(self.held.pop(0))

    @rule(count=st.integers(1, 6))
    def evict(self, count: int) -> None:
        in_use = {page for pages in self.held for page in pages}
        evictable = len(set(self.known.values()) - in_use)
        assert self.tree.evict(count) == min(count, evictable)
        left = {node.page for node in self.tree.nodes()}
        self.known = {key: page for key, page in self.known.items() if page in left}

    @invariant()
    def pages_add_up(self) -> None:
        in_use = {page for pages in self.held for page in pages}
        assert len(self.tree) == len(self.known)
        assert self.pool.free == self.pool.total - len(set(self.known.values()) | in_use)
        assert self.pool.reclaimable == len(set(self.known.values()) - in_use)


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=40)
