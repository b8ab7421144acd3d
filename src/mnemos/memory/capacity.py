"""How many cache pages an engine gets."""

from __future__ import annotations

from mnemos.contract import ModelSpec
from mnemos.errors import CapacityError
from mnemos.machine.memory import address_space_left, machine_memory

DEFAULT_TOKENS = 65_536


def plan_pages(spec: ModelSpec, cache_tokens: int | None) -> int:
    """Pages for `cache_tokens` positions; None: two full contexts, at least DEFAULT_TOKENS, in a quarter of memory.

    Backends commit a page's memory when it is first written, so a generous plan costs nothing. CapacityError if what
    was asked for is beyond the machine's memory.
    """
    layout, memory = spec.layout, machine_memory()
    if cache_tokens is not None:
        pages = -(-cache_tokens // layout.page_size)
        if memory and pages * layout.page_bytes > memory:
            raise CapacityError(
                f"cache_tokens is {cache_tokens}, which takes {pages * layout.page_bytes:,} bytes of keys and values; "
                f"the machine has {memory:,}"
            )
        return pages
    pages = -(-max(DEFAULT_TOKENS, 2 * spec.context_length) // layout.page_size)
    if memory:
        left = address_space_left()
        share = memory // 4 if left is None else min(memory // 4, left // 2)
        pages = min(pages, share // max(layout.page_bytes, 1))
    return max(pages, 1)
