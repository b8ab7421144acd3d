"""GPT-NeoX and Pythia: attention and MLP side by side, partial rotation. Black et al. 2022, arXiv:2204.06745."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mnemos.contract import Cache
from mnemos.models.activations import read_activation
from mnemos.models.blocks import MLP, Attention, attention_params, load_head, only, run_layers
from mnemos.models.config import DecoderConfig, read_shape
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops, RopeParams, Rows

_NAMES_IN_CONFIG = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(DecoderConfig):
    """GPT-NeoX's hyperparameters."""

    intermediate_size: int
    layer_norm_eps: float
    hidden_act: str
    rope: Rope
    use_parallel_residual: bool
    attention_bias: bool

    @classmethod
    def read(cls, fields: Fields) -> GPTNeoXConfig:
        """From a config.json or GGUF metadata; FormatError for a field that is missing or impossible."""
        if fields.get("rotary_pct") is not None or fields.get("rotary_emb_base") is not None:
            fields = fields.renamed(**_NAMES_IN_CONFIG)
        shape = read_shape(fields, slides=lambda layer: False)
        shape["num_key_value_heads"] = shape["num_attention_heads"]
        return cls(
            **shape,
            intermediate_size=fields.size("intermediate_size"),
            layer_norm_eps=fields.number("layer_norm_eps", None if fields.is_gguf else 1e-5, most=1.0),
            hidden_act=read_activation(fields, "hidden_act", "gelu"),
            rope=read_rope(fields, shape["head_dim"], fraction=0.25),
            use_parallel_residual=fields.flag("use_parallel_residual", True),
            attention_bias=fields.flag("attention_bias", True),
        )


class Layer:
    """x + attention(norm(x)) + mlp(norm(x)), or, where the two are not parallel, one after the other."""

    def __init__(self, weights: Weights, i: int, config: GPTNeoXConfig, rope: RopeParams) -> None:
        name, size, inner, epsilon = f"layers.{i}", config.hidden_size, config.intermediate_size, config.layer_norm_eps
        bias = config.attention_bias
        q_proj, k_proj, v_proj = (
            weights.linear(f"{name}.attention.query_key_value", 3 * size, size, bias, take=rows)
            for rows in _split_rows(config, weights.is_gguf)
        )
        self.input_norm = weights.layer_norm(f"{name}.input_layernorm", size, epsilon)
        self.attention = Attention(
            q_proj,
            k_proj,
            v_proj,
            o_proj=weights.linear(f"{name}.attention.dense", size, size, bias),
            layer=i,
            params=attention_params(config, i),
            rope=rope,
        )
        self.mlp_norm = weights.layer_norm(f"{name}.post_attention_layernorm", size, epsilon)
        self.mlp = MLP(
            up_proj=weights.linear(f"{name}.mlp.dense_h_to_4h", inner, size, True),
            down_proj=weights.linear(f"{name}.mlp.dense_4h_to_h", size, inner, True),
            activation=config.hidden_act,
        )
        self.parallel = config.use_parallel_residual

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = only(ops, x, wanted)
        if self.parallel:
            return ops.add(x, ops.add(attended, self.mlp(ops, self.mlp_norm(ops, x))))
        x = ops.add(x, attended)
        return ops.add(x, self.mlp(ops, self.mlp_norm(ops, x)))


class GPTNeoX:
    """Embedding, layers, a last norm and the output projection."""

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
        rope = config.rope.params(config.head_dim)
        self.embed_in = weights.matrix("embed_in", config.vocab_size, config.hidden_size)
        self.layers = [Layer(weights, i, config, rope) for i in range(config.num_hidden_layers)]
        self.final_layer_norm = weights.layer_norm("final_layer_norm", config.hidden_size, config.layer_norm_eps)
        self.lm_head = load_head(weights, self.embed_in, config, "embed_out", "embed_in")

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        x = ops.embed(self.embed_in, batch.token_ids)
        hidden = self.final_layer_norm(ops, run_layers(self.layers, ops, x, batch, cache))
        return hidden, ops.linear(hidden, self.lm_head)


def _split_rows(config: GPTNeoXConfig, is_gguf: bool) -> list[Rows]:
    """Which rows of one tensor are queries, keys and values: Hugging Face has all three of a head together."""
    rows = np.arange(3 * config.hidden_size, dtype=np.intp)
    if is_gguf:
        return list(rows.reshape(3, -1))
    heads = rows.reshape(config.num_attention_heads, 3, config.head_dim)
    return [heads[:, part].flatten() for part in range(3)]
