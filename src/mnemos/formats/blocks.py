"""Values into storage types: what `formats.quants` reads, written, with the bytes of ggml's own quantizer.

The native core encodes every type (`native/quantize/`). The NumPy encoders here are its reference for the types whose
scale follows from a block's extremes; they also serve where the core was not built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats
from mnemos.errors import ConfigError, FormatError
from mnemos.formats.tensor_types import TensorType
from mnemos.native import core, require_core

Bytes = npt.NDArray[np.uint8]


def encode(values: Floats, type: TensorType, importance: Floats | None = None) -> Bytes:
    """The values in a storage type, as a new flat uint8 array.

    values      float32 of any shape; the last axis is a whole number of the type's blocks
    importance  float32 (columns,), non-negative: how much the squared error of each column counts. Without it, errors
                are weighed as ggml does. All quantized types use it but Q8_0.

    ConfigError if shapes do not fit; FormatError names the first row that the type cannot hold: one with an infinity or
    NaN, or with a scale beyond float16.
    """
    matrix = np.ascontiguousarray(values, dtype=np.float32)
    columns = matrix.shape[-1] if matrix.ndim else 1
    matrix = matrix.reshape(-1, columns)
    out = np.empty((len(matrix), type.row_bytes(columns)), dtype=np.uint8)
    failed = encode_rows(matrix, type, importance, out)
    if failed >= 0:
        raise FormatError(f"row {failed} {unfit_because(matrix[failed], type)}")
    return out.reshape(-1)


def encode_rows(values: Floats, type: TensorType, importance: Floats | None, out: Bytes) -> int:
    """Encodes float32 (rows, columns) into uint8 (rows, bytes per row).

    Returns the first row that the type cannot hold, or -1. The bytes of such rows are undefined.
    """
    block = type.block[0]
    if values.shape[1] % block:
        raise ConfigError(f"rows have {values.shape[1]} values; {type.name} needs a multiple of {block}")
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if not (np.isfinite(importance).all() and (importance >= 0).all()):
            raise ConfigError("importance has infinite, NaN or negative values; all must be finite and at least 0")
    if type is TensorType.F32:
        out[:] = values.view(np.uint8)
        return _first(np.isfinite(values).all(axis=1))
    if core is not None:
        return int(core.encode_rows(values, int(type), importance, out, core.shared_pool(0)))
    if importance is not None or type not in ENCODERS:
        require_core()
    return reference_rows(values, type, out)


def unfit_because(row: Floats, type: TensorType) -> str:
    """Why a row cannot be stored: the rest of a sentence that begins with the row's name."""
    bad = np.flatnonzero(~np.isfinite(row))
    if bad.size:
        return f"has {row[bad[0]]} in column {bad[0]}; all values must be finite"
    return f"has values up to {np.abs(row).max():.3g}, beyond what the float16 numbers of {type.name} can hold"


def reference_rows(values: Floats, type: TensorType, out: Bytes) -> int:
    """`encode_rows` in NumPy, without importance, for the types of `ENCODERS`."""
    elements, size = type.block
    blocks = values.reshape(-1, elements)
    with np.errstate(all="ignore"):  # rows that do not fit are found below
        encoded, numbers = ENCODERS[type](blocks)
    out.reshape(-1, size)[:] = encoded
    return _first(np.isfinite(numbers).reshape(len(values), -1).all(axis=1) & np.isfinite(values).all(axis=1))


def _first(fits: Any) -> int:
    """The first row that does not fit, or -1."""
    unfit = np.flatnonzero(~np.asarray(fits))
    return int(unfit[0]) if unfit.size else -1


def _bytes(array: npt.NDArray[np.generic], dtype: str) -> Bytes:
    return np.ascontiguousarray(array, dtype=dtype).view(np.uint8).reshape(len(array), -1)


def _inverse(scale: Floats) -> Floats:
    inverse: Floats = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    return inverse


def _f16(blocks: Floats) -> tuple[Bytes, Floats]:
    halves = blocks.astype("<f2")
    return _bytes(halves, "<f2"), halves.astype(np.float32)


def _bf16(blocks: Floats) -> tuple[Bytes, Floats]:
    bits = blocks.view(np.uint32)
    upper = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return _bytes(upper, "<u2"), (upper << 16).astype(np.uint32).view(np.float32)


def _packed(codes: npt.NDArray[np.int32], bits: int) -> list[Bytes]:
    low: Bytes = (codes[:, :16] & 15 | (codes[:, 16:] & 15) << 4).astype(np.uint8)
    high = [np.packbits((codes >> 4).astype(np.uint8), axis=1, bitorder="little")] if bits == 5 else []
    return [*high, low]


def _symmetric(bits: int) -> Callable[[Floats], tuple[Bytes, Floats]]:
    """Q4_0 and Q5_0: the value of largest magnitude is the lowest integer."""
    half = 1 << (bits - 1)

    def encode(blocks: Floats) -> tuple[Bytes, Floats]:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
        scale = (np.where(largest == 0, 0, largest) / np.float32(-half)).astype(np.float32)  # of zeros: -0, as in ggml
        codes = np.minimum((blocks * _inverse(scale) + np.float32(half + 0.5)).astype(np.int32), 2 * half - 1)
        stored = scale.astype("<f2")
        return np.hstack([_bytes(stored, "<f2"), *_packed(codes, bits)]), stored.astype(np.float32)

    return encode


def _affine(bits: int) -> Callable[[Floats], tuple[Bytes, Floats]]:
    """Q4_1 and Q5_1: from the least value to the largest."""
    levels = (1 << bits) - 1

    def encode(blocks: Floats) -> tuple[Bytes, Floats]:
        low = blocks.min(1, keepdims=True)
        scale = ((blocks.max(1, keepdims=True) - low) / np.float32(levels)).astype(np.float32)
        codes = np.minimum(((blocks - low) * _inverse(scale) + np.float32(0.5)).astype(np.int32), levels)
        stored = np.hstack([scale, low]).astype("<f2")
        return np.hstack([_bytes(stored, "<f2"), *_packed(codes, bits)]), stored.astype(np.float32)

    return encode


def _q8_0(blocks: Floats) -> tuple[Bytes, Floats]:
    scale = (np.abs(blocks).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
    scaled = blocks * _inverse(scale)
    codes = np.trunc(scaled + np.copysign(np.float32(0.5) - np.float32(2**-25), scaled))  # halves away from zero
    stored = scale.astype("<f2")
    return np.hstack([_bytes(stored, "<f2"), _bytes(codes, "<i1")]), stored.astype(np.float32)


# Of (blocks, elements) float32: the bytes of every block, and its float16 or bfloat16 numbers as they were stored.
ENCODERS: dict[TensorType, Callable[[Floats], tuple[Bytes, Floats]]] = {
    TensorType.F16: _f16,
    TensorType.BF16: _bf16,
    TensorType.Q4_0: _symmetric(4),
    TensorType.Q5_0: _symmetric(5),
    TensorType.Q4_1: _affine(4),
    TensorType.Q5_1: _affine(5),
    TensorType.Q8_0: _q8_0,
}
