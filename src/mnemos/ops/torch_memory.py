"""PyTorch's operators of memory-augmented models: pooling for routers, and attention to banks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from mnemos.contract import Batch
from mnemos.ops.protocol import MemoryParams, PoolParams


class TorchWindows:
    """Rows at the latest positions: for each slot (layers, length, width), position p at p % length."""

    def __init__(self, layers: int, width: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = layers, length, width
        self.length = length
        self._device, self._dtype = device, dtype
        self._slots: dict[int, Tensor] = {}

    def reserve(self, slots: int) -> None:
        """Memory is allocated when a slot is first written."""

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            if source in self._slots:
                self._slots[target] = self._slots[source].clone()

    def clear(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._slots.pop(slot, None)

    def layer(self, slot: int, layer: int) -> Tensor:
        """A view of a slot's rows in one layer."""
        if slot not in self._slots:
            self._slots[slot] = torch.zeros(self.shape, device=self._device, dtype=self._dtype)
        return self._slots[slot][layer]


def pooled_rows(x: Tensor, batch: Batch, windows: TorchWindows | None, layer: int, params: PoolParams) -> Tensor:
    """See `Ops.pool_rows`."""
    out = x.clone()
    for s, (first, last) in enumerate(pairwise(batch.sequence_starts.tolist())):
        rows, begin = x[first:last], int(batch.positions[first])
        if begin == 0:
            out[first:last] = _pooled(rows, params)
        if windows is None:
            continue
        held = windows.layer(int(batch.states[s]), layer)
        if begin == 0:
            kept = torch.arange(max(0, len(rows) - windows.length), len(rows), device=x.device)
            held[kept % windows.length] = rows[kept]
            continue
        for offset in range(len(rows)):
            position = begin + offset
            held[position % windows.length] = rows[offset]
            past = torch.arange(max(0, position - params.window + 1), position + 1, device=x.device)
            out[first + offset] = held[past % windows.length].mean(0)
    return out


def _pooled(rows: Tensor, params: PoolParams) -> Tensor:
    """What a whole prompt is routed by."""
    if params.kind == "rolling":
        rows = rows[-params.window :]
    if params.kind == "sequence-rolling":
        ends = range(1, len(rows) + 1)
        rows = torch.stack([rows[max(0, end - params.window) : end].mean(0) for end in ends])
    return rows.mean(0)


def attend_memory(
    q: Tensor, bank: tuple[Tensor, Tensor], ids: Tensor | None, weights: Tensor | None, params: MemoryParams
) -> Tensor:
    """See `Ops.memory_attention`."""
    queries = q.view(len(q), params.heads, params.head_dim)
    if ids is None or weights is None:
        return _attend(queries, *bank, params).reshape(q.shape)
    length, shared = params.rows // params.chapters, params.shared
    keys, values = (side.view(len(side), params.chapters, length, -1) for side in bank)
    out = torch.zeros_like(queries)
    if params.separate:
        if shared:
            first_keys, first_values = (side[:, :shared].flatten(1, 2) for side in (keys, values))
            out += _attend(queries, first_keys, first_values, params)
        for chapter in torch.unique(ids).tolist():
            row, place = torch.nonzero(ids == chapter, as_tuple=True)
            share = params.scaling * weights[row, place].to(q.dtype)
            answer = _attend(queries[row], keys[:, shared + chapter], values[:, shared + chapter], params)
            out.index_add_(0, row, share[:, None, None] * answer)
        return out.reshape(q.shape)
    shares = weights
    if shared:
        shares = torch.cat((weights.new_ones(len(q), shared), params.scaling * weights), dim=1)
        shares = shares / shares.sum(1, keepdim=True)
    # Rows of one sequence have the same chapters: each set is gathered once.
    sets, member = torch.unique(torch.cat((ids.double(), shares.double()), dim=1), dim=0, return_inverse=True)
    for number, one in enumerate(sets):
        row = torch.nonzero(member == number, as_tuple=True)[0]
        chosen = torch.cat((torch.arange(shared, device=q.device), shared + one[: ids.shape[1]].long()))
        share = one[ids.shape[1] :].to(q.dtype)[None, :, None, None]
        own_keys, own_values = ((side[:, chosen] * share).flatten(1, 2) for side in (keys, values))
        out[row] = _attend(queries[row], own_keys, own_values, params)
    return out.reshape(q.shape)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, params: MemoryParams) -> Tensor:
    """queries (rows, heads, head_dim), keys and values (kv_heads, n, head_dim) -> (rows, heads, head_dim)."""
    grouped = params.heads != params.kv_heads
    mixed = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], keys[None], values[None], scale=params.scale, enable_gqa=grouped
    )
    return mixed[0].transpose(0, 1)
