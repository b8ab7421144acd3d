"""Every operator with operands of shapes that are not round, for the driver that compares backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mnemos.contract import Batch
from mnemos.formats.quantized_rows import QuantizedRows
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.ops.protocol import ACTIVATIONS, AttentionParams, BankSource, MemoryParams, PoolParams, RopeParams

ROWS = (1, 2, 3, 7, 33)
Run = Callable[[Any, np.random.Generator, int], Any]


@dataclass(frozen=True)
class Case:
    """run(ops, generator, rows) creates its own operands, the same for every backend, and applies one operator."""

    name: str
    run: Run


def floats(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.standard_normal(shape).astype(np.float32)


def weight(ops: Any, generator: np.random.Generator, rows: int, columns: int) -> Any:
    return ops.matrix(Tensor.from_array("weight", floats(generator, rows, columns) / np.float32(np.sqrt(columns))))


def quantized(ops: Any, generator: np.random.Generator, rows: int, columns: int) -> Any:
    """Random Q8_0 blocks: a float16 scale and 32 signed bytes."""
    blocks = rows * columns // 32
    scales = (generator.uniform(0.5, 1.5, blocks) / 127 / np.sqrt(columns)).astype(np.float16)
    quants = generator.integers(-127, 128, (blocks, 32)).astype(np.int8)
    data = np.concatenate([scales.view(np.uint8).reshape(blocks, 2), quants.view(np.uint8)], axis=1)
    return ops.matrix(Tensor("weight", TensorType.Q8_0, (rows, columns), data.reshape(-1)))


def _embed(ops: Any, g: np.random.Generator, t: int) -> Any:
    return ops.embed(weight(ops, g, 50, 37), g.integers(0, 50, t).astype(np.int32))


def _rows(ops: Any, g: np.random.Generator, t: int) -> Any:
    return ops.rows(floats(g, t, 37), g.integers(0, t, 5).astype(np.int32))


def _linear(bias: bool) -> Run:
    def run(ops: Any, g: np.random.Generator, t: int) -> Any:
        return ops.linear(floats(g, t, 70), weight(ops, g, 45, 70), floats(g, 45) if bias else None)

    return run


def _rms_norm(n: int) -> Run:
    return lambda ops, g, t: ops.rms_norm(floats(g, t, 3 * 35), floats(g, n), 1e-5)


def _layer_norm(bias: bool) -> Run:
    return lambda ops, g, t: ops.layer_norm(10 + floats(g, t, 77), floats(g, 77), floats(g, 77) if bias else None, 1e-5)


def _rope(head_dim: int, rotary_dim: int, magnitude: float) -> Run:
    def run(ops: Any, g: np.random.Generator, t: int) -> Any:
        frequencies = (10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)
        positions = g.integers(0, 3000, t).astype(np.int32)
        return ops.rope(floats(g, t, 3 * head_dim), positions, RopeParams(head_dim, rotary_dim, frequencies, magnitude))

    return run


def _route(normalise: bool) -> Run:
    return lambda ops, g, t: ops.route(floats(g, t, 40), weight(ops, g, 9, 40), 3, normalise)


def _experts(ops: Any, g: np.random.Generator, t: int) -> Any:
    ids = np.stack([g.permutation(7)[:3] for _ in range(t)]).astype(np.int32)
    x, shares = floats(g, t, 40), np.abs(floats(g, t, 3))
    gate, up, down = ([weight(ops, g, *shape) for _ in range(7)] for shape in ((52, 40), (52, 40), (40, 52)))
    return ops.experts(x, ids, shares, gate, up, down, "silu")


def _choose(ops: Any, g: np.random.Generator, t: int) -> Any:
    logits = floats(g, t, 9)
    logits[:, 5] = logits[:, 2]  # ties go to the lower id
    return ops.choose(3 * logits, 4)


def bank_source(g: np.random.Generator, params: MemoryParams, bits: int = 0, norm: str = "") -> BankSource:
    """Vectors of 28 columns, in float32 or quantized, and projections of them."""
    rows = floats(g, params.rows, 28)
    keys, values = floats(g, 2, params.kv_heads * params.head_dim, 28) / np.float32(5)
    stored = QuantizedRows.of(rows, bits) if bits else Tensor.from_array("rows", rows)
    return BankSource(stored, keys, values, norm, 1e-5, 0.9)


def _memory(params: MemoryParams, chosen: int) -> Run:
    """The rows of a tile choose alike or not, as those of a text or those of several do."""

    def run(ops: Any, g: np.random.Generator, t: int) -> Any:
        bank = ops.bank(bank_source(g, params), params)
        q = 2 * floats(g, t, params.heads * params.head_dim)
        if not params.chapters:
            return ops.memory_attention(q, bank, None, None, params)
        sets = np.stack([g.permutation(params.chapters - params.shared)[:chosen] for _ in range(3)]).astype(np.int32)
        weights = np.abs(floats(g, 3, chosen))
        member = np.sort(g.integers(0, 3, t))
        return ops.memory_attention(q, bank, sets[member], (weights / weights.sum(1)[:, None])[member], params)

    return run


MEMORIES = {
    "memory": (MemoryParams(6, 2, 24, 0.2, rows=300), 0),
    "memory undivided, by token": (MemoryParams(4, 2, 16, 0.3, rows=70, scaling=0.5, separate=True), 0),
    "memory of one row": (MemoryParams(3, 3, 8, 0.4, rows=1), 0),
    "memory by chapters": (MemoryParams(4, 1, 32, 0.2, rows=12 * 17, chapters=12), 3),
    "memory by chapters, some shared": (
        MemoryParams(4, 2, 16, 0.3, rows=6 * 160, chapters=6, shared=2, scaling=2.5),
        2,
    ),
    "memory by token": (MemoryParams(4, 2, 20, 0.3, rows=8 * 24, chapters=8, scaling=0.7, separate=True), 3),
    "memory by token, some shared": (
        MemoryParams(2, 1, 64, 0.1, rows=5 * 130, chapters=5, shared=1, scaling=1.3, separate=True),
        2,
    ),
}

CASES = (
    Case("embed", _embed),
    Case("rows", _rows),
    Case("linear", _linear(False)),
    Case("linear with bias", _linear(True)),
    Case("rms_norm", _rms_norm(105)),
    Case("rms_norm of heads", _rms_norm(35)),
    Case("layer_norm", _layer_norm(True)),
    Case("layer_norm without bias", _layer_norm(False)),
    Case("rope", _rope(64, 64, 1.0)),
    Case("rope of a part", _rope(37, 22, 1.3)),
    *(Case(kind, lambda ops, g, t, kind=kind: ops.activation(4 * floats(g, t, 53), kind)) for kind in ACTIVATIONS),
    *(
        Case(f"gated {kind}", lambda ops, g, t, kind=kind: ops.gated_activation(*floats(g, 2, t, 53), kind))
        for kind in ACTIVATIONS
    ),
    Case("add", lambda ops, g, t: ops.add(floats(g, t, 53), floats(g, t, 53))),
    Case("scale", lambda ops, g, t: ops.scale(floats(g, t, 53), 0.37)),
    Case("softcap", lambda ops, g, t: ops.softcap(20 * floats(g, t, 53), 7.5)),
    Case("route", _route(False)),
    Case("route normalised", _route(True)),
    Case("experts", _experts),
    Case("choose", _choose),
    *(Case(name, _memory(*memory)) for name, memory in MEMORIES.items()),
)


@dataclass(frozen=True)
class PoolCase:
    """Two texts that are read, go on, return by two positions and go on again, one beside a third that is new."""

    params: PoolParams
    width: int = 37
    length: int = 9  # of the windows

    def batches(self) -> list[Batch]:
        steps = [[range(12), range(3)], [range(12, 13), range(3, 7)], [range(11, 14), range(6, 7), range(5)]]
        states = [[2, 0], [2, 0], [2, 0, 1]]
        nothing = Table(np.empty(0, np.int32), np.empty(0, np.int32))
        return [
            replace(batch_of(step, [nothing] * len(step)), states=np.array(slots, dtype=np.int32))
            for step, slots in zip(steps, states, strict=True)
        ]


POOL_CASES = tuple(PoolCase(PoolParams(kind, 4)) for kind in ("sequence", "sequence-rolling", "rolling", "hybrid"))


@dataclass(frozen=True)
class AttentionCase:
    """Sequences that grow step by step. steps: the new tokens of each sequence at each step."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    window: int = 0
    softcap: float = 0.0
    steps: tuple[tuple[int, ...], ...] = ((33, 140, 1), (1, 20, 1), (1, 1, 1), (30, 3, 2), (1, 1, 1))

    @property
    def params(self) -> AttentionParams:
        return AttentionParams(self.heads, self.kv_heads, self.head_dim, self.head_dim**-0.5, self.window, self.softcap)

    @property
    def pages(self) -> int:
        """Pages of one sequence."""
        return max(map(sum, zip(*self.steps, strict=True))) // self.page_size + 1

    def batches(self, generator: np.random.Generator) -> list[Batch]:
        """Pages are stored in the cache in random order; a table is without those that no window reaches."""
        sequences = len(self.steps[0])
        pages = generator.permutation(sequences * self.pages).reshape(sequences, self.pages)
        done = [0] * sequences
        batches = []
        for step in self.steps:
            hidden = [max(0, d - self.window + 1) // self.page_size if self.window else 0 for d in done]
            tables = [Table(pages[s, n:], self.page_size * np.arange(n, self.pages)) for s, n in enumerate(hidden)]
            batches.append(batch_of([range(d, d + n) for d, n in zip(done, step, strict=True)], tables))
            done = [d + n for d, n in zip(done, step, strict=True)]
        return batches


class Table(NamedTuple):
    """The pages of one sequence and the first position that each holds."""

    pages: np.ndarray
    positions: np.ndarray


def batch_of(positions: Sequence[Sequence[int]], tables: Sequence[Table]) -> Batch:
    """A batch of sequences with these new positions; without token ids and logit rows."""

    def ints(parts: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])

    rows = ints(positions)
    return Batch(
        token_ids=np.zeros_like(rows),
        positions=rows,
        sequence_starts=np.cumsum([0, *map(len, positions)], dtype=np.int32),
        pages=ints(table.pages for table in tables),
        page_positions=ints(table.positions for table in tables),
        page_starts=np.cumsum([0, *(len(table.pages) for table in tables)], dtype=np.int32),
        logit_rows=rows[:0],
    )


ATTENTION_CASES = (
    AttentionCase(6, 2, 64, 32),
    AttentionCase(3, 3, 24, 16, window=50),
    AttentionCase(8, 1, 40, 4, softcap=3.0),
    AttentionCase(5, 5, 17, 128, window=3),
    AttentionCase(14, 2, 32, 32, steps=((300, 5), (1, 1), (700, 1), (1, 40), (1, 1))),
)
