"""Memory-augmented models in the engine: the reference's logits and ids on every backend, whatever runs beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("yaml")
pytest.importorskip("safetensors")

from mnemos import InferenceEngine
from mnemos.errors import ConfigError, FormatError
from tests.gpu import CUDA_BACKEND
from tests.models.memory_transformer.folders import write_folder
from tests.models.memory_transformer.references import (
    ADAPTERS,
    CASES,
    CHAPTERED,
    columns,
    read_reference,
    strategies_of,
)

EVERY = [*CASES, *((name, strategy) for name in ADAPTERS for strategy in strategies_of(name))]
BACKENDS = ("native", "numpy", "torch:cpu", CUDA_BACKEND)


@pytest.fixture
def load(tmp_path: Path, base_folder: Path) -> Any:
    def load(name: str, strategy: str = "plain", **options: Any) -> InferenceEngine:
        folder = tmp_path / f"{name}-{strategy}"
        if not folder.exists():
            write_folder(read_reference(name), folder, strategy, base_folder)
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


def greedy(engine: InferenceEngine, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    handles = [engine.submit(prompt, max_new_tokens=24, ignore_eos=True, **options) for prompt in prompts]
    return [list(handle.result().token_ids) for handle in handles]


PROMPTS = [[40, 109, 238, 220, 102, 246, 19, 49], [157, 205, 127], [9, 4] * 18, [1, 2]]
POOLED = [(name, strategy) for name in CHAPTERED for strategy in ("sequence", "sequence-rolling", "rolling", "hybrid")]


@pytest.mark.parametrize(("name", "strategy"), [*POOLED, (CHAPTERED[0], "token")])
def test_texts_do_not_depend_on_what_runs_beside_them(load: Any, name: str, strategy: str) -> None:
    """Together, alone, and in a cache so small that one gives way to others and is read again from its prompt."""
    with load(name, strategy) as engine:
        alone = [greedy(engine, [prompt])[0] for prompt in PROMPTS]
        assert greedy(engine, PROMPTS) == alone
    with InferenceEngine(engine.model, cache_tokens=96) as small:
        for _ in range(20):  # the first may be done before the others come
            patient = iter(small.submit(PROMPTS[0], max_new_tokens=24, ignore_eos=True, priority=1))
            first = next(patient).token_id
            assert greedy(small, PROMPTS[1:]) == alone[1:]
            assert [first, *(token.token_id for token in patient)] == alone[0]
            if small.stats().preemptions:
                break
        assert small.stats().preemptions > 0


WINDOWED = [(CHAPTERED[0], "rolling"), (CHAPTERED[1], "hybrid"), (CHAPTERED[0], "token")]


@pytest.mark.parametrize(("name", "strategy"), WINDOWED)
def test_drafts_and_beams_carry_their_windows(load: Any, name: str, strategy: str) -> None:
    """Drafts that are taken back change no text; beams fork as they do over the plain operators."""
    prompt = [7, 7, 8, 7, 7, 8, 7, 7]
    beams = []
    with load(name, strategy) as engine:
        plain = greedy(engine, [prompt])[0]
        assert greedy(engine, [prompt], speculative="prompt_lookup")[0] == plain
        beams.append(engine.submit(prompt, num_beams=3, max_new_tokens=12).result())
        assert engine.stats().states_used == 0
    with load(name, strategy, backend="numpy") as engine:
        beams.append(engine.submit(prompt, num_beams=3, max_new_tokens=12).result())
    assert beams[0].token_ids == beams[1].token_ids


def test_what_models_promise(load: Any) -> None:
    with load(CHAPTERED[0], "hybrid") as engine:
        spec = engine.spec
        assert spec.pools_prompts and spec.states and spec.rewinds and spec.rewind_limit
        assert not spec.chunks and not spec.shares_prefixes and spec.verifies_drafts
    with load(CHAPTERED[0], "sequence") as engine:
        assert engine.spec.pools_prompts and not engine.spec.states and not engine.spec.chunks
    for name, strategy in ((CHAPTERED[0], "token"), ("05_factorized", "plain")):
        with load(name, strategy) as engine:
            assert engine.spec.chunks and engine.spec.shares_prefixes and not engine.spec.states


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
def test_quantized_banks(make_module: Any, tmp_path: Path, file: str, bits: int, backend: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    reference = read_reference("09_chapters_shared_norm")
    module, ids = make_module(reference), torch.from_numpy(reference.ids).long()
    module.quantize_memory(bits)
    (tmp_path / "config.yaml").write_text(reference.text)
    write = torch.save if file.endswith(".pt") else save_file
    write({name: value.clone() for name, value in module.state_dict().items()}, tmp_path / file)
    with InferenceEngine.from_pretrained(tmp_path, backend=backend, dtype="float32") as engine:
        logits = np.stack([engine.logits(row) for row in reference.ids.tolist()])
    with torch.no_grad():
        np.testing.assert_allclose(logits, module(ids).logits, rtol=0, atol=1e-4)


def test_a_pickled_checkpoint(make_module: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    reference = read_reference("15_memory_heads_8_1")
    module = make_module(reference)
    (tmp_path / "config.yaml").write_text(reference.text)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    with InferenceEngine.from_pretrained(tmp_path, dtype="float32") as engine:
        logits = engine.logits(reference.ids[0].tolist())
    np.testing.assert_allclose(columns(logits), reference.numbers["full.plain.logits"][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("05_factorized", "memory_rank: 16", "memory_rank: 8", r"memory_banks.0.A' has shape \[128, 16\]"),
        ("05_factorized", "memory_sharing: shared", "memory_sharing: per_layer", "memory_banks.1.A' is missing"),
        ("05_factorized", "memory_layer_placement: all", "memory_layer_placement: none", "has no place in a model"),
        (
            "09_chapters_shared_norm",
            "num_chapters: 8",
            "num_chapters: 4",
            r"routers.0.router.weight' has shape \[8, 64\]",
        ),
        ("09_chapters_shared_norm", "use_chapters: true", "use_chapters: false", "memory_banks.0.memory' is missing"),
        ("5_qwen2_lora_only", "lora_rank: 4", "lora_rank: 2", "the LoRA factors of"),
        ("5_qwen2_lora_only", "use_lora: true", "use_lora: false", "has no place in a model"),
        ("5_qwen2_lora_only", "  - q_proj\n", "", "q_proj' has LoRA factors, and memory.lora_targets is"),
        (
            "5_qwen2_lora_only",
            "  - q_proj\n",
            "  - q_proj\n  - mlp\n",
            "has no LoRA factors, and memory.lora_targets is",
        ),
    ],
)
def test_configs_that_contradict_the_tensors(
    tmp_path: Path, base_folder: Path, name: str, old: str, new: str, message: str
) -> None:
    reference = read_reference(name)
    assert old in reference.text
    reference.text = reference.text.replace(old, new, 1)
    folder = write_folder(reference, tmp_path / "model", "plain", base_folder)
    with pytest.raises(FormatError, match=message):
        InferenceEngine.from_pretrained(folder)


def test_broken_folders(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {base_model_name: /nowhere/at/all}")
    with pytest.raises(FormatError, match="holds no weights beside config.yaml"):
        InferenceEngine.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(FormatError, match="nowhere"):
        InferenceEngine.from_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {hidden_dims: 4}")
    with pytest.raises(ConfigError, match="hidden_dims is unknown"):
        InferenceEngine.from_pretrained(tmp_path)
