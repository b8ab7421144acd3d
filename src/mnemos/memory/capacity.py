"""Decides how many cache pages and state slots an engine gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from mnemos.contract import Model, ModelSpec, PagedModel, StatefulModel
from mnemos.errors import CapacityError
from mnemos.machine.memory import address_space_left, machine_memory

DEFAULT_TOKENS = 65_536


@dataclass(frozen=True)
class Capacity:
    """The numbers of cache pages and state slots; 0 for a model without them."""

    pages: int
    states: int = 0


def reserve(model: Model, spec: ModelSpec, cache_tokens: int | None, sequences: int) -> Capacity:
    """Reserves room in a model for `cache_tokens` positions (see `plan_pages`) and `sequences` branches at once.

    spec: the model's own, or one with a shorter context. Each running branch has a state slot, and there are as many
    again for a request with more branches than `sequences`.
    """
    capacity = Capacity(
        pages=plan_pages(spec, cache_tokens) if spec.layout.layers else 0, states=2 * sequences if spec.states else 0
    )
    if capacity.pages:
        cast(PagedModel, model).reserve(capacity.pages)
    if capacity.states:
        cast(StatefulModel, model).reserve_states(capacity.states)
    return capacity


def plan_pages(spec: ModelSpec, cache_tokens: int | None) -> int:
    """Pages for `cache_tokens` positions; None: two full contexts, at least DEFAULT_TOKENS, in a quarter of memory.

    Backends commit a page's memory when it is first written, so a generous plan costs nothing. CapacityError if the
    requested size exceeds the machine's memory.
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
