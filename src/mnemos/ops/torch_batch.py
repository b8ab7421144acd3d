"""A batch on PyTorch's device: which slots of the cache its rows are written to, and which they see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnemos.contract import Batch, KVLayout

NOT_SEEN = int(np.iinfo(np.int32).max)  # a position beyond every row's
Int64s = npt.NDArray[np.int64]
Put = Callable[[npt.NDArray[Any]], Tensor]


@dataclass(frozen=True)
class Together:
    """Sequences with equally many new tokens, whose attention is one call.

    rows (S, new): their rows in the batch, at `positions` (S, new); slots (S, longest): the cache slots of their pages'
    content, flat over pages, at the positions `held` (S, longest); longest: the most positions of one sequence. Shorter
    ones are padded with slots that no row sees. whole: the rows are the batch's, in order.
    """

    rows: Tensor
    positions: Tensor
    slots: Tensor
    held: Tensor
    whole: bool = False
    _visible: dict[int, Tensor] = field(default_factory=dict)

    def visible(self, window: int) -> Tensor:
        """(S, 1, new, longest) bool: what each row sees within a window, 0: without one; once for all layers."""
        if window not in self._visible:
            distance = self.positions[:, None, :, None] - self.held[:, None, None, :]
            seen = distance >= 0
            self._visible[window] = seen & (distance < window) if window else seen
        return self._visible[window]


@dataclass(frozen=True)
class TorchTables:
    """A batch's page tables in one layer group as indices into the cache, computed once for all its layers.

    new_slots (T,): where the new keys and values are stored; parts: attention's calls.
    """

    new_slots: Tensor
    parts: list[Together]


@dataclass(frozen=True)
class TorchBatch:
    """A `Batch` on the device, with its page tables in each layer group. host: the batch itself."""

    token_ids: Tensor
    positions: Tensor
    logit_rows: Tensor
    tables: list[TorchTables]
    host: Batch

    @classmethod
    def of(cls, batch: Batch, layout: KVLayout, device: torch.device) -> TorchBatch:
        """A batch as it is."""

        def put(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array.astype(np.int64)).to(device)

        tables = [_tables(batch, layout, group, put) for group in range(len(layout.groups))]
        return cls(put(batch.token_ids), put(batch.positions), put(batch.logit_rows), tables, batch)


def find_slots(batch: Batch, layout: KVLayout, group: int) -> tuple[Int64s, list[tuple[Int64s, Int64s]]]:
    """(the slots that the new tokens are stored in, each sequence's slots and the positions that they hold)."""
    size = layout.page_size
    new_slots = np.empty(len(batch.token_ids), dtype=np.int64)
    found = []
    within = np.arange(size)
    for s, (first, last) in enumerate(pairwise(batch.sequence_starts.tolist())):
        table = batch.table(s, group, len(layout.groups))
        pages, firsts = batch.pages[table].astype(np.int64), batch.page_positions[table].astype(np.int64)
        where = batch.positions[first:last]
        page = pages[np.searchsorted(firsts, where, side="right") - 1]
        new_slots[first:last] = page * size + where % size
        slots, held = ((start[:, None] + within).reshape(-1) for start in (pages * size, firsts))
        count = int(np.searchsorted(held, batch.positions[last - 1], side="right"))
        found.append((slots[:count], held[:count]))
    return new_slots, found


def padded(tables: list[tuple[Int64s, Int64s]], rows: int, length: int, unused: int = 0) -> tuple[Int64s, Int64s]:
    """Slots and the positions that they hold of sequences, (rows, length) each; `unused` is a slot that no row sees."""
    slots = np.full((rows, length), unused, dtype=np.int64)
    held = np.full((rows, length), NOT_SEEN, dtype=np.int64)
    for i, (own, positions) in enumerate(tables):
        slots[i, : len(own)], held[i, : len(own)] = own, positions
    return slots, held


def _tables(batch: Batch, layout: KVLayout, group: int, put: Put) -> TorchTables:
    new_slots, found = find_slots(batch, layout, group)
    bounds = list(pairwise(batch.sequence_starts.tolist()))
    together: dict[int, list[int]] = {}
    for s, (first, last) in enumerate(bounds):
        together.setdefault(last - first, []).append(s)
    parts = []
    for members in together.values():
        slots, held = padded([found[s] for s in members], len(members), max(len(found[s][0]) for s in members))
        rows = np.stack([np.arange(*bounds[s]) for s in members])
        whole = len(together) == 1
        parts.append(Together(put(rows), put(batch.positions[rows]), put(slots), put(held), whole))
    return TorchTables(put(new_slots), parts)
