"""The reference models as modules and as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.memory_transformer.references import DATA, Reference, read_reference


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 as transformers saves it."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("memory") / "base_qwen2"
    folder.mkdir()
    base = read_reference("base_qwen2")
    (folder / "config.json").write_text(json.dumps(json.loads(base.text)))
    save_file(base.weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def make_module(base_folder: Path) -> Any:
    """A function from a reference and a strategy to its module, in evaluation mode."""
    torch = pytest.importorskip("torch")
    from mnemos.models.memory_transformer.adapter import MemoryAdapter
    from mnemos.models.memory_transformer.transformer import MemoryTransformer

    def make(reference: Reference, strategy: str = "plain") -> Any:
        config = reference.config(strategy)
        weights = {name: torch.from_numpy(values.copy()) for name, values in reference.weights.items()}
        if config.model.base_model_name is None:
            model = MemoryTransformer(config)
            missing, unexpected = model.load_state_dict(weights, strict=False)
            assert all("inv_freq" in name for name in missing) and not unexpected
        else:
            config.model.base_model_name = str(base_folder)
            model = MemoryAdapter(config)
            missing, unexpected = model.load_state_dict(weights, strict=False)
            assert all(name.startswith("base_model.") for name in missing) and not unexpected
        return model.eval()

    return make


@pytest.fixture(scope="session")
def routers() -> dict[str, Any]:
    with np.load(DATA / "routers.npz") as file:
        return {key: file[key] for key in file.files}
