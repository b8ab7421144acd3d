"""The types in which files store tensors: their numbers and the sizes of their blocks."""

from __future__ import annotations

from enum import IntEnum


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
        """Whether elements share a scale, so that they have no value by themselves."""
        return self.block[0] > 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` elements, a whole number of blocks."""
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
