"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values. Yang et al. 2024, arXiv:2407.10671."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.activations import read_activation
from mnemos.models.blocks import DecoderConfig, load_attention, load_gated_mlp, load_pre_norm_decoder, read_shape
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    tie_word_embeddings: bool

    @classmethod
    def read(cls, fields: Fields) -> Qwen2Config:
        shape = read_qwen_shape(fields)
        return cls(
            **shape,
            intermediate_size=fields.size("intermediate_size"),
            rms_norm_eps=fields.number("rms_norm_eps", None if fields.is_gguf else 1e-6, most=1.0),
            hidden_act=read_activation(fields, "hidden_act", "silu"),
            rope=read_rope(fields, shape["head_dim"]),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


def read_qwen_shape(fields: Fields, head_dim: int | None = None) -> dict[str, Any]:
    """The shape; a sliding window, if switched on, begins at layer `max_window_layers`."""
    if not fields.is_gguf and not fields.flag("use_sliding_window", False):
        return read_shape(fields, head_dim=head_dim) | {"windows": (0,) * fields.size("num_hidden_layers")}
    first = fields.size("max_window_layers", 28, least=0)
    return read_shape(fields, head_dim=head_dim, slides=lambda layer: layer >= first)


class Qwen2:
    gguf_names: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = config = Qwen2Config.read(fields)
        rope = config.rope.params(config.head_dim)
        self.decoder = load_pre_norm_decoder(
            weights,
            config,
            config.rms_norm_eps,
            config.tie_word_embeddings,
            attention=lambda layer: load_attention(weights, layer, config, rope, qkv_bias=True),
            mlp=lambda layer: load_gated_mlp(
                weights, layer, config.hidden_size, config.intermediate_size, config.hidden_act
            ),
        )

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        return self.decoder(ops, batch, cache)
