"""Dequantization equals the gguf package's, bit for bit."""

import numpy as np
import pytest

from mnemos.errors import FormatError
from mnemos.formats.quants import dequantize
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType

gguf = pytest.importorskip("gguf")

HALVES = {  # where a block holds float16 scales
    TensorType.Q4_0: (0,), TensorType.Q4_1: (0, 2), TensorType.Q5_0: (0,), TensorType.Q5_1: (0, 2),
    TensorType.Q8_0: (0,), TensorType.Q2_K: (80, 82), TensorType.Q3_K: (108,), TensorType.Q4_K: (0, 2),
    TensorType.Q5_K: (0, 2), TensorType.Q6_K: (208,), TensorType.IQ4_NL: (0,), TensorType.IQ4_XS: (0,),
}  # fmt: skip


def random_blocks(type_: TensorType, count: int, scales: np.ndarray) -> np.ndarray:
    generator = np.random.default_rng(int(type_))
    blocks = generator.integers(0, 256, (count, type_.block[1]), dtype=np.uint8)
    for at in HALVES[type_]:
        chosen = generator.choice(scales.astype(np.float16), count)
        blocks[:, at : at + 2] = chosen.reshape(-1, 1).view(np.uint8)
    return blocks


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.dtype == np.float32 and np.array_equal(ours.view(np.uint32), np.ravel(theirs).view(np.uint32))


@pytest.mark.parametrize("type_", HALVES, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ["ordinary", "extreme"])
def test_random_bytes(type_, kind):
    extreme = np.array([0.0, -0.0, 6e-8, -6e-8, 65504, -65504, 1, -1])
    blocks = random_blocks(type_, 777, np.random.default_rng(1).standard_normal(99) if kind == "ordinary" else extreme)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(int(type_)))
    assert same_bits(dequantize(blocks.reshape(-1), type_), expected)


@pytest.mark.parametrize("type_", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"])
def test_quantized_normals(type_):
    values = np.random.default_rng(2).standard_normal((64, 256), dtype=np.float32)
    stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_])
    ours = dequantize(stored.reshape(-1).view(np.uint8), TensorType[type_])
    assert same_bits(ours, gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[type_]))
    assert np.abs(ours - values.reshape(-1)).max() < 0.5


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i1", "i2", "i4", "i8", "u1"])
def test_numbers(dtype):
    values = np.array([0, 1, 2, 3, 100, 7, 5, 4], dtype=dtype)
    type_ = TensorType.U8 if dtype == "u1" else TensorType[f"{dtype[0].upper()}{8 * int(dtype[1])}"]
    assert dequantize(values.view(np.uint8), type_).tolist() == values.tolist()


def test_bfloat16_keeps_nan_infinity_and_signed_zero():
    stored = np.array([0x7FC0, 0x7F80, 0xFF80, 0x8000, 0x3F80], dtype="<u2")
    values = dequantize(stored.view(np.uint8), TensorType.BF16)
    assert np.isnan(values[0]) and values[1:].tolist() == [np.inf, -np.inf, 0.0, 1.0] and np.signbit(values[3])


def test_chunks_join_seamlessly():
    type_ = TensorType.Q6_K
    blocks = random_blocks(type_, (9 << 20) // type_.block[1], np.array([0.5, 1.0, -2.0]))
    whole = dequantize(blocks.reshape(-1), type_).reshape(len(blocks), -1)
    some = [0, 1, 19971, 19972, 19973, 39945, len(blocks) - 1]
    assert np.array_equal(whole[some], dequantize(blocks[some].reshape(-1), type_).reshape(len(some), -1))


def test_unaligned_views_of_a_file_are_read():
    buffer = np.arange(1 + 4 * 6, dtype=np.uint8)
    assert np.array_equal(dequantize(buffer[1:], TensorType.F32), buffer[1:].copy().view(np.float32))


def test_empty_and_partial_blocks():
    assert dequantize(np.zeros(0, np.uint8), TensorType.Q4_K).shape == (0,)
    with pytest.raises(FormatError, match=r"19 bytes .* Q4_0 blocks of 18"):
        dequantize(np.zeros(19, np.uint8), TensorType.Q4_0)


def test_tensor_dequantizes_to_its_shape():
    blocks = random_blocks(TensorType.Q4_1, 6, np.array([1.0]))
    tensor = Tensor("t", TensorType.Q4_1, (3, 64), blocks.reshape(-1))
    assert tensor.dequantize().shape == (3, 64)
    assert np.array_equal(tensor.slice_rows(1, 3).dequantize(), tensor.dequantize()[1:3])
    assert np.array_equal(tensor.take_rows(np.array([2, 0])).dequantize(), tensor.dequantize()[[2, 0]])
