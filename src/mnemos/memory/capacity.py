"""Decides how many cache pages and state slots an engine gets."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mnemos.contract import KVLayout, Model, ModelSpec, PagedModel, SpillingModel, StatefulModel
from mnemos.errors import CapacityError
from mnemos.machine.memory import address_space_left, machine_memory

DEFAULT_TOKENS = 65_536


@dataclass(frozen=True)
class Capacity:
    """The numbers of cache pages of each layer group and of state slots; 0 for a model without them."""

    pages: tuple[int, ...]
    states: int = 0


def reserve(
    model: Model,
    spec: ModelSpec,
    cache_tokens: int | None,
    sequences: int,
    batch_tokens: int = 512,
    room: int | None = None,
) -> Capacity:
    """Reserves room in a model for `cache_tokens` positions (see `plan_pages`) and `sequences` branches at once.

    spec: the model's own, or one with a shorter context. batch_tokens: the most positions that a step evaluates. Each
    running branch has a state slot, and there are as many again for a request with more branches than `sequences`.
    room: bytes that the pages may take, None without a limit of its own.
    """
    paged, folder = spec.layout.layers > 0, None
    if spec.layout.recall is not None and isinstance(model, SpillingModel):
        folder = model.spill_folder
    plan = plan_pages(spec, cache_tokens, sequences, batch_tokens, room, folder) if paged else spec.layout.counts(0)
    capacity = Capacity(
        pages=plan,
        states=2 * sequences if spec.states else 0,
    )
    if paged:
        cast(PagedModel, model).reserve(capacity.pages)
    if capacity.states:
        cast(StatefulModel, model).reserve_states(capacity.states)
    return capacity


def pages_at_once(positions: int, window: int, chunk: int, page_size: int) -> int:
    """The most pages that a sequence of that many positions holds at once in a layer group with this window, or 0.

    It reads its prompt in chunks of at most `chunk` tokens, and keeps one page more than it needs. After a slide its
    first tokens have a page of their own.
    """
    pages = -(-positions // page_size)
    return min(pages, -(-(window + chunk) // page_size) + 3) if window else pages


def plan_pages(
    spec: ModelSpec,
    cache_tokens: int | None,
    sequences: int = 64,
    batch_tokens: int = 512,
    room: int | None = None,
    folder: Path | None = None,
) -> tuple[int, ...]:
    """Pages for `cache_tokens` positions; None: two full contexts, at least DEFAULT_TOKENS, in a quarter of memory.

    A layer group with a window has no more than twice what `sequences` branches need, of which one reads a prompt, if
    another group has none. Backends commit a page's memory when it is first written, so a generous plan costs nothing.
    folder: where pages that leave memory are stored, in which case its room counts in place of memory's.
    CapacityError if the requested size exceeds the machine's memory or `room` (bytes), or if that is less than a page.
    """
    layout, memory = spec.layout, machine_memory()
    place, most = "the machine has", memory
    if folder is not None:
        place, room = f"the memory's folder {str(folder)!r} has room for", None
        memory = most = _free_space(folder)

    def plan(pages: int) -> tuple[int, ...]:
        chunk = batch_tokens if spec.chunks else spec.context_length
        enough = -(-chunk // layout.page_size)
        length = pages * layout.page_size
        return tuple(
            min(pages, 2 * sequences * pages_at_once(length, group.window, 1, layout.page_size) + enough)
            if group.window and not spec.window
            else pages
            for group in layout.groups
        )

    def size(pages: int) -> int:
        return cache_bytes(layout, plan(pages))

    if cache_tokens is not None:
        pages = -(-cache_tokens // layout.page_size)
        if memory and size(pages) > memory:
            raise CapacityError(
                f"cache_tokens is {cache_tokens}, which takes {size(pages):,} bytes of keys and values; "
                f"{place} {most:,}"
            )
        if room is not None and size(pages) > room:
            raise CapacityError(
                f"cache_tokens is {cache_tokens}, which takes {size(pages):,} bytes of keys and values; max_memory_gb "
                f"leaves {room:,}"
            )
        return plan(pages)
    pages = -(-max(DEFAULT_TOKENS, 2 * spec.context_length) // layout.page_size)
    if room is not None and size(1) > room:
        raise CapacityError(f"max_memory_gb leaves {room:,} bytes for keys and values; a page takes {size(1):,}")
    if memory or room is not None:
        left = address_space_left()
        shares = [memory // 4 if memory else None, None if left is None else left // 2, room]
        share = min(one for one in shares if one is not None)
        pages = bisect_right(range(pages + 1), share, key=size) - 1
    return plan(max(pages, 1))


def _free_space(folder: Path) -> int:
    """Bytes; 0, which means unknown, where the folder cannot be asked."""
    import shutil  # rarely needed

    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def text_pages(spec: ModelSpec) -> tuple[int, ...]:
    """The most pages of each layer group that a text of the whole context holds while it grows by single tokens."""
    size = spec.layout.page_size
    return tuple(pages_at_once(spec.context_length, group.window, 1, size) for group in spec.layout.groups)


def cache_bytes(layout: KVLayout, pages: Sequence[int]) -> int:
    """The size of these pages of each layer group."""
    return sum(group.page_bytes * count for group, count in zip(layout.groups, pages, strict=True))
