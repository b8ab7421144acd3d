"""LoRA before and after merging, and sampling, as another implementation computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mnemos import InferenceEngine, apply_temperature, merge_adapter_weights, top_k_top_p_filtering  # noqa: E402
from mnemos.decoding.choice import Cutoffs, sample, sample_numpy  # noqa: E402
from mnemos.models.memory_transformer.lora import apply_lora  # noqa: E402
from tests.engine.toys import LetterTokenizer  # noqa: E402
from tests.models.memory_transformer.references import DATA, columns  # noqa: E402

SAMPLING = dict(np.load(DATA / "sampling.npz"))
CASES = json.loads(str(SAMPLING["cases"]))


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    return dict(np.load(DATA / "lora.npz"))


@pytest.fixture
def model(base_folder: Path, numbers: dict[str, Any]) -> Any:
    """The tiny Qwen2 with LoRA on q and v, its factors those of the reference."""
    module = transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    apply_lora(module, ["q_proj", "v_proj"], rank=4, alpha=8)
    factors = {name: torch.from_numpy(values) for name, values in numbers.items() if "lora_" in name}
    _, unexpected = module.load_state_dict(factors, strict=False)
    assert len(factors) == 16 and not unexpected
    return module


@torch.no_grad()
def test_lora_is_added(model: Any, numbers: dict[str, Any]) -> None:
    ids = torch.from_numpy(numbers["input_ids"]).long()
    np.testing.assert_allclose(columns(model(ids).logits), numbers["qv.lora.logits"], rtol=0, atol=1e-4)
    assert abs(numbers["qv.lora.logits"] - numbers["base.logits"]).max() > 0.1


@torch.no_grad()
def test_merged_weights_are_the_references_and_carry_no_factors(
    model: Any, numbers: dict[str, Any], base_folder: Path, tmp_path: Path
) -> None:
    merged = merge_adapter_weights(model, tmp_path / "merged.safetensors")
    assert not [name for name in merged if "lora_" in name]
    for name, values in numbers.items():
        if name.startswith("merged/"):
            np.testing.assert_allclose(merged[name.removeprefix("merged/")][:, ::16], values, rtol=0, atol=1e-6)
    ids = torch.from_numpy(numbers["input_ids"]).long()
    plain = transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    plain.load_state_dict(merged)
    np.testing.assert_allclose(columns(plain(ids).logits), numbers["qv.merged.logits"], rtol=0, atol=3e-4)
    (tmp_path / "config.json").write_text((base_folder / "config.json").read_text())
    (tmp_path / "merged.safetensors").rename(tmp_path / "model.safetensors")
    again = transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    apply_lora(again, ["q_proj", "v_proj"], rank=4, alpha=8)  # with factors of its own, which add nothing yet
    again.load_state_dict(merged)
    np.testing.assert_allclose(columns(again(ids).logits), numbers["qv.merged.logits"], rtol=0, atol=3e-4)
    with InferenceEngine.from_pretrained(tmp_path, dtype="float32", tokenizer=LetterTokenizer()) as engine:
        found = np.stack([engine.logits(row) for row in numbers["input_ids"].tolist()])
    np.testing.assert_allclose(columns(found), numbers["qv.merged.logits"], rtol=0, atol=3e-4)


@pytest.mark.parametrize(("name", "temperature", "top_k", "top_p"), CASES, ids=[case[0] for case in CASES])
def test_probabilities_that_tokens_are_drawn_with(name: str, temperature: float, top_k: int, top_p: float) -> None:
    rows = SAMPLING["step_logits_ties" if name.startswith("ties") else "step_logits"]
    known = SAMPLING[name]
    logits = top_k_top_p_filtering(apply_temperature(rows.copy(), temperature), top_k, top_p)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_allclose(weights / weights.sum(-1, keepdims=True), known, rtol=0, atol=1e-6)
    cutoffs, draws = Cutoffs(temperature, top_k, top_p), 2000
    for draw in (sample, sample_numpy):
        for row, probabilities in zip(rows, known, strict=True):
            drawn = [draw(row, cutoffs, (n + 0.5) / draws) for n in range(draws)]
            shares = np.bincount(drawn, minlength=len(row)) / draws
            np.testing.assert_allclose(shares, probabilities, rtol=0, atol=1.01 / draws)
