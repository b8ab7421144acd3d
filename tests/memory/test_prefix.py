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
    tree.insert(salt, tokens, [(pages, 0)])
    pool.release(pages)


def test_only_whole_pages_of_the_same_tokens_and_salt_match() -> None:
    pool = PagePool(8)
    tree = PrefixTree([pool], SIZE)
    fill(pool, tree, None, [1, 2, 3, 4, 5])
    assert len(tree.match(None, [1, 2, 3, 4, 5, 6]).pages[0]) == 2
    assert len(tree.match(None, [1, 2, 3, 9]).pages[0]) == 1
    assert tree.match(None, [1]).pages[0] == []
    assert tree.match("other", [1, 2, 3, 4]).pages[0] == []
    assert tree.match(None, [1, 2, 3, 4], skip=1).pages[0] == tree.match(None, [1, 2, 3, 4]).pages[0][1:]


def test_the_least_recently_used_leaf_goes_first_and_its_parent_after_it() -> None:
    pool = PagePool(8)
    tree = PrefixTree([pool], SIZE)
    fill(pool, tree, None, [1, 1, 2, 2])
    fill(pool, tree, None, [1, 1, 3, 3])
    tree.match(None, [1, 1, 2, 2])
    assert tree.evict(1) == 1
    assert len(tree.match(None, [1, 1, 3, 3]).pages[0]) == 1
    assert len(tree.match(None, [1, 1, 2, 2]).pages[0]) == 2
    assert tree.evict(5) == 2
    assert (len(tree), pool.free) == (0, 8)


def test_pages_that_were_found_often_are_spared_for_a_while() -> None:
    pool = PagePool(20)
    tree = PrefixTree([pool], SIZE)
    tree.restrict(20, weighted=True)
    fill(pool, tree, None, [1, 1, 2, 2])
    for _ in range(3):
        tree.match(None, [1, 1, 2, 2])
    for number in range(3, 12):
        fill(pool, tree, None, [number, number])
    tree.restrict(4, weighted=True)
    assert (len(tree), tree.covered(None, [1, 1, 2, 2])) == (4, 2)
    for number in range(20, 40):  # nobody asks for them any more
        fill(pool, tree, None, [number, number])
    assert (len(tree), tree.covered(None, [1, 1, 2, 2])) == (4, 0)


def test_pages_in_use_stay() -> None:
    pool = PagePool(4)
    tree = PrefixTree([pool], SIZE)
    fill(pool, tree, None, [1, 1, 2, 2])
    held = tree.match(None, [1, 1, 2, 2]).pages[0]
    pool.share(held)
    assert tree.evict(4) == 0
    pool.release(held)
    assert tree.evict(4) == 2


def test_the_first_pages_of_a_text_are_free_for_others_when_it_has_left_them() -> None:
    pool = PagePool(4)
    tree = PrefixTree([pool], SIZE)
    pages = [pool.allocate() for _ in range(4)]
    tree.insert(None, [1, 1, 2, 2, 3, 3, 4, 4], [(pages, 0)])
    pool.release(pages[:2])
    assert tree.evict(1) == 1 and pool.free == 1
    assert tree.evict(2) == 1 and pool.free == 2
    assert tree.match(None, [1, 1, 2, 2, 3, 3, 4, 4]).pages[0] == [] and len(tree) == 0
    assert [pool.references[page] for page in pages[2:]] == [1, 1]


def test_a_page_that_only_the_tree_holds_gives_way_to_the_same_one_in_use() -> None:
    """A known text is evaluated again and needs all the room."""
    pool = PagePool(4)
    tree = PrefixTree([pool], SIZE)
    fill(pool, tree, None, [1, 1, 2, 2])
    own = [pool.allocate(), pool.allocate()]
    tree.insert(None, [1, 1, 2, 2], [(own, 0)])
    assert tree.match(None, [1, 1, 2, 2]).pages[0] == own
    assert (pool.free, pool.reclaimable, len(tree)) == (2, 0, 2)
    tree.insert(None, [1, 1, 2, 2], [([pool.allocate(), pool.allocate()], 0)])  # both are in use: the tree's stay
    assert tree.match(None, [1, 1, 2, 2]).pages[0] == own
    pool.release(own)
    assert tree.evict(4) == 2 == pool.free


class Tree(RuleBasedStateMachine):
    """Every prefix that was inserted and not evicted is found, and no other; pages add up."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(24)
        self.tree = PrefixTree([self.pool], SIZE)
        self.known: dict[tuple[str | None, tuple[int, ...]], int] = {}
        self.held: list[list[int]] = []

    @rule(salt=salts, tokens=texts)
    def insert(self, salt: str | None, tokens: list[int]) -> None:
        if self.pool.free < len(tokens) // SIZE:
            return
        fill(self.pool, self.tree, salt, tokens)
        path = self.tree.match(salt, tokens).pages[0]
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
        assert self.tree.match(salt, tokens).pages[0] == expected
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
        left = {node.pages[0] for node in self.tree.nodes()}
        self.known = {key: page for key, page in self.known.items() if page in left}

    @invariant()
    def pages_add_up(self) -> None:
        in_use = {page for pages in self.held for page in pages}
        assert len(self.tree) == len(self.known)
        assert self.pool.free == self.pool.total - len(set(self.known.values()) | in_use)
        assert self.pool.reclaimable == len(set(self.known.values()) - in_use)


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=40)


# A model whose first layers see all positions and others the last WINDOW: two layer groups.
WINDOW = 3
TEXT = [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


class Sliding:
    """A tree over two layer groups, and texts whose sequences keep what their windows reach."""

    def __init__(self, pages: int = 40) -> None:
        self.pools = [PagePool(pages), PagePool(pages)]
        self.tree = PrefixTree(self.pools, SIZE, (0, WINDOW))

    def fill(self, tokens: list[int], ended: bool = False) -> None:
        """Inserts a text's pages, of the second group those that are left after it has moved on; then it ends."""
        count = len(tokens) // SIZE
        skip = max(0, (len(tokens) - WINDOW + 1) // SIZE - 1)
        own = [
            [pool.allocate() for _ in range(count - first)] for pool, first in zip(self.pools, (0, skip), strict=True)
        ]
        self.tree.insert(None, tokens, [(own[0], 0), (own[1], skip)], ended)
        for pool, pages in zip(self.pools, own, strict=True):
            pool.release(pages)

    def end(self, tokens: list[int]) -> int:
        return self.tree.match(None, tokens).end


def test_a_text_continues_where_the_pages_within_the_window_are() -> None:
    known = Sliding()
    known.fill(TEXT)
    assert known.tree.held == [6, 2]
    match = known.tree.match(None, [*TEXT, 7, 7])
    assert (match.end, [len(pages) for pages in match.pages]) == (6, [6, 1])
    assert known.end(TEXT[:10]) == 5  # one page more than the window reaches is held
    assert known.end(TEXT[:8]) == 0


def test_a_growing_text_leaves_only_its_end_and_its_prompts_end() -> None:
    known = Sliding()
    for length in (4, 6, 8):
        known.fill(TEXT[:length], ended=length == 6)
    assert known.tree.held == [4, 2 + 1]
    known.fill(TEXT)
    known.fill([*TEXT, 7, 7, 8, 8])
    assert known.tree.held == [8, 2 + 2]
    assert [known.end(TEXT[:length]) for length in (4, 6, 8, 10)] == [2, 3, 3, 3]
    known.fill(TEXT, ended=True)  # a later prompt's end takes the place of the earlier one's
    assert [known.end(TEXT[:length]) for length in (6, 8, 10, 12)] == [0, 0, 5, 6]


def test_texts_that_part_can_part_there_again() -> None:
    known = Sliding()
    known.fill(TEXT)
    assert known.end([*TEXT[:6], 9, 9]) == 0
    known.fill([*TEXT[:6], 9, 9])
    assert known.end([*TEXT[:6], 7, 7]) == 3
    known.fill([*TEXT[:6], 9, 9, 8, 8, 7, 7, 6, 6])
    assert known.end([*TEXT[:6], 7, 7]) == 3


def test_a_sequence_brings_what_it_has_before_the_match() -> None:
    """The second group's pages after the first `skip` pages are enough, since the caller has the earlier ones."""
    known = Sliding()
    known.fill(TEXT)
    assert known.tree.match(None, TEXT[:10], skip=4).end == 5
    assert known.tree.match(None, TEXT[:10], skip=3).end == 5
    assert known.tree.match(None, TEXT[:8], skip=3).end == 3


def test_pages_within_a_window_are_evicted_for_their_own_group() -> None:
    known = Sliding()
    known.fill(TEXT)
    assert known.tree.evict(1, group=1) == 1  # the last page: no text continues from there
    assert (known.tree.held, known.end(TEXT), known.end(TEXT[:10])) == ([6, 1], 5, 5)
    assert known.tree.evict(3, group=1) == 1
    assert (known.tree.held, known.end(TEXT)) == ([6, 0], 0)
    assert known.tree.evict(1) == 1
    assert known.tree.evict(9) == 5
    assert known.tree.held == [0, 0]
    assert [pool.free for pool in known.pools] == [40, 40]


def test_a_text_whose_layers_all_have_windows_holds_no_other_pages() -> None:
    pool = PagePool(9)
    tree = PrefixTree([pool], SIZE, (WINDOW,))
    pages = [pool.allocate() for _ in range(3)]
    tree.insert(None, TEXT, [(pages, 3)])
    assert (len(tree), len(list(tree.nodes()))) == (2, 6)
    assert tree.match(None, TEXT).pages == [pages[2:]]
    pool.release(pages)
    assert tree.evict(9) == 2
    assert list(tree.nodes()) == [] and pool.free == 9
