"""Llama 1 to 3 and what shares its form: SmolLM, Mistral, Yi. Touvron et al. 2023, arXiv:2302.13971."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.blocks import DecoderLayer, load_attention, load_gated_mlp, load_head, only, run_layers
from mnemos.models.config import GatedDecoderConfig, read_gated_decoder, read_shape
from mnemos.models.fields import Fields
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops, RopeParams


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(GatedDecoderConfig):
    """Llama's hyperparameters."""

    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def read(cls, fields: Fields, *, theta: float = 10000.0, tied: bool = False) -> LlamaConfig:
        """theta and tied: what a config means that leaves out the rotary base and whether the head is tied."""
        return cls(
            **read_gated_decoder(fields, read_shape(fields, tied=tied), theta=theta),
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
        )


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, weights: Weights, i: int, config: LlamaConfig, rope: RopeParams | None, interleaved: bool = False
    ) -> None:
        """interleaved: the file pairs neighbours of a head in the rotary embedding, as GGUF files of Llama do."""
        name, size, epsilon = f"layers.{i}", config.hidden_size, config.rms_norm_eps
        self.input_norm = weights.rms_norm(f"{name}.input_layernorm", size, epsilon)
        self.mlp_norm = weights.rms_norm(f"{name}.post_attention_layernorm", size, epsilon)
        self.attention = load_attention(
            weights,
            i,
            config,
            rope,
            qkv_bias=_has_bias(weights, "self_attn.q_proj", config.attention_bias),
            o_bias=_has_bias(weights, "self_attn.o_proj", config.attention_bias),
            interleaved=config.rope.rotary_dim if interleaved or weights.is_gguf else 0,
        )
        self.mlp = load_gated_mlp(weights, i, config, bias=_has_bias(weights, "mlp.up_proj", config.mlp_bias))

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = ops.add(only(ops, x, wanted), attended)
        return ops.add(x, self.mlp(ops, self.mlp_norm(ops, x)))


class Decoder:
    """Embedding, layers, a last norm and the output projection.

    Llama's relatives derive from it: each gives it its own layers, and has its own `forward` where that differs.
    """

    gguf_names: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        weights: Weights,
        config: GatedDecoderConfig,
        make_layer: Callable[[int], DecoderLayer],
        norm_offset: float = 0.0,
    ) -> None:
        """norm_offset is added to the last norm's weight."""
        self.config = config
        self.embed_tokens = weights.matrix("embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = [make_layer(i) for i in range(config.num_hidden_layers)]
        self.norm = weights.rms_norm("norm", config.hidden_size, config.rms_norm_eps, offset=norm_offset)
        self.lm_head = load_head(weights, self.embed_tokens, config)

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        x = ops.embed(self.embed_tokens, batch.token_ids)
        hidden = self.norm(ops, run_layers(self.layers, ops, x, batch, cache))
        return hidden, ops.linear(hidden, self.lm_head)


class Llama(Decoder):
    """Llama's layers, all of which rotate."""

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = LlamaConfig.read(fields)
        rope = config.rope.params(config.head_dim)
        super().__init__(weights, config, lambda i: Layer(weights, i, config, rope))


def _has_bias(weights: Weights, name: str, configured: bool) -> bool:
    """GGUF has no field for biases, only tensors."""
    return weights.has(f"layers.0.{name}", ".bias") if weights.is_gguf else configured
