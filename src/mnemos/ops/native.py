"""The native backend: a forward pass is recorded once and then runs in C++, one call per step, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from mmap import mmap
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.contract import Batch, Floats, Ints, KVLayout, Output
from mnemos.errors import ConfigError
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.machine.levels import settle_levels
from mnemos.native import core as _native
from mnemos.native import require_core
from mnemos.ops.native_cache import NativeCache, NativeWindows
from mnemos.ops.protocol import AttentionParams, BankSource, Forward, MemoryParams, PoolParams, RopeParams, Rows
from mnemos.rules import COUNT

require_core()  # this module is useless without it
NATIVE_DTYPES = ("auto", "float32")
# From this many rows on, finding the most probable tokens without all logits is faster; fewer are memory-bound anyway.
ARGMAX_ALONE_FROM = 8
LARGEST_PAGE = 32  # rows of a memory bank's pages
_NO_INTS = np.zeros(0, dtype=np.int32)
_NO_FLOATS = np.zeros(0, dtype=np.float32)
_STARTS = np.zeros(1, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class Value:
    """A result of the program being recorded."""

    program: _native.Program
    number: int


@dataclass(frozen=True, eq=False)
class _BatchArray:
    """One of a batch's arrays, whose content is only known when a step runs."""

    program: _native.Program
    field: str


@dataclass(frozen=True)
class _RecordedBatch:
    """Stands in for a batch while an architecture is being recorded."""

    token_ids: _BatchArray
    positions: _BatchArray
    logit_rows: _BatchArray


class NativeOps:
    """Operators that are recorded if their operands come from a recording, and run immediately on NumPy arrays.

    threads: None for all cores that the process may use; backends with equally many threads share one pool. dtype:
    "auto" multiplies weights as stored, with activations rounded to 8 bits in blocks of 32 (15 bits for keys, values,
    logits and what follows the last attention) or to bfloat16; "float32" expands weights and multiplies in float32.
    """

    name = "native"

    def __init__(self, threads: int | None = None, dtype: str = "auto") -> None:
        if dtype not in NATIVE_DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(NATIVE_DTYPES)}")
        if threads is not None:
            COUNT.apply("threads", threads)
        self.as_float32 = dtype == "float32"
        settle_levels()
        self.cache_dtype = "bfloat16" if _native.keeps_bfloats() else "float16"
        self.pool = _native.shared_pool(threads or 0)
        self._limit = 0
        self._unpacked: list[tuple[_native.Matrix, npt.NDArray[np.uint8], Rows | None, bool]] = []
        self._packing = Lock()

    @property
    def threads(self) -> int:
        """How many threads a step has at most, without a limit."""
        return self.pool.threads

    def limit_threads(self, threads: int) -> None:
        """Steps have at most this many threads from now on, which changes no result."""
        self._limit = COUNT.apply("threads", threads)

    # Parameters.

    def matrix(self, tensor: Tensor, rows: Rows | None = None) -> _native.Matrix:
        """The weights are packed on first use, or by `finish`."""
        matrix = _native.allocate_matrix(
            tensor.data, int(tensor.type), tensor.rows, tensor.columns, as_float32=self.as_float32, order=rows
        )
        self._unpacked.append((matrix, tensor.data, rows, _is_mapped(tensor.data)))
        return matrix

    def weight_memory(self, tensors: Iterable[Tensor]) -> int:
        """Weights take roughly their size in the file, unless they are expanded."""
        expanded = 4 if self.as_float32 else 0
        return sum(max(len(tensor.data), expanded * tensor.size) for tensor in tensors)

    def finish(self) -> None:
        with self._packing:
            if self._unpacked:
                _native.pack_matrices(self._unpacked, self.pool)
                self._unpacked = []

    def factors(self, pairs: Sequence[tuple[Floats, Floats] | None], shape: tuple[int, int]) -> _native.LowRank:
        """Kept in float16 unless weights are expanded, with a power of two that uses its range."""
        kind = TensorType.F32 if self.as_float32 else TensorType.F16

        def stored(a: Floats, b: Floats) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], int, float]:
            (down, one), (up, other) = (_as_stored(values, self.as_float32) for values in (a, b))
            return down, up, len(a), one * other

        own = [None if pair is None else stored(*pair) for pair in pairs]
        return _native.LowRank(shape[1], shape[0], int(kind), own)

    def vector(self, tensor: Tensor) -> Floats:
        return np.ascontiguousarray(tensor.dequantize().reshape(-1), dtype=np.float32)

    def cache(self, layout: KVLayout, pages: int | Sequence[int]) -> NativeCache:
        return NativeCache(layout, pages)

    def bank(self, source: BankSource, params: MemoryParams) -> _native.Bank:
        """Keys and values of a chapter are made when it is first read; until then its vectors stay in the file."""
        length = params.rows // params.chapters if params.chapters else LARGEST_PAGE
        page_size = min(length & -length, LARGEST_PAGE)  # the largest power of two that divides the length
        rows = source.rows
        if isinstance(rows, Tensor):
            kinds = {TensorType.F32: "float32", TensorType.F16: "float16", TensorType.BF16: "bfloat16"}
            if rows.type not in kinds:
                rows = Tensor.from_array(rows.name, rows.dequantize())
            stored, scales, kind = rows.data, _NO_FLOATS, kinds[rows.type]
        else:
            stored, scales, kind = rows.codes.reshape(-1).view(np.uint8), rows.scales, f"int{rows.bits}"
        compact = "int8" if len(scales) else self.cache_dtype
        return _native.Bank(
            stored,
            kind,
            np.ascontiguousarray(scales, dtype=np.float32),
            np.ascontiguousarray(np.concatenate((source.keys, source.values)).T, dtype=np.float32),
            source.norm,
            source.epsilon,
            source.factor,
            rows=params.rows,
            span=params.rows // params.chapters if params.chapters else params.rows,
            kv_heads=params.kv_heads,
            head_dim=params.head_dim,
            page_size=page_size,
            dtype="float32" if self.as_float32 else compact,
        )

    def windows(self, layers: int, width: int, length: int) -> NativeWindows:
        return NativeWindows(layers, width, length)

    def compile(self, forward: Forward, cache: NativeCache) -> Callable[[Batch], Output]:
        program = _native.Program(self.pool, cache.cores)
        batch = _RecordedBatch(*(_BatchArray(program, field) for field in ("token_ids", "positions", "logit_rows")))
        hidden, logits, *early = forward(self, batch, cache)
        program.finish([hidden.number, *(value.number for value in early), logits.number])
        self.finish()

        def step(batch: Batch) -> Output:
            if batch.greedy and program.finds_argmax and len(batch.logit_rows) >= ARGMAX_ALONE_FROM:
                hidden, *_, numbers = _run(program, batch, [], argmax=True, threads=self._limit)
                tokens = numbers[:, 0]
                if (tokens >= 0).all():
                    return Output(np.empty((len(tokens), 0), dtype=np.float32), hidden, tokens)
                # Some row has no most probable token: the chooser needs the logits to report why.
            hidden, *rows, logits = _run(program, batch, [], threads=self._limit)
            return Output(logits=logits, hidden=hidden, early=np.stack(rows) if rows else None)

        return step

    # Operators.

    def embed(self, matrix: _native.Matrix, token_ids: Any) -> Any:
        if isinstance(token_ids, _BatchArray):
            program = token_ids.program
            return Value(program, program.embed(matrix, by_position=token_ids.field == "positions"))
        return self._eager((), lambda program: program.embed(matrix, by_position=False), token_ids=token_ids)

    def rows(self, x: Any, index: Any) -> Any:
        if isinstance(x, Value):
            return Value(x.program, x.program.rows(x.number))
        return self._eager((x,), lambda program, x: program.rows(x), logit_rows=index)

    def linear(self, x: Any, matrix: _native.Matrix, bias: Floats | None = None) -> Any:
        return self._apply((x,), lambda program, x: program.linear(x, matrix, bias))

    def add_low_rank(self, y: Any, x: Any, factors: _native.LowRank, batch: Any) -> Any:
        def record(program: _native.Program, y: int, x: int) -> int:
            return program.low_rank(y, x, factors)

        if isinstance(y, Value):
            return self._apply((y, x), record)
        return self._eager((y, x), record, batch=batch)

    def rms_norm(self, x: Any, weight: Floats, epsilon: float) -> Any:
        return self._apply((x,), lambda program, x: program.rms_norm(x, weight, epsilon))

    def layer_norm(self, x: Any, weight: Floats, bias: Floats | None, epsilon: float) -> Any:
        return self._apply((x,), lambda program, x: program.layer_norm(x, weight, bias, epsilon))

    def rope(self, x: Any, positions: Any, params: RopeParams) -> Any:
        if 2 * len(params.frequencies) != params.rotary_dim:
            raise ConfigError(f"rotary_dim is {params.rotary_dim} with {len(params.frequencies)} frequencies")
        frequencies = np.ascontiguousarray(params.frequencies, dtype=np.float32)

        def record(program: _native.Program, x: int) -> int:
            return program.rope(x, frequencies, params.head_dim, params.magnitude)

        return self._apply((x,), record, positions=positions)

    def attention(
        self, q: Any, k: Any, v: Any, cache: NativeCache, layer: int, batch: Any, params: AttentionParams
    ) -> Any:
        place = cache.layout.place(layer)

        def record(program: _native.Program, q: int, k: int, v: int) -> int:
            shape = params.heads, params.kv_heads, params.head_dim
            return program.attention(q, k, v, *place, *shape, params.scale, params.window, params.softcap)

        if isinstance(q, Value):
            return self._apply((q, k, v), record)
        return self._eager((q, k, v), record, cache=cache, batch=batch)

    def activation(self, x: Any, kind: str) -> Any:
        return self._apply((x,), lambda program, x: program.activation(x, kind))

    def gated_activation(self, gate: Any, up: Any, kind: str) -> Any:
        return self._apply((gate, up), lambda program, gate, up: program.gated_activation(gate, up, kind))

    def add(self, x: Any, y: Any) -> Any:
        return self._apply((x, y), lambda program, x, y: program.add(x, y))

    def scale(self, x: Any, factor: float) -> Any:
        return self._apply((x,), lambda program, x: program.scale(x, factor))

    def softcap(self, x: Any, cap: float) -> Any:
        return self._apply((x,), lambda program, x: program.softcap(x, cap))

    def route(self, x: Any, router: _native.Matrix, top_k: int, normalise: bool) -> tuple[Any, Any]:
        ids, weights = self._apply((x,), lambda program, x: program.route(x, router, top_k, normalise))
        return ids, weights

    def choose(self, logits: Any, top_k: int) -> tuple[Any, Any]:
        ids, weights = self._apply((logits,), lambda program, logits: program.choose(logits, top_k))
        return ids, weights

    def pool_rows(self, x: Any, batch: Any, windows: NativeWindows | None, layer: int, params: PoolParams) -> Any:
        core = None if windows is None else windows.core

        def record(program: _native.Program, x: int) -> int:
            return program.pool(x, core, layer, params.kind, params.window)

        if isinstance(x, Value):
            return self._apply((x,), record)
        return self._eager((x,), record, batch=batch)

    def memory_attention(self, q: Any, bank: _native.Bank, ids: Any, weights: Any, params: MemoryParams) -> Any:
        def record(program: _native.Program, q: int, ids: int = -1, weights: int = -1) -> int:
            return program.memory_attention(
                q,
                ids,
                weights,
                bank,
                params.heads,
                params.kv_heads,
                params.head_dim,
                params.scale,
                params.rows,
                params.chapters,
                params.shared,
                params.scaling,
                params.separate,
            )

        return self._apply((q,) if ids is None else (q, ids, weights), record)

    def experts(
        self,
        x: Any,
        ids: Any,
        weights: Any,
        gate: Sequence[_native.Matrix],
        up: Sequence[_native.Matrix],
        down: Sequence[_native.Matrix],
        kind: str,
    ) -> Any:
        def record(program: _native.Program, x: int, ids: int, weights: int) -> int:
            return program.experts(x, ids, weights, list(gate), list(up), list(down), kind)

        return self._apply((x, ids, weights), record)

    # The two ways to run an operator.

    def _apply(self, operands: tuple[Any, ...], record: Callable[..., Any], **arrays: Any) -> Any:
        first = operands[0]
        if not isinstance(first, Value):
            return self._eager(operands, record, **arrays)
        result = record(first.program, *(operand.number for operand in operands))
        if isinstance(result, tuple):
            return tuple(Value(first.program, number) for number in result)
        return Value(first.program, result)

    def _eager(
        self,
        operands: tuple[Any, ...],
        record: Callable[..., Any],
        *,
        cache: NativeCache | None = None,
        batch: Batch | None = None,
        **arrays: Any,
    ) -> Any:
        """Runs one operator as a program of its own; the result is a copy."""
        self.finish()
        program = _native.Program(self.pool, cache.cores if cache is not None else [])
        inputs = [np.ascontiguousarray(operand) for operand in operands]
        numbers = [program.input(array.shape[1], integers=array.dtype == np.int32) for array in inputs]
        result = record(program, *numbers)
        program.finish(list(result) if isinstance(result, tuple) else [result])
        if batch is None:
            batch = _batch_of(len(inputs[0]) if inputs else len(arrays["token_ids"]), **arrays)
        outputs = tuple(output.copy() for output in _run(program, batch, inputs))
        return outputs if isinstance(result, tuple) else outputs[0]


def _run(
    program: _native.Program, batch: Batch, inputs: list[npt.NDArray[Any]], argmax: bool = False, threads: int = 0
) -> list[npt.NDArray[Any]]:
    return program.run(
        batch.token_ids,
        batch.positions,
        batch.sequence_starts,
        batch.pages,
        batch.page_positions,
        batch.page_starts,
        batch.logit_rows,
        inputs,
        argmax,
        batch.states if len(batch.states) else None,
        threads,
        batch.adapters if len(batch.adapters) else None,
        batch.memories.reshape(-1) if len(batch.memories) else None,
    )


def _batch_of(
    rows: int, token_ids: Ints | None = None, positions: Ints | None = None, logit_rows: Ints | None = None
) -> Batch:
    """A batch for a single operator, in which only the array that the operator reads is meaningful."""
    zeros = np.zeros(rows, dtype=np.int32)

    def flat(array: Ints | None) -> Ints:
        return zeros if array is None else np.ascontiguousarray(array, dtype=np.int32)

    index = _NO_INTS if logit_rows is None else flat(logit_rows)
    return Batch(flat(token_ids), flat(positions), _STARTS, _NO_INTS, _NO_INTS, _STARTS, index)


def _as_stored(values: Floats, as_float32: bool) -> tuple[npt.NDArray[np.uint8], float]:
    """(a factor's bytes in float32 or float16, what their products are multiplied by)."""
    if as_float32:
        return np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint8), 1.0
    power = 15 - int(np.frexp(np.abs(values).max(initial=0))[1])
    return np.ldexp(values, power).astype(np.float16).reshape(-1).view(np.uint8), 2.0**-power


def _is_mapped(array: npt.NDArray[np.uint8]) -> bool:
    """True if the array is a read-only view of a memory-mapped file: its pages can be dropped and read again."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return isinstance(base, mmap) and not array.flags.writeable
