"""Mixtral: Mistral with eight experts in the place of each MLP. Jiang et al. 2024, arXiv:2401.04088."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.architectures.llama import Decoder
from mnemos.models.blocks import load_attention, only
from mnemos.models.config import GatedDecoderConfig, read_gated_decoder, read_shape
from mnemos.models.fields import Fields
from mnemos.models.moe import GGUF_EXPERT_NAMES, Routing, load_sparse_mlp, read_routing
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops, RopeParams


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(GatedDecoderConfig):
    """Mixtral's hyperparameters; `intermediate_size` is one expert's."""

    routing: Routing

    @classmethod
    def read(cls, fields: Fields) -> MixtralConfig:
        """From a config.json or GGUF metadata; FormatError for a field that is missing or impossible."""
        theta = 1e4 if fields.is_gguf else 1e6
        return cls(
            **read_gated_decoder(fields, read_shape(fields), epsilon=1e-5, theta=theta),
            routing=read_routing(fields, "intermediate_size", normalise=True),
        )


class Layer:
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, weights: Weights, i: int, config: MixtralConfig, rope: RopeParams) -> None:
        name, size, epsilon = f"layers.{i}", config.hidden_size, config.rms_norm_eps
        interleaved = config.rope.rotary_dim if weights.is_gguf else 0
        self.input_norm = weights.rms_norm(f"{name}.input_layernorm", size, epsilon)
        self.mlp_norm = weights.rms_norm(f"{name}.post_attention_layernorm", size, epsilon)
        self.attention = load_attention(weights, i, config, rope, interleaved=interleaved)
        self.mlp = load_sparse_mlp(
            weights, f"{name}.block_sparse_moe", size, config.routing, config.hidden_act, names=("w1", "w3", "w2")
        )

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = ops.add(only(ops, x, wanted), attended)
        return ops.add(x, self.mlp(ops, self.mlp_norm(ops, x)))


class Mixtral(Decoder):
    """Mixtral's layers in Llama's frame."""

    gguf_names: ClassVar[dict[str, str]] = GGUF_EXPERT_NAMES

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = MixtralConfig.read(fields)
        rope = config.rope.params(config.head_dim)
        super().__init__(weights, config, lambda i: Layer(weights, i, config, rope))
