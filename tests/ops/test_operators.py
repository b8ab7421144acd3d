"""Every operator of the native backend against the reference, at every level of kernels that this machine runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from zlib import crc32

import numpy as np
import pytest
from tests.ops.cases import ATTENTION_CASES, CASES, ROWS, AttentionCase, Case, floats

from mnemos.contract import Batch, KVLayout
from mnemos.ops.native import NativeOps
from mnemos.ops.numpy import NumpyOps

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
        if dtype == "bfloat16" and isa in ("avx512_bf16", "amx"):
            error = np.abs(result - step.expected)
            assert error.max() < 0.02 and np.sqrt(np.mean(error**2) / np.mean(step.expected**2)) < 0.004
        else:
            np.testing.assert_allclose(result, step.expected, rtol=1e-5, atol=1e-5)


def test_extreme_values_stay_finite(isa: str) -> None:
    ops = NativeOps()
    x = np.array([[-1e4, -100, -88, -1e-30, 0, 1e-30, 20, 88, 100, 1e4]], dtype=np.float32)
    with np.errstate(over="ignore"):
        for kind in ("silu", "gelu", "gelu_tanh", "relu"):
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
