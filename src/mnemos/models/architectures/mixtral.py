"""Mixtral: Mistral with eight experts in the place of each MLP. Jiang et al. 2024, arXiv:2401.04088."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.activations import read_activation
from mnemos.models.blocks import DecoderConfig, load_attention, load_pre_norm_decoder, read_shape
from mnemos.models.fields import Fields
from mnemos.models.moe import GGUF_EXPERT_NAMES, Routing, load_sparse_mlp, read_routing
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(DecoderConfig):
    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    routing: Routing
    tie_word_embeddings: bool

    @classmethod
    def read(cls, fields: Fields) -> MixtralConfig:
        shape = read_shape(fields)
        return cls(
            **shape,
            rms_norm_eps=fields.number("rms_norm_eps", None if fields.is_gguf else 1e-5, most=1.0),
            hidden_act=read_activation(fields, "hidden_act", "silu"),
            rope=read_rope(fields, shape["head_dim"], theta=1e4 if fields.is_gguf else 1e6),
            routing=read_routing(fields, "intermediate_size", normalise=True),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


class Mixtral:
    gguf_names: ClassVar[dict[str, str]] = GGUF_EXPERT_NAMES
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = config = MixtralConfig.read(fields)
        rope = config.rope.params(config.head_dim)
        interleaved = config.rope.rotary_dim if weights.is_gguf else 0
        self.decoder = load_pre_norm_decoder(
            weights,
            config,
            config.rms_norm_eps,
            config.tie_word_embeddings,
            attention=lambda layer: load_attention(weights, layer, config, rope, interleaved=interleaved),
            mlp=lambda layer: load_sparse_mlp(
                weights,
                layer,
                config.hidden_size,
                config.routing,
                config.hidden_act,
                block="block_sparse_moe",
                names=("w1", "w3", "w2"),
            ),
        )

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        return self.decoder(ops, batch, cache)
