"""Codes and scales into the bytes of GGUF's block formats: `formats.quants` the other way round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats
from mnemos.formats.quants import IQ4_VALUES
from mnemos.formats.tensor_types import TensorType

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class BlockFormat:
    """How a type's values follow from codes: scale * (code - zero) + minimum, codes 0 to `top`.

    With `curved`, IQ4's value of the code takes the place of code - zero.
    `group` weights share a scale (and a minimum, with `minima`). Where `block` is larger, its groups' scales are
    integers from scale_low to scale_top times the block's unit, and their minima integers up to minimum_top times minus
    its other unit.
    """

    group: int
    block: int
    top: int
    zero: int
    minima: bool = False
    scale_low: int = 0
    scale_top: int = 0
    minimum_top: int = 0
    curved: bool = False

    @property
    def numbers(self) -> tuple[int, ...]:
        """The fields in the order of the native core's SearchFormat."""
        scales = self.scale_low, self.scale_top, self.minimum_top
        return self.group, self.block, self.top, self.zero, int(self.minima), *scales, int(self.curved)


FORMATS = {
    TensorType.Q4_0: BlockFormat(32, 32, 15, 8),
    TensorType.Q4_1: BlockFormat(32, 32, 15, 0, minima=True),
    TensorType.Q5_0: BlockFormat(32, 32, 31, 16),
    TensorType.Q5_1: BlockFormat(32, 32, 31, 0, minima=True),
    TensorType.Q8_0: BlockFormat(32, 32, 254, 127),
    TensorType.Q2_K: BlockFormat(16, 256, 3, 0, True, 0, 15, 15),
    TensorType.Q3_K: BlockFormat(16, 256, 7, 4, False, -32, 31),
    TensorType.Q4_K: BlockFormat(32, 256, 15, 0, True, 0, 63, 63),
    TensorType.Q5_K: BlockFormat(32, 256, 31, 0, True, 0, 63, 63),
    TensorType.Q6_K: BlockFormat(16, 256, 63, 32, False, -128, 127),
    TensorType.IQ4_NL: BlockFormat(32, 32, 15, 0, curved=True),
    TensorType.IQ4_XS: BlockFormat(32, 256, 15, 0, False, -32, 31, curved=True),
}


@dataclass(frozen=True, eq=False)
class Codes:
    """A matrix in codes: codes (rows, columns); units (rows, columns / block, 2), the scales and minima in float16's
    values; integers (rows, columns / group, 2), the groups' scales and minima in those units."""

    codes: Bytes
    units: Floats
    integers: npt.NDArray[np.int8]

    def values(self, format: BlockFormat) -> Floats:
        """What the codes stand for, float32 (rows, columns)."""
        rows, columns = self.codes.shape
        units = np.repeat(self.units, format.block // format.group, axis=1)
        if format.block > format.group:
            units = units * self.integers * np.array([1, -1], dtype=np.float32)
        levels = IQ4_VALUES[self.codes] if format.curved else self.codes.astype(np.float32) - format.zero
        scaled = units[:, :, :1] * levels.reshape(rows, -1, format.group)
        return np.asarray(scaled + units[:, :, 1:], dtype=np.float32).reshape(rows, columns)


def pack(found: Codes, type: TensorType) -> Bytes:
    """The blocks' bytes, (rows, bytes per row)."""
    format = FORMATS[type]
    rows = len(found.codes)
    codes = found.codes.reshape(-1, format.block)
    low, high = codes & np.uint8(15), codes >> np.uint8(4)
    units = found.units.reshape(-1, 2)
    halves = np.ascontiguousarray(units.astype("<f2")).view(np.uint8)  # two bytes of scale, two of minimum
    integers = found.integers.reshape(-1, format.block // format.group, 2)
    scales, minima = integers[:, :, 0], integers[:, :, 1].view(np.uint8)
    parts: tuple[Bytes, ...]
    match type:
        case TensorType.Q4_0 | TensorType.IQ4_NL:
            parts = halves[:, :2], _fields(codes, 4, 16)
        case TensorType.Q4_1:
            parts = halves, _fields(codes, 4, 16)
        case TensorType.Q5_0:
            parts = halves[:, :2], _bits(high), _fields(low, 4, 16)
        case TensorType.Q5_1:
            parts = halves, _bits(high), _fields(low, 4, 16)
        case TensorType.Q8_0:
            parts = halves[:, :2], codes - np.uint8(127)  # modulo 256, as a signed byte
        case TensorType.Q2_K:
            parts = scales.view(np.uint8) | minima << np.uint8(4), _fields(codes, 2, 32), halves
        case TensorType.Q3_K:
            six_bits = (scales + np.int8(32)).view(np.uint8)
            packed = _fields(six_bits & 15, 4, 8), _fields(six_bits >> 4, 2, 4)
            parts = _fields(codes >> 2, 1, 32), _fields(codes & 3, 2, 32), *packed, halves[:, :2]
        case TensorType.Q4_K:
            parts = halves, _scales_and_minima(scales.view(np.uint8), minima), _fields(codes, 4, 32)
        case TensorType.Q5_K:
            packed = _fields(high, 1, 32), _fields(low, 4, 32)
            parts = halves, _scales_and_minima(scales.view(np.uint8), minima), *packed
        case TensorType.IQ4_XS:
            six_bits = (scales + np.int8(32)).view(np.uint8)
            parts = halves[:, :2], _fields(six_bits >> 4, 2, 1), _fields(six_bits & 15, 4, 1), _fields(codes, 4, 16)
        case _:  # Q6_K
            parts = _fields(low, 4, 64), _fields(high, 2, 32), scales.view(np.uint8), halves[:, :2]
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _fields(integers: npt.NDArray[Any], bits: int, run: int) -> Bytes:
    """Packs 8 / bits runs of `run` integers into one run of bytes, the first into the lowest bits: (blocks, bytes)."""
    runs = integers.astype(np.uint8).reshape(len(integers), -1, 8 // bits, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(runs << shifts, axis=2)
    return packed.reshape(len(integers), -1)


def _bits(integers: Bytes) -> Bytes:
    return np.packbits(integers, axis=1, bitorder="little")


def _scales_and_minima(scales: Bytes, minima: Bytes) -> Bytes:
    """Eight 6-bit scales and minima in twelve bytes, (blocks, 12)."""
    low, high = scales[:, :4], scales[:, 4:]
    low_minima, high_minima = minima[:, :4], minima[:, 4:]
    first, second = (a | b >> np.uint8(4) << np.uint8(6) for a, b in ((low, high), (low_minima, high_minima)))
    return np.concatenate((first, second, (high & np.uint8(15)) | high_minima << np.uint8(4)), axis=1)
