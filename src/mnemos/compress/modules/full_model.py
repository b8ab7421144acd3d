"""A whole module in another precision, by the names of the memory transformer's documents."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.compress.modules.layers import check_finite_parameters, check_module
from mnemos.compress.modules.quantizable import Layer, find_layers
from mnemos.compress.modules.quantized_model import QuantizedModel
from mnemos.compress.modules.state_file import check_name, save_state
from mnemos.compress.modules.stored_weights import (
    BitsandbytesFloat8Weight,
    Float8Weight,
    StoredEmbedding,
    StoredLinear,
    import_bitsandbytes,
)
from mnemos.errors import ConfigError, ModelError, shown
from mnemos.rules import one_of

_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
METHOD = one_of(*_FLOATS, "dynamic", "fp8", "bnb_8bit", "bnb_4bit", "bnb_fp8")


def quantize_full_model(
    model: nn.Module, method: str = "dynamic", output_path: str | os.PathLike[str] | None = None
) -> nn.Module:
    """A copy of the model in another precision.

    fp16, bf16, fp32   all floating-point values
    dynamic            `QuantizedModel` with 8 bits: the fastest on a CPU
    fp8                linear layers and tables in float8, expanded in each call: a quarter of the memory, not faster
    bnb_8bit, bnb_4bit bitsandbytes' int8 and nf4 layers for linear ones, which are meant for GPUs
    bnb_fp8            linear layers in bitsandbytes' 8-bit floating-point code, expanded in each call

    output_path: "dynamic" writes what `QuantizedModel.load` reads; the others a state dict, .safetensors, .pt, .pth or
    .bin, for a module that this function has made with the same method. Errors: ConfigError for an unknown method,
    MissingDependencyError where bitsandbytes is needed, ModelError for NaN weights, ones beyond float16's range, or
    nothing to quantize.
    """
    METHOD.apply("method", method)
    check_module(model)
    if output_path is not None:
        if not isinstance(output_path, (str, os.PathLike)):
            raise ConfigError(f"output_path is {shown(output_path)}; expected a path, or None to write nothing")
        if method != "dynamic":
            check_name(output_path)
    if method == "dynamic":
        quantized = QuantizedModel(model)
        if output_path is not None:
            quantized.save(os.fspath(output_path))
        return quantized
    if method in _FLOATS:
        check_finite_parameters(model)
        made = copy.deepcopy(model).to(_FLOATS[method])
        _check_range(model, made, method)
    else:
        memo: dict[int, Any] = {}
        shared: dict[int, Any] = {}
        for layer in find_layers(model, 8):
            replacement = _replacement(layer, method, shared)
            if replacement is not None:
                memo[id(layer.module)] = replacement
        made = copy.deepcopy(model, memo)
    made.requires_grad_(method in _FLOATS)
    made.train(model.training)
    if output_path is not None:
        save_state(_tensors(made), output_path)
    return made


def _check_range(model: nn.Module, made: nn.Module, method: str) -> None:
    """ModelError: a value has become infinite, by the name of its parameter."""
    for (name, before), after in zip(model.named_parameters(), made.parameters(), strict=True):
        if after.is_floating_point() and not bool(torch.isfinite(after).all()):
            largest = float(before.detach().abs().max())
            raise ModelError(
                f"{name} has values up to {largest:.3g}, and {method} ends at {torch.finfo(after.dtype).max:.3g}; "
                "expected method='bf16'"
            )


def _replacement(layer: Layer, method: str, shared: dict[int, Any]) -> nn.Module | None:
    """The layer in that precision; None: it stays."""
    weight, key = layer.parameter, id(layer.parameter)
    bias: Tensor | None = getattr(layer.module, "bias", None)
    if method == "fp8":
        if key not in shared:
            shared[key] = Float8Weight(layer.matrix)
        if layer.kind == "embedding":
            return StoredEmbedding(shared[key], weight.dtype)
        return StoredLinear(shared[key], bias)
    if layer.kind == "embedding":
        return None
    if method == "bnb_fp8":
        return StoredLinear(BitsandbytesFloat8Weight(layer.matrix), bias)
    layers = import_bitsandbytes().nn
    rows, columns = layer.matrix.shape
    made: nn.Module
    if method == "bnb_8bit":
        made = layers.Linear8bitLt(columns, rows, bias is not None, has_fp16_weights=False)
    else:
        made = layers.Linear4bit(columns, rows, bias is not None, compute_dtype=weight.dtype, quant_type="nf4")
    state = {"weight": layer.matrix.contiguous()} | ({} if bias is None else {"bias": bias.detach()})
    made.load_state_dict(state)
    return made.to(weight.device)  # which is when bitsandbytes quantizes


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
