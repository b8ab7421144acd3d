"""Which cache pages a sequence has: growth, copy-on-write, prefix reuse and pages that leave the window."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from mnemos.contract import PagedModel
from mnemos.errors import CapacityError
from mnemos.memory.pages import NO_PAGE, PagePool
from mnemos.memory.prefix import PrefixTree


class PageTable:
    """One sequence in the cache.

    pages    its pages in order, int32; NO_PAGE where the model's window does not reach any more
    done     the number of positions that they hold
    """

    __slots__ = ("done", "pages")

    def __init__(self) -> None:
        self.pages = array("i")  # quickly copied into a step's batch
        self.done = 0


class PageTables:
    """The page tables of all sequences, over one pool of pages and one prefix tree. It knows no request."""

    def __init__(self, model: PagedModel, pages: int, prefix_cache: bool) -> None:
        self.cache = model.cache
        self.page_size = model.spec.layout.page_size
        self.window = model.spec.window
        self.pool = PagePool(pages)
        self.tree = PrefixTree(self.pool, self.page_size) if prefix_cache else None

    # A sequence grows.

    def holds_next(self, table: PageTable) -> bool:
        """True if the next position is in a page that the sequence has begun and nobody shares.

        The short way to `pages_missing(table, 1) == 0`, which most rows of most steps take.
        """
        index, slot = divmod(table.done, self.page_size)
        return slot != 0 and self.pool.references[table.pages[index]] == 1

    def pages_missing(self, table: PageTable, rows: int) -> int:
        """How many pages the next `rows` positions need beyond those that the sequence may write to."""
        return self.count(table.done + rows) - len(table.pages) + self._must_copy(table)

    def make_room(self, count: int) -> bool:
        """True if `count` pages are free, if need be after unused prefixes are evicted."""
        missing = count - self.pool.free
        if missing > 0 and self.tree is not None and self.pool.reclaimable:
            missing -= self.tree.evict(missing)
        return missing <= 0

    def extend(self, table: PageTable, rows: int) -> None:
        """Gives the sequence pages for its next `rows` positions, which nobody shares. `make_room` has made room."""
        pages = table.pages
        if self._must_copy(table):
            index = table.done // self.page_size
            old, new = pages[index], self.pool.allocate()
            pages[index] = new
            self.pool.release((old,))
            self.cache.copy((old,), (new,))
        for _ in range(self.count(table.done + rows) - len(pages)):
            pages.append(self.pool.allocate())

    # It shares what others have evaluated.

    def share(self, source: PageTable, target: PageTable, length: int) -> None:
        """`target`, which has no pages, begins with the first `length` positions of `source`."""
        target.done = length
        target.pages = source.pages[: self.count(length)]
        self.pool.share(target.pages)

    def reuse(self, table: PageTable, salt: str | None, tokens: Sequence[int]) -> int:
        """Takes over the full pages that the prefix tree has of `tokens`, from the table's end on.

        Returns the number of positions found.
        """
        if self.tree is None:
            return 0
        pages = self.tree.match(salt, tokens, skip=len(table.pages))
        self.pool.share(pages)
        table.pages.extend(pages)
        found = len(pages) * self.page_size
        table.done += found
        return found

    def remember(self, table: PageTable, salt: str | None, tokens: Sequence[int]) -> None:
        """Puts the full pages that hold `tokens`, the table's first ones, into the prefix tree."""
        if self.tree is not None and len(tokens) >= self.page_size:
            self.tree.insert(salt, tokens, table.pages)

    # It goes back, leaves pages behind, and ends.

    def trim(self, table: PageTable, length: int) -> None:
        """Keeps the first `length` cached positions; none if the pages that they see have left the window."""
        if self.window and NO_PAGE in table.pages[max(0, length - self.window + 1) // self.page_size :]:
            length = 0
        table.done = min(table.done, length)
        count = self.count(table.done)
        if len(table.pages) > count:
            self.pool.release(table.pages[count:])
            del table.pages[count:]

    def leave_behind(self, table: PageTable) -> None:
        """Gives back the pages that no later position can see, but one, as strategies take back a few tokens."""
        pages = table.pages
        for index in range((table.done - self.window + 1) // self.page_size - 2, -1, -1):
            if pages[index] == NO_PAGE:
                break
            self.pool.release((pages[index],))
            pages[index] = NO_PAGE

    def release(self, table: PageTable) -> None:
        """The sequence has ended: gives its pages back."""
        self.pool.release(table.pages)

    # What there is.

    def count(self, positions: int) -> int:
        """The number of pages that hold so many positions."""
        return -(-positions // self.page_size)

    @property
    def available(self) -> int:
        """Pages that are free or become so by eviction."""
        return self.pool.free + self.pool.reclaimable

    def in_use(self, salt: str | None, tokens: Sequence[int]) -> int:
        """How many pages of the longest known prefix of `tokens` other sequences hold: those cost nothing."""
        if self.tree is None:
            return 0
        return sum(self.pool.is_shared(page) for page in self.tree.match(salt, tokens))

    def check_length(self, prompt: int, context_length: int) -> None:
        """CapacityError for a prompt of so many tokens that could not run even with all pages for itself."""
        needed = self.count(min(prompt + 1, context_length))
        if needed > self.pool.total:
            raise CapacityError(
                f"a prompt of {prompt} tokens needs {needed} cache pages of {self.page_size} tokens; there are "
                f"{self.pool.total}: give the engine more cache_tokens"
            )

    def refuse(self, table: PageTable, rows: int) -> None:
        """Raises the error of a request that has all pages for itself and still too few."""
        raise CapacityError(
            f"the request needs {self.pages_missing(table, rows)} more cache pages of {self.page_size} tokens and "
            f"{self.pool.free} of {self.pool.total} are free; give the engine more cache_tokens or ask for less"
        )

    def _must_copy(self, table: PageTable) -> bool:
        """True if the page that holds the next position is partly filled and shared."""
        index, slot = divmod(table.done, self.page_size)
        return slot != 0 and self.pool.references[table.pages[index]] > 1
