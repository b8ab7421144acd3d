"""Layers over weights in 8, 5 or 4 bits, which stand where nn.Linear and others stood.

On the CPU the native core computes them, on a GPU torchao, from the same blocks; these stay in the machine's memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mnemos.compress.modules.block_weights import BLOCK, TYPES, BlockWeights
from mnemos.compress.modules.gpu_weights import check_gpu, linear_weight, multiply, on_device, pick_rows
from mnemos.compress.modules.layers import place_of
from mnemos.compress.modules.native_linear import NativeLinear, Products, check_on_cpu, check_width, pack_together
from mnemos.errors import ConfigError, RequestError
from mnemos.native import core as _native

CPU = torch.device("cpu")


class QuantizedWeight(nn.Module):
    """BlockWeights as buffers on the CPU, and the copy of them that `place`, the CPU or a GPU, multiplies by.

    It is shared where a module shares its weight, as an embedding and a head may.
    """

    codes: Tensor
    scales: Tensor
    row_scales: Tensor
    minima: Tensor | None
    row_minima: Tensor | None

    def __init__(self, weights: BlockWeights, place: torch.device = CPU) -> None:
        super().__init__()
        self.bits, self.columns, self.place = weights.bits, weights.columns, place
        for name in ("codes", "scales", "row_scales", "minima", "row_minima"):
            self.register_buffer(name, getattr(weights, name))
        self._matrix: Any = None
        self._values: Tensor | None = None
        self._placed: dict[bool, Tensor] = {}
        self._table: BlockWeights | None = None
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

    def placed(self, rounds_inputs: bool) -> Tensor:
        """The GPU's copy for products, see `gpu_weights.linear_weight`."""
        if rounds_inputs not in self._placed:
            self._placed[rounds_inputs] = linear_weight(self.weights, self.place, rounds_inputs)
        return self._placed[rounds_inputs]

    @property
    def table(self) -> BlockWeights:
        """The GPU's copy for rows by their numbers."""
        if self._table is None:
            self._table = on_device(self.weights, self.place)
        return self._table

    def values(self) -> Tensor:
        """(rows, columns) float32; kept from the first call on, as modules that ask once ask in each call."""
        if self._values is None:
            self._values = self.weights.values().to(self.place)
        return self._values

    @property
    def is_expanded(self) -> bool:
        """Whether `values` was called, so that the weights are kept in float32 too."""
        return self._values is not None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def _forget(self) -> None:
        self._matrix = self._values = self._table = None
        self._placed = {}

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedWeight:
        """Another device computes from now on; the blocks stay. A change of dtype is for what is left in float."""
        place = moved_to(fn, self.place, self.bits)
        if place != self.place:
            self.place = place
            self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrix": None, "_values": None, "_placed": {}, "_table": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        memo[id(self)] = copy = QuantizedWeight(self.weights.mapped(Tensor.clone), self.place)
        return copy


class QuantizedLinear(NativeLinear):
    """x W^T + bias for x (..., in_features) in float32, float16 or bfloat16, whose dtype the result has.

    On the CPU, activations are rounded to 8 bits in blocks of 32 with a scale each when they come in, or to 15 bits
    with `precise`. On a GPU they are with `rounds_on_gpu`, to 8 bits with one scale a row. A row's result does not
    depend on the other rows. There are no gradients.
    """

    rounds_inputs = True

    def __init__(
        self,
        quantized: QuantizedWeight,
        bias: Tensor | None,
        *,
        precise: bool = False,
        rounds_on_gpu: bool = False,
        products: Products | None = None,
    ) -> None:
        sizes = quantized.rows, quantized.columns
        super().__init__(sizes, quantized.padded, bias, precise=precise, products=products)
        self.quantized, self.rounds_on_gpu = quantized, rounds_on_gpu

    @property
    def matrix(self) -> Any:
        """The native core's weights, (out_features, padded)."""
        return self.quantized.matrix

    @property
    def weight(self) -> Tensor:
        """The weights in the blocks, (out_features, in_features) float32."""
        return self.quantized.values()

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.quantized.place.type != "cpu":
            self.unbind()
        return self

    def settle(self) -> None:
        """Makes the GPU's copy of the weights now instead of in the first call."""
        self.quantized.placed(self.rounds_on_gpu)

    def forward(self, input: Tensor) -> Tensor:
        place = self.quantized.place
        if place.type == "cpu":
            return super().forward(input)
        check_width(input, self.in_features)
        check_there(input, place)
        return multiply(input, self.quantized.placed(self.rounds_on_gpu), self.bias)

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

    def settle(self) -> None:
        """Makes the GPU's copy of the table now instead of in the first call."""
        _ = self.quantized.table

    def forward(self, input: Tensor) -> Tensor:
        place = self.quantized.place
        if place.type == "cpu":
            check_on_cpu(input)
        else:
            check_there(input, place)
        if input.is_floating_point():
            raise RequestError(f"input is {input.dtype}; expected row numbers, in int64 or another type of integers")
        ids = input.to(torch.int64).contiguous()
        if place.type != "cpu":
            return pick_rows(self.quantized.table, ids).to(self.dtype)
        y = torch.empty((*ids.shape, self.quantized.padded), dtype=torch.float32)
        _native.gather_rows(self.quantized.matrix, ids.data_ptr(), ids.numel(), y.data_ptr())
        return y[..., : self.embedding_dim].to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedEmbedding:
        self.dtype = fn(torch.zeros(1, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.quantized.bits}"


def moved_to(fn: Any, place: torch.device, bits: int) -> torch.device:
    """Where `fn`, see `layers.place_of`, moves weights from `place`. ConfigError, MissingDependencyError: it cannot."""
    new = place_of(fn, place)
    if new.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {str(new)!r}; a quantized module runs on 'cpu' or 'cuda'")
    if new != place and new.type == "cuda":
        check_gpu(new, bits)
    return new


def check_there(input: Tensor, place: torch.device) -> None:
    """RequestError unless a tensor is on that device."""
    if input.device != place:
        raise RequestError(f"input is on {input.device}; expected a tensor on {place}, where this layer's weights are")
