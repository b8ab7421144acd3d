"""A tensor as it is stored in a file: a type, a shape and bytes that are only interpreted on request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from mnemos.formats.quants import dequantize
from mnemos.formats.tensor_types import TensorType


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
        """Elements of the last axis, 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """How often the last axis is repeated."""
        return prod(self.shape[:-1])

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    @classmethod
    def from_array(cls, name: str, array: npt.NDArray[np.float32]) -> Tensor:
        """Wraps a float32 array of any shape as an F32 tensor."""
        values = np.ascontiguousarray(array, dtype=np.float32)
        return cls(name, TensorType.F32, values.shape, values.reshape(-1).view(np.uint8))

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The values as a new float32 array of `shape`."""
        return dequantize(self.data, self.type).reshape(self.shape)

    def row_matrix(self) -> npt.NDArray[np.uint8]:
        """The bytes as (rows, bytes per row), a view."""
        return self.data.reshape(self.rows, self.type.row_bytes(self.columns))

    def take_rows(self, index: npt.NDArray[np.intp]) -> Tensor:
        """The rows named by `index`, in that order, copied in their storage form; the result has two axes."""
        data = np.ascontiguousarray(self.row_matrix()[index]).reshape(-1)
        return Tensor(self.name, self.type, (len(index), self.columns), data)

    def slice_rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop as a view; the result has two axes."""
        width = self.type.row_bytes(self.columns)
        return Tensor(self.name, self.type, (stop - start, self.columns), self.data[start * width : stop * width])


# What DistributedDataParallel, torch.compile and PEFT put in front of every name.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")


def unwrapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors under the names that they have without the wrappers that the model was trained in."""
    names = list(tensors)
    while wrapper := next((one for one in _WRAPPERS if names and all(name.startswith(one) for name in names)), None):
        names = [name.removeprefix(wrapper) for name in names]
    names = [name.replace("._orig_mod.", ".") for name in names]
    return tensors if names == list(tensors) else dict(zip(names, tensors.values(), strict=True))
