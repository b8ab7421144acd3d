"""How many cache pages an engine gets."""

from __future__ import annotations

import os
from pathlib import Path

from mnemos.errors import CapacityError
from mnemos.models.contract import ModelSpec
from mnemos.ops.limits import address_space, address_space_left

DEFAULT_TOKENS = 65_536
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


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


def machine_memory() -> int:
    """Bytes of memory that this process may use, of the machine's, its cgroup's and its own limit; 0 if unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
    limits = [total, address_space()]
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        limit = ""
    if limit.isdigit():
        limits.append(int(limit))
    return min(filter(None, limits))
