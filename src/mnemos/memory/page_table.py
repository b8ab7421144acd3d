"""A sequence's part of the cache: pages, which it grows, shares, reuses and drops, and a state slot."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import cast

from mnemos.contract import Model, PagedModel, StatefulModel
from mnemos.errors import CapacityError
from mnemos.memory.capacity import Capacity
from mnemos.memory.pages import PagePool
from mnemos.memory.prefix import PrefixTree
from mnemos.memory.states import NO_STATE, StateSlots


class PageTable:
    """One sequence's pages and state.

    pages      its pages, int32, in the order of their positions
    positions  the first position that each page holds, int32; pages that no later position sees are left out
    state      its state slot, NO_STATE before it has one
    done       the next position to evaluate; pages and state hold what it sees
    """

    __slots__ = ("done", "pages", "positions", "state")

    def __init__(self) -> None:
        self.pages = array("i")  # an array is copied into a step's batch quickly
        self.positions = array("i")
        self.state = NO_STATE
        self.done = 0


class PageTables:
    """The page tables of all sequences, over one pool of pages, one prefix tree and one set of state slots.

    It knows nothing about requests. For a model without pages it counts none, and for one without states it allocates
    no slots. Prefixes are shared as far as the model promises that sharing and cutting a prompt change nothing; a state
    belongs to one position and is not shared.
    """

    def __init__(self, model: Model, capacity: Capacity, prefix_cache: bool) -> None:
        spec = model.spec
        self.paged = spec.layout.layers > 0
        self.page_size = spec.layout.page_size
        self.window = spec.window if self.paged else 0
        gaps = self.paged and spec.chunks and not spec.states and not self.window  # pages may be left in the middle
        self.position_limit = spec.position_limit if gaps else 0
        self.pool = PagePool(capacity.pages)
        self.states = StateSlots(cast(StatefulModel, model), capacity.states) if spec.states else None
        self.rewinds = spec.rewinds or not spec.states
        self.shares_prefixes = self.paged and spec.shares_prefixes and spec.chunks and not spec.states
        self.tree = PrefixTree(self.pool, self.page_size) if prefix_cache and self.shares_prefixes else None
        if self.paged:
            self.cache = cast(PagedModel, model).cache

    # Growing.

    def holds_next(self, table: PageTable) -> bool:
        """True if the next position needs nothing new: its page and state belong to the sequence alone.

        A shortcut for `missing(table, 1) == (0, 0)` once the sequence has begun, taken by most rows of most steps.
        """
        if self.states is not None and not self.states.is_own(table.state):
            return False
        if not self.paged:
            return True
        slot = table.done % self.page_size
        return slot != 0 and table.positions[-1] + slot == table.done and self.pool.references[table.pages[-1]] == 1

    def missing(self, table: PageTable, rows: int) -> tuple[int, int]:
        """How many new pages and state slots the next `rows` positions need."""
        pages = 0
        if self.paged:
            start, end = table.done // self.page_size * self.page_size, table.done + rows
            there = bisect_left(table.positions, end) - bisect_left(table.positions, start)
            pages = self.count(end - start) - there + self._must_copy(table)
        return pages, 0 if self.states is None or self.states.is_own(table.state) else 1

    def make_room(self, table: PageTable, rows: int) -> bool:
        """True if what the next `rows` positions need is free, after evicting unused prefixes if necessary."""
        pages, slots = self.missing(table, rows)
        lacking = pages - self.pool.free
        if lacking > 0 and self.tree is not None and self.pool.reclaimable:
            lacking -= self.tree.evict(lacking)
        return lacking <= 0 and (self.states is None or slots <= self.states.free)

    def extend(self, table: PageTable, rows: int) -> None:
        """Gives the sequence pages and a state for its next `rows` positions; call `make_room` first."""
        if self.paged:
            self._extend_pages(table, rows)
        if self.states is not None:
            table.state = self.states.own(table.state)

    # Sharing.

    def share(self, source: PageTable, target: PageTable, length: int) -> None:
        """Makes the empty `target` begin with the first `length` positions of `source`.

        It stays empty if the source's state is past them and does not rewind.
        """
        if length < source.done and not self.rewinds:
            return
        target.done = length
        end = bisect_left(source.positions, length)
        target.pages, target.positions = source.pages[:end], source.positions[:end]
        self.pool.share(target.pages)
        if self.states is not None:
            target.state = self.states.share(source.state)

    def reuse(self, table: PageTable, salt: str | None, tokens: Sequence[int]) -> int:
        """Adds the full pages that the prefix tree has for `tokens`, after those already in the table.

        Returns the number of positions found.
        """
        size = self.page_size
        if self.tree is None or table.done % size or len(tokens) - table.done < size:
            return 0
        pages = self.tree.match(salt, tokens, skip=table.done // size)
        self.pool.share(pages)
        found = len(pages) * size
        table.pages.extend(pages)
        table.positions.extend(range(table.done, table.done + found, size))
        table.done += found
        return found

    def remember(self, table: PageTable, salt: str | None, tokens: Sequence[int]) -> None:
        """Adds the full pages of `tokens`, which begin at position 0, to the prefix tree."""
        if self.tree is not None and len(tokens) >= self.page_size and table.pages:
            self.tree.insert(salt, tokens, table.pages, skip=table.positions[0] // self.page_size)

    # Truncating, dropping and releasing.

    def trim(self, table: PageTable, length: int) -> None:
        """Keeps the first `length` cached positions; none if the window or the state no longer covers them."""
        if self.window and not (table.pages and table.positions[0] <= max(0, length - self.window + 1)):
            length = 0
        if length < table.done and not self.rewinds:
            length = 0
            self._release_state(table)
        table.done = min(table.done, length)
        self._drop(table, bisect_left(table.positions, table.done), len(table.pages))

    def leave_behind(self, table: PageTable) -> None:
        """Frees the pages that no later position can see, except one, as strategies may truncate a few tokens."""
        reached = (table.done - self.window + 1) // self.page_size
        self.leave(table, (reached - 1) * self.page_size)

    def leave(self, table: PageTable, start: int) -> None:
        """Frees the pages before position `start`."""
        self._drop(table, 0, bisect_left(table.positions, start))

    def release(self, table: PageTable) -> None:
        """Frees everything; the table is empty again."""
        self._drop(table, 0, len(table.pages))
        table.done = 0
        self._release_state(table)

    # Counting.

    def count(self, positions: int) -> int:
        """The number of pages that hold that many positions."""
        return -(-positions // self.page_size) if self.paged else 0

    @property
    def available(self) -> tuple[int, int]:
        """Pages that are free or can be freed by eviction, and free state slots."""
        return self.pool.free + self.pool.reclaimable, 0 if self.states is None else self.states.free

    def in_use(self, salt: str | None, tokens: Sequence[int]) -> int:
        """How many pages of the longest cached prefix of `tokens` are held by other sequences: those cost nothing."""
        if self.tree is None:
            return 0
        return sum(self.pool.is_shared(page) for page in self.tree.match(salt, tokens))

    def check_length(self, prompt: int, context_length: int) -> None:
        """Raises CapacityError if a prompt of this length could not run even with all pages to itself."""
        needed = self.count(min(prompt + 1, context_length))
        if needed > self.pool.total:
            raise CapacityError(
                f"a prompt of {prompt} tokens needs {needed} cache pages of {self.page_size} tokens; there are "
                f"{self.pool.total}: give the engine more cache_tokens"
            )

    def refuse(self, table: PageTable, rows: int) -> None:
        """Raises the error of a request that has the whole cache to itself and still needs more."""
        pages, slots = self.missing(table, rows)
        if self.states is not None and slots > self.states.free:
            raise CapacityError(
                f"the request needs more than the {self.states.total} state slots of the engine, one for each of its "
                "branches; give the engine more max_sequences or ask for fewer results or beams"
            )
        raise CapacityError(
            f"the request needs {pages} more cache pages of {self.page_size} tokens and {self.pool.free} of "
            f"{self.pool.total} are free; give the engine more cache_tokens or ask for less"
        )

    def _must_copy(self, table: PageTable) -> bool:
        """True if the page that holds the next position is partly filled and shared."""
        if table.done % self.page_size == 0:
            return False
        return self.pool.is_shared(table.pages[bisect_right(table.positions, table.done) - 1])

    def _extend_pages(self, table: PageTable, rows: int) -> None:
        pages, positions, size = table.pages, table.positions, self.page_size
        start = table.done // size * size
        index = bisect_left(positions, start)
        if self._must_copy(table):
            old, new = pages[index], self.pool.allocate()
            pages[index] = new
            self.pool.release((old,))
            self.cache.copy((old,), (new,))
        for position in range(start, table.done + rows, size):
            if index == len(positions) or positions[index] != position:
                pages.insert(index, self.pool.allocate())
                positions.insert(index, position)
            index += 1

    def _drop(self, table: PageTable, start: int, end: int) -> None:
        """Frees the pages with these indices."""
        if start < end:
            self.pool.release(table.pages[start:end])
            del table.pages[start:end], table.positions[start:end]

    def _release_state(self, table: PageTable) -> None:
        if self.states is not None:
            self.states.release(table.state)
            table.state = NO_STATE
