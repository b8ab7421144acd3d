"""Matrix products over every weight type, on every level of kernels that this machine has."""

from __future__ import annotations

import numpy as np
import pytest

from mnemos import _native
from mnemos.formats.tensor import Tensor, TensorType
from mnemos.ops.native import NativeOps

# Byte offsets of the float16 numbers in a block: random bytes there would be infinities.
HALVES = {
    TensorType.Q4_0: (0,),
    TensorType.Q4_1: (0, 2),
    TensorType.Q5_0: (0,),
    TensorType.Q5_1: (0, 2),
    TensorType.Q8_0: (0,),
    TensorType.Q2_K: (80, 82),
    TensorType.Q3_K: (108,),
    TensorType.Q4_K: (0, 2),
    TensorType.Q5_K: (0, 2),
    TensorType.Q6_K: (208,),
    TensorType.IQ4_NL: (0,),
    TensorType.IQ4_XS: (0,),
}
FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16)
WEIGHTS = (*FLOATS, *HALVES)


def random_weight(kind: TensorType, rows: int, columns: int) -> Tensor:
    generator = np.random.default_rng([int(kind), rows, columns])
    values = generator.standard_normal((rows, columns)).astype(np.float32)
    if kind is TensorType.F32:
        data = values.view(np.uint8)
    elif kind is TensorType.F16:
        data = values.astype(np.float16).view(np.uint8)
    elif kind is TensorType.BF16:
        data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        elements, size = kind.block
        blocks = generator.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
        for offset in HALVES[kind]:
            scales = generator.standard_normal((len(blocks), 1)).astype(np.float16) / np.float16(16)
            blocks[:, offset : offset + 2] = scales.view(np.uint8)
        data = blocks
    return Tensor("weight", kind, (rows, columns), data.reshape(-1))


def shapes(kind: TensorType) -> list[tuple[int, int]]:
    """(rows, columns): partly empty panels, odd numbers of panels and blocks, several chunks of columns."""
    block = kind.block[0]
    columns = (1, 37, 515) if block == 1 else (32, 608, 1600) if block == 32 else (256, 768, 1792)
    return list(zip((1, 50, 33), columns, strict=True))


def activations(rows: int, columns: int) -> np.ndarray:
    """Rows of different sizes; one is zero, one has values too small to scale, one a single large value."""
    x = np.random.default_rng([rows, columns]).standard_normal((rows, columns)).astype(np.float32)
    x[1::5] = 0
    x[2::5] *= np.float32(1e-36)
    x[3::5, -1] = 1000
    return x


def largest_error(kind: TensorType, x: np.ndarray, weight: np.ndarray, level: str, as_float32: bool) -> np.ndarray:
    """What rounding the activations, and then the sums, can cost each output."""
    sizes = np.abs(weight).T.astype(np.float64)
    sums = 1e-6 * (np.abs(x) @ sizes) + 1e-30
    if kind.is_quantized and not as_float32:
        blocks = np.abs(x).reshape(len(x), -1, 32).max(axis=-1)
        tiny = np.where(blocks < 1e-30, blocks, blocks / 254 * (1 + 1e-4))  # half a step of 127 to each side
        return tiny.repeat(32, axis=1) @ sizes + 8 * sums
    if kind is TensorType.BF16 and not as_float32 and level in ("avx512_bf16", "amx"):
        return 2.0**-8 * (np.abs(x) @ sizes) + sums
    return sums


@pytest.mark.parametrize("as_float32", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_products_are_as_exact_as_the_activations(isa: str, kind: TensorType, as_float32: bool) -> None:
    ops = NativeOps(dtype="float32" if as_float32 else "auto")
    for rows, columns in shapes(kind):
        tensor = random_weight(kind, rows, columns)
        weight = tensor.dequantize()
        bias = np.random.default_rng(0).standard_normal(rows).astype(np.float32)
        x = activations(15, columns)
        expected = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
        error = np.abs(ops.linear(x, ops.matrix(tensor), bias) - expected)
        bound = largest_error(kind, x, weight, isa, as_float32) + 1e-6 * np.abs(bias)
        assert (error <= bound).all(), f"{rows} x {columns}: {(error / bound).max():.2f} times the bound"


@pytest.mark.parametrize("as_float32", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_rows_dequantize_to_the_exact_values(isa: str, kind: TensorType, as_float32: bool) -> None:
    ops = NativeOps(dtype="float32" if as_float32 else "auto")
    for rows, columns in shapes(kind):
        tensor = random_weight(kind, rows, columns)
        found = ops.embed(ops.matrix(tensor), np.arange(rows, dtype=np.int32))
        np.testing.assert_array_equal(found, tensor.dequantize())


@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_bits_do_not_depend_on_the_other_rows(isa: str, kind: TensorType) -> None:
    columns = 1024 + (0 if kind.is_quantized else 3)
    tensor = random_weight(kind, 90, columns)
    x = activations(140, columns)
    alone, together = NativeOps(threads=1), NativeOps()
    weight = alone.matrix(tensor)
    whole = alone.linear(x, weight)
    np.testing.assert_array_equal(together.linear(x, together.matrix(tensor)), whole)
    start = 0
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 32, 50):
        part = alone.linear(x[start : start + count], weight)
        np.testing.assert_array_equal(part.view(np.uint32), whole[start : start + count].view(np.uint32))
        start += count


@pytest.mark.parametrize("kind", list(HALVES), ids=lambda kind: kind.name)
def test_levels_with_fused_arithmetic_agree_bit_for_bit(kind: TensorType) -> None:
    tensor, x = random_weight(kind, 40, 1536), activations(9, 1536)
    results = {}
    try:
        for level in _native.available_isas():
            _native.select_isa(level)
            ops = NativeOps()
            results[level] = ops.linear(x, ops.matrix(tensor))
    finally:
        _native.select_isa("")
    plain = results.pop("scalar")  # rounds products and sums apart
    fused = list(results.values())
    for result in fused:
        np.testing.assert_array_equal(result, fused[0])
        np.testing.assert_allclose(result, plain, rtol=1e-3, atol=1e-4 * np.abs(plain).max())


@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_packed_size_stays_near_the_file(kind: TensorType) -> None:
    tensor = random_weight(kind, 64, 1024)
    ratio = NativeOps().matrix(tensor).bytes / tensor.data.nbytes
    assert ratio <= (1.21 if kind is TensorType.Q2_K else 1.05)
