"""Qwen3 with mixtures of experts in the place of some or all MLPs. Yang et al. 2025, arXiv:2505.09388."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.architectures.llama import Decoder
from mnemos.models.architectures.qwen2 import read_qwen_shape
from mnemos.models.blocks import GatedMLP, HeadNorm, load_attention, load_gated_mlp, only
from mnemos.models.config import GatedDecoderConfig, read_gated_decoder
from mnemos.models.fields import Fields
from mnemos.models.moe import GGUF_EXPERT_NAMES, Routing, SparseMLP, load_sparse_mlp, read_routing
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops, RopeParams


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(GatedDecoderConfig):
    """Hyperparameters of Qwen3's mixtures of experts; `intermediate_size` is that of the layers without experts."""

    attention_bias: bool
    routing: Routing
    sparse_layers: tuple[bool, ...]  # which layers have experts

    @classmethod
    def read(cls, fields: Fields) -> Qwen3MoeConfig:
        """From a config.json or GGUF metadata; FormatError for a field that is missing or impossible."""
        if fields.get("num_local_experts") is None:
            fields = fields.renamed(num_local_experts="num_experts")
        shape = read_qwen_shape(fields)
        inner = fields.size("moe_intermediate_size")
        return cls(
            **read_gated_decoder(fields, shape, inner_size=inner),
            attention_bias=fields.flag("attention_bias", False),
            # GGUF files rarely say it: all published models normalise.
            routing=read_routing(fields, "moe_intermediate_size", fields.flag("norm_topk_prob", fields.is_gguf)),
            sparse_layers=_sparse_layers(fields, shape["num_hidden_layers"]),
        )


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x)), where the MLP may be a mixture of experts."""

    def __init__(self, weights: Weights, i: int, config: Qwen3MoeConfig, rope: RopeParams) -> None:
        name, size, epsilon = f"layers.{i}", config.hidden_size, config.rms_norm_eps
        bias, head_norm = config.attention_bias, HeadNorm(epsilon)
        self.input_norm = weights.rms_norm(f"{name}.input_layernorm", size, epsilon)
        self.mlp_norm = weights.rms_norm(f"{name}.post_attention_layernorm", size, epsilon)
        self.attention = load_attention(weights, i, config, rope, qkv_bias=bias, o_bias=bias, head_norm=head_norm)
        self.mlp: SparseMLP | GatedMLP = (
            load_sparse_mlp(weights, f"{name}.mlp", size, config.routing, config.hidden_act)
            if config.sparse_layers[i]
            else load_gated_mlp(weights, i, config)
        )

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = ops.add(only(ops, x, wanted), attended)
        return ops.add(x, self.mlp(ops, self.mlp_norm(ops, x)))


class Qwen3Moe(Decoder):
    """Qwen3's layers with experts in Llama's frame."""

    gguf_names: ClassVar[dict[str, str]] = GGUF_EXPERT_NAMES

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = Qwen3MoeConfig.read(fields)
        rope = config.rope.params(config.head_dim)
        super().__init__(weights, config, lambda i: Layer(weights, i, config, rope))


def _sparse_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer has experts, those in `mlp_only_layers` excepted."""
    dense = set(fields.sizes("mlp_only_layers"))
    step = fields.size("decoder_sparse_step", 1)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
