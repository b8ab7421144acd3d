"""Every operator with operands of shapes that are not round, for the driver that compares backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mnemos.contract import Batch
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.ops.protocol import ACTIVATIONS, AttentionParams, RopeParams

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
)


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
