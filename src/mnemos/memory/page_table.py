"""A sequence's part of the cache: pages, which it grows, shares, reuses and drops, and a state slot."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import cast

from mnemos.contract import Model, PagedModel, StatefulModel
from mnemos.errors import CapacityError
from mnemos.memory.capacity import Capacity, pages_at_once
from mnemos.memory.pages import PagePool
from mnemos.memory.prefix import PrefixTree
from mnemos.memory.states import NO_STATE, StateSlots


class GroupPages:
    """One sequence's pages in one layer group.

    pages      their ids in the group, int32, in the order of their positions
    positions  the first position that each page holds, int32; pages that no later position sees are left out
    """

    __slots__ = ("pages", "positions")

    def __init__(self) -> None:
        self.pages = array("i")  # an array is copied into a step's batch quickly
        self.positions = array("i")


class PageTable:
    """One sequence's pages and state.

    groups  its pages in each of the model's layer groups; a group without a window has a page for each that another has
    state   its state slot, NO_STATE before it has one
    done    the next position to evaluate; pages and state hold what it sees
    whole   how many first positions are evaluated together or not at all: the prompt, where its model pools it
    """

    __slots__ = ("done", "groups", "state", "whole")

    def __init__(self, groups: int) -> None:
        self.groups = tuple(GroupPages() for _ in range(groups))
        self.state = NO_STATE
        self.done = 0
        self.whole = 0


class PageTables:
    """The page tables of all sequences, over a pool of pages for each layer group, a prefix tree and the state slots.

    It knows nothing about requests. For a model without pages it counts none, and for one without states it allocates
    no slots. Prefixes are shared as far as the model promises that sharing and cutting a prompt change nothing; a state
    belongs to one position and is not shared. `chunk` is the most positions that a sequence is extended by at once.

    Numbers of pages are tuples with one for each layer group.
    """

    def __init__(self, model: Model, capacity: Capacity, prefix_cache: bool, chunk: int = 1) -> None:
        spec = model.spec
        self.paged = spec.layout.layers > 0
        self.pools_prompts = spec.pools_prompts
        self.page_size = spec.layout.page_size
        self.windows = tuple(group.window for group in spec.layout.groups)
        self.slides = any(self.windows)  # pages leave sequences while they grow
        self.chunk = chunk if spec.chunks else spec.context_length
        gaps = self.paged and spec.chunks and not spec.states and not spec.window  # pages may be left in the middle
        gaps = gaps and spec.layout.recall is None
        self.position_limit = spec.position_limit if gaps else 0
        self.pools = tuple(PagePool(pages) for pages in capacity.pages)
        self.states = StateSlots(cast(StatefulModel, model), capacity.states) if spec.states else None
        self.rewinds = spec.rewinds or not spec.states
        self.rewind_limit = spec.rewind_limit if spec.states else 0
        self.shares_prefixes = self.paged and spec.shares_prefixes and spec.chunks and not spec.states
        shared = prefix_cache and self.shares_prefixes
        self.tree = PrefixTree(self.pools, self.page_size, self.windows) if shared else None
        if self.paged:
            self.cache = cast(PagedModel, model).cache

    def new(self) -> PageTable:
        """An empty table."""
        return PageTable(len(self.pools))

    # Growing.

    def holds_next(self, table: PageTable) -> bool:
        """True if the next position needs nothing new: its page and state belong to the sequence alone.

        A shortcut for a `missing` of nothing once the sequence has begun, taken by most rows of most steps.
        """
        if self.states is not None and not self.states.is_own(table.state):
            return False
        if not self.paged:
            return True
        slot = table.done % self.page_size
        if slot == 0:
            return False
        start = table.done - slot
        for own, pool in zip(table.groups, self.pools, strict=True):
            if own.positions[-1] != start or pool.references[own.pages[-1]] != 1:
                return False
        return True

    def missing(self, table: PageTable, rows: int) -> tuple[tuple[int, ...], int]:
        """How many new pages and state slots the next `rows` positions need."""
        pages = (0,) * len(self.pools)
        if self.paged:
            start, end = table.done // self.page_size * self.page_size, table.done + rows
            whole = self.count(end - start)
            pages = tuple(
                whole - _between(own, start, end) + self._must_copy(own, pool, table.done)
                for own, pool in zip(table.groups, self.pools, strict=True)
            )
        return pages, 0 if self.states is None or self.states.is_own(table.state) else 1

    def make_room(self, table: PageTable, rows: int) -> bool:
        """True if what the next `rows` positions need is free, after evicting unused prefixes if necessary."""
        pages, slots = self.missing(table, rows)
        for group, (needed, pool) in enumerate(zip(pages, self.pools, strict=True)):
            lacking = needed - pool.free
            if lacking > 0 and self.tree is not None and pool.reclaimable:
                lacking -= self.tree.evict(lacking, group)
            if lacking > 0:
                return False
        return self.states is None or slots <= self.states.free

    def extend(self, table: PageTable, rows: int) -> None:
        """Gives the sequence pages and a state for its next `rows` positions; call `make_room` first."""
        if self.paged:
            for group in range(len(self.pools)):
                self._extend_group(table, group, rows)
        if self.states is not None:
            table.state = self.states.own(table.state)

    # Sharing.

    def share(self, source: PageTable, target: PageTable, length: int) -> None:
        """Makes the empty `target` begin with the first `length` positions of `source`.

        It stays empty if the source's state is past them and does not rewind.
        """
        if not self.can_return(source, length):
            return
        target.done = length
        for theirs, own, pool in zip(source.groups, target.groups, self.pools, strict=True):
            end = bisect_left(theirs.positions, length)
            own.pages, own.positions = theirs.pages[:end], theirs.positions[:end]
            pool.share(own.pages)
        if self.states is not None:
            target.state = self.states.share(source.state)

    def reuse(self, table: PageTable, salt: str | None, tokens: Sequence[int]) -> int:
        """Adds the full pages that the prefix tree has for `tokens`, after those already in the table.

        Returns the number of positions found.
        """
        size = self.page_size
        if self.tree is None or table.done % size or len(tokens) - table.done < size:
            return 0
        match = self.tree.match(salt, tokens, skip=table.done // size)
        end = match.end * size
        found, table.done = end - table.done, end
        for own, pool, pages in zip(table.groups, self.pools, match.pages, strict=True):
            pool.share(pages)
            own.pages.extend(pages)
            own.positions.extend(range(end - len(pages) * size, end, size))
        self.leave_behind(table)  # there may be a gap between these pages and earlier ones
        return found

    def remember(self, table: PageTable, salt: str | None, tokens: Sequence[int], ended: bool = False) -> None:
        """Adds the full pages of `tokens`, which begin at position 0, to the prefix tree.

        ended: another text is likely to continue from here, not only from where this one will end.
        """
        if self.tree is not None and len(tokens) >= self.page_size and table.groups[0].pages:
            held = [(own.pages, own.positions[0] // self.page_size) for own in table.groups]
            self.tree.insert(salt, tokens, held, ended)

    # Truncating, dropping and releasing.

    def trim(self, table: PageTable, length: int) -> None:
        """Keeps the first `length` cached positions; none if a window or the state no longer covers them."""
        if self.slides and not self._covers(table, length):
            length = 0
        if not self.can_return(table, length):
            length = 0
            self._release_state(table)
        table.done = min(table.done, length)
        for own, pool in zip(table.groups, self.pools, strict=True):
            _drop(own, pool, bisect_left(own.positions, table.done), len(own.pages))

    def can_return(self, table: PageTable, length: int) -> bool:
        """Whether a sequence can go on from its first `length` positions with what is kept of it."""
        back = table.done - length
        if back <= 0:
            return True
        return self.rewinds and length >= table.whole and (not self.rewind_limit or back <= self.rewind_limit)

    def leave_behind(self, table: PageTable) -> None:
        """Frees the pages that no later position can see, except one, as strategies may truncate a few tokens."""
        for own, pool, window in zip(table.groups, self.pools, self.windows, strict=True):
            if window:
                reached = (table.done - window + 1) // self.page_size
                _drop(own, pool, 0, bisect_left(own.positions, (reached - 1) * self.page_size))

    def leave(self, table: PageTable, start: int) -> None:
        """Frees the pages before position `start`."""
        for own, pool in zip(table.groups, self.pools, strict=True):
            _drop(own, pool, 0, bisect_left(own.positions, start))

    def release(self, table: PageTable) -> None:
        """Frees everything; the table is empty again."""
        for own, pool in zip(table.groups, self.pools, strict=True):
            _drop(own, pool, 0, len(own.pages))
        table.done = 0
        self._release_state(table)

    # Counting.

    def count(self, positions: int) -> int:
        """The number of pages that hold that many positions."""
        return -(-positions // self.page_size) if self.paged else 0

    def needs(self, positions: int) -> tuple[int, ...]:
        """The most pages that a sequence of that many positions holds at once."""
        if not self.paged:
            return (0,) * len(self.pools)
        return tuple(pages_at_once(positions, window, self.chunk, self.page_size) for window in self.windows)

    @property
    def available(self) -> tuple[tuple[int, ...], int]:
        """Pages that are free or can be freed by eviction, and free state slots."""
        pages = tuple(pool.free + pool.reclaimable for pool in self.pools)
        return pages, 0 if self.states is None else self.states.free

    def in_use(self, salt: str | None, tokens: Sequence[int]) -> tuple[int, ...]:
        """How many pages of the longest cached prefix of `tokens` are held by other sequences: those cost nothing."""
        if self.tree is None:
            return (0,) * len(self.pools)
        match = self.tree.match(salt, tokens)
        return tuple(sum(map(pool.is_shared, pages)) for pool, pages in zip(self.pools, match.pages, strict=True))

    def check_length(self, prompt: int, context_length: int) -> None:
        """Raises CapacityError if a prompt of this length could not run even with all pages to itself."""
        for needed, pool in zip(self.needs(min(prompt + 1, context_length)), self.pools, strict=True):
            if needed > pool.total:
                raise CapacityError(
                    f"a prompt of {prompt} tokens needs {needed} cache pages of {self.page_size} tokens; there are "
                    f"{pool.total}: give the engine more cache_tokens"
                )

    def refuse(self, table: PageTable, rows: int) -> None:
        """Raises the error of a request that has the whole cache to itself and still needs more."""
        pages, slots = self.missing(table, rows)
        if self.states is not None and slots > self.states.free:
            raise CapacityError(
                f"the request needs more than the {self.states.total} state slots of the engine, one for each of its "
                "branches; give the engine more max_sequences or ask for fewer results or beams"
            )
        lacking = [(needed - pool.free, needed, pool) for needed, pool in zip(pages, self.pools, strict=True)]
        _, needed, pool = max(lacking, key=lambda one: one[0])
        raise CapacityError(
            f"the request needs {needed} more cache pages of {self.page_size} tokens and {pool.free} of "
            f"{pool.total} are free; give the engine more cache_tokens or ask for less"
        )

    def _must_copy(self, own: GroupPages, pool: PagePool, done: int) -> bool:
        """True if the page that holds the next position is partly filled and shared."""
        if done % self.page_size == 0:
            return False
        return pool.is_shared(own.pages[bisect_right(own.positions, done) - 1])

    def _extend_group(self, table: PageTable, group: int, rows: int) -> None:
        own, pool, size = table.groups[group], self.pools[group], self.page_size
        pages, positions = own.pages, own.positions
        start = table.done // size * size
        index = bisect_left(positions, start)
        if self._must_copy(own, pool, table.done):
            old, new = pages[index], pool.allocate()
            pages[index] = new
            pool.release((old,))
            self.cache.copy((old,), (new,), group)
        for position in range(start, table.done + rows, size):
            if index == len(positions) or positions[index] != position:
                pages.insert(index, pool.allocate())
                positions.insert(index, position)
            index += 1

    def _covers(self, table: PageTable, length: int) -> bool:
        """True if every group has the pages that the position `length` sees.

        The first group sees farthest back: another one must have what the first has within the other's window.
        """
        first = table.groups[0]
        for own, window in zip(table.groups, self.windows, strict=True):
            start = max(0, length - window + 1)
            if window and own is first:
                if not (own.pages and own.positions[0] <= start):
                    return False
            elif window:
                page = start // self.page_size * self.page_size
                if _between(own, page, length) != _between(first, page, length):
                    return False
        return True

    def _release_state(self, table: PageTable) -> None:
        if self.states is not None:
            self.states.release(table.state)
            table.state = NO_STATE


def _between(own: GroupPages, start: int, end: int) -> int:
    """How many of the pages begin at positions `start` to `end` - 1."""
    return bisect_left(own.positions, end) - bisect_left(own.positions, start)


def _drop(own: GroupPages, pool: PagePool, start: int, end: int) -> None:
    """Frees the pages with these indices."""
    if start < end:
        pool.release(own.pages[start:end])
        del own.pages[start:end], own.positions[start:end]
