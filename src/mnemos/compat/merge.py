"""Parts of a memory-augmented model as files: its memory alone, its weights with LoRA merged, its banks quantized."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.compress.modules.state_file import save_state
from mnemos.errors import ConfigError, FormatError
from mnemos.export.gguf import export_to_gguf as export_to_gguf
from mnemos.models.memory_transformer.lora import LoRALinear

State = dict[str, Tensor]
_MEMORY = ("memory_bank", "memory_attn", "router", "memory_adapters")
_BESIDE = ("memory_layernorm", "post_memory_layernorm", "post_memory_mlp")
_LORA = (".lora_A", ".lora_B")


def extract_memory_weights(
    model: nn.Module, output_path: str | os.PathLike[str] | None = None, complete: bool = False
) -> State:
    """The memory of a `MemoryTransformer` or `MemoryAdapter`: banks, memory attention, routers.

    That is the key set of other implementations, which a model cannot be rebuilt from: `complete` adds the norms and
    networks beside memory attention and the LoRA factors. output_path: also saved there, as .safetensors or .pt.
    """
    chosen = {name: value for name, value in model.state_dict().items() if _is_memory(name, complete)}
    return _saved(chosen, output_path)


def load_memory_weights(model: nn.Module, weights: Mapping[str, Tensor] | str | os.PathLike[str]) -> nn.Module:
    """Puts what `extract_memory_weights(..., complete=True)` took, or its file, into another model; returns that.

    What is not memory keeps its values: the base may be another one of the same shape. Banks become quantized where the
    weights' are. FormatError: a memory tensor is missing, the model has no place for one, or shapes differ.
    """
    if isinstance(weights, (str, os.PathLike)):
        weights = _read(Path(weights))
    try:
        missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        raise FormatError(f"the memory weights do not fit the model: {' '.join(str(error).split())[:300]}") from error
    lacking = [name for name in missing if _is_memory(name, True)]
    if lacking:
        raise FormatError(
            f"the memory weights lack {lacking[0]!r} (and {len(lacking) - 1} more); expected those that "
            "extract_memory_weights(model, complete=True) takes from a model with the same config"
        )
    if unexpected:
        raise FormatError(f"the memory weights hold {unexpected[0]!r}, for which the model's config has no place")
    return model


def merge_adapter_weights(model: nn.Module, output_path: str | os.PathLike[str] | None = None) -> State:
    """The model's whole state dict with LoRA merged into the weights, without its factors; the model stays as it is.

    A memory-augmented model, or one of peft. The factors are left out because whoever loaded them beside merged weights
    would add them twice. output_path: also saved there, as .safetensors or .pt.
    """
    if hasattr(model, "merge_and_unload"):
        unmerged: Any = copy.deepcopy(model)
        return _saved(unmerged.merge_and_unload(safe_merge=True).state_dict(), output_path)
    state = model.state_dict()
    merged = {name: value for name, value in state.items() if not name.endswith(_LORA)}
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            merged[f"{path}.weight"] = layer.merged_weight()
    return _saved(merged, output_path)


def quantize_memory_for_deployment(
    model: nn.Module, bits: int = 8, output_path: str | os.PathLike[str] | None = None
) -> nn.Module:
    """Replaces the model's banks by ones of 8 or 4 bits, with a scale for each vector, and returns the model.

    The rest keeps its type. output_path: the state dict is saved there too. ConfigError: other bits, or an odd width at
    4 bits.
    """
    quantize = getattr(model, "quantize_memory", None)
    if quantize is None:
        raise ConfigError(f"model is a {type(model).__name__}; expected a MemoryTransformer or a MemoryAdapter")
    quantize(bits)
    _saved(model.state_dict(), output_path)
    return model


def _is_memory(name: str, complete: bool) -> bool:
    return any(part in name for part in _MEMORY) or (
        complete and (any(part in name for part in _BESIDE) or name.endswith(_LORA))
    )


def _saved(state: State, path: str | os.PathLike[str] | None) -> State:
    if path is None:
        return state
    save_state(state, path)
    return state


def _read(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the two libraries raise for a damaged file
        raise FormatError(f"{path}: cannot be read as memory weights: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FormatError(f"{path}: holds no state dict; expected names and tensors")
    return state
