"""Parts of memory-augmented models as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mnemos import (  # noqa: E402
    MemoryTransformer,
    extract_memory_weights,
    load_memory_weights,
    merge_adapter_weights,
    quantize_memory_for_deployment,
)
from mnemos.errors import ConfigError, FormatError  # noqa: E402
from mnemos.models.memory_transformer.config import Config, MemorySettings, ModelConfig  # noqa: E402
from mnemos.models.memory_transformer.lora import apply_lora  # noqa: E402


def make(seed: int, **settings: Any) -> MemoryTransformer:
    torch.manual_seed(seed)
    model = ModelConfig(hidden_dim=16, num_heads=2, num_layers=2, intermediate_dim=24, vocab_size=11)
    memory = MemorySettings(
        num_memory_tokens=8, use_chapters=True, num_chapters=4, top_k_chapters=2, memory_block_variant="B",
        wo_init_zero=False, memory_init_std=1.0, **settings,
    )  # fmt: skip
    return MemoryTransformer(Config(model, memory)).eval()


IDS = torch.tensor([[1, 5, 3, 9]])


def test_the_default_key_set_leaves_out_norms() -> None:
    keys = set(extract_memory_weights(make(0)))
    assert keys == {
        "memory_banks.0.base_bank.memory",
        *(f"layers.{i}.memory_attn.{p}_proj.weight" for i in range(2) for p in "qkvo"),
        *(f"routers.{i}.router.{part}" for i in range(2) for part in ("weight", "bias")),
    }
    added = set(extract_memory_weights(make(0), complete=True)) - keys
    beside = (
        "memory_layernorm",
        "post_memory_layernorm",
        *(f"post_memory_mlp.{p}_proj" for p in ("gate", "up", "down")),
    )
    assert added == {f"layers.{i}.{name}.weight" for i in range(2) for name in beside}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("bits", [None, 4])
def test_memory_moves_to_another_base(tmp_path: Path, suffix: str, bits: int | None) -> None:
    source, target = make(0), make(1)
    if bits:
        quantize_memory_for_deployment(source, bits)
    path = tmp_path / f"memory{suffix}"
    extract_memory_weights(source, path, complete=True)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    assert load_memory_weights(target, path) is target
    moved = extract_memory_weights(source, complete=True)
    after = target.state_dict()
    assert moved.keys() <= after.keys()
    for name, value in after.items():
        assert torch.equal(value, moved[name] if name in moved else before[name]), name


def test_memory_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    weights = extract_memory_weights(make(0), complete=True)
    with pytest.raises(FormatError, match="lack 'layers.0.memory_layernorm.weight'"):
        load_memory_weights(make(1), extract_memory_weights(make(0)))
    with pytest.raises(FormatError, match="for which the model's config has no place"):
        load_memory_weights(make(1), {**weights, "layers.7.memory_attn.q_proj.weight": torch.zeros(16, 16)})
    with pytest.raises(FormatError, match="do not fit the model"):
        load_memory_weights(make(1), {**weights, "routers.0.router.bias": torch.zeros(5)})
    broken = tmp_path / "memory.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="cannot be read as memory weights"):
        load_memory_weights(make(1), broken)
    with pytest.raises(ConfigError, match="its suffix must be"):
        extract_memory_weights(make(0), tmp_path / "memory.txt")


def test_merged_weights_have_no_factors_and_the_model_stays() -> None:
    model, plain = make(0), make(0)
    paths = apply_lora(model, ["self_attn.q_proj"], rank=2, alpha=4)
    for path in paths:
        torch.nn.init.normal_(model.get_submodule(path).lora_B)
    assert paths == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
    logits = model(IDS).logits
    merged = merge_adapter_weights(model)
    assert torch.equal(model(IDS).logits, logits)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(IDS).logits, logits, rtol=0, atol=1e-5)


def test_quantizing_for_deployment_takes_a_memory_model(tmp_path: Path) -> None:
    model = make(0)
    assert quantize_memory_for_deployment(model, bits=4, output_path=tmp_path / "model.pt") is model
    loaded = make(1)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(ConfigError, match="model is a Linear"):
        quantize_memory_for_deployment(torch.nn.Linear(2, 2), 4)
    with pytest.raises(ConfigError, match="bits is 3"):
        quantize_memory_for_deployment(make(0), 3)
