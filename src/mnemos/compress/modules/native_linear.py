"""What the layers over the native core's products have in common: they stand where nn.Linear stood."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.errors import ConfigError, RequestError
from mnemos.machine.levels import settle_levels
from mnemos.models.foreign.threads import hold_threads, outer_threads, release_threads
from mnemos.native import core as _native

# Up to so many rows PyTorch is held to one thread: what its others could share is less than what they cost by spinning.
_HELD_ROWS = 512
_PACKED_TOGETHER = 64 << 20  # bytes: so much of the stored form is held beside the packed one


class Products:
    """The native products of one model's layers, which learn in which order they are called; for each thread count."""

    def __init__(self) -> None:
        self._steps: dict[int, Any] = {}

    def step(self, threads: int) -> Any:
        """The native core's object for so many threads."""
        if threads not in self._steps:
            settle_levels()
            pool = _native.shared_pool(min(threads, _native.usable_cores()))
            self._steps[threads] = _native.ForeignStep(pool)
        return self._steps[threads]

    def forget(self) -> None:
        """Lets go of all weights."""
        self._steps.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Products:
        return Products()

    def __reduce__(self) -> Any:
        return Products, ()


class NativeLinear(nn.Module):
    """x W^T + bias for x (..., in_features) of any floating-point type, which the result has. There are no gradients.

    dtype: of the inputs and results of the product; padded: the columns of `matrix`; precise: see ForeignStep.add.
    """

    rounds_inputs = False  # for `models.foreign.comparison`

    def __init__(
        self,
        sizes: tuple[int, int],
        padded: int,
        bias: Tensor | None,
        *,
        dtype: torch.dtype = torch.float32,
        precise: bool = False,
        products: Products | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = sizes
        self.padded, self.dtype, self.precise = padded, dtype, precise
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.products = products or Products()
        self._numbers: dict[int, tuple[Any, int]] = {}

    @property
    def matrix(self) -> Any:
        """The native core's weights, (out_features, padded)."""
        raise NotImplementedError

    def bind(self, threads: int) -> tuple[Any, int]:
        """Makes the native product for so many threads, where there is none: (how to multiply, its number)."""
        if threads not in self._numbers:
            step = self.products.step(threads)
            bias = None if self.bias is None else self.bias.detach().float().contiguous().numpy()
            self._numbers[threads] = step.multiply, step.add(self.matrix, bias, self.precise)
        return self._numbers[threads]

    def unbind(self) -> None:
        """Lets go of the native products, also of the layers that share `products`, all of which must do this."""
        self._numbers = {}
        self.products.forget()

    def forward(self, input: Tensor) -> Tensor:
        shape, width = input.shape, self.in_features
        check_width(input, width)
        check_on_cpu(input)
        if input.requires_grad and torch.is_grad_enabled():
            raise ConfigError("input requires gradients, which this layer does not have; train the module it is from")
        x = input if input.dtype is self.dtype else input.to(self.dtype)
        if self.padded != width:
            x = F.pad(x, (0, self.padded - width))
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty((*shape[:-1], self.out_features))
        threads = outer_threads()
        multiply, number = self._numbers.get(threads) or self.bind(threads)
        if y.numel():
            multiply(number, x.data_ptr(), y.numel() // self.out_features, y.data_ptr())
        return y if input.dtype is self.dtype else y.to(input.dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._numbers = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_numbers": {}}


def check_on_cpu(input: Tensor) -> None:
    """RequestError unless the native core can read the tensor's memory."""
    if not input.is_cpu:
        raise RequestError(f"input is on {input.device}; expected a tensor on the CPU, where this layer's weights are")


def check_width(input: Tensor, width: int) -> None:
    """RequestError unless the last axis has so many values."""
    if input.shape[-1:] != (width,):
        raise RequestError(f"input has shape {tuple(input.shape)}; expected {width} values in its last axis")


def pack_together(weights: Iterable[tuple[Any, Any]]) -> None:
    """Packs (matrix, what it was allocated for) each, many into one piece of memory: it then has large pages, which
    single matrices are often too small for, and which are read half as fast again."""
    group: list[tuple[Any, Any, Any, bool]] = []
    size = 0
    for matrix, stored in weights:
        group.append((matrix, stored, None, False))
        size += stored.nbytes
        if size >= _PACKED_TOGETHER:
            _native.pack_matrices(group, _native.shared_pool(1))
            group, size = [], 0
    if group:
        _native.pack_matrices(group, _native.shared_pool(1))


def bind_all(model: nn.Module) -> None:
    """Makes all native products of a module, so that its first call is as fast as the others."""
    threads = outer_threads()
    for layer in model.modules():
        if isinstance(layer, NativeLinear):
            layer.bind(threads)


def call_native(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Calls a module with native layers; PyTorch's own threads rest where the native core's have more use of a core."""
    held = _rows_of((*args, *kwargs.values())) <= _HELD_ROWS and hold_threads()
    try:
        return model(*args, **kwargs)
    finally:
        if held:
            release_threads()


def _rows_of(values: Iterable[Any]) -> int:
    """The tokens or rows of the first tensor among a call's arguments."""
    for value in values:
        if isinstance(value, Tensor):
            return value.numel() // (value.shape[-1] if value.is_floating_point() and value.dim() else 1)
    return _HELD_ROWS + 1
