"""Linear layers on a CPU, multiplied from copies of their weights that lie as the processor reads them fastest.

PyTorch multiplies by the weights as they lie in the parameter, which for a few rows reads them far below the memory's
speed. Here the copies are oneDNN's, and for a few rows in float32 the native core's, which are about twice as fast
again. They are made once, and take the place of the layers' forward only while the engine calls the module: for anyone
else the module is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.formats.tensor import TensorType
from mnemos.memory.planning import machine_memory

MEMORY_SHARE = 4  # the copies may take a quarter of the machine's memory
FEW_ROWS = 8
_DTYPES = (torch.float32, torch.bfloat16)
Multiply = Callable[[Tensor], Tensor]

_native: Any
try:
    from mnemos import _native
except ImportError:  # not built: oneDNN does it all
    _native = None


@dataclass(frozen=True)
class PackedLayer:
    layer: nn.Linear
    weight: Tensor
    bias: Tensor | None
    state: tuple[int, ...]
    forward: Multiply

    def is_current(self) -> bool:
        layer = self.layer
        same = layer.weight is self.weight and layer.bias is self.bias
        return same and _state(self.weight, self.bias) == self.state


class PackedLinears:
    """The packed linear layers of one module. A layer whose weight was changed since is packed anew when next used."""

    def __init__(self, module: nn.Module) -> None:
        compiled = hasattr(module, "_orig_mod")
        layers = [m for m in module.modules() if type(m) is nn.Linear and _can_be_packed(m) and not compiled]
        bytes_needed = sum(layer.weight.nbytes for layer in layers)
        room = machine_memory() // MEMORY_SHARE
        self._pool = _native.shared_pool(torch.get_num_threads()) if _native and 2 * bytes_needed <= room else None
        if not _available() or bytes_needed > room:
            layers = []
        self._packed = [packed for layer in layers if (packed := _pack(layer, self._pool)) is not None]
        self._threads = torch.get_num_threads()
        self._native = self._pool is not None and any(one.layer.weight.dtype is torch.float32 for one in self._packed)

    def install(self, rows: int) -> None:
        """The layers multiply by the copies from now on, in a call with so many tokens.

        With few tokens the native core does what is worth sharing among threads. PyTorch's, which spin for work after
        each of its operations, would only take the cores from it.
        """
        self._threads = torch.get_num_threads()
        if self._native and rows <= FEW_ROWS and self._threads > 1:
            torch.set_num_threads(1)
        packed = self._packed
        for index, one in enumerate(packed):
            if not one.is_current():
                again = _pack(one.layer, self._pool) if _can_be_packed(one.layer) else None
                if again is None:
                    continue
                one = packed[index] = again
            one.layer.__dict__["forward"] = one.forward

    def remove(self) -> None:
        """The layers are as they were."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        for one in self._packed:
            one.layer.__dict__.pop("forward", None)


def _available() -> bool:
    backend: Any = torch.backends.mkldnn
    return bool(backend.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _can_be_packed(layer: nn.Linear) -> bool:
    """Exactly nn.Linear with ordinary parameters in memory; what was subclassed or patched computes something else."""
    weight = layer.weight
    plain = type(layer) is nn.Linear and "forward" not in layer.__dict__ and not weight.is_inference()
    return plain and weight.device.type == "cpu" and weight.dtype in _DTYPES


def _state(*parameters: Tensor | None) -> tuple[int, ...]:
    """Where the parameters lie (`module.to` moves them) and how often optimizers and load_state_dict changed them."""
    return tuple(number for p in parameters if p is not None for number in (p._version, p.data_ptr()))


def _pack(layer: nn.Linear, pool: Any) -> PackedLayer | None:
    weight, bias = layer.weight, layer.bias
    many = _pack_many(weight, bias)
    if many is None:
        return None
    floats = all(one is None or one.dtype is torch.float32 for one in (weight, bias))
    few = _pack_few(weight, bias, pool) if floats and pool is not None else None

    def forward(input: Tensor) -> Tensor:
        if input.dtype is not weight.dtype:  # PyTorch knows better what it can make of that, or what to say
            return F.linear(input, weight, bias)
        if few is not None and 0 < input.numel() <= FEW_ROWS * weight.shape[1]:
            return few(input)
        return many(input)

    return PackedLayer(layer, weight, bias, _state(weight, bias), forward)


def _pack_many(weight: Tensor, bias: Tensor | None) -> Multiply | None:
    """oneDNN's product; None for a dtype that this processor has no instructions for."""
    multiply: Any = torch.ops.mkldnn._linear_pointwise.default
    try:
        with torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
    except RuntimeError:
        return None

    def many(input: Tensor) -> Tensor:
        product: Tensor = multiply(input, packed, bias, "none", [], "")
        return product

    return many


def _pack_few(weight: Tensor, bias: Tensor | None, pool: Any) -> Multiply:
    """The native core's product, of float32."""
    rows, columns = weight.shape
    stored = weight.detach().contiguous().view(torch.uint8).numpy().reshape(-1)
    matrix = _native.make_matrix(stored, int(TensorType.F32), rows, columns, as_float32=True, release=False, pool=pool)
    program = _native.Program(pool, None)
    offset = None if bias is None else bias.detach().contiguous().numpy()
    program.finish([program.linear(program.input(columns, integers=False), matrix, offset)])

    def few(input: Tensor) -> Tensor:
        x = input.reshape(-1, columns).contiguous()
        (product,) = program.run(*_BATCHES[len(x)], [x.numpy()])
        return torch.from_numpy(product.copy()).reshape(*input.shape[:-1], rows)

    return few


def _batch(rows: int) -> tuple[np.ndarray[Any, Any], ...]:
    """A step of `rows` tokens as the native core takes it, of which the product reads nothing but their number."""
    count = np.arange(rows, dtype=np.int32)
    none, ends = np.zeros(0, np.int32), np.array([0, rows], np.int32)
    return np.zeros(rows, np.int32), count, ends, none, np.zeros(2, np.int32), none


_BATCHES = [_batch(count) for count in range(FEW_ROWS + 1)]
