"""Writes the GGUF file that llama.cpp's converter would make of a small Hugging Face model, all tensors in F32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType
from gguf.quants import quantize

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "mixtral": MODEL_ARCH.LLAMA,
    "smollm3": MODEL_ARCH.SMOLLM3,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "olmo2": MODEL_ARCH.OLMO2,
    "phi3": MODEL_ARCH.PHI3,
    "gpt2": MODEL_ARCH.GPT2,
    "gpt_neox": MODEL_ARCH.GPTNEOX,
}
_PERMUTED = ("llama", "mistral", "mixtral", "smollm3")


def write_gguf(module: Any, path: Path, quantization: GGMLQuantizationType | None = None) -> Path:
    """The module's weights and hyperparameters in a new file at `path`; matrices may be quantized."""
    config = module.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    _write_hyperparameters(writer, config)
    for name, array in _tensors(module):
        values = np.ascontiguousarray(array, dtype=np.float32)
        if quantization is not None and values.ndim > 1 and values.shape[-1] % 32 == 0:
            writer.add_tensor(name, quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_hyperparameters(writer: gguf.GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_eos_token_id(2)
    inner = config.intermediate_size if hasattr(config, "intermediate_size") else config.n_inner
    writer.add_feed_forward_length(inner or 4 * config.hidden_size)
    if config.model_type in ("gpt2", "gpt_neox"):
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.model_type == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if config.model_type == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            getattr(writer, f"add_{name}")(getattr(config, name))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type != "gpt2":
        _write_rope(writer, config, head_dim)


def _write_rope(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "longrope":
        scale = config.max_position_embeddings / rope["original_max_position_embeddings"]
        factor = math.sqrt(1 + math.log(scale) / math.log(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(factor)


def _tensors(module: Any) -> list[tuple[str, np.ndarray]]:
    config = module.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    found = []
    for name, parameter in module.state_dict().items():
        if tied and name in ("lm_head.weight", "embed_out.weight"):
            continue
        array = parameter.float().numpy()
        for part, values in _parts(config, name, array):
            target = names.get_name(part, (".weight", ".bias"))
            assert target is not None, part
            found.append((target, values))
    return found + _rope_tensors(config)


def _parts(config: Any, name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The converter's changes: row orders, transposed matrices, Gemma's norms, fused experts."""
    kind = config.model_type
    if kind in _PERMUTED and name.endswith(("q_proj.weight", "q_proj.bias")):
        return [(name, _interleave(array, config.num_attention_heads))]
    if kind in _PERMUTED and name.endswith(("k_proj.weight", "k_proj.bias")):
        return [(name, _interleave(array, config.num_key_value_heads))]
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return [(name, array + 1)]
    if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return [(name, array.T)]
    if kind == "gpt_neox" and "query_key_value" in name:
        heads = array.reshape(config.num_attention_heads, 3, -1, *array.shape[1:])
        return [(name, heads.swapaxes(0, 1).reshape(array.shape))]
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(array, 2, axis=1)
        base = name.removesuffix("gate_up_proj")
        return [(f"{base}gate_proj.weight", gate), (f"{base}up_proj.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", array)]
    return [(name, array)]


def _interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (halves, pairs) to (pairs, halves), the order that ggml's plain rotation needs."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _rope_tensors(config: Any) -> list[tuple[str, np.ndarray]]:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return [(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"])) for length in ("long", "short")]
    if rope.get("rope_type") == "llama3":
        return [("rope_freqs.weight", _llama3_factors(config, rope))]
    return []


def _llama3_factors(config: Any, rope: dict[str, Any]) -> np.ndarray:
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0), 1)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors)
