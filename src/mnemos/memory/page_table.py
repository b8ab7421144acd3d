"""What a sequence has in the cache: pages, which it grows, shares, reuses and leaves behind, and a state slot."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import cast

from mnemos.contract import Model, PagedModel, StatefulModel
from mnemos.errors import CapacityError
from mnemos.memory.capacity import Capacity
from mnemos.memory.pages import NO_PAGE, PagePool
from mnemos.memory.prefix import PrefixTree
from mnemos.memory.states import NO_STATE, StateSlots


class PageTable:
    """One sequence in the cache.

    pages    its pages in order, int32; NO_PAGE where the model's window does not reach any more
    state    its state slot, NO_STATE before it has one
    done     the number of positions that pages and state hold
    """

    __slots__ = ("done", "pages", "state")

    def __init__(self) -> None:
        self.pages = array("i")  # quickly copied into a step's batch
        self.state = NO_STATE
        self.done = 0


class PageTables:
    """The page tables of all sequences, over one pool of pages, one prefix tree and one set of state slots.

    It knows no request. Of a model without pages it counts none, and of one without states it allocates no slots.
    Prefixes are shared as far as the model promises that this and a cut prompt change nothing; a state belongs to one
    position and is not shared.
    """

    def __init__(self, model: Model, capacity: Capacity, prefix_cache: bool) -> None:
        spec = model.spec
        self.paged = spec.layout.layers > 0
        self.page_size = spec.layout.page_size
        self.window = spec.window if self.paged else 0
        self.pool = PagePool(capacity.pages)
        self.states = StateSlots(cast(StatefulModel, model), capacity.states) if spec.states else None
        self.rewinds = spec.rewinds or not spec.states
        self.shares_prefixes = self.paged and spec.shares_prefixes and spec.chunks and not spec.states
        self.tree = PrefixTree(self.pool, self.page_size) if prefix_cache and self.shares_prefixes else None
        if self.paged:
            self.cache = cast(PagedModel, model).cache

    # A sequence grows.

    def holds_next(self, table: PageTable) -> bool:
        """True if the next position needs nothing new: it is in a page and a state that the sequence has for itself.

        The short way to `missing(table, 1) == (0, 0)` where the sequence has begun, which most rows of most steps take.
        """
        if self.states is not None and not self.states.is_own(table.state):
            return False
        index, slot = divmod(table.done, self.page_size)
        return slot != 0 and self.pool.references[table.pages[index]] == 1 if self.paged else True

    def missing(self, table: PageTable, rows: int) -> tuple[int, int]:
        """How many pages and state slots the next `rows` positions need beyond those that the sequence may write to."""
        pages = self.count(table.done + rows) - len(table.pages) + self._must_copy(table)
        return pages, 0 if self.states is None or self.states.is_own(table.state) else 1

    def make_room(self, table: PageTable, rows: int) -> bool:
        """True if what the next `rows` positions need is free, if need be after unused prefixes are evicted."""
        pages, slots = self.missing(table, rows)
        lacking = pages - self.pool.free
        if lacking > 0 and self.tree is not None and self.pool.reclaimable:
            lacking -= self.tree.evict(lacking)
        return lacking <= 0 and (self.states is None or slots <= self.states.free)

    def extend(self, table: PageTable, rows: int) -> None:
        """Gives the sequence pages and a state for its next `rows` positions; `make_room` has made room."""
        pages = table.pages
        if self._must_copy(table):
            index = table.done // self.page_size
            old, new = pages[index], self.pool.allocate()
            pages[index] = new
            self.pool.release((old,))
            self.cache.copy((old,), (new,))
        for _ in range(self.count(table.done + rows) - len(pages)):
            pages.append(self.pool.allocate())
        if self.states is not None:
            table.state = self.states.own(table.state)

    # It shares what others have evaluated.

    def share(self, source: PageTable, target: PageTable, length: int) -> None:
        """`target`, which has nothing yet, begins with the first `length` positions of `source`.

        With nothing, if the source's state is beyond them and does not rewind.
        """
        if length < source.done and not self.rewinds:
            return
        target.done = length
        target.pages = source.pages[: self.count(length)]
        self.pool.share(target.pages)
        if self.states is not None:
            target.state = self.states.share(source.state)

    def reuse(self, table: PageTable, salt: str | None, tokens: Sequence[int]) -> int:
        """Takes over the full pages that the prefix tree has of `tokens`, from the table's end on.

        Returns the number of positions found.
        """
        size = self.page_size
        if self.tree is None or len(table.pages) * size != table.done or len(tokens) - table.done < size:
            return 0
        pages = self.tree.match(salt, tokens, skip=len(table.pages))
        self.pool.share(pages)
        table.pages.extend(pages)
        found = len(pages) * size
        table.done += found
        return found

    def remember(self, table: PageTable, salt: str | None, tokens: Sequence[int]) -> None:
        """Puts the full pages that hold `tokens`, the table's first ones, into the prefix tree."""
        if self.tree is not None and len(tokens) >= self.page_size:
            self.tree.insert(salt, tokens, table.pages)

    # It goes back, leaves pages behind, and ends.

    def trim(self, table: PageTable, length: int) -> None:
        """Keeps the first `length` cached positions; none if what these need has left the window or the state."""
        if self.window and NO_PAGE in table.pages[max(0, length - self.window + 1) // self.page_size :]:
            length = 0
        if length < table.done and not self.rewinds:
            length = 0
            self._release_state(table)
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
        """Gives everything back; the table is as new."""
        self.pool.release(table.pages)
        table.pages = array("i")
        table.done = 0
        self._release_state(table)

    # What there is.

    def count(self, positions: int) -> int:
        """The number of pages that hold so many positions."""
        return -(-positions // self.page_size) if self.paged else 0

    @property
    def available(self) -> tuple[int, int]:
        """Pages that are free or become so by eviction, and free state slots."""
        return self.pool.free + self.pool.reclaimable, 0 if self.states is None else self.states.free

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
        """Raises the error of a request that has everything for itself and still too little."""
        pages, slots = self.missing(table, rows)
        if self.states is not None and slots > self.states.free:
            raise CapacityError(
                f"the request needs more than the {self.states.total} state slots that there are, one for each of its "
                "branches; give the engine more max_sequences or ask for fewer results or beams"
            )
        raise CapacityError(
            f"the request needs {pages} more cache pages of {self.page_size} tokens and {self.pool.free} of "
            f"{self.pool.total} are free; give the engine more cache_tokens or ask for less"
        )

    def _must_copy(self, table: PageTable) -> bool:
        """True if the page that holds the next position is partly filled and shared."""
        index, slot = divmod(table.done, self.page_size)
        return self.paged and slot != 0 and self.pool.references[table.pages[index]] > 1

    def _release_state(self, table: PageTable) -> None:
        if self.states is not None:
            self.states.release(table.state)
            table.state = NO_STATE
