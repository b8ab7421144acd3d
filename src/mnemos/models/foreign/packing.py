"""Linear layers on a CPU, multiplied from weights laid out for oneDNN: about twice the speed for a few rows.

PyTorch multiplies by the weights as they lie in the parameter, which for one row reads them far below the memory's
speed. Here a second copy in oneDNN's own order is made once, and takes the place of the layers' forward only while the
engine calls the module: for anyone else the module is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.memory.planning import machine_memory

MEMORY_SHARE = 4  # the copies may take a quarter of the machine's memory
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class PackedLayer:
    layer: nn.Linear
    weight: Tensor
    bias: Tensor | None
    version: int  # counts the changes to the weight, as optimizers and load_state_dict make them
    forward: Callable[[Tensor], Tensor]

    def is_current(self) -> bool:
        layer, weight = self.layer, self.weight
        return layer.weight is weight and layer.bias is self.bias and weight._version == self.version


class PackedLinears:
    """The packed linear layers of one module. A layer whose weight was changed since is packed anew when next used."""

    def __init__(self, module: nn.Module) -> None:
        compiled = hasattr(module, "_orig_mod")
        layers = [m for m in module.modules() if type(m) is nn.Linear and _can_be_packed(m) and not compiled]
        bytes_needed = sum(layer.weight.nbytes for layer in layers)
        if not _available() or bytes_needed > machine_memory() // MEMORY_SHARE:
            layers = []
        self._packed = [packed for layer in layers if (packed := _pack(layer)) is not None]

    def install(self) -> None:
        """The layers multiply by the copies from now on."""
        packed = self._packed
        for index, one in enumerate(packed):
            if not one.is_current():
                again = _pack(one.layer) if _can_be_packed(one.layer) else None
                if again is None:
                    continue
                one = packed[index] = again
            one.layer.__dict__["forward"] = one.forward

    def remove(self) -> None:
        """The layers are as they were."""
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


def _pack(layer: nn.Linear) -> PackedLayer | None:
    multiply: Any = torch.ops.mkldnn._linear_pointwise.default
    weight, bias = layer.weight, layer.bias
    try:
        with torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
    except RuntimeError:  # a dtype that this processor has no instructions for
        return None

    def forward(input: Tensor) -> Tensor:
        product: Tensor = multiply(input, packed, bias, "none", [], "")
        return product

    return PackedLayer(layer, weight, bias, weight._version, forward)
