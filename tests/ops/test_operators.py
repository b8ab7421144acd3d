"""Every operator of the native backend against the reference, at every level of kernels that this machine runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from zlib import crc32

import numpy as np
import pytest
from tests.ops.cases import (
    ATTENTION_CASES,
    CASES,
    MEMORIES,
    POOL_CASES,
    ROWS,
    AttentionCase,
    Case,
    PoolCase,
    bank_source,
    floats,
)

from mnemos.contract import Batch, KVLayout
from mnemos.errors import ConfigError, RequestError
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.ops.native import NativeOps
from mnemos.ops.numpy import NumpyOps
from mnemos.ops.protocol import ACTIVATIONS

REFERENCE = NumpyOps()


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(crc32(name.encode()))


def _assert_close(result: object, expected: object, tolerance: float = 2e-6) -> None:
    if isinstance(expected, tuple):
        assert isinstance(result, tuple)
        for one, other in zip(result, expected, strict=True):
            _assert_close(one, other, tolerance)
        return
    assert isinstance(result, np.ndarray) and isinstance(expected, np.ndarray)
    assert result.shape == expected.shape and result.dtype == expected.dtype
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator_equals_the_reference(case: Case, isa: str) -> None:
    ops = NativeOps(dtype="float32")
    for rows in ROWS:
        expected = case.run(REFERENCE, _generator(f"{case.name} {rows}"), rows)
        _assert_close(case.run(ops, _generator(f"{case.name} {rows}"), rows), expected)


@pytest.mark.parametrize("case", POOL_CASES, ids=lambda case: case.params.kind)
def test_pooling_equals_the_reference(case: PoolCase) -> None:
    backends = (REFERENCE, NativeOps(dtype="float32"))
    layers = [ops.windows(2, case.width, case.length) if case.params.remembers else None for ops in backends]
    for windows in filter(None, layers):
        windows.reserve(4)
    generator = np.random.default_rng(1)
    for batch in case.batches():
        x = floats(generator, len(batch.positions), case.width)
        expected, result = (ops.pool_rows(x, batch, w, 1, case.params) for ops, w in zip(backends, layers, strict=True))
        _assert_close(result, expected)
    if case.params.remembers:  # a fork goes on as its original does
        for windows in filter(None, layers):
            windows.copy([2], [3])
            windows.clear([2])
        batch = replace(
            case.batches()[1].part(0, 1), positions=np.array([14], np.int32), states=np.array([3], np.int32)
        )
        x = floats(generator, 1, case.width)
        expected, result = (ops.pool_rows(x, batch, w, 1, case.params) for ops, w in zip(backends, layers, strict=True))
        _assert_close(result, expected)


@pytest.mark.parametrize("name", MEMORIES)
def test_memory_rows_do_not_depend_on_each_other(name: str, isa: str) -> None:
    """A row's bits are the same alone, where threads share its blocks, and among many."""
    params, chosen = MEMORIES[name]
    g, ops = _generator(name), NativeOps()
    bank = ops.bank(bank_source(g, params), params)
    q = floats(g, 70, params.heads * params.head_dim)
    ids = weights = None
    if chosen:
        rows = [g.permutation(params.chapters - params.shared)[:chosen] for _ in range(3)]
        ids = np.repeat(np.stack(rows), [40, 29, 1], axis=0).astype(np.int32)
        weights = np.repeat(np.abs(floats(g, 3, chosen)), [40, 29, 1], axis=0)
    together = ops.memory_attention(q, bank, ids, weights, params)
    for row in (0, 13, 39, 40, 69):
        own = (None, None) if ids is None or weights is None else (ids[row : row + 1], weights[row : row + 1])
        alone = ops.memory_attention(q[row : row + 1], bank, *own, params)
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize("norm", ["", "rms", "layernorm"])
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_banks_are_made_of_what_is_stored(bits: int, norm: str, dtype: str) -> None:
    """And no chapter before it is read."""
    params, chosen = MEMORIES["memory by chapters, some shared"]
    g, ops = _generator("types"), NativeOps(dtype=dtype)
    source = bank_source(g, params, bits, norm)
    bank = ops.bank(source, params)
    assert bank.bytes == 0
    weights = np.full((5, chosen), 0.5, np.float32)
    q = floats(g, 5, params.heads * params.head_dim)
    sizes = []
    for chapters in ([1, 3], [3, 1], [0, 2]):
        ids = np.tile(np.array(chapters, np.int32), (5, 1))
        for rows in (1, 5):
            operands = q[:rows], ids[:rows], weights[:rows]
            result, expected = (
                backend.memory_attention(operands[0], made, *operands[1:], params)
                for backend, made in ((ops, bank), (REFERENCE, REFERENCE.bank(source, params)))
            )
            _assert_close(result, expected, 4e-6 if dtype == "float32" else 0.03)
        sizes.append(bank.bytes)
    assert sizes[0] == sizes[1] == sizes[2] * 4 // 6


@pytest.mark.parametrize("type", [TensorType.F16, TensorType.BF16])
def test_banks_of_half_precision(type: TensorType) -> None:
    params, _ = MEMORIES["memory"]
    g = _generator("half")
    source = bank_source(g, params)
    bits = source.rows.dequantize()
    data = (
        bits.astype(np.float16).view(np.uint8)
        if type is TensorType.F16
        else bits.view(np.uint16)[:, 1::2].copy().view(np.uint8)
    )
    source = replace(source, rows=Tensor("rows", type, bits.shape, data.reshape(-1)))
    q, ops = floats(g, 3, params.heads * params.head_dim), NativeOps(dtype="float32")
    result = ops.memory_attention(q, ops.bank(source, params), None, None, params)
    _assert_close(result, REFERENCE.memory_attention(q, REFERENCE.bank(source, params), None, None, params), 4e-6)


def test_chapters_and_states_out_of_range_are_refused() -> None:
    params, chosen = MEMORIES["memory by chapters"]
    ops = NativeOps()
    bank = ops.bank(bank_source(_generator("refused"), params), params)
    q, weights = np.zeros((1, params.heads * params.head_dim), np.float32), np.ones((1, chosen), np.float32)
    with pytest.raises(RequestError, match="chapter 12 is not one of 12"):
        ops.memory_attention(q, bank, np.array([[0, 1, 12]], np.int32), weights, params)
    with pytest.raises(ConfigError, match="needs the ids and weights"):
        ops.memory_attention(q, bank, None, None, params)
    case = POOL_CASES[-1]
    windows, batch = ops.windows(1, case.width, case.length), case.batches()[0]
    windows.reserve(2)
    with pytest.raises(RequestError, match="state slot 2 is not one of 2"):
        ops.pool_rows(np.zeros((15, case.width), np.float32), batch, windows, 0, case.params)
    with pytest.raises(RequestError, match="needs one for each of its 2 sequences"):
        ops.pool_rows(
            np.zeros((15, case.width), np.float32), replace(batch, states=batch.states[:1]), windows, 0, case.params
        )


@dataclass
class AttentionStep:
    """A batch with its queries, keys and values, and what the reference makes of them."""

    batch: Batch
    qkv: tuple[np.ndarray, np.ndarray, np.ndarray]
    expected: np.ndarray


@cache  # one for all levels of kernels
def _attention_steps(case: AttentionCase, layout: KVLayout, pages: int) -> Sequence[AttentionStep]:
    generator = _generator(str(case))
    stored = REFERENCE.cache(layout, pages)
    steps = []
    for batch in case.batches(generator):
        rows = len(batch.positions)
        widths = (case.heads * case.head_dim, *[case.kv_heads * case.head_dim] * 2)
        q, k, v = (floats(generator, rows, width) for width in widths)
        expected = REFERENCE.attention(q, k, v, stored, 1, batch, case.params)
        steps.append(AttentionStep(batch, (q, k, v), expected))
    return steps


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention_equals_the_reference(case: AttentionCase, dtype: str, isa: str) -> None:
    ops = NativeOps()
    layout = KVLayout(2, case.kv_heads, case.head_dim, case.page_size, dtype)
    pages = case.pages * len(case.steps[0])
    stored = ops.cache(layout, pages)
    for step in _attention_steps(case, layout, pages):
        result = ops.attention(*step.qkv, stored, 1, step.batch, case.params)
        # These levels round queries and weights to bfloat16 too.
        if dtype == "bfloat16" and isa in ("avx512_bf16", "amx", "amx_bf16"):
            error = np.abs(result - step.expected)
            assert error.max() < 0.02 and np.sqrt(np.mean(error**2) / np.mean(step.expected**2)) < 0.004
        else:
            np.testing.assert_allclose(result, step.expected, rtol=1e-5, atol=1e-5)


def test_extreme_values_stay_finite(isa: str) -> None:
    ops = NativeOps()
    x = np.array([[-1e4, -100, -88, -1e-30, 0, 1e-30, 20, 88, 100, 1e4]], dtype=np.float32)
    with np.errstate(over="ignore"):
        for kind in ACTIVATIONS:
            np.testing.assert_allclose(ops.activation(x, kind), REFERENCE.activation(x, kind), rtol=2e-5, atol=1e-30)
    np.testing.assert_allclose(ops.softcap(x, 30.0), REFERENCE.softcap(x, 30.0), rtol=1e-6)


def test_float16_pages_hold_what_is_beyond_their_range_as_their_largest_number(isa: str) -> None:
    ops, case = NativeOps(), AttentionCase(1, 1, 16, 16, steps=((1,),))
    cache = ops.cache(KVLayout(1, 1, 16, 16, "float16"), 1)
    big = np.full((1, 16), 1e6, dtype=np.float32)
    result = ops.attention(big * 0, big * 0, big, cache, 0, case.batches(_generator(""))[0], case.params)
    np.testing.assert_array_equal(result, np.full((1, 16), 65504, dtype=np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_pages_are_copied_read_and_written_whole(dtype: str) -> None:
    ops, case = NativeOps(), AttentionCase(2, 2, 20, 8, steps=((8,), (1,)))
    layout = KVLayout(1, 2, 20, 8, dtype)
    generator = _generator(dtype)
    first, second = case.batches(generator)
    qkv = [floats(generator, 8, 40) for _ in range(3)]
    last = [floats(generator, 1, 40) for _ in range(3)]
    caches = [ops.cache(layout, 2 * len(first.pages)) for _ in range(2)]
    ops.attention(*qkv, caches[0], 0, first, case.params)
    expected = ops.attention(*last, caches[0], 0, second, case.params)
    page, free = int(first.pages[0]), len(first.pages)
    caches[1].write(page, caches[0].read(page))
    assert np.array_equal(ops.attention(*last, caches[1], 0, second, case.params), expected)
    caches[1].copy([page], [free])
    assert np.array_equal(caches[1].read(free), caches[0].read(page))


def _adapted_batch(rows: int, adapters: Sequence[int]) -> Batch:
    """One sequence for each adapter, of about equal lengths."""
    none = np.zeros(0, dtype=np.int32)
    starts = np.linspace(0, rows, len(adapters) + 1).astype(np.int32)
    index = np.zeros(rows, dtype=np.int32)
    return Batch(index, index, starts, none, none, np.zeros(1, np.int32), none, adapters=np.array(adapters, np.int32))


def test_each_row_gets_what_its_own_adapter_adds(isa: str) -> None:
    g = np.random.default_rng(4)
    pairs = [(floats(g, rank, 70), floats(g, 45, rank)) for rank in (1, 5, 64)]
    factors = [pairs[0], None, pairs[1], pairs[2]]
    ops = NativeOps(dtype="float32")
    for rows in (1, 2, 7, 33):
        y, x = floats(g, rows, 45), floats(g, rows, 70)
        batch = _adapted_batch(rows, [0, -1, 3, 1, 2, 0])
        expected = REFERENCE.add_low_rank(y, x, factors, batch)
        result = ops.add_low_rank(y, x, ops.factors(factors, (45, 70)), batch)
        _assert_close(result, expected)
        plain = np.isin(batch.row_adapters(rows), (-1, 1))
        np.testing.assert_array_equal(result[plain], y[plain])


@pytest.mark.parametrize("size", [1.0, 1e-7, 1e7])
def test_adapters_of_any_size_are_stored_in_float16(size: float, isa: str) -> None:
    g = np.random.default_rng(5)
    pair = floats(g, 8, 300) * np.float32(size), floats(g, 45, 8) / np.float32(size)
    ops = NativeOps()
    y, x = floats(g, 7, 45), floats(g, 7, 300)
    batch = _adapted_batch(7, [0])
    expected = REFERENCE.add_low_rank(y, x, [pair], batch)
    result = ops.add_low_rank(y, x, ops.factors([pair], (45, 300)), batch)
    assert np.linalg.norm(result - expected) < 5e-4 * np.linalg.norm(expected - y)


def test_adapters_that_are_not_there_are_refused() -> None:
    ops, x, y = NativeOps(), np.zeros((3, 70), np.float32), np.zeros((3, 45), np.float32)
    factors = ops.factors([(np.zeros((2, 70), np.float32), np.zeros((45, 2), np.float32))], (45, 70))
    with pytest.raises(RequestError, match="adapter 1 is not one of 1"):
        ops.add_low_rank(y, x, factors, _adapted_batch(3, [0, 1]))
    with pytest.raises(ConfigError, match="adapters change a product of 70 to 45 columns; this one has 45 and 70"):
        ops.add_low_rank(x, y, factors, _adapted_batch(3, [0]))
    with pytest.raises(ConfigError, match=r"factors must be \(rank, 70\) and \(45, rank\)"):
        ops.factors([(np.zeros((2, 70), np.float32), np.zeros((45, 3), np.float32))], (45, 70))
