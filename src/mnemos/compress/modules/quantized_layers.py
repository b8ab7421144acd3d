"""Layers over weights in 8, 5 or 4 bits, computed by the native core; they stand where nn.Linear and others stood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mnemos.compress.modules.block_weights import BLOCK, TYPES, BlockWeights
from mnemos.compress.modules.layers import stay_on_cpu
from mnemos.compress.modules.native_linear import NativeLinear, Products, check_on_cpu, pack_together
from mnemos.errors import RequestError
from mnemos.native import core as _native

PLACE = "weights in the native core's blocks", "use dequantize(), or the float module, on another device"


class QuantizedWeight(nn.Module):
    """BlockWeights as buffers, and the copy of them that the native core multiplies by.

    It is shared where a module shares its weight, as an embedding and a head may.
    """

    codes: Tensor
    scales: Tensor
    row_scales: Tensor
    minima: Tensor | None
    row_minima: Tensor | None

    def __init__(self, weights: BlockWeights) -> None:
        super().__init__()
        self.bits, self.columns = weights.bits, weights.columns
        for name in ("codes", "scales", "row_scales", "minima", "row_minima"):
            self.register_buffer(name, getattr(weights, name))
        self._matrix: Any = None
        self._values: Tensor | None = None
        self.requires_grad_(False)

    @property
    def weights(self) -> BlockWeights:
        """What it holds."""
        buffers = (self.codes, self.scales, self.row_scales, self.minima, self.row_minima)
        return BlockWeights(self.bits, self.columns, *buffers)

    @property
    def rows(self) -> int:
        return len(self.row_scales)

    @property
    def padded(self) -> int:
        """Columns, rounded up to whole blocks."""
        return -(-self.columns // BLOCK) * BLOCK

    @property
    def stored_values(self) -> int:
        """How many weights there are."""
        return self.rows * self.columns

    @property
    def matrix(self) -> Any:
        """The native core's copy, (rows, padded)."""
        if self._matrix is None:
            pack_together([self.allocate()])
        return self._matrix

    @property
    def is_allocated(self) -> bool:
        """Whether the native core has a copy."""
        return self._matrix is not None

    def allocate(self) -> tuple[Any, Any]:
        """(the native core's copy, what it is to be packed from); `pack_together` must follow."""
        stored = self.weights.gguf_blocks().numpy()
        kind = int(TYPES[self.bits])
        self._matrix = _native.allocate_matrix(
            stored, kind, self.rows, self.padded, as_float32=False, order=None, skip_zeros=True
        )
        return self._matrix, stored

    def values(self) -> Tensor:
        """(rows, columns) float32; kept from the first call on, as modules that ask once ask in each call."""
        if self._values is None:
            self._values = self.weights.values()
        return self._values

    @property
    def is_expanded(self) -> bool:
        """Whether `values` was called, so that the weights are kept in float32 too."""
        return self._values is not None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._matrix = self._values = None

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedWeight:
        """Moving is refused; a change of dtype is for what is left in float."""
        stay_on_cpu(fn, *PLACE)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrix": None, "_values": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        weights = self.weights
        parts = (weights.codes, weights.scales, weights.row_scales, weights.minima, weights.row_minima)
        copies = (None if part is None else part.clone() for part in parts)
        memo[id(self)] = copy = QuantizedWeight(BlockWeights(self.bits, self.columns, *copies))  # type: ignore[arg-type]
        return copy


class QuantizedLinear(NativeLinear):
    """x W^T + bias for x (..., in_features) in float32, float16 or bfloat16, whose dtype the result has.

    The activations are rounded to 8 bits in blocks of 32 with a scale each when they come in, or to 15 bits with
    `precise`. A row's result does not depend on the other rows. There are no gradients.
    """

    rounds_inputs = True

    def __init__(
        self,
        quantized: QuantizedWeight,
        bias: Tensor | None,
        *,
        precise: bool = False,
        products: Products | None = None,
    ) -> None:
        sizes = quantized.rows, quantized.columns
        super().__init__(sizes, quantized.padded, bias, precise=precise, products=products)
        self.quantized = quantized

    @property
    def matrix(self) -> Any:
        """The native core's weights, (out_features, padded)."""
        return self.quantized.matrix

    @property
    def weight(self) -> Tensor:
        """The weights as the products use them, (out_features, in_features) float32."""
        return self.quantized.values()

    def extra_repr(self) -> str:
        bits = f"bits={self.quantized.bits}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {bits}"


class QuantizedEmbedding(nn.Module):
    """Rows of a table in 8, 5 or 4 bits by their ids (...) int64: (..., embedding_dim) in `dtype`."""

    def __init__(self, quantized: QuantizedWeight, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantized = quantized
        self.num_embeddings, self.embedding_dim = quantized.rows, quantized.columns
        self.padding_idx = padding_idx
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:
        """The whole table, (num_embeddings, embedding_dim) in `dtype`."""
        return self.quantized.values().to(self.dtype)

    @property
    def expanded(self) -> Tensor | None:
        """The table in float32 if `weight` was ever read."""
        return self.quantized.values() if self.quantized.is_expanded else None

    def forward(self, input: Tensor) -> Tensor:
        check_on_cpu(input)
        if input.is_floating_point():
            raise RequestError(f"input is {input.dtype}; expected row numbers, in int64 or another type of integers")
        ids = input.to(torch.int64).contiguous()
        y = torch.empty((*ids.shape, self.quantized.padded), dtype=torch.float32)
        _native.gather_rows(self.quantized.matrix, ids.data_ptr(), ids.numel(), y.data_ptr())
        return y[..., : self.embedding_dim].to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedEmbedding:
        self.dtype = fn(torch.zeros(1, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.quantized.bits}"
