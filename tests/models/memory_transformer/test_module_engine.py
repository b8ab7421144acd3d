"""`InferenceEngine(module)` for memory-augmented modules: as trained, without probing."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from mnemos import InferenceEngine, QuantizedModel, quantize_full_model  # noqa: E402
from mnemos.errors import ConfigError, ModelError  # noqa: E402
from tests.models.memory_transformer.folders import write_folder  # noqa: E402
from tests.models.memory_transformer.references import (  # noqa: E402
    ADAPTERS,
    CASES,
    CHAPTERED,
    columns,
    read_reference,
    strategies_of,
)

EVERY = [*CASES, *((name, strategy) for name in ADAPTERS for strategy in strategies_of(name))]


@pytest.mark.parametrize(("name", "strategy"), EVERY)
def test_ids(make_module: Any, name: str, strategy: str) -> None:
    reference = read_reference(name)
    prompts = reference.ids[:, :8].tolist()
    with InferenceEngine(make_module(reference, strategy)) as engine:
        handles = [engine.submit(prompt, max_new_tokens=8, ignore_eos=True) for prompt in prompts]
        found = [handle.result().token_ids for handle in handles]
    assert found == reference.numbers[f"decode.{strategy}.tokens"].tolist()


@pytest.mark.parametrize("name", CHAPTERED)
@pytest.mark.parametrize("strategy", ["sequence", "rolling", "hybrid", "token"])
def test_the_documented_generation(make_module: Any, name: str, strategy: str) -> None:
    reference = read_reference(name)
    known = reference.generated(strategy)
    with InferenceEngine(make_module(reference, strategy)) as engine:
        new = engine.submit(known["generate_prompt"], max_new_tokens=8, ignore_eos=True).result().token_ids
        assert [*known["generate_prompt"], *new] == known["generate_ids"]
        ended = engine.submit(
            known["generate_prompt"], max_new_tokens=8, stop_token_ids=[known["eos_token_id"]]
        ).result()
        assert ended.finish_reason == "stop"


@pytest.mark.parametrize(
    ("name", "strategy"), [(CHAPTERED[0], "hybrid"), (CHAPTERED[1], "rolling"), (ADAPTERS[0], "hybrid")]
)
def test_forks_and_drafts_as_natively(
    make_module: Any, base_folder: Path, tmp_path: Path, name: str, strategy: str
) -> None:
    reference, prompt = read_reference(name), [7, 7, 8, 7, 7, 8, 7, 7]
    folder = write_folder(reference, tmp_path / "model", strategy, base_folder)
    texts = []
    for engine in (
        InferenceEngine(make_module(reference, strategy)),
        InferenceEngine.from_pretrained(folder, dtype="float32"),
    ):
        with engine:
            beams = engine.submit(prompt, num_beams=3, max_new_tokens=10).result().token_ids
            plain = engine.submit(prompt, max_new_tokens=20, ignore_eos=True).result().token_ids
            drafted = engine.submit(
                prompt, max_new_tokens=20, ignore_eos=True, speculative="prompt_lookup"
            ).result().token_ids  # fmt: skip
        assert drafted == plain
        texts.append((beams, plain))
    assert texts[0] == texts[1]


def test_a_module_that_goes_on_training(make_module: Any) -> None:
    """The engine reads the weights as they are, and a chosen strategy stays."""
    reference = read_reference(CHAPTERED[0])
    module = make_module(reference)
    with InferenceEngine(module) as engine:
        before = engine.logits(reference.ids[0].tolist())
        assert abs(columns(before) - reference.numbers["full.sequence.logits"][0]).max() < 1e-4
        with torch.no_grad():
            module.lm_head.weight.mul_(2)
        assert abs(engine.logits(reference.ids[0].tolist()) - before).max() > 1
        module.config.memory.routing_strategy_inference = "token"
        with pytest.raises(ModelError, match="is 'token' and was 'sequence' when the engine was made"):
            engine.logits([1, 2, 3])
    with pytest.raises(ConfigError, match="use_kv_cache is False for a MemoryTransformer"):
        InferenceEngine(module, use_kv_cache=False)
    with pytest.raises(ConfigError, match="context_length is 65; the model's is 64"):
        InferenceEngine(module, context_length=65)


@pytest.mark.parametrize("method", ["fp16", "bf16", "fp8", "dynamic"])
@pytest.mark.parametrize("name", [*CHAPTERED, ADAPTERS[0]])
def test_whole_models_in_another_precision(make_module: Any, name: str, method: str, tmp_path: Path) -> None:
    reference = read_reference(name)
    module, ids = make_module(reference, "hybrid"), torch.from_numpy(reference.ids).long()
    path = tmp_path / "model.pt"
    quantized = quantize_full_model(module, method, path)
    with torch.no_grad():
        exact, found = module(ids).logits, quantized(ids, use_cache=True).logits.float()
    assert 0 < (found - exact).abs().max() < 0.5 * exact.abs().max()
    with InferenceEngine(quantized) as engine:
        logits = engine.logits(reference.ids[0].tolist())
    # A batch of two rounds as one text does, except in half precision.
    tolerance = 0.1 * float(exact.abs().max()) if method in ("fp16", "bf16") else 1e-4
    np.testing.assert_allclose(logits, found[0].numpy(), rtol=0, atol=tolerance)
    if method == "dynamic":
        loaded = QuantizedModel.load(path, make_module(reference, "hybrid"))
        with torch.no_grad():
            assert torch.equal(loaded(ids, use_cache=True).logits, found)


def test_copies_read_memory_of_their_own(make_module: Any) -> None:
    """Copied, pickled, and changed: the other one stays as it was."""
    reference = read_reference(ADAPTERS[0])
    module, ids = make_module(reference), torch.from_numpy(reference.ids).long()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected = module(ids).logits
        for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(ids).logits, expected)
            other.memory_banks[0].base_bank.memory.neg_()
            assert (other(ids).logits - expected).abs().max() > 0.01
            assert torch.equal(module(ids).logits, expected)
