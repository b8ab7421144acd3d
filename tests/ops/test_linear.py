"""Matrix products over every weight type, on every level of kernels that this machine has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mnemos import _native
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.ops.native import NativeOps
from mnemos.ops.numpy import NumpyOps

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
# What these types add to a block takes other steps on the level of bfloat16 dot products: with 8-bit activations, such
# a product.
PAIRED = (TensorType.Q4_1, TensorType.Q5_1, TensorType.Q4_K, TensorType.Q5_K)
PAIRED_LEVEL = "avx512_bf16"
BFLOAT_LEVELS = ("avx512_bf16", "amx", "amx_bf16")  # which multiply bfloat16 weights by activations in bfloat16
ALL_BFLOAT_LEVEL = "amx_bf16"  # which rounds quantized weights and their activations to bfloat16


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


def product(ops: NativeOps, x: np.ndarray, tensor: Tensor, bias: np.ndarray | None = None, *, precise: bool) -> Any:
    """x W^T + bias. Returned results use finer activations than intermediate ones."""
    weight = ops.matrix(tensor)
    if precise:
        return ops.linear(x, weight, bias)
    zeros = np.zeros((len(x), tensor.rows), dtype=np.float32)
    return ops._eager((zeros, x), lambda program, zeros, x: program.add(zeros, program.linear(x, weight, bias)))


def largest_error(
    kind: TensorType, x: np.ndarray, weight: np.ndarray, level: str, as_float32: bool, precise: bool
) -> np.ndarray:
    """The largest error from rounding the activations, and then the sums, in each output."""
    sizes = np.abs(weight).T.astype(np.float64)
    sums = 1e-6 * (np.abs(x) @ sizes) + 1e-30
    if kind.is_quantized and not as_float32 and level == ALL_BFLOAT_LEVEL:
        # Codes before their offset or minimum is added are at most twice the largest weight. Those that are 2^22 times
        # smaller than a row's largest weight are lost.
        largest = sizes.reshape(len(sizes) // 32, 32, -1).max(axis=1).repeat(32, axis=0)
        return 2.0**-6 * (np.abs(x) @ largest) + 2.0**-18 * np.abs(x).sum(axis=1)[:, None] * sizes.max(axis=0) + sums
    if kind.is_quantized and not as_float32:
        blocks = np.abs(x).reshape(len(x), -1, 32).max(axis=-1)
        # Half a step is lost; a step is a sum of two powers of two, up to a fifth larger than it need be.
        steps = 2 * 127 * (128 if precise else 1)
        tiny = np.where(blocks < 1e-20, blocks, blocks / steps * (1.2 + 1e-4))
        bound = tiny.repeat(32, axis=1) @ sizes + 8 * sums
        if kind in PAIRED and level == PAIRED_LEVEL and not precise:
            added = sizes.reshape(len(blocks[0]), 32, -1).max(axis=1)  # no more than the largest weight
            block_sums = np.abs(x.reshape(len(x), -1, 32).sum(axis=-1)) + 32 * tiny
            bound += 2.0**-8 * (1 + 2.0**-8) * (block_sums @ added)
        return bound
    if kind is TensorType.BF16 and not as_float32 and level in BFLOAT_LEVELS:
        return 2.0**-8 * (np.abs(x) @ sizes) + sums
    return sums


@pytest.mark.parametrize(("as_float32", "precise"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_products_are_as_exact_as_the_activations(isa: str, kind: TensorType, as_float32: bool, precise: bool) -> None:
    ops = NativeOps(dtype="float32" if as_float32 else "auto")
    for rows, columns in shapes(kind):
        tensor = random_weight(kind, rows, columns)
        weight = tensor.dequantize()
        bias = np.random.default_rng(0).standard_normal(rows).astype(np.float32)
        for count in (5, 15):
            x = activations(count, columns)
            expected = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
            error = np.abs(product(ops, x, tensor, bias, precise=precise) - expected)
            bound = largest_error(kind, x, weight, isa, as_float32, precise) + 1e-6 * np.abs(bias)
            assert (error <= bound).all(), f"{rows} x {columns}: {(error / bound).max():.2f} times the bound"


@pytest.mark.parametrize("kind", [TensorType.Q4_0, TensorType.Q4_1, TensorType.Q8_0], ids=lambda kind: kind.name)
def test_fine_activations_multiply_integers_exactly(isa: str, kind: TensorType) -> None:
    """Codes and activations at both ends of their ranges: no sum overflows, no part loses a bit."""
    if isa == ALL_BFLOAT_LEVEL:
        pytest.skip("activations are bfloat16 numbers there")
    rows, columns = 20, 128
    generator = np.random.default_rng(3)
    elements, size = kind.block
    blocks = generator.choice(np.array([0, 0x7F, 0x80, 0xFF], dtype=np.uint8), (rows * columns // elements, size))
    for offset in HALVES[kind]:
        blocks[:, offset : offset + 2] = np.array([1], dtype=np.float16).view(np.uint8)
    tensor = Tensor("weight", kind, (rows, columns), blocks.reshape(-1))
    for count in (3, 20):
        x = generator.choice(np.array([-16256, -16255, -8191, -64, -1, 0, 1, 63, 64, 8192, 16256]), (count, columns))
        x[:, ::32] = 16256
        x[0], x[1] = 16256, -16256
        expected = x @ tensor.dequantize().T.astype(np.int64)
        found = product(NativeOps(), x.astype(np.float32), tensor, precise=True)
        np.testing.assert_allclose(found, expected, rtol=0, atol=columns * 16256 * 255 * 2.0**-23)
        small = (x % 128).astype(np.float32)
        small[:, ::32] = 127
        found = product(NativeOps(), small, tensor, precise=True)
        np.testing.assert_array_equal(found, small @ tensor.dequantize().T)


@pytest.mark.parametrize("as_float32", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_rows_dequantize_to_the_exact_values(isa: str, kind: TensorType, as_float32: bool) -> None:
    ops = NativeOps(dtype="float32" if as_float32 else "auto")
    for rows, columns in shapes(kind):
        tensor = random_weight(kind, rows, columns)
        found = ops.embed(ops.matrix(tensor), np.arange(rows, dtype=np.int32))
        np.testing.assert_array_equal(found, tensor.dequantize())


@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_rows_can_be_asked_for_in_another_order(kind: TensorType) -> None:
    tensor = random_weight(kind, 50, shapes(kind)[1][1])
    rows = np.random.default_rng(int(kind)).permutation(50)[:37]
    for ops in (NativeOps(), NumpyOps()):
        found = ops.embed(ops.matrix(tensor, rows), np.arange(len(rows), dtype=np.int32))
        np.testing.assert_array_equal(found, tensor.dequantize()[rows])


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_bits_do_not_depend_on_the_other_rows(isa: str, kind: TensorType, precise: bool) -> None:
    columns = 1024 + (0 if kind.is_quantized else 3)
    tensor = random_weight(kind, 90, columns)
    x = activations(140, columns)
    alone, together = NativeOps(threads=1), NativeOps()
    whole = product(alone, x, tensor, precise=precise)
    np.testing.assert_array_equal(product(together, x, tensor, precise=precise), whole)
    start = 0
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 32, 50):
        part = product(alone, x[start : start + count], tensor, precise=precise)
        np.testing.assert_array_equal(part.view(np.uint32), whole[start : start + count].view(np.uint32))
        start += count


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("kind", list(HALVES), ids=lambda kind: kind.name)
def test_levels_with_fused_arithmetic_agree_bit_for_bit(kind: TensorType, precise: bool) -> None:
    tensor, x = random_weight(kind, 40, 1536), activations(9, 1536)
    results = {}
    try:
        for level in _native.available_isas():
            _native.select_isa(level)
            results[level] = product(NativeOps(), x, tensor, precise=precise)
    finally:
        _native.select_isa("")
    plain = results.pop("scalar")  # rounds products and sums separately
    in_bfloats = results.pop(ALL_BFLOAT_LEVEL, None)
    paired = results.pop(PAIRED_LEVEL, None) if kind in PAIRED else None
    fused = list(results.values())
    for result in fused:
        np.testing.assert_array_equal(result, fused[0])
        np.testing.assert_allclose(result, plain, rtol=1e-3, atol=1e-4 * np.abs(plain).max())
    if in_bfloats is not None:  # without coarse activations' loss beside a single large one
        np.testing.assert_allclose(in_bfloats, plain, rtol=1e-2, atol=(1e-2 if precise else 4e-2) * np.abs(plain).max())
    if paired is not None:
        np.testing.assert_allclose(paired, plain, rtol=1e-3, atol=(1e-4 if precise else 1e-2) * np.abs(plain).max())


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize(
    "kind", [TensorType.Q4_0, TensorType.Q4_1, TensorType.Q8_0, TensorType.Q4_K], ids=lambda kind: kind.name
)
def test_extreme_scales_are_multiplied_as_any_other(isa: str, kind: TensorType, precise: bool) -> None:
    """Weights' scales of zero and near the ends of float16, activations of very different sizes: as exact as ever."""
    tensor = random_weight(kind, 32, 1024)
    blocks = tensor.data.reshape(-1, kind.block[1]).copy()
    for offset in HALVES[kind]:
        scales = np.resize(np.array([0, 2.0**-24, 1, -60000, 2.0**-14, 0.5, -0.0], dtype=np.float16), (len(blocks), 1))
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    tensor = Tensor("weight", kind, tensor.shape, blocks.reshape(-1))
    weight = tensor.dequantize()
    x = np.random.default_rng(5).standard_normal((20, 1024)).astype(np.float32)
    x *= np.repeat(10.0 ** np.resize(np.arange(-19, 20, 2), (20, 32)), 32, axis=1).astype(np.float32)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    error = np.abs(product(NativeOps(), x, tensor, precise=precise) - expected)
    assert (error <= largest_error(kind, x, weight, isa, False, precise)).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("kind", [TensorType.Q4_0, TensorType.Q4_1, TensorType.Q4_K], ids=lambda kind: kind.name)
def test_overflowing_activations_show_in_their_row_alone(isa: str, kind: TensorType, bad: float) -> None:
    tensor, x = random_weight(kind, 32, 256), activations(20, 256)
    good = product(NativeOps(), x, tensor, precise=False)
    x[7, 40] = bad
    found = product(NativeOps(), x, tensor, precise=False)
    assert np.isnan(found[7]).all()
    others = np.arange(20) != 7
    np.testing.assert_array_equal(found[others].view(np.uint32), good[others].view(np.uint32))


@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_packed_size_stays_near_the_file(kind: TensorType) -> None:
    tensor = random_weight(kind, 64, 1024)
    ratio = NativeOps().matrix(tensor).bytes / tensor.data.nbytes
    assert ratio <= (1.21 if kind is TensorType.Q2_K else 1.05)


@pytest.mark.parametrize("kind", [TensorType.Q4_0, TensorType.Q4_1, TensorType.Q6_K, TensorType.BF16, TensorType.F32])
@pytest.mark.parametrize("precise", [False, True])
def test_what_is_not_a_number_stays_none(isa: str, kind: TensorType, precise: bool) -> None:
    """Rounding to integers must not hide it: choosing a token must show that something is wrong."""
    tensor = random_weight(kind, 20, 256)
    for count in (3, 20):
        x = np.ones((count, 256), dtype=np.float32)
        x[0, 250], x[1], x[2, 31] = np.nan, np.nan, np.inf
        y = product(NativeOps(), x, tensor, precise=precise)
        assert not np.isfinite(y[:3]).any()
        assert np.isfinite(y[3:]).all()
