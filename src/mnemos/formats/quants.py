"""Values of stored tensors: every storage type turned into float32, bit for bit as ggml defines it.

Block layouts are those of ggml's ggml-common.h. A group of weights shares a scale; its integers are packed in bytes,
the bits above the fourth (of Q3_K above the second) apart. Products and sums are rounded to float32 in ggml's order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats
from mnemos.errors import FormatError
from mnemos.formats.tensor_types import TensorType

Bytes = npt.NDArray[np.uint8]

_CHUNK = 1 << 16  # bytes expanded at a time: temporary arrays stay in the cache
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
_NUMBERS = {
    TensorType.F32: "<f4",
    TensorType.F16: "<f2",
    TensorType.F64: "<f8",
    TensorType.I8: "<i1",
    TensorType.I16: "<i2",
    TensorType.I32: "<i4",
    TensorType.I64: "<i8",
    TensorType.U8: "<u1",
}


def dequantize(data: Bytes, type: TensorType) -> Floats:
    """The values of `data`, a flat uint8 array of whole blocks, as a new flat float32 array."""
    block, block_bytes = type.block
    if len(data) % block_bytes:
        raise FormatError(f"{len(data)} bytes are not a whole number of {type.name} blocks of {block_bytes} bytes")
    if type in _NUMBERS:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite
            return data.view(_NUMBERS[type]).astype(np.float32)
    if type is TensorType.BF16:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = data.reshape(-1, block_bytes)
    values = np.empty((len(blocks), block), dtype=np.float32)
    step = _CHUNK // block_bytes
    with np.errstate(
        all="ignore"
    ):  # corrupt scales may be infinite or NaN; that is for the reader of the values to see
        for start in range(0, len(blocks), step):
            values[start : start + step] = _EXPANDERS[type](blocks[start : start + step]).reshape(-1, block)
    return values.reshape(-1)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _fields(packed: Bytes, bits: int, run: int) -> Bytes:
    """Unpacks each run of `run` bytes into 8 / bits such runs, those of the lowest bits first: (blocks, integers)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs: Bytes = packed.reshape(len(packed), -1, 1, run) >> shifts
    runs &= np.uint8((1 << bits) - 1)
    return runs.reshape(len(packed), -1)


def _bits(packed: Bytes) -> Bytes:
    """The bits of every block, lowest first: (blocks, bits)."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _grouped(scales: Floats, integers: npt.NDArray[Any], subtract: int = 0) -> Floats:
    """scale * (integer - subtract) for each scale's share of the integers: (blocks, scales, integers a scale)."""
    values: Floats = integers.reshape(*scales.shape, -1).astype(np.float32)
    values -= np.float32(subtract)
    values *= scales[:, :, None]
    return values


def _q4_0(blocks: Bytes) -> Floats:
    return _grouped(_half(blocks, 0), _fields(blocks[:, 2:], 4, 16), subtract=8)


def _q4_1(blocks: Bytes) -> Floats:
    return _grouped(_half(blocks, 0), _fields(blocks[:, 4:], 4, 16)) + _half(blocks, 2)[:, :, None]


def _q5_0(blocks: Bytes) -> Floats:
    integers = _fields(blocks[:, 6:], 4, 16) | _bits(blocks[:, 2:6]) << np.uint8(4)
    return _grouped(_half(blocks, 0), integers, subtract=16)


def _q5_1(blocks: Bytes) -> Floats:
    integers = _fields(blocks[:, 8:], 4, 16) | _bits(blocks[:, 4:8]) << np.uint8(4)
    return _grouped(_half(blocks, 0), integers) + _half(blocks, 2)[:, :, None]


def _q8_0(blocks: Bytes) -> Floats:
    return _grouped(_half(blocks, 0), blocks[:, 2:].view(np.int8))


def _q2_k(blocks: Bytes) -> Floats:
    scales = _half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    minima = _half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    return _grouped(scales, _fields(blocks[:, 16:80], 2, 32)) - minima[:, :, None]


def _q3_k(blocks: Bytes) -> Floats:
    six_bits = _fields(blocks[:, 96:104], 4, 8) | _fields(blocks[:, 104:108], 2, 4) << np.uint8(4)
    scales = _half(blocks, 108) * (six_bits.astype(np.int8) - np.int8(32)).astype(np.float32)
    high = _fields(blocks[:, :32], 1, 32)  # clear where 4 is to be subtracted
    return _grouped(scales, _fields(blocks[:, 32:96], 2, 32) | high << np.uint8(2), subtract=4)


def _scales_and_minima(blocks: Bytes) -> tuple[Floats, Floats]:
    """Q4_K's and Q5_K's eight scales and minima, (blocks, 8) each.

    Twelve bytes hold sixteen 6-bit numbers: bytes 0-3 and 4-7 the first four scales and minima in their low six bits,
    bytes 8-11 the low halves of the others, whose two high bits are those of bytes 0-7.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.hstack((first & 63, (third & 15) | (first >> 6 << 4)))
    minima = np.hstack((second & 63, (third >> 4) | (second >> 6 << 4)))
    return _half(blocks, 0) * scales.astype(np.float32), _half(blocks, 2) * minima.astype(np.float32)


def _q4_k(blocks: Bytes) -> Floats:
    scales, minima = _scales_and_minima(blocks)
    return _grouped(scales, _fields(blocks[:, 16:], 4, 32)) - minima[:, :, None]


def _q5_k(blocks: Bytes) -> Floats:
    scales, minima = _scales_and_minima(blocks)
    integers = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << np.uint8(4)
    return _grouped(scales, integers) - minima[:, :, None]


def _q6_k(blocks: Bytes) -> Floats:
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    integers = _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << np.uint8(4)
    return _grouped(scales, integers, subtract=32)


def _iq4_nl(blocks: Bytes) -> Floats:
    return _grouped(_half(blocks, 0), IQ4_VALUES[_fields(blocks[:, 2:], 4, 16)])


def _iq4_xs(blocks: Bytes) -> Floats:
    six_bits = _fields(blocks[:, 4:8], 4, 1) | _fields(blocks[:, 2:4], 2, 1) << np.uint8(4)
    scales = _half(blocks, 0) * (six_bits.astype(np.int8) - np.int8(32)).astype(np.float32)
    return _grouped(scales, IQ4_VALUES[_fields(blocks[:, 8:], 4, 16)])


_EXPANDERS: dict[TensorType, Callable[[Bytes], Floats]] = {
    TensorType.Q4_0: _q4_0,
    TensorType.Q4_1: _q4_1,
    TensorType.Q5_0: _q5_0,
    TensorType.Q5_1: _q5_1,
    TensorType.Q8_0: _q8_0,
    TensorType.Q2_K: _q2_k,
    TensorType.Q3_K: _q3_k,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
    TensorType.IQ4_NL: _iq4_nl,
    TensorType.IQ4_XS: _iq4_xs,
}
