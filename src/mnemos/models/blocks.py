"""What decoder-only architectures share: the hyperparameters that all have, attention and feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from mnemos.contract import Cache
from mnemos.errors import FormatError
from mnemos.models.fields import Fields
from mnemos.models.rope import context_in_use
from mnemos.models.weights import Linear, RMSNorm, Weights
from mnemos.ops.protocol import Array, AttentionParams, Matrix, Ops, RopeParams

# More is a damaged field, found before anything is made of that size.
MOST_LAYERS = 100_000
WIDEST_HEAD = 65_536
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Hyperparameters of every architecture, under Hugging Face's names; `context_length` is the one in use."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    context_length: int
    windows: tuple[int, ...]  # for each layer how many positions attention reaches back, 0 without a limit


def read_shape(
    fields: Fields, *, head_dim: int | None = None, slides: Callable[[int], bool] = lambda layer: True
) -> dict[str, Any]:
    """The values of DecoderConfig's fields.

    head_dim: where the config has none (else hidden size / heads). slides: which layers have the sliding window, if
    there is one and the config does not list the layers' types.
    """
    hidden = fields.size("hidden_size")
    heads = fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of the {heads} attention heads")
    if fields.get("head_dim") is None and head_dim is None:
        if hidden % heads:
            raise fields.wrong("num_attention_heads", f"a divisor of the hidden size {hidden}")
        head_dim = hidden // heads
        if head_dim > WIDEST_HEAD:
            raise fields.wrong("num_attention_heads", f"heads of at most {WIDEST_HEAD} elements")
    return {
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": fields.size("num_hidden_layers", largest=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": fields.size("head_dim", head_dim, largest=WIDEST_HEAD),
        "context_length": context_in_use(fields),
        "windows": _read_windows(fields, fields.size("num_hidden_layers", largest=MOST_LAYERS), slides),
    }


def _read_windows(fields: Fields, layers: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
    window = fields.size("sliding_window", 0, least=0) if fields.flag("use_sliding_window", True) else 0
    types = fields.get("layer_types")
    if types is None:
        return tuple(window if slides(layer) else 0 for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers or any(kind not in LAYER_TYPES for kind in types):
        raise fields.wrong("layer_types", f"a list of {layers} names out of {', '.join(LAYER_TYPES)}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


class Architecture(Protocol):
    """One model family, written over ops: made from checked fields and weights, then only `forward` is called."""

    gguf_names: ClassVar[dict[str, str]]  # what its GGUF tensors are called where that differs from the usual
    ignored: ClassVar[tuple[str, ...]]  # patterns of tensors that a file may have beyond those of the model

    @property
    def config(self) -> DecoderConfig: ...

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]: ...


class Layer(Protocol):
    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        """The layer's output; only the rows `wanted` of it, if given (keys and values are stored for all)."""


def run_layers(layers: Sequence[Layer], ops: Ops, x: Array, batch: Any, cache: Cache) -> Array:
    """The rows of the last layer's output whose logits are asked for; for the others, it only fills the cache."""
    for layer in layers[:-1]:
        x = layer(ops, x, batch, cache)
    return layers[-1](ops, x, batch, cache, batch.logit_rows)


def only(ops: Ops, x: Array, wanted: Array | None) -> Array:
    return x if wanted is None else ops.rows(x, wanted)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention with its projections; heads may be normalised one by one before the rotation."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    layer: int
    params: AttentionParams
    rope: RopeParams | None
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        q, k, v = self.q_proj(ops, x), self.k_proj(ops, x), self.v_proj(ops, x)
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(ops, q), self.k_norm(ops, k)
        if self.rope:
            q, k = ops.rope(q, batch.positions, self.rope), ops.rope(k, batch.positions, self.rope)
        mixed = ops.attention(q, k, v, cache, self.layer, batch, self.params)
        return self.o_proj(ops, only(ops, mixed, wanted))


@dataclass(frozen=True)
class GatedMLP:
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    activation: str

    def __call__(self, ops: Ops, x: Array) -> Array:
        return self.down_proj(ops, ops.gated_activation(self.gate_proj(ops, x), self.up_proj(ops, x), self.activation))


@dataclass(frozen=True)
class MLP:
    up_proj: Linear
    down_proj: Linear
    activation: str

    def __call__(self, ops: Ops, x: Array) -> Array:
        return self.down_proj(ops, ops.activation(self.up_proj(ops, x), self.activation))


@dataclass(frozen=True)
class PreNormLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)): the layer of Llama and its kin."""

    input_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: Any

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = ops.add(only(ops, x, wanted), attended)
        return ops.add(x, self.mlp(ops, self.mlp_norm(ops, x)))


@dataclass(frozen=True)
class HeadNorm:
    """Norms of each query and key head; `offset` is added to their weights."""

    epsilon: float
    offset: float = 0.0


def load_attention(
    weights: Weights,
    layer: int,
    config: DecoderConfig,
    rope: RopeParams | None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    qkv_bias: bool = False,
    o_bias: bool = False,
    head_norm: HeadNorm | None = None,
    interleaved: int = 0,
) -> Attention:
    """The attention block `layers.{layer}.self_attn` with separate q, k and v projections.

    interleaved: in how many leading elements of each head the file pairs neighbours instead of halves.
    """
    name = f"layers.{layer}.self_attn"
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q_take, k_take = (half_split_rows(n, size, interleaved) if interleaved else None for n in (heads, kv_heads))
    q_norm, k_norm = (
        weights.rms_norm(f"{name}.{norm}", size, head_norm.epsilon, offset=head_norm.offset) if head_norm else None
        for norm in ("q_norm", "k_norm")
    )
    return Attention(
        q_proj=weights.linear(f"{name}.q_proj", heads * size, config.hidden_size, qkv_bias, take=q_take),
        k_proj=weights.linear(f"{name}.k_proj", kv_heads * size, config.hidden_size, qkv_bias, take=k_take),
        v_proj=weights.linear(f"{name}.v_proj", kv_heads * size, config.hidden_size, qkv_bias),
        o_proj=weights.linear(f"{name}.o_proj", config.hidden_size, heads * size, o_bias),
        layer=layer,
        params=AttentionParams(
            heads, kv_heads, size, size**-0.5 if scale is None else scale, config.windows[layer], softcap
        ),
        rope=rope,
        q_norm=q_norm,
        k_norm=k_norm,
    )


def load_gated_mlp(
    weights: Weights, layer: int, hidden_size: int, inner_size: int, activation: str, bias: bool = False
) -> GatedMLP:
    name = f"layers.{layer}.mlp"
    return GatedMLP(
        gate_proj=weights.linear(f"{name}.gate_proj", inner_size, hidden_size, bias),
        up_proj=weights.linear(f"{name}.up_proj", inner_size, hidden_size, bias),
        down_proj=weights.linear(f"{name}.down_proj", hidden_size, inner_size, bias),
        activation=activation,
    )


def load_head(weights: Weights, embedding: Matrix, config: DecoderConfig, tied: bool, name: str = "lm_head") -> Matrix:
    """The output projection: the embedding itself where the two are tied; in GGUF, where there is no other."""
    if not weights.has(name) if weights.is_gguf else tied:
        weights.ignore(name)  # tied models may be saved with a copy
        return embedding
    return weights.matrix(name, config.vocab_size, config.hidden_size)


@dataclass(frozen=True)
class PreNormDecoder:
    """Embedding, layers of PreNormLayer, a last norm and the output projection."""

    embed_tokens: Matrix
    layers: list[PreNormLayer]
    norm: RMSNorm
    lm_head: Matrix
    embed_scale: float | None = None

    def __call__(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        x = ops.embed(self.embed_tokens, batch.token_ids)
        if self.embed_scale:
            x = ops.scale(x, self.embed_scale)
        hidden = self.norm(ops, run_layers(self.layers, ops, x, batch, cache))
        return hidden, ops.linear(hidden, self.lm_head)


def load_pre_norm_decoder(
    weights: Weights,
    config: DecoderConfig,
    epsilon: float,
    tied: bool,
    attention: Callable[[int], Attention],
    mlp: Callable[[int], Any],
    norm_offset: float = 0.0,
    embed_scale: float | None = None,
) -> PreNormDecoder:
    """A decoder whose layers have the attention and feed-forward blocks that the functions give for their number.

    norm_offset is added to every norm's weights.
    """

    def norm(name: str) -> RMSNorm:
        return weights.rms_norm(name, config.hidden_size, epsilon, offset=norm_offset)

    embed_tokens = weights.matrix("embed_tokens", config.vocab_size, config.hidden_size)
    layers = [
        PreNormLayer(
            input_norm=norm(f"layers.{i}.input_layernorm"),
            attention=attention(i),
            mlp_norm=norm(f"layers.{i}.post_attention_layernorm"),
            mlp=mlp(i),
        )
        for i in range(config.num_hidden_layers)
    ]
    lm_head = load_head(weights, embed_tokens, config, tied)
    return PreNormDecoder(embed_tokens, layers, norm("norm"), lm_head, embed_scale)


@cache
def half_split_rows(heads: int, head_dim: int, rotary_dim: int) -> npt.NDArray[np.intp]:
    """Where each row of a half-split projection lies in one whose rotary pairs are neighbours."""
    if rotary_dim > head_dim or rotary_dim % 2:
        raise FormatError(f"{rotary_dim} interleaved elements do not fit into heads of {head_dim}")
    within = np.arange(head_dim)
    within[:rotary_dim] = np.concatenate((np.arange(0, rotary_dim, 2), np.arange(1, rotary_dim, 2)))
    return (np.arange(heads)[:, None] * head_dim + within).reshape(-1).astype(np.intp)
