"""Which layers of a module can be quantized, to how many bits, and why the others stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mnemos.compress.modules.block_weights import BLOCK
from mnemos.compress.modules.layers import check_finite_parameters, is_transposed, matrix_of
from mnemos.errors import ConfigError, ModelError

Kind = Literal["linear", "conv1d", "embedding"]
BITS = (8, 4)
METHODS = ("dynamic", "static")
RANGE = (1e-4, 6e4)  # of the largest value of a weight, whose scales float16 holds
# A 4-bit file may be this share of the float32 one. What is left of it goes to tables and heads, which round worst.
_TARGET = 0.1485
_MOST_ADDED = 0.18  # bits a weight, in small modules, which miss that share by their norms and biases alone


@dataclass(frozen=True)
class Layer:
    """A layer to quantize. precise: it rounds what it reads to 15 bits instead of 8."""

    name: str
    module: nn.Module
    kind: Kind
    bits: int = 8
    precise: bool = False

    @property
    def parameter(self) -> Tensor:
        """The weight as the layer has it."""
        return cast(Tensor, self.module.weight)

    @property
    def matrix(self) -> Tensor:
        """The weight as (rows, columns): its products are x W^T. transformers' Conv1D has it the other way round."""
        return matrix_of(self.module)


def check_request(bits: Any, method: Any) -> None:
    """ConfigError unless the bits and the method are known."""
    if type(bits) is not int or bits not in BITS:
        raise ConfigError(f"bits is {bits!r}; expected 8 or 4")
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(f"method is {method!r}; expected 'dynamic' or 'static'")


def find_layers(model: nn.Module, bits: int) -> list[Layer]:
    """The layers to quantize, with their bits. ModelError: there are none, or a parameter is not finite or is empty.

    Tables and the heads that choose among their entries get 5 or 8 bits in a 4-bit module, as long as the file has
    room; those of an 8-bit module round their inputs more finely.
    """
    layers = [layer for name, module in model.named_modules() if (layer := _layer_of(name, module)) is not None]
    if not layers:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ModelError(
            f"{type(model).__name__} has nothing to quantize; expected nn.Linear, nn.Embedding, nn.MultiheadAttention "
            f"or transformers' Conv1D among its layers, which are {', '.join(kinds)}"
        )
    for layer in layers:
        _check_type(layer)
    check_finite_parameters(model)
    entries = {len(layer.parameter) for layer in layers if layer.kind == "embedding"}
    heads = {layer.name for layer in layers if layer.kind != "embedding" and len(layer.matrix) in entries}
    raised = {} if bits == 8 else _raised(model, layers, heads)
    return [
        replace(layer, bits=raised.get(id(layer.parameter), bits), precise=bits == 8 and layer.name in heads)
        for layer in layers
    ]


def reason_to_stay(module: nn.Module) -> str:
    """Why a module's own parameters stay in float."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        if not module.weight.numel():
            return "it has no values"
        if type(module) is nn.Embedding:
            return "its rows are renormalised when they are read"
        return f"{type(module).__name__} is a subclass with a forward of its own"
    if isinstance(module, nn.RNNBase):
        return "recurrent layers are not quantized"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions are not quantized"
    return f"{type(module).__name__} computes with it itself"


def _layer_of(name: str, module: Any) -> Layer | None:
    if "forward" in module.__dict__:  # patched: what it computes is not known
        return None
    kind: Kind
    if type(module) is nn.Linear:
        kind = "linear"
    elif type(module) is nn.Embedding and module.max_norm is None:
        kind = "embedding"
    elif is_transposed(module):
        kind = "conv1d"
    else:
        return None
    return Layer(name, module, kind) if module.weight.numel() else None


def _check_type(layer: Layer) -> None:
    weight, name = layer.parameter, f"{layer.name}.weight" if layer.name else "weight"
    if not weight.is_floating_point():
        raise ModelError(f"{name} is {weight.dtype}; expected a floating-point weight, not a quantized one")


def one_place(model: nn.Module) -> torch.device:
    """The device of all parameters and buffers. ConfigError: they are on several, or on one for which there are no
    products."""
    first, place = "", torch.device("cpu")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.device.type not in ("cpu", "cuda"):
            raise ConfigError(f"{name} is on {tensor.device}; a quantized module runs on 'cpu' or 'cuda'")
        if first and tensor.device != place:
            raise ConfigError(f"{name} is on {tensor.device} and {first} on {place}; expected all of it on one device")
        first, place = name, tensor.device
    return place


def outside_of_range(weight: Tensor) -> str:
    """Why a weight's values cannot be quantized, or an empty string."""
    largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
    if largest == 0 or RANGE[0] <= largest <= RANGE[1]:
        return ""
    return f"its largest value is {largest:.1e}; float16 scales need {RANGE[0]:.0e} to {RANGE[1]:.0e}"


def stored_bits(columns: int, bits: int) -> float:
    """Bits a weight of a file."""
    padded = -(-columns // BLOCK) * BLOCK
    whole = bits + (8 if bits == 8 else 16) / BLOCK
    return whole * padded / columns + (16 if bits == 8 else 32) / columns


def _raised(model: nn.Module, layers: list[Layer], heads: set[str]) -> dict[int, int]:
    """More bits than 4 for some weights, by id."""
    unique = {id(layer.parameter): layer for layer in layers}
    matrices = {key: layer.matrix for key, layer in unique.items()}
    quantized = sum(matrix.numel() for matrix in matrices.values())
    whole = sum(p.numel() for p in model.parameters())
    used = 32 * (whole - quantized) + sum(stored_bits(m.shape[1], 4) * m.numel() for m in matrices.values())
    room = _TARGET * 32 * whole - used
    if room < 0:
        room = _MOST_ADDED * quantized
    wanted = [key for key, layer in unique.items() if layer.kind == "embedding" or layer.name in heads]
    wanted.sort(key=lambda key: matrices[key].numel())
    raised: dict[int, int] = {}
    for bits in (5, 8):
        for key in wanted:
            rows, columns = matrices[key].shape
            cost = rows * columns * (stored_bits(columns, bits) - stored_bits(columns, raised.get(key, 4)))
            if cost <= room:
                room -= cost
                raised[key] = bits
    return raised


def named_leftovers(model: nn.Module, quantized: set[int]) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module that has it, parameter) of all parameters that are not among `quantized`, by id."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in quantized and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, module, parameter
