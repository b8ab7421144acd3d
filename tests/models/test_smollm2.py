"""SmolLM2-135M-Instruct, teacher-forced over what Hugging Face transformers generated from its weights in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemos.models.load import LoadedModel
from tests.models.conftest import open_model
from tests.models.stepping import Session

REFERENCES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "smollm2" / "greedy.json").read_text(encoding="utf-8")
)
PAGES = [4, 2, 9, 0, 7]
STEPS = 3


@pytest.fixture(scope="module")
def model(smollm2: Path, backend: str) -> LoadedModel:
    return open_model(smollm2, backend)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_float32_reproduces_transformers(model: LoadedModel) -> None:
    """All texts in one batch, each in its own pages."""
    texts = {i: item["prompt_ids"] + item["token_ids"][:-1] for i, item in enumerate(REFERENCES)}
    found = Session(model, [range(4 * i, 4 * i + 4) for i in texts]).step(texts)
    for i, item in enumerate(REFERENCES):
        logits = found[i][len(item["prompt_ids"]) - 1 :]
        clear = np.asarray(item["margins"]) > 0.01
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(logits.argmax(axis=-1)[clear], np.asarray(item["token_ids"])[clear])
        best = np.take_along_axis(log_softmax(logits), np.asarray(item["top_ids"]), axis=-1)
        np.testing.assert_allclose(best, item["top_logprobs"], atol=2e-4)


def test_the_specification(model: LoadedModel) -> None:
    spec = model.spec
    assert (spec.architecture, spec.vocabulary_size, spec.context_length) == ("llama", 49152, 8192)
    assert (spec.layout.layers, spec.layout.kv_heads, spec.layout.head_dim, spec.layout.dtype) == (30, 3, 64, "float32")
    assert (spec.bos_token_id, spec.eos_token_ids, spec.parameters) == (1, (2,), 134_515_008)
    assert spec.details["license"] == "apache-2.0"


def test_stored_weights_stay_close(smollm2: Path, backend: str) -> None:
    """The default: weights as stored and a cache of 16 bits, prompt and steps."""
    model = open_model(smollm2, backend, dtype="auto")
    assert model.spec.layout.dtype in ("float16", "bfloat16")
    item = REFERENCES[0]
    session = Session(model, [PAGES])
    rows = [session.step({0: item["prompt_ids"]})[0][-1:]]
    rows += [session.step({0: [token]})[0] for token in item["token_ids"][:STEPS]]
    found = np.take_along_axis(log_softmax(np.concatenate(rows)), np.asarray(item["top_ids"])[: STEPS + 1], axis=-1)
    assert np.abs(found - np.asarray(item["top_logprobs"])[: STEPS + 1]).mean() < 0.1
