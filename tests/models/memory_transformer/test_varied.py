"""Configs of many kinds with random weights: every backend computes what the module computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
yaml = pytest.importorskip("yaml")
save_file = pytest.importorskip("safetensors.torch").save_file

from mnemos import InferenceEngine, MemoryAdapter, MemoryTransformer, load_config  # noqa: E402

MODEL = {"hidden_dim": 48, "num_heads": 4, "num_layers": 3, "intermediate_dim": 40, "vocab_size": 90, "max_seq_len": 64}
CHAPTERS = {"use_chapters": True, "num_memory_tokens": 60, "num_chapters": 5, "top_k_chapters": 2}
REDUCED = {"use_low_rank_memory": True, "low_rank_mode": "reduced_dim", "memory_rank": 24}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "undivided, token": ({}, {"num_memory_tokens": 100, "routing_strategy_inference": "token"}),
    "undivided, hybrid, reduced": (
        {"num_kv_heads": 1, "use_rms_norm": False},
        {"num_memory_tokens": 33, "routing_strategy_inference": "hybrid", **REDUCED},
    ),
    "tanh, one head, wide bank": (
        {"hidden_activation": "tanh"},
        {"num_memory_tokens": 70, "memory_dim": 80, "memory_num_heads": 1, "memory_layer_placement": "last_k"},
    ),
    "sigmoid, all chapters shared": (
        {"hidden_activation": "sigmoid", "use_rope": False},
        {**CHAPTERS, "num_shared_chapters": 5, "memory_block_variant": "B"},
    ),
    "all chapters but the shared chosen": (
        {"hidden_activation": "relu"},
        {**CHAPTERS, "num_shared_chapters": 3, "top_k_chapters": 4, "routed_scaling_factor": 0.5,
         "normalize_shared_routed_before_mixing": True, "shared_routed_norm_type": "layernorm",
         "routing_strategy_inference": "rolling", "routing_window_size": 1},
    ),
    "token, scaled, reduced": (
        {},
        {**CHAPTERS, **REDUCED, "routed_scaling_factor": 2.5, "routing_strategy_inference": "token",
         "memory_sharing": "per_layer", "memory_layer_placement": "custom", "memory_layer_indices": [2, 0, 2, 9]},
    ),
    "factorized, thin projections": (
        {"hidden_activation": "gelu"},
        {**CHAPTERS, "use_low_rank_memory": True, "memory_rank": 7, "memory_dim": 30, "use_low_rank_projections": True,
         "projection_rank": 5, "memory_sharing": "every_k_layers", "routing_strategy_inference": "sequence_rolling",
         "routing_window_size": 3},
    ),
    "adapter, undivided, token, LoRA": (
        {"base_model_name": "base_qwen2"},
        {"num_memory_tokens": 100, "routing_strategy_inference": "token", "use_both_memory_and_lora": True,
         "lora_rank": 3, "lora_targets": ["mlp"], "memory_num_heads": 2, "memory_num_kv_heads": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", CASES)
def test_every_backend_computes_what_the_module_does(
    name: str, bits: int | None, base_folder: Path, tmp_path: Path
) -> None:
    model, memory = CASES[name]
    adapts = "base_model_name" in model
    own = {"base_model_name": str(base_folder)} if adapts else {**MODEL, **model}
    sections = {"model": own, "memory": {"wo_init_zero": False, **memory}, "training": {"mixed_precision": "no"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    torch.manual_seed(5)
    module = (MemoryAdapter if adapts else MemoryTransformer)(load_config(tmp_path / "config.yaml")).eval()
    for part, values in module.named_parameters():
        if not part.startswith("base_model.") or "lora" in part:
            scale = 1.0 if "bank" in part or "router" in part else 0.2
            torch.nn.init.normal_(values, mean=float(values.dim() == 1), std=scale)
    if bits is not None:
        module.quantize_memory(bits)
    save_file({key: value.clone() for key, value in module.state_dict().items()}, tmp_path / "model.safetensors")
    prompt = [3, 71, 8, 8, 40, 12, 89]
    with InferenceEngine(module) as engine:
        logits, ids = engine.logits(prompt), engine.generate(prompt, max_new_tokens=6, ignore_eos=True)
    for backend in ("native", "numpy", "torch:cpu"):
        with InferenceEngine.from_pretrained(tmp_path, backend=backend, dtype="float32") as engine:
            np.testing.assert_allclose(engine.logits(prompt), logits, rtol=0, atol=1e-4)
            assert engine.generate(prompt, max_new_tokens=6, ignore_eos=True) == ids
