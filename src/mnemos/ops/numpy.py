"""The reference backend: short, obviously right, slow. Every other backend is tested against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import erf

import numpy as np
import numpy.typing as npt

from mnemos.contract import Batch, Floats, Ints, KVLayout, Output, Recall
from mnemos.formats.tensor import Tensor
from mnemos.ops.protocol import AttentionParams, BankSource, Forward, MemoryParams, PoolParams, RopeParams, Rows
from mnemos.ops.recall import Bytes, index_keys, recalled_effects, see_from_nearer, seen_pages

_erf = np.vectorize(erf, otypes=[np.float64])


class NumpyCache:
    """Pages of keys and values, held as float32 values already rounded to the layout's dtype."""

    def __init__(self, layout: KVLayout, pages: int | Sequence[int]) -> None:
        self.layout = layout
        self.pages = layout.counts(pages)
        page = (layout.page_size, layout.kv_heads, layout.head_dim)
        self.values = [  # by layer group: (layers, 2, pages, page size, heads, head size)
            np.zeros((len(group.layers), 2, count, *page), dtype=np.float32)
            for group, count in zip(layout.groups, self.pages, strict=True)
        ]
        self._recalled: dict[int, list[Floats]] = {}  # by layer, of (2, rows, heads)

    def begin_recall(self, recall: Recall) -> None:
        """See `RecallingCache`."""
        self.layout = replace(self.layout, recall=recall)

    def recalled(self) -> Floats:
        """See `RecallingCache`."""
        found = {layer: np.concatenate(rows, axis=1) for layer, rows in self._recalled.items()}
        heads = max((rows.shape[2] for rows in found.values()), default=0)
        means = np.zeros((2, self.layout.layers, heads), dtype=np.float32)
        for layer, rows in found.items():
            means[:, layer] = rows.mean(axis=1) if rows.shape[1] else 0
        return means.reshape(2, self.layout.layers, self.layout.kv_heads, -1)

    def count_recalled(self, layer: int, effects: Floats) -> None:
        """Adds what each of some rows has recalled: shares and changes, (2, rows, heads)."""
        self._recalled.setdefault(layer, []).append(effects)

    def index(self, group: int, layer: int, pages: Ints, head: int) -> tuple[Bytes, Floats]:
        """The index of a head's keys in these pages: codes (pages, page size, components) and scales; see Recall."""
        assert self.layout.recall is not None
        return index_keys(self.values[group][layer][0][pages, :, head][..., list(self.layout.recall.components)])

    def copy(self, sources: Sequence[int], targets: Sequence[int], group: int = 0) -> None:
        values = self.values[group]
        values[:, :, list(targets)] = values[:, :, list(sources)]

    def read(self, page: int, group: int = 0) -> npt.NDArray[np.uint8]:
        return np.ascontiguousarray(self.values[group][:, :, page]).reshape(-1).view(np.uint8)

    def write(self, page: int, content: npt.NDArray[np.uint8], group: int = 0) -> None:
        target = self.values[group][:, :, page]
        target[:] = content.view(np.float32).reshape(target.shape)

    fill = write  # see `FillingCache`


class NumpyWindows:
    """Rows at the latest positions: for each slot (layers, length, width), position p at p % length."""

    def __init__(self, layers: int, width: int, length: int) -> None:
        self.shape = layers, length, width
        self.slots: dict[int, Floats] = {}

    def reserve(self, slots: int) -> None:
        """Memory is allocated when a slot is first written."""

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            if source in self.slots:
                self.slots[target] = self.slots[source].copy()

    def clear(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.slots.pop(slot, None)

    def layer(self, slot: int, layer: int) -> Floats:
        """A view of a slot's rows in one layer."""
        return np.asarray(self.slots.setdefault(slot, np.zeros(self.shape, dtype=np.float32))[layer])


def round_to(x: Floats, dtype: str) -> Floats:
    """x (..., head_dim) as read back after storage in `dtype`."""
    if dtype == "float16":
        return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return np.asarray(rounded & np.uint32(0xFFFF0000), dtype=np.uint32).view(np.float32)
    if dtype == "int8":
        scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        return np.asarray(np.rint(x * inverse) * scale, dtype=np.float32)
    return x


def softmax(x: Floats) -> Floats:
    """Along the last axis, of any shape; -inf stands for what has no probability."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


class NumpyOps:
    """The reference: each operator as its definition reads, in float32, slow. Other backends are compared with it."""

    name = "numpy"
    cache_dtype = "float16"

    def matrix(self, tensor: Tensor, rows: Rows | None = None) -> Floats:
        values = tensor.dequantize().reshape(tensor.rows, tensor.columns)
        return values if rows is None else values[rows]

    def vector(self, tensor: Tensor) -> Floats:
        return tensor.dequantize().reshape(-1)

    def weight_memory(self, tensors: Iterable[Tensor]) -> None:
        """Unknown: only the native core reports the available memory."""

    def finish(self) -> None:
        """Parameters are ready as soon as they are created."""

    def cache(self, layout: KVLayout, pages: int | Sequence[int]) -> NumpyCache:
        return NumpyCache(layout, pages)

    def bank(self, source: BankSource, params: MemoryParams) -> tuple[Floats, Floats]:
        shape = (params.rows, params.kv_heads, params.head_dim)
        keys, values = source.projected(params.rows)
        return keys.reshape(shape), values.reshape(shape)

    def windows(self, layers: int, width: int, length: int) -> NumpyWindows:
        return NumpyWindows(layers, width, length)

    def compile(self, forward: Forward, cache: NumpyCache) -> Callable[[Batch], Output]:
        def step(batch: Batch) -> Output:
            hidden, logits, *early = forward(self, batch, cache)
            return Output(logits=logits, hidden=hidden, early=np.stack(early) if early else None)

        return step

    def embed(self, matrix: Floats, token_ids: Ints) -> Floats:
        return np.asarray(matrix[token_ids])

    def rows(self, x: Floats, index: Ints) -> Floats:
        return np.asarray(x[index])

    def linear(self, x: Floats, matrix: Floats, bias: Floats | None = None) -> Floats:
        y: Floats = x @ matrix.T
        return y if bias is None else y + bias

    def factors(
        self, pairs: Sequence[tuple[Floats, Floats] | None], shape: tuple[int, int]
    ) -> Sequence[tuple[Floats, Floats] | None]:
        return pairs

    def add_low_rank(
        self, y: Floats, x: Floats, factors: Sequence[tuple[Floats, Floats] | None], batch: Batch
    ) -> Floats:
        result: Floats = y.copy()
        for row, adapter in enumerate(batch.row_adapters(len(x))):
            pair = None if adapter < 0 else factors[adapter]
            if pair is not None:
                a, b = pair
                result[row] += b @ (a @ x[row])
        return result

    def rms_norm(self, x: Floats, weight: Floats, epsilon: float) -> Floats:
        groups = x.reshape(len(x), x.shape[1] // len(weight), len(weight))
        mean = np.mean(groups.astype(np.float64) ** 2, axis=-1, keepdims=True)
        y = groups / np.sqrt(mean + epsilon) * weight
        return np.asarray(y, dtype=np.float32).reshape(x.shape)

    def layer_norm(self, x: Floats, weight: Floats, bias: Floats | None, epsilon: float) -> Floats:
        centred = x - x.mean(axis=-1, keepdims=True, dtype=np.float64)
        y = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + epsilon) * weight
        return np.asarray(y if bias is None else y + bias, dtype=np.float32)

    def rope(self, x: Floats, positions: Ints, params: RopeParams) -> Floats:
        half = params.rotary_dim // 2
        angles = positions.astype(np.float32)[:, None] * params.frequencies
        cos, sin = (f(angles.astype(np.float64))[:, None] * params.magnitude for f in (np.cos, np.sin))
        heads = x.reshape(len(x), -1, params.head_dim)
        first, second, rest = np.split(heads, (half, 2 * half), axis=-1)
        rotated = np.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1)
        return np.asarray(rotated, dtype=np.float32).reshape(x.shape)

    def attention(
        self, q: Floats, k: Floats, v: Floats, cache: NumpyCache, layer: int, batch: Batch, params: AttentionParams
    ) -> Floats:
        dtype, page_size = cache.layout.dtype, cache.layout.page_size
        group, index = cache.layout.place(layer)
        keys, values = cache.values[group][index]
        out = np.empty_like(q)
        for s in range(batch.sequences):
            new = slice(batch.sequence_starts[s], batch.sequence_starts[s + 1])
            positions = batch.positions[new]
            table = batch.table(s, group, len(cache.layout.groups))
            pages, firsts = batch.pages[table], batch.page_positions[table]
            shape = (len(positions), params.kv_heads, params.head_dim)
            page = pages[np.searchsorted(firsts, positions, side="right") - 1]
            keys[page, positions % page_size] = round_to(k[new].reshape(shape), dtype)
            values[page, positions % page_size] = round_to(v[new].reshape(shape), dtype)

            held = (firsts[:, None] + np.arange(page_size)).reshape(-1)
            past = held[held <= positions[-1]]
            page = pages.repeat(page_size)[: len(past)]
            shared = params.heads // params.kv_heads
            all_keys = keys[page, past % page_size].repeat(shared, axis=1)
            all_values = values[page, past % page_size].repeat(shared, axis=1)
            queries = q[new].reshape(len(positions), params.heads, params.head_dim)
            scores = np.einsum("ihd,jhd->hij", queries, all_keys) * np.float32(params.scale)
            recall = None if params.window else _recall_of(cache, batch, s)
            if recall is not None and recall.farthest and params.rope is not None:
                see_from_nearer(self.rope, scores, queries, all_keys, positions, page_size, recall.farthest, params)
            if params.softcap:
                scores = params.softcap * np.tanh(scores / params.softcap)
            distance = positions[:, None] - past
            hidden = (distance < 0) | ((distance >= params.window) if params.window else False)
            if recall is not None:
                scaled = queries * np.float32(params.scale)
                seen = _recalled(cache, recall, layer, scaled, positions, pages, params.kv_heads)
                hidden = hidden | ~seen.repeat(page_size, axis=2)[:, :, : len(past)].repeat(shared, axis=0)
            probabilities = softmax(np.where(hidden, -np.inf, scores))
            if recall is not None and recall.measured:
                heads = np.isin(np.arange(params.kv_heads), recall.heads[layer]).repeat(shared)
                effects = recalled_effects(recall, page_size, probabilities, all_values, positions)
                cache.count_recalled(layer, effects * heads)
            out[new] = np.einsum("hij,jhd->ihd", probabilities, all_values).reshape(len(positions), -1)
        return out

    def activation(self, x: Floats, kind: str) -> Floats:
        if kind == "silu":
            y = x / (1 + np.exp(-x.astype(np.float64)))
        elif kind == "gelu":
            y = 0.5 * x * (1 + _erf(x / np.sqrt(2)))
        elif kind == "gelu_tanh":
            y = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)))
        elif kind == "relu":
            y = np.maximum(x, 0)
        elif kind == "sigmoid":
            y = 1 / (1 + np.exp(-x.astype(np.float64)))
        elif kind == "tanh":
            y = np.tanh(x)
        else:
            raise ValueError(f"activation {kind!r} is unknown")
        return np.asarray(y, dtype=np.float32)

    def gated_activation(self, gate: Floats, up: Floats, kind: str) -> Floats:
        return self.activation(gate, kind) * up

    def add(self, x: Floats, y: Floats) -> Floats:
        return x + y

    def scale(self, x: Floats, factor: float) -> Floats:
        return np.asarray(x * np.float32(factor))

    def softcap(self, x: Floats, cap: float) -> Floats:
        return np.asarray(np.float32(cap) * np.tanh(x / np.float32(cap)))

    def route(self, x: Floats, router: Floats, top_k: int, normalise: bool) -> tuple[Ints, Floats]:
        probabilities = softmax(x @ router.T)
        ids = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top_k].astype(np.int32)
        weights = np.take_along_axis(probabilities, ids, axis=-1)
        return ids, weights / weights.sum(axis=-1, keepdims=True) if normalise else weights

    def choose(self, logits: Floats, top_k: int) -> tuple[Ints, Floats]:
        probabilities = softmax(logits)
        ids = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top_k].astype(np.int32)
        weights = np.take_along_axis(probabilities, ids, axis=-1)
        return ids, weights / weights.sum(axis=-1, keepdims=True)

    def pool_rows(
        self, x: Floats, batch: Batch, windows: NumpyWindows | None, layer: int, params: PoolParams
    ) -> Floats:
        out = x.copy()
        for s in range(batch.sequences):
            rows = slice(batch.sequence_starts[s], batch.sequence_starts[s + 1])
            positions, states = batch.positions[rows], x[rows]
            held = windows.layer(int(batch.states[s]), layer) if windows is not None else np.empty((0, 0), np.float32)
            if positions[0] == 0:
                out[rows] = _pooled(states, params)
            for position, row, pooled in zip(positions, states, out[rows], strict=True):
                if len(held):
                    held[position % len(held)] = row
                if positions[0] > 0 and params.remembers:
                    past = np.arange(max(0, position - params.window + 1), position + 1)
                    pooled[:] = held[past % len(held)].mean(axis=0)
        return np.asarray(out)

    def memory_attention(
        self,
        q: Floats,
        bank: tuple[Floats, Floats],
        ids: Ints | None,
        weights: Floats | None,
        params: MemoryParams,
    ) -> Floats:
        keys, values = (side.repeat(params.heads // params.kv_heads, axis=1) for side in bank)
        queries = q.reshape(len(q), params.heads, params.head_dim) * np.float32(params.scale)
        out = np.zeros_like(queries)

        def attend(query: Floats, rows: Rows, share: Floats) -> Floats:
            """softmax(query . (share * keys)) (share * values) over some of the rows; share (rows,)."""
            chances = softmax(np.einsum("hd,jhd->hj", query, keys[rows]) * share)
            return np.asarray(np.einsum("hj,jhd->hd", chances * share, values[rows]))

        if ids is None or weights is None:
            every = np.arange(params.rows)
            for t, query in enumerate(queries):
                out[t] = attend(query, every, np.ones(params.rows, dtype=np.float32))
            return np.asarray(out.reshape(q.shape))
        length, shared = params.rows // params.chapters, params.shared
        for t, query in enumerate(queries):
            shares = np.concatenate((np.ones(shared), params.scaling * weights[t])).astype(np.float32)
            chapters = np.concatenate((np.arange(shared), shared + ids[t]))
            rows = (chapters[:, None] * length + np.arange(length)).reshape(-1)
            if not params.separate:
                joint = shares / shares.sum() if shared else weights[t]
                out[t] = attend(query, rows, joint.repeat(length))
                continue
            one = np.ones(length, dtype=np.float32)
            if shared:
                out[t] = attend(query, rows[: shared * length], one.repeat(shared))
            for share, chapter in zip(shares[shared:], chapters[shared:], strict=True):
                out[t] += share * attend(query, chapter * length + np.arange(length), one)
        return np.asarray(out.reshape(q.shape))

    def experts(
        self,
        x: Floats,
        ids: Ints,
        weights: Floats,
        gate: Sequence[Floats],
        up: Sequence[Floats],
        down: Sequence[Floats],
        kind: str,
    ) -> Floats:
        y = np.zeros((len(x), down[0].shape[0]), dtype=np.float32)
        for row, (chosen, share) in enumerate(zip(ids, weights, strict=True)):
            for expert, weight in zip(chosen, share, strict=True):
                one = x[row : row + 1]
                inner = self.gated_activation(self.linear(one, gate[expert]), self.linear(one, up[expert]), kind)
                y[row] += weight * self.linear(inner, down[expert])[0]
        return y


def _recall_of(cache: NumpyCache, batch: Batch, sequence: int) -> Recall | None:
    """How a sequence's rows see a long text."""
    recall, page = cache.layout.recall, cache.layout.page_size
    if recall is None or not len(batch.memories) or not batch.memories[sequence].any():
        return recall
    window, recalled, sinks = (int(pages) * page for pages in batch.memories[sequence])
    return replace(recall, window=window, recall=recalled, sinks=sinks)


def _recalled(
    cache: NumpyCache, recall: Recall, layer: int, queries: Floats, positions: Ints, pages: Ints, kv_heads: int
) -> npt.NDArray[np.bool_]:
    """Which pages of its table each row sees in each key/value head: (kv_heads, rows, pages).

    queries (rows, heads, head size), scaled. The pages are those of all positions from 0 on.
    """
    size = cache.layout.page_size
    seen = np.ones((kv_heads, len(positions), len(pages)), dtype=np.bool_)
    group, index = cache.layout.place(layer)
    for head in range(kv_heads):
        recalls = head in recall.heads[layer]
        codes, scales = cache.index(group, index, pages if recalls else pages[:0], head)
        for row, position in enumerate(positions):
            own, page = queries[row].reshape(kv_heads, -1, queries.shape[2])[head], int(position) // size
            own = own[list(recall.naming_of(layer, head)) or slice(None)][:, list(recall.components)]
            seen[head, row, : page + 1] = seen_pages(recall, size, page, own, codes[:page], scales[:page], recalls)
    return seen


def _pooled(states: Floats, params: PoolParams) -> Floats:
    """What a whole prompt is routed by."""
    if params.kind == "rolling":
        states = states[-params.window :]
    if params.kind == "sequence-rolling":
        ends = range(1, len(states) + 1)
        states = np.stack([states[max(0, end - params.window) : end].mean(axis=0) for end in ends])
    return np.asarray(states.mean(axis=0))
