"""The folder of a memory-augmented transformer: a config.yaml beside its weights, and for an adapter a base model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnemos.errors import FormatError
from mnemos.formats.safetensors import open_safetensors, open_safetensors_folder
from mnemos.formats.strict_json import read_json_object
from mnemos.formats.tensor import Tensor, unwrapped
from mnemos.formats.yaml_file import read_yaml

CONFIG_NAME = "config.yaml"
WEIGHT_NAMES = ("model.pt", "model.safetensors", "pytorch_model.bin", "adapter.safetensors")
BASE = "base_model."  # before the names of an adapter's base model's tensors


def open_memory_folder(folder: Path) -> tuple[dict[str, Any], Mapping[str, Tensor], dict[str, Any], Path | None]:
    """(metadata, tensors, the base's generation_config, the base's folder) of a checkpoint.

    The metadata are `architectures`, `memory_config` (the file's content) and an adapter's `base`, its config.json. An
    adapter's tensors include its base's, from the base's folder if the weights are of memory and LoRA alone.
    FormatError: a file is missing or damaged.
    """
    content = read_yaml(folder / CONFIG_NAME)
    section = content.get("model") if isinstance(content, dict) else None
    model = section if isinstance(section, dict) else {}
    weights = next((folder / name for name in WEIGHT_NAMES if (folder / name).exists()), None)
    if weights is None:
        raise FormatError(f"{folder}: holds no weights beside config.yaml; expected one of {', '.join(WEIGHT_NAMES)}")
    tensors = _read_weights(weights)
    ids = {key: model.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    name = model.get("base_model_name")
    if name is None:
        metadata = {"architectures": ["MemoryTransformer"], "memory_config": content, **ids}
        return metadata, unwrapped(tensors), {}, None
    base = base_folder(str(name), folder)
    config = read_json_object(base / "config.json")
    generation = base / "generation_config.json"
    defaults = read_json_object(generation) if generation.exists() else {}
    # Weights of memory and LoRA alone lack the base's, or all but the layers that LoRA changes.
    tensors = {**{BASE + key: tensor for key, tensor in open_safetensors_folder(base).items()}, **tensors}
    special = {key: config.get(key) if value is None else value for key, value in ids.items()}
    metadata = {"architectures": ["MemoryAdapter"], "memory_config": content, "base": config, **special}
    return metadata, tensors, defaults, base


def base_folder(name: str, folder: Path | None) -> Path:
    """Where a base model is: the folder of that name, one in or beside `folder`, or one of the Hugging Face hub's."""
    from mnemos.hub.sources import resolve

    places = [Path(name), *([] if folder is None else [folder / name, folder.parent / name])]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        found = resolve(f"hf:{name}" if "/" in name and not os.path.isabs(name) else name)
    if not found.is_dir():
        raise FormatError(f"{found}: the base model {name!r} is a file; expected a folder with config.json")
    return found


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    from mnemos.formats.pickled import read_pickled

    return read_pickled(path).tensors
