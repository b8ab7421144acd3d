"""Small random models of every architecture, made by Hugging Face transformers, and GGUF files with their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

VOCABULARY = 131
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _decoder(config: type, **changes: Any) -> Callable[[], Any]:
    return lambda: config(**(_COMMON | changes))


_GPT2 = dict(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2)
_NEOX = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25})
_LOCAL_GLOBAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _decoder(hf.LlamaConfig),
    "llama-tied": _decoder(hf.LlamaConfig, tie_word_embeddings=True, num_key_value_heads=1),
    "llama-biases": _decoder(hf.LlamaConfig, attention_bias=True, mlp_bias=True, head_dim=24),
    "mistral": _decoder(hf.MistralConfig, sliding_window=7),
    "smollm3": _decoder(hf.SmolLM3Config, num_hidden_layers=4, no_rope_layer_interval=2),
    "mixtral": _decoder(hf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _decoder(hf.Qwen2Config),
    "qwen2-window": _decoder(hf.Qwen2Config, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": _decoder(hf.Qwen3Config, head_dim=32, tie_word_embeddings=True),
    "qwen3-biases": _decoder(hf.Qwen3Config, head_dim=16, attention_bias=True),
    "qwen3moe": _decoder(
        hf.Qwen3MoeConfig,
        head_dim=32,
        num_experts=5,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
    "qwen3moe-mixed": _decoder(
        hf.Qwen3MoeConfig,
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=False,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
    "gemma": _decoder(hf.GemmaConfig, head_dim=32),
    "gemma2": _decoder(
        hf.Gemma2Config,
        head_dim=32,
        num_hidden_layers=4,
        sliding_window=6,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma2-scalar": _decoder(hf.Gemma2Config, head_dim=32, query_pre_attn_scalar=20, sliding_window=5),
    "gemma3": _decoder(
        hf.Gemma3TextConfig,
        head_dim=32,
        num_hidden_layers=6,
        sliding_window=6,
        query_pre_attn_scalar=32,
        rope_parameters=_LOCAL_GLOBAL,
    ),
    "olmo2": _decoder(hf.Olmo2Config),
    "olmo2-biases": _decoder(hf.Olmo2Config, attention_bias=True, tie_word_embeddings=True),
    "phi3": _decoder(hf.Phi3Config, sliding_window=9),
    "phi3-partial": _decoder(
        hf.Phi3Config,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    ),
    "gpt2": lambda: hf.GPT2Config(**_GPT2),
    "gpt2-scaled": lambda: hf.GPT2Config(**_GPT2, n_inner=96, scale_attn_by_inverse_layer_idx=True),
    "gpt_neox": _decoder(hf.GPTNeoXConfig, **_NEOX),
    "gpt_neox-serial": _decoder(hf.GPTNeoXConfig, use_parallel_residual=False, **_NEOX),
}


@dataclass(frozen=True)
class Reference:
    """A transformers model and the folder that it was saved to."""

    module: Any
    folder: Path

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """float32 (time, vocabulary) for one whole text."""
        with torch.no_grad():
            return self.module(torch.tensor([token_ids]), use_cache=False).logits[0].float().numpy()


def build(config: Any, folder: Path, seed: int = 0) -> Reference:
    """A model with weights large enough that a mistake anywhere changes its logits by far more than rounding does."""
    torch.set_num_threads(1)
    config._attn_implementation = "eager"
    module = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or ".ln_" in name:
                parameter.add_(0.1 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    module.save_pretrained(folder)
    return Reference(module, folder)


def token_ids(count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, VOCABULARY, count)]
