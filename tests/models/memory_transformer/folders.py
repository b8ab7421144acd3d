"""The reference models as checkpoint folders."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.numpy import save_file

from tests.models.memory_transformer.references import Reference


def write_folder(reference: Reference, folder: Path, strategy: str, base: Path) -> Path:
    """A folder with config.yaml, and model.safetensors or adapter.safetensors with the base model beside it."""
    folder.mkdir(parents=True)
    own = next(line for line in reference.text.splitlines() if "routing_strategy_inference" in line)
    text = reference.text if strategy == "plain" else reference.text.replace(
        own, f"  routing_strategy_inference: {strategy}"
    )  # fmt: skip
    (folder / "config.yaml").write_text(text)
    is_adapter = "embed_tokens.weight" not in reference.weights
    save_file(dict(reference.weights), folder / ("adapter.safetensors" if is_adapter else "model.safetensors"))
    if is_adapter and not (folder.parent / "base_qwen2").exists():
        shutil.copytree(base, folder.parent / "base_qwen2")
    return folder
