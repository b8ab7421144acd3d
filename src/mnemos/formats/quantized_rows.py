"""Quantized memory banks: rows of 8- or 4-bit codes, each row with a scale of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats
from mnemos.errors import ConfigError

_LARGEST = {8: 127, 4: 7}
_SMALLEST_SCALE = np.float32(1e-8)


@dataclass(frozen=True)
class QuantizedRows:
    """codes int8 (rows, width) at 8 bits, (rows, width / 2) at 4 bits; scales float32 (rows,). A value is code * scale.

    At 4 bits, columns 2j and 2j + 1 share byte j, the even one in the low nibble, in two's complement.
    """

    codes: npt.NDArray[np.int8]
    scales: Floats
    bits: int

    @classmethod
    def of(cls, rows: Floats, bits: int) -> QuantizedRows:
        """The nearest codes, halves to the even one; a row's scale is its largest magnitude over 127 (7 at 4 bits).

        ConfigError: bits other than 4 and 8, an array that is not a matrix, an odd width at 4 bits.
        """
        if bits not in _LARGEST:
            raise ConfigError(f"bits is {bits}; it must be 4 or 8")
        if rows.ndim != 2:
            raise ConfigError(f"a bank has {rows.ndim} axes; it must have 2, tokens and width")
        if bits == 4 and rows.shape[1] % 2:
            raise ConfigError(f"a bank has width {rows.shape[1]}; 4 bits need an even one")
        rows = np.asarray(rows, dtype=np.float32)
        largest = np.float32(_LARGEST[bits])
        scales = np.maximum(np.abs(rows).max(axis=1, initial=0) / largest, _SMALLEST_SCALE)
        codes = np.clip(np.rint(rows / scales[:, None]), -largest - 1, largest).astype(np.int8)
        return cls(pack_nibbles(codes) if bits == 4 else codes, scales, bits)

    def values(self) -> Floats:
        """The float32 matrix that the codes stand for."""
        codes = unpack_nibbles(self.codes) if self.bits == 4 else self.codes
        return codes.astype(np.float32) * self.scales[:, None]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def pack_nibbles(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """(rows, width) codes from -8 to 7 as (rows, width / 2) bytes."""
    low, high = codes[:, 0::2].view(np.uint8) & 15, codes[:, 1::2].view(np.uint8) & 15
    return (low | high << 4).view(np.int8)


def unpack_nibbles(packed: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """The inverse of `pack_nibbles`."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), dtype=np.int8)
    codes[:, 0::2] = (packed << 4) >> 4
    codes[:, 1::2] = packed >> 4
    return codes
