"""The examples of the Memory Transformer's document that concern trained models: their routers, weights and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

from mnemos import (  # noqa: E402
    InferenceEngine,
    MemoryAdapter,
    create_inference_router,
    export_to_gguf,
    extract_memory_weights,
    generate,
    load_config,
    load_memory_weights,
    merge_adapter_weights,
    quantize_full_model,
    quantize_memory_for_deployment,
)
from mnemos.compat.routing_strategies import (  # noqa: E402
    HybridRouter,
    RollingWindowRouter,
    SequenceLevelRouter,
    TokenLevelRouter,
)
from tests.seeds.conftest import FIRST, LAST  # noqa: E402

PROMPT = "4 6 8"
MEMORY = {
    "use_chapters": True, "num_memory_tokens": 48, "num_chapters": 6, "top_k_chapters": 4, "wo_init_zero": False,
    "routing_strategy_train": "sequence", "routing_strategy_inference": "sequence", "window_size": 128,
    "use_both_memory_and_lora": True, "lora_rank": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """outputs/final_model as a training run leaves it: config.yaml, model.pt, and the base model with its tokenizer."""
    outputs = tmp_path_factory.mktemp("outputs")
    config = transformers.Qwen2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=FIRST + LAST + 1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(outputs / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (outputs / "base" / name).write_bytes((tokenizer_folder / name).read_bytes())
    final = outputs / "final_model"
    final.mkdir()
    sections = {
        "model": {"base_model_name": str(outputs / "base")},
        "memory": MEMORY,
        "training": {"mixed_precision": "no"},
    }
    (final / "config.yaml").write_text(yaml.safe_dump(sections))
    model = MemoryAdapter(load_config(final / "config.yaml"))
    for name, values in model.named_parameters():
        if not name.startswith("base_model.") or "lora" in name:
            torch.nn.init.normal_(values, mean=float(values.dim() == 1), std=1.0 if "bank" in name else 0.2)
    torch.save(model.state_dict(), final / "model.pt")
    return outputs


@pytest.fixture
def model(outputs: Path) -> Any:
    """As "Basic Generation" loads it."""
    config = load_config(outputs / "final_model" / "config.yaml")
    model = MemoryAdapter(config)
    state_dict = torch.load(outputs / "final_model" / "model.pt")
    model.load_state_dict(state_dict)
    return model.eval()


def logits_of(model: Any, **options: Any) -> np.ndarray:
    engine = InferenceEngine(model) if isinstance(model, torch.nn.Module) else InferenceEngine.from_pretrained(model)
    with engine:
        return np.asarray(engine.logits([1, 7, 9, 11]))


def test_basic_generation(model: Any, outputs: Path, tokenizer_folder: Path) -> None:
    """The module in PyTorch and its folder on every other backend say the same."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    output = generate(model, tokenizer, PROMPT, max_new_tokens=20, do_sample=False, device="cpu")
    assert len(output.split()) > 3
    with InferenceEngine.from_pretrained(outputs / "final_model", dtype="float32") as engine:
        assert engine.generate(PROMPT, max_new_tokens=20).split() == output.split()
    sampled = [generate(model, tokenizer, PROMPT, max_new_tokens=20, seed=3, device="cpu") for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_the_window_is_a_field_of_the_config(outputs: Path) -> None:
    assert load_config(outputs / "final_model" / "config.yaml").memory.routing_window_size == 128


def test_routers_by_their_names(model: Any) -> None:
    trained_router = model.routers["0"]
    generator = torch.Generator().manual_seed(1)
    prompt, new = torch.randn(2, 9, 48, generator=generator), torch.randn(2, 1, 48, generator=generator)

    def by_hand(states: Any) -> Any:
        best = torch.softmax(trained_router.router(states.mean(1)), -1).topk(4, -1)
        return best.indices, best.values / best.values.sum(-1, keepdim=True)

    def same(found: Any, expected: Any) -> bool:
        return torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], atol=1e-6)

    with torch.no_grad():
        assert same(SequenceLevelRouter(trained_router, top_k=4).route(prompt), by_hand(prompt))
        rolling = RollingWindowRouter(trained_router, top_k=4, window_size=5)
        rolling.reset_cache()
        rolling.route(prompt, use_cache=True)
        assert same(rolling.route(new, use_cache=True), by_hand(torch.cat((prompt, new), 1)[:, -5:]))
        indices, weights = TokenLevelRouter(trained_router, top_k=4).route(prompt)
        assert indices.shape == weights.shape == (2, 9, 4)
        assert same((indices[:, 3], weights[:, 3]), by_hand(prompt[:, 3:4]))
        hybrid = create_inference_router(router=trained_router, strategy="hybrid", top_k=4, window_size=5)
        assert isinstance(hybrid, HybridRouter)
        assert same(hybrid.route(prompt), by_hand(prompt))
        hybrid.start_generation(prompt)
        assert same(hybrid.route(new), by_hand(torch.cat((prompt, new), 1)[:, -5:]))
        hybrid.reset()
        assert same(hybrid.route(new), by_hand(new))
    for strategy, kind in (
        ("sequence", SequenceLevelRouter),
        ("rolling", RollingWindowRouter),
        ("token", TokenLevelRouter),
    ):
        assert type(create_inference_router(trained_router, strategy, top_k=4, window_size=128)) is kind


@pytest.mark.parametrize(
    ("method", "far"), [("fp16", 0.01), ("bf16", 0.05), ("fp32", 0.0), ("dynamic", 0.1), ("fp8", 0.3)]
)
def test_quantize_full_model(model: Any, tmp_path: Path, method: str, far: float) -> None:
    expected = logits_of(model)
    quantized = quantize_full_model(model, method=method, output_path=tmp_path / "quantized_model.pt")
    assert (tmp_path / "quantized_model.pt").stat().st_size > 0
    assert np.abs(logits_of(quantized) - expected).max() <= far * np.abs(expected).max()


@pytest.mark.parametrize(("bits", "far"), [(8, 0.02), (4, 0.3)])
def test_quantize_memory_for_deployment(model: Any, outputs: Path, tmp_path: Path, bits: int, far: float) -> None:
    """The file is a checkpoint beside the config; in the engine it says what the module does."""
    expected = logits_of(model)
    (tmp_path / "config.yaml").write_bytes((outputs / "final_model" / "config.yaml").read_bytes())
    quantized = quantize_memory_for_deployment(model, bits=bits, output_path=tmp_path / "model.pt")
    logits = logits_of(quantized)
    assert 0 < np.abs(logits - expected).max() <= far * np.abs(expected).max()
    with InferenceEngine.from_pretrained(tmp_path, dtype="float32") as engine:
        np.testing.assert_allclose(engine.logits([1, 7, 9, 11]), logits, atol=1e-4)


def test_merge_adapter_weights(model: Any, outputs: Path, tmp_path: Path) -> None:
    """Merged weights are those of a model without LoRA, which computes the same."""
    state_dict = merge_adapter_weights(model, output_path=tmp_path / "merged_weights.pt")
    assert not [name for name in state_dict if "lora" in name]
    config = load_config(outputs / "final_model" / "config.yaml")
    config.memory.use_both_memory_and_lora = False
    plain = MemoryAdapter(config).eval()
    plain.load_state_dict(torch.load(tmp_path / "merged_weights.pt"))
    np.testing.assert_allclose(logits_of(plain), logits_of(model), atol=1e-4)
    (tmp_path / "config.yaml").write_bytes((outputs / "final_model" / "config.yaml").read_bytes())
    (tmp_path / "merged_weights.pt").rename(tmp_path / "model.pt")  # beside the config of the training
    with InferenceEngine.from_pretrained(tmp_path, dtype="float32") as engine:
        np.testing.assert_allclose(engine.logits([1, 7, 9, 11]), logits_of(model), atol=1e-4)


def test_extract_memory_weights(model: Any, outputs: Path, tmp_path: Path) -> None:
    """What is shared among bases makes another one of the same shape the same model."""
    extract_memory_weights(model, output_path=tmp_path / "memory_only.pt")
    assert all("base_model" not in name for name in torch.load(tmp_path / "memory_only.pt"))
    weights = extract_memory_weights(model, complete=True)
    fresh = MemoryAdapter(load_config(outputs / "final_model" / "config.yaml")).eval()
    assert not np.allclose(logits_of(fresh), logits_of(model), atol=1e-2)
    np.testing.assert_allclose(logits_of(load_memory_weights(fresh, weights)), logits_of(model), atol=1e-5)


def test_export_to_gguf(model: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="llama_cpp_path is not needed"):
        export_to_gguf(
            model, output_path=tmp_path / "model.gguf", quantization_type="f16", llama_cpp_path="/path/to/llama.cpp"
        )
    with InferenceEngine.from_pretrained(tmp_path / "model.gguf") as engine:
        expected = logits_of(model)
        assert np.abs(engine.logits([1, 7, 9, 11]) - expected).max() < 0.02 * np.abs(expected).max()
