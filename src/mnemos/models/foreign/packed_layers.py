"""Layers on a CPU, computed from copies of their weights in the order in which the processor reads them fastest.

PyTorch multiplies by the weights in the order of the parameter, which for a few rows reads them far below the memory's
speed. Here the copies are oneDNN's, and for a few rows the native core's, which are two to three times as fast
again. They are made once, and take the place of the layers' forward only while the engine calls the module: for anyone
else the module is as it was.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.machine.large_pages import in_large_pages
from mnemos.machine.memory import machine_memory
from mnemos.models.foreign.native_steps import MOST_ROWS, Multiply, NativeOperators, rms_norm, takes_rms_norm
from mnemos.models.foreign.threads import hold_threads, release_threads

MEMORY_SHARE = 4  # the copies may take a quarter of the machine's memory
LARGE_COPIES = 64 << 20  # bytes from which on large pages are worth making: of less, many stay in the caches
SAMPLED = 64  # values of a parameter
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(slots=True)
class PackedLayer:
    """A layer's stand-in for its forward, and the parameters that it was made of.

    version: how often optimizers and load_state_dict have changed a parameter; address: `module.to` moves it; sample:
    some of the weight's values and the bias's, as changes through `.data` are not counted.
    """

    layer: nn.Linear
    attributes: dict[str, Any]  # the layer's own
    held: dict[str, Any]  # and its parameters, as looking them up in the layer is slow and happens before each step
    weight: Tensor
    bias: Tensor | None
    version: int
    address: int
    bias_version: int
    bias_address: int
    forward: Multiply
    number: int | None  # the native core's, of its product
    sample: Tensor

    def is_as_sampled(self) -> bool:
        return torch.equal(_sample(self.weight, self.bias), self.sample)

    def is_current(self) -> bool:
        weight, bias, held = self.weight, self.bias, self.held
        if held.get("weight") is not weight or held.get("bias") is not bias:
            return False
        if weight._version != self.version or weight.data_ptr() != self.address:
            return False
        return bias is None or (bias._version == self.bias_version and bias.data_ptr() == self.bias_address)


class PackedLayers:
    """The linear layers and norms of one module. A layer whose weight was changed is repacked when next used.

    native: what computes for few tokens, if the native core does.
    """

    def __init__(self, module: nn.Module) -> None:
        compiled = hasattr(module, "_orig_mod")
        layers = [m for m in module.modules() if isinstance(m, nn.Linear) and _can_be_packed(m) and not compiled]
        bytes_needed = sum(layer.weight.nbytes for layer in layers)
        room = machine_memory() // MEMORY_SHARE
        native = (
            NativeOperators(torch.get_num_threads())
            if NativeOperators.available() and 2 * bytes_needed <= room
            else None
        )
        if not _available() or bytes_needed > room:
            layers = []
        with in_large_pages() if bytes_needed >= LARGE_COPIES else nullcontext():
            self._packed = [packed for layer in layers if (packed := _pack(layer, native, None)) is not None]
        if native is not None:
            native.finish()
        self._holds_threads = False
        self.native = native if any(one.number is not None for one in self._packed) else None
        self._norms: list[tuple[nn.Module, Multiply]] = []
        if self.native is not None:
            norms = [m for m in module.modules() if isinstance(m, nn.RMSNorm) and takes_rms_norm(m)]
            self._norms = [(norm, rms_norm(norm)) for norm in norms]

    def install(self, rows: int) -> None:
        """The layers multiply by the copies from now on, in a call of `rows` tokens.

        With few tokens the native core does what is worth sharing among threads.
        """
        if self.native is not None and rows <= MOST_ROWS:
            self._holds_threads = hold_threads()
            for norm, forward in self._norms:
                if takes_rms_norm(norm):
                    norm.__dict__["forward"] = forward
        for index, one in enumerate(self._packed):
            if one.is_current() or self._renew(index):
                one.attributes["forward"] = self._packed[index].forward
        if self.native is not None:
            self.native.finish()

    def check(self) -> None:
        """Layers whose weights were changed through `.data` are repacked when next used."""
        for one in self._packed:
            if one.is_current() and not one.is_as_sampled():
                one.version = -1

    def _renew(self, index: int) -> bool:
        """Packs a layer that was changed; False if it cannot be packed any more."""
        one = self._packed[index]
        again = _pack(one.layer, self.native, one.number) if _can_be_packed(one.layer) else None
        if again is not None:
            self._packed[index] = again
        return again is not None

    def remove(self) -> None:
        """The layers are as they were."""
        if self._holds_threads:
            release_threads()
            self._holds_threads = False
        for one in self._packed:
            one.attributes.pop("forward", None)
        for norm, _ in self._norms:
            norm.__dict__.pop("forward", None)


def _available() -> bool:
    backend: Any = torch.backends.mkldnn
    return bool(backend.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _can_be_packed(layer: nn.Linear) -> bool:
    """Exactly nn.Linear with ordinary parameters in memory; what was subclassed or patched computes something else."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight, held = layer.weight, layer._parameters
    if held.get("weight") is not weight or held.get("bias") is not layer.bias:  # recreated by a hook
        return False
    return not weight.is_inference() and weight.device.type == "cpu" and weight.dtype in _DTYPES


def _pack(layer: nn.Linear, native: NativeOperators | None, number: int | None) -> PackedLayer | None:
    """Packs a layer; `number` is that of its product before, if it had one."""
    weight, bias = layer.weight, layer.bias
    many = _pack_many(weight, bias)
    if many is None:
        return None
    dtype = weight.dtype

    def multiply(input: Tensor) -> Tensor:
        if input.dtype is not dtype or not input.is_cpu:  # PyTorch knows what it can make of that, or what to say
            return F.linear(input, weight, bias)
        return many(input)

    forward: Multiply = multiply
    if native is not None and (bias is None or bias.dtype is dtype):
        forward, number = native.linear(weight, bias, number, many)

    states = (weight._version, weight.data_ptr(), *((0, 0) if bias is None else (bias._version, bias.data_ptr())))
    sample = _sample(weight, bias)
    return PackedLayer(layer, layer.__dict__, layer._parameters, weight, bias, *states, forward, number, sample)


def _sample(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Up to SAMPLED values of the weight along a diagonal, so of many rows and columns, and as many of the bias."""
    step = weight.shape[1] + 1
    values = weight.detach().flatten()[:: step * -(-len(weight) // SAMPLED)]
    return values.clone() if bias is None else torch.cat((values, bias.detach()[:: -(-len(bias) // SAMPLED)]))


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
