"""Memory-augmented models in the engine: the reference's logits and ids on every backend, whatever runs beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("yaml")
pytest.importorskip("safetensors")

from mnemos import InferenceEngine
from tests.models.memory_transformer.folders import write_folder
from tests.models.memory_transformer.references import (
    ADAPTERS,
    CASES,
    columns,
    read_reference,
    strategies_of,
)

EVERY = [*CASES, *((name, strategy) for name in ADAPTERS for strategy in strategies_of(name))]
BACKENDS = ("native", "numpy", "torch:cpu")


@pytest.fixture
def load(tmp_path: Path, base_folder: Path) -> Any:
    def load(name: str, strategy: str = "plain", **options: Any) -> InferenceEngine:
        folder = write_folder(read_reference(name), tmp_path / f"{name}-{strategy}", strategy, base_folder)
        return InferenceEngine.from_pretrained(folder, **{"dtype": "float32", **options})

    return load


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "strategy"), EVERY)
def test_logits_and_ids(load: Any, name: str, strategy: str, backend: str) -> None:
    """A prompt is read, then decoded token by token; both rows at once, and the shorter alone."""
    numbers = read_reference(name).numbers
    prompts = numbers["input_ids"][:, :8].tolist()
    with load(name, strategy, backend=backend) as engine:
        handles = [engine.submit(prompt, max_new_tokens=8, ignore_eos=True) for prompt in prompts]
        found = [handle.result().token_ids[-8:] for handle in handles]
        assert found == numbers[f"decode.{strategy}.tokens"].tolist()
        whole = np.stack([engine.logits(row) for row in numbers["input_ids"].tolist()])
        key = "sequence" if strategy == "hybrid" else strategy
        expected = numbers[f"full.{key}.logits"]
        if strategy == "rolling":  # without a cache it is `sequence`; in the engine it never is
            expected = numbers["mask.rolling.cached.logits"][:1]
            whole = whole[:1]
        np.testing.assert_allclose(columns(whole), expected, rtol=0, atol=1e-4)
