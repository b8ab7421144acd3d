"""A tensor as it lies in a file: a type, a shape and bytes that are only interpreted on request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import prod

import numpy as np
import numpy.typing as npt


class TensorType(IntEnum):
    """Storage types, numbered as in GGUF; those from 1000 on occur in other formats only."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    BF16 = 30
    U8 = 1000

    @property
    def block(self) -> tuple[int, int]:
        """(elements, bytes) of one block; a row is a whole number of blocks."""
        return _BLOCKS[self]

    @property
    def is_quantized(self) -> bool:
        return self.block[0] > 1

    def row_bytes(self, columns: int) -> int:
        elements, size = self.block
        return columns // elements * size


_BLOCKS = {
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.Q4_0: (32, 18),
    TensorType.Q4_1: (32, 20),
    TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24),
    TensorType.Q8_0: (32, 34),
    TensorType.Q2_K: (256, 84),
    TensorType.Q3_K: (256, 110),
    TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176),
    TensorType.Q6_K: (256, 210),
    TensorType.IQ4_NL: (32, 18),
    TensorType.IQ4_XS: (256, 136),
    TensorType.I8: (1, 1),
    TensorType.I16: (1, 2),
    TensorType.I32: (1, 4),
    TensorType.I64: (1, 8),
    TensorType.F64: (1, 8),
    TensorType.BF16: (1, 2),
    TensorType.U8: (1, 1),
}


@dataclass(frozen=True)
class Tensor:
    """A named tensor in row-major order: the last axis of `shape` is contiguous, as in NumPy.

    `data` is a flat uint8 array, normally a view of the memory-mapped file; nothing is expanded
    until `dequantize` is called. Readers check that `data` has exactly the bytes that type and shape need.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def size(self) -> int:
        return prod(self.shape)

    @classmethod
    def from_array(cls, name: str, array: npt.NDArray[np.float32]) -> Tensor:
        """Wraps a float32 array of any shape as an F32 tensor."""
        values = np.ascontiguousarray(array, dtype=np.float32)
        return cls(name, TensorType.F32, values.shape, values.reshape(-1).view(np.uint8))

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The values as a new float32 array of `shape`."""
        from mnemos.formats.quants import dequantize

        return dequantize(self.data, self.type).reshape(self.shape)

    def row_matrix(self) -> npt.NDArray[np.uint8]:
        """The bytes as (rows, bytes a row), a view."""
        return self.data.reshape(self.rows, self.type.row_bytes(self.columns))

    def take_rows(self, index: npt.NDArray[np.intp]) -> Tensor:
        """The rows named by `index`, in that order, copied in their storage form; the result has two axes."""
        data = np.ascontiguousarray(self.row_matrix()[index]).reshape(-1)
        return Tensor(self.name, self.type, (len(index), self.columns), data)

    def slice_rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop as a view; the result has two axes."""
        width = self.type.row_bytes(self.columns)
        return Tensor(self.name, self.type, (stop - start, self.columns), self.data[start * width : stop * width])
