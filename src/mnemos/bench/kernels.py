"""Times each native kernel separately and compares it with the machine's memory and arithmetic limits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mnemos.contract import Batch, Floats, KVLayout
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.machine.figures import Limits, Machine, examine
from mnemos.ops.native import NativeOps
from mnemos.ops.protocol import Array, AttentionParams, BankSource, MemoryParams, Ops, PoolParams

WEIGHT_TYPES = (
    TensorType.Q4_0,
    TensorType.Q4_1,
    TensorType.Q5_0,
    TensorType.Q8_0,
    TensorType.Q4_K,
    TensorType.Q5_K,
    TensorType.Q6_K,
    TensorType.IQ4_NL,
    TensorType.BF16,
    TensorType.F16,
    TensorType.F32,
)
_WIDTH = 2048
_WEIGHT_BYTES = 96 << 20  # more than the last-level cache of most machines, so that reads come from memory
_CONTEXT = 1024
_REPEATS, _REPEATS_OF_FEW, _FEW = 3, 12, 8  # steps of few rows take milliseconds, which anything disturbs

Forward = Callable[[Ops, Any, Any], tuple[Array, Array]]


@dataclass(frozen=True)
class KernelTime:
    """One kernel over `rows` rows of activations: seconds, bytes of weights or cache read, floating-point operations.

    `limit_seconds` is the larger of the minimum times for reading and computing.
    """

    kernel: str
    rows: int
    seconds: float
    bytes: int
    operations: int
    limit_seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.seconds / 1e9

    @property
    def gigaflops(self) -> float:
        return self.operations / self.seconds / 1e9

    @property
    def share(self) -> float:
        """The share of the machine's limit that the kernel reaches."""
        return self.limit_seconds / self.seconds


def measure_kernels(
    machine: Machine, rows: Sequence[int] = (1, 32, 512), types: Sequence[TensorType] = WEIGHT_TYPES
) -> Iterator[KernelTime]:
    """Matrix products of every type, then attention over a long context, yielded as they are measured."""
    ops = NativeOps()
    for kind in types:
        yield from _measure_products(ops, kind, rows, machine.limits)
    yield from _measure_attention(ops, rows, machine)
    yield from _measure_memory(ops, rows, machine, chapters=0)
    yield from _measure_memory(ops, rows, machine, chapters=64)


def _measure_products(ops: NativeOps, kind: TensorType, rows: Sequence[int], limits: Limits) -> Iterator[KernelTime]:
    """A chain of square products, with norms in between to keep values in range."""
    first = ops.matrix(_random_weight(kind, _WIDTH))
    count = max(2, _WEIGHT_BYTES // first.bytes)
    weights = [first, *(ops.matrix(_random_weight(kind, _WIDTH)) for _ in range(count - 1))]
    embedding = ops.matrix(Tensor.from_array("embedding", _floats(8, _WIDTH)))
    norm = np.ones(_WIDTH, dtype=np.float32)

    def forward(ops: Ops, batch: Any, cache: Any) -> tuple[Array, Array]:
        x = ops.embed(embedding, batch.token_ids)
        for weight in weights:
            x = ops.rms_norm(ops.linear(x, weight), norm, 1e-5)
        return x, ops.rows(x, batch.logit_rows)

    size, operations = count * first.bytes, 2 * count * _WIDTH**2
    rate = 2 * limits.rates[first.form]
    for t, seconds in _time_steps(ops, forward, KVLayout(1, 1, 8), rows, context=0):
        limit = max(size / limits.bandwidth, operations * t / rate)
        yield KernelTime(f"linear {kind.name}", t, seconds, size, operations * t, limit)


def _measure_attention(ops: NativeOps, rows: Sequence[int], machine: Machine) -> Iterator[KernelTime]:
    """Heads as in a model with a billion parameters, several layers, after a context of 1,024 positions."""
    rate = 2 * machine.limits.rates["bfloat16" if ops.cache_dtype == "bfloat16" else "float32"]
    layers, heads, kv_heads, head_dim = 8, 32, 8, 64
    embedding = ops.matrix(Tensor.from_array("embedding", _floats(8, heads * head_dim)))
    keys = ops.matrix(Tensor.from_array("keys", _floats(8, kv_heads * head_dim)))
    layout = KVLayout(layers, kv_heads, head_dim, dtype=ops.cache_dtype)
    params = AttentionParams(heads, kv_heads, head_dim, head_dim**-0.5)

    def forward(ops: Ops, batch: Any, cache: Any) -> tuple[Array, Array]:
        x, k = ops.embed(embedding, batch.token_ids), ops.embed(keys, batch.token_ids)
        for layer in range(layers):
            x = ops.attention(x, k, k, cache, layer, batch, params)
        return x, ops.rows(x, batch.logit_rows)

    for t, seconds in _time_steps(ops, forward, layout, rows, _CONTEXT):
        size = (_CONTEXT + t) * layout.page_bytes // layout.page_size
        operations = 4 * layers * heads * head_dim * t * (_CONTEXT + t // 2)
        limit = max(size / machine.limits.bandwidth, operations / rate)
        yield KernelTime(f"attention {layout.dtype} after {_CONTEXT}", t, seconds, size, operations, limit)


def _measure_memory(ops: NativeOps, rows: Sequence[int], machine: Machine, chapters: int) -> Iterator[KernelTime]:
    """Attention to 1,024 vectors, or to 4 chapters of 1,024 out of many; heads as in a model of 135 million."""
    rate = 2 * machine.limits.rates["bfloat16" if ops.cache_dtype == "bfloat16" else "float32"]
    layers, heads, kv_heads, head_dim, chosen = 8, 9, 3, 64, 4
    vectors = _CONTEXT * max(chapters, 1)
    params = MemoryParams(heads, kv_heads, head_dim, head_dim**-0.5, vectors, chapters)
    embedding = ops.matrix(Tensor.from_array("embedding", _floats(8, heads * head_dim)))
    router = ops.matrix(Tensor.from_array("router", _floats(max(chapters, 1), heads * head_dim)))
    stored = Tensor.from_array("bank", _floats(vectors, head_dim))
    projection = _floats(kv_heads * head_dim, head_dim) / np.float32(head_dim**0.5)
    banks = [ops.bank(BankSource(stored, projection, projection), params) for _ in range(layers)]

    def forward(ops: Ops, batch: Any, cache: Any) -> tuple[Array, Array]:
        x = ops.embed(embedding, batch.token_ids)
        ids = weights = None
        if chapters:
            states = ops.pool_rows(x, batch, None, 0, PoolParams("sequence", 1))
            ids, weights = ops.choose(ops.linear(states, router), chosen)
        for bank in banks:
            x = ops.memory_attention(x, bank, ids, weights, params)
        return x, ops.rows(x, batch.logit_rows)

    name = f"memory {chosen} of {chapters} chapters" if chapters else f"memory of {vectors}"
    read = _CONTEXT * (chosen if chapters else 1)
    for t, seconds in _time_steps(ops, forward, KVLayout(1, 1, 8), rows, context=0):
        size = sum(bank.bytes for bank in banks)  # no chapter is made that is not read
        operations = 4 * layers * heads * head_dim * t * read
        limit = max(size / machine.limits.bandwidth, operations / rate)
        yield KernelTime(name, t, seconds, size, operations, limit)


def _time_steps(
    ops: NativeOps, forward: Forward, layout: KVLayout, rows: Sequence[int], context: int
) -> Iterator[tuple[int, float]]:
    """(rows, best seconds) of a step of one sequence after `context` positions."""
    pages = -(-(context + max(rows)) // layout.page_size)
    step = ops.compile(forward, ops.cache(layout, pages))
    for t in (context, *rows) if context else rows:  # the first one fills the cache
        start = context if t != context else 0
        batch = _batch(t, start, pages, layout.page_size)
        repeats = _REPEATS_OF_FEW if t <= _FEW else _REPEATS
        seconds = min(_seconds(lambda batch=batch: step(batch)) for _ in range(repeats))  # type: ignore[misc]
        if t != context:
            yield t, seconds


def _batch(rows: int, start: int, pages: int, page_size: int) -> Batch:
    token_ids = (np.arange(rows) % 8).astype(np.int32)
    positions = np.arange(start, start + rows, dtype=np.int32)
    bounds = np.array([0, rows], dtype=np.int32)
    table = np.arange(pages, dtype=np.int32)
    page_starts = np.array([0, pages], dtype=np.int32)
    last = np.array([rows - 1], dtype=np.int32)
    return Batch(token_ids, positions, bounds, table, page_size * table, page_starts, last)


def _random_weight(kind: TensorType, width: int) -> Tensor:
    """Values of ordinary size: many processors are much slower with denormal numbers, which random bytes may encode."""
    shape = (width, width)
    values = 0.02 * _floats(*shape)
    if kind == TensorType.F32:
        data = values.view(np.uint8)
    elif kind == TensorType.F16:
        data = values.astype(np.float16).view(np.uint8)
    elif kind == TensorType.BF16:
        data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:  # bytes below 0x34 are numbers below 0.25 wherever a block contains a float
        data = np.random.default_rng(0).integers(0, 0x34, width * kind.row_bytes(width), dtype=np.uint8)
    return Tensor("weight", kind, shape, data.reshape(-1))


def _floats(rows: int, columns: int) -> Floats:
    return np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(as_json: bool) -> int:
    """Prints a line for each kernel once it is measured."""
    machine = examine(_WEIGHT_BYTES)
    if not as_json:
        print(f"{machine}\n")
        print(f"{'kernel':28}{'rows':>5}{'ms':>10}{'GB/s':>8}{'GFLOP/s':>9}{'of limit':>10}")
    for result in measure_kernels(machine):
        if as_json:
            rates = {"gb_per_s": round(result.gigabytes_per_second, 2), "gflop_per_s": round(result.gigaflops, 1)}
            print(json.dumps({**asdict(result), **rates, "share": round(result.share, 3)}), flush=True)
        else:
            print(
                f"{result.kernel:28}{result.rows:5}{result.seconds * 1e3:10.3f}{result.gigabytes_per_second:8.1f}"
                f"{result.gigaflops:9.0f}{result.share:10.0%}",
                flush=True,
            )
    return 0
