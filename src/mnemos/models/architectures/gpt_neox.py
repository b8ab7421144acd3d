"""GPT-NeoX and Pythia: attention and MLP side by side, partial rotation. Black et al. 2022, arXiv:2204.06745."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mnemos.contract import Cache
from mnemos.models.activations import read_activation
from mnemos.models.blocks import MLP, Attention, DecoderConfig, load_head, only, read_shape, run_layers
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import LayerNorm, Weights
from mnemos.ops.protocol import Array, AttentionParams, Ops, RopeParams

_NAMES_IN_CONFIG = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(DecoderConfig):
    intermediate_size: int
    layer_norm_eps: float
    hidden_act: str
    rope: Rope
    use_parallel_residual: bool
    attention_bias: bool
    tie_word_embeddings: bool

    @classmethod
    def read(cls, fields: Fields) -> GPTNeoXConfig:
        if fields.get("rotary_pct") is not None or fields.get("rotary_emb_base") is not None:
            fields = fields.renamed(**_NAMES_IN_CONFIG)
        shape = read_shape(fields)
        shape["num_key_value_heads"] = shape["num_attention_heads"]
        return cls(
            **shape,
            intermediate_size=fields.size("intermediate_size"),
            layer_norm_eps=fields.number("layer_norm_eps", None if fields.is_gguf else 1e-5, most=1.0),
            hidden_act=read_activation(fields, "hidden_act", "gelu"),
            rope=read_rope(fields, shape["head_dim"], fraction=0.25),
            use_parallel_residual=fields.flag("use_parallel_residual", True),
            attention_bias=fields.flag("attention_bias", True),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


@dataclass(frozen=True)
class Layer:
    input_norm: LayerNorm
    attention: Attention
    mlp_norm: LayerNorm
    mlp: MLP
    parallel: bool

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = only(ops, x, wanted)
        if self.parallel:
            return ops.add(x, ops.add(attended, self.mlp(ops, self.mlp_norm(ops, x))))
        x = ops.add(x, attended)
        return ops.add(x, self.mlp(ops, self.mlp_norm(ops, x)))


class GPTNeoX:
    gguf_names: ClassVar[dict[str, str]] = {
        "embed_in": "token_embd",
        "post_attention_layernorm": "ffn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
        "final_layer_norm": "output_norm",
        "embed_out": "output",
    }
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = config = GPTNeoXConfig.read(fields)
        size, epsilon = config.hidden_size, config.layer_norm_eps
        rope = config.rope.params(config.head_dim)
        self.embed_in = weights.matrix("embed_in", config.vocab_size, size)
        self.layers = [
            Layer(
                input_norm=weights.layer_norm(f"layers.{i}.input_layernorm", size, epsilon),
                attention=_load_attention(weights, i, config, rope),
                mlp_norm=weights.layer_norm(f"layers.{i}.post_attention_layernorm", size, epsilon),
                mlp=_load_mlp(weights, i, config),
                parallel=config.use_parallel_residual,
            )
            for i in range(config.num_hidden_layers)
        ]
        self.final_layer_norm = weights.layer_norm("final_layer_norm", size, epsilon)
        self.embed_out = load_head(weights, self.embed_in, config, config.tie_word_embeddings, "embed_out")

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        x = ops.embed(self.embed_in, batch.token_ids)
        hidden = self.final_layer_norm(ops, run_layers(self.layers, ops, x, batch, cache))
        return hidden, ops.linear(hidden, self.embed_out)


def _load_attention(weights: Weights, layer: int, config: GPTNeoXConfig, rope: RopeParams) -> Attention:
    name, size, heads = f"layers.{layer}.attention", config.hidden_size, config.num_attention_heads
    q_proj, k_proj, v_proj = (
        weights.linear(
            f"{name}.query_key_value", 3 * size, size, config.attention_bias, take=_rows(config, part, weights.is_gguf)
        )
        for part in range(3)
    )
    return Attention(
        q_proj,
        k_proj,
        v_proj,
        o_proj=weights.linear(f"{name}.dense", size, size, config.attention_bias),
        layer=layer,
        params=AttentionParams(heads, heads, config.head_dim, config.head_dim**-0.5),
        rope=rope,
    )


def _rows(config: GPTNeoXConfig, part: int, is_gguf: bool) -> npt.NDArray[np.intp]:
    """Where queries (part 0), keys (1) or values (2) lie: Hugging Face has all three of a head together."""
    size = config.hidden_size
    if is_gguf:
        return np.arange(part * size, (part + 1) * size, dtype=np.intp)
    heads = np.arange(3 * size, dtype=np.intp).reshape(config.num_attention_heads, 3, config.head_dim)
    return heads[:, part].flatten()


def _load_mlp(weights: Weights, layer: int, config: GPTNeoXConfig) -> MLP:
    name, size, inner = f"layers.{layer}.mlp", config.hidden_size, config.intermediate_size
    up = weights.linear(f"{name}.dense_h_to_4h", inner, size, True)
    return MLP(up, weights.linear(f"{name}.dense_4h_to_h", size, inner, True), config.hidden_act)
