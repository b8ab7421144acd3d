"""Qwen3 with mixtures of experts in the place of some or all MLPs. Yang et al. 2025, arXiv:2505.09388."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.activations import read_activation
from mnemos.models.architectures.qwen2 import read_qwen_shape
from mnemos.models.blocks import DecoderConfig, HeadNorm, load_attention, load_gated_mlp, load_pre_norm_decoder
from mnemos.models.fields import Fields
from mnemos.models.moe import GGUF_EXPERT_NAMES, Routing, load_sparse_mlp, read_routing
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(DecoderConfig):
    intermediate_size: int  # of the layers without experts
    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    attention_bias: bool
    routing: Routing
    sparse_layers: tuple[bool, ...]
    tie_word_embeddings: bool

    @classmethod
    def read(cls, fields: Fields) -> Qwen3MoeConfig:
        if fields.get("num_local_experts") is None:
            fields = fields.renamed(num_local_experts="num_experts")
        shape = read_qwen_shape(fields)
        inner = fields.size("moe_intermediate_size")
        return cls(
            **shape,
            intermediate_size=fields.size("intermediate_size", inner),
            rms_norm_eps=fields.number("rms_norm_eps", None if fields.is_gguf else 1e-6, most=1.0),
            hidden_act=read_activation(fields, "hidden_act", "silu"),
            rope=read_rope(fields, shape["head_dim"]),
            attention_bias=fields.flag("attention_bias", False),
            # GGUF files rarely say it: all published models normalise.
            routing=read_routing(fields, "moe_intermediate_size", fields.flag("norm_topk_prob", fields.is_gguf)),
            sparse_layers=_sparse_layers(fields, shape["num_hidden_layers"]),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


class Qwen3Moe:
    gguf_names: ClassVar[dict[str, str]] = GGUF_EXPERT_NAMES
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = config = Qwen3MoeConfig.read(fields)
        rope = config.rope.params(config.head_dim)

        def mlp(layer: int) -> Any:
            if config.sparse_layers[layer]:
                return load_sparse_mlp(weights, layer, config.hidden_size, config.routing, config.hidden_act)
            return load_gated_mlp(weights, layer, config.hidden_size, config.intermediate_size, config.hidden_act)

        self.decoder = load_pre_norm_decoder(
            weights,
            config,
            config.rms_norm_eps,
            config.tie_word_embeddings,
            attention=lambda layer: load_attention(
                weights,
                layer,
                config,
                rope,
                qkv_bias=config.attention_bias,
                o_bias=config.attention_bias,
                head_norm=HeadNorm(config.rms_norm_eps),
            ),
            mlp=mlp,
        )

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        return self.decoder(ops, batch, cache)


def _sparse_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer has experts, those in `mlp_only_layers` excepted."""
    dense = set(fields.sizes("mlp_only_layers"))
    step = fields.size("decoder_sparse_step", 1)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
