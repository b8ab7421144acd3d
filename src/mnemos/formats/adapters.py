"""LoRA adapters as peft saves them: what they add to a model's weights.

A folder with adapter_config.json and adapter_model.safetensors. A pair of factors A (rank, in) and B (out, rank) adds
scale * B A to a weight (Hu et al. 2021, arXiv:2106.09685); the scale is alpha / rank, or alpha / sqrt(rank) for
rank-stabilised ones (Kalajdzievski 2023, arXiv:2312.03732). With a magnitude (out,), the rows of the sum are given that
length (DoRA, Liu et al. 2024, arXiv:2402.09353).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.contract import Floats
from mnemos.errors import FormatError, UnsupportedError, shown
from mnemos.formats.safetensors import open_safetensors
from mnemos.formats.strict_json import read_json_object
from mnemos.formats.tensor import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.lora_(embedding_)?(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?")


@dataclass(frozen=True)
class Pair:
    """What is added to one weight (out, in).

    a (rank, in), b (out, rank); magnitude (out,) or None. transposed: the weight is stored as (in, out)
    """

    a: Floats
    b: Floats
    scale: float
    magnitude: Floats | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, as stored."""
        shape = len(self.b), self.a.shape[1]
        return shape[::-1] if self.transposed else shape

    def merged(self, weight: Floats, strength: float = 1.0) -> Floats:
        """The weight, float32 as it is stored, with `strength` times the pair in it."""
        plain = weight.T if self.transposed else weight
        total = plain + np.float32(self.scale * strength) * (self.b @ self.a)
        if self.magnitude is not None:
            length = np.linalg.norm(total, axis=1, keepdims=True)
            total = total * (self.magnitude[:, None] / np.maximum(length, np.finfo(np.float32).tiny))
            total = plain + np.float32(strength) * (total - plain) if strength != 1 else total
        return np.ascontiguousarray(total.T if self.transposed else total, dtype=np.float32)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder.

    pairs   by the name of the module whose weight they change, as in the model that was trained
    whole   tensors that replace the model's, such as trained heads and biases
    base    the model that it was trained on, as its config names it; may be empty
    """

    path: Path
    pairs: Mapping[str, Pair]
    whole: Mapping[str, Tensor]
    base: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether all it does is to add products of two factors, so that it can be used without being merged."""
        return not self.whole and all(pair.magnitude is None for pair in self.pairs.values())


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """An adapter folder as peft saves it. FormatError: something is missing or does not fit together, or a factor is
    not finite; UnsupportedError: another kind of adapter than LoRA."""
    folder = Path(folder)
    config = read_json_object(folder / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{folder / CONFIG}: peft_type is {shown(kind)}; only LORA is supported")
    if config.get("alora_invocation_tokens"):
        raise UnsupportedError(f"{folder / CONFIG}: an activated LoRA depends on the tokens and cannot be merged")
    factors: dict[str, dict[str, Floats]] = {}
    whole: dict[str, Tensor] = {}
    embeddings = set()
    for stored, tensor in open_safetensors(folder / WEIGHTS).items():
        name = stored.removeprefix(_PREFIX).replace(".modules_to_save.default.", ".")
        part = _PART.fullmatch(name)
        if part is None:
            whole[name.replace(".base_layer.", ".")] = tensor
            continue
        values = tensor.dequantize()
        if not np.isfinite(values).all():
            raise FormatError(f"{folder / WEIGHTS}: {stored} has values that are NaN or infinite; expected finite ones")
        factors.setdefault(part[1], {})[part[3]] = values
        if part[2]:
            embeddings.add(part[1])
    if not factors and not whole:
        raise FormatError(f"{folder / WEIGHTS}: holds no tensors; expected pairs lora_A and lora_B")
    pairs = {name: _pair(folder, name, parts, config, name in embeddings) for name, parts in factors.items()}
    base = config.get("base_model_name_or_path")
    return Adapter(folder, pairs, whole, base if isinstance(base, str) else "")


def _pair(folder: Path, name: str, parts: dict[str, Floats], config: Mapping[str, Any], embedding: bool) -> Pair:
    a, b = parts.get("A"), parts.get("B")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        shapes = ", ".join(f"lora_{key} {list(value.shape)}" for key, value in parts.items())
        raise FormatError(f"{folder / WEIGHTS}: {name} has {shapes}; expected lora_A (rank, in) and lora_B (out, rank)")
    rank = len(a)
    alpha = _for_module(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise FormatError(f"{folder / CONFIG}: lora_alpha is {shown(alpha)}; expected a number")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    magnitude = parts.get("magnitude_vector")
    if embedding:  # a lookup in A, whose columns are the tokens
        return Pair(np.ascontiguousarray(b.T), np.ascontiguousarray(a.T), scale)
    transposed = bool(config.get("fan_in_fan_out"))
    return Pair(a, b, scale, None if magnitude is None else magnitude.reshape(-1), transposed)


def _for_module(patterns: Any, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as peft matches them."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default
