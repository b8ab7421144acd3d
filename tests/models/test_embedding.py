"""Embeddings of real architectures are pooled from the hidden states of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import UnsupportedError
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.models.load import load_model
from tests.models.checkpoints import CONFIGS, Reference, token_ids

torch = pytest.importorskip("torch")

TEXTS = [token_ids(40, seed=2), token_ids(3, seed=3), token_ids(66, seed=4)]


def expected(reference: Reference, pooling: str) -> np.ndarray:
    """By transformers: of the input of its output projection."""
    kept: list[torch.Tensor] = []
    hook = reference.module.get_output_embeddings().register_forward_pre_hook(lambda m, inputs: kept.append(inputs[0]))
    rows = []
    with torch.no_grad():
        for ids in TEXTS:
            reference.module(torch.tensor([ids]))
            hidden = kept[-1][0].double().numpy()
            rows.append(hidden.mean(axis=0) if pooling == "mean" else hidden[-1])
    hook.remove()
    return np.stack([row / np.linalg.norm(row) for row in rows])


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("name", CONFIGS)
def test_built_in_architectures(name: str, pooling: str, backend: str, reference: Callable[[str], Reference]) -> None:
    model = load_model(open_checkpoint(reference(name).folder), backend=backend, dtype="float32")
    with InferenceEngine(model, cache_tokens=512) as engine:
        np.testing.assert_allclose(engine.embed(TEXTS, pooling), expected(reference(name), pooling), atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_modules(pooling: str, reference: Callable[[str], Reference]) -> None:
    name = next(iter(CONFIGS))
    with InferenceEngine(reference(name).module) as engine:
        np.testing.assert_allclose(engine.embed(TEXTS, pooling), expected(reference(name), pooling), atol=1e-5)


def test_a_module_without_an_output_projection_has_none() -> None:
    class Bigrams(torch.nn.Module):
        """Rows of a table are its logits."""

        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(20, 20)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids)

    refused = pytest.raises(UnsupportedError, match="shows no hidden states")
    with InferenceEngine(Bigrams().eval()) as engine, refused:
        engine.embed([1, 2])
