"""The modules that decoder-only architectures share: attention and feed-forward blocks, and how they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from mnemos.contract import Cache
from mnemos.errors import FormatError
from mnemos.models.config import DecoderConfig, GatedDecoderConfig
from mnemos.models.weights import Linear, RMSNorm, Weights
from mnemos.ops.protocol import Array, AttentionParams, Matrix, Ops, RopeParams


class Architecture(Protocol):
    """One model family, written with ops: created from checked fields and weights; then only `forward` is called."""

    gguf_names: ClassVar[dict[str, str]]  # names of its GGUF tensors where they differ from the usual ones
    ignored: ClassVar[tuple[str, ...]]  # patterns of tensors that a file may have in addition to the model's

    layers: list[DecoderLayer]

    @property
    def lm_head(self) -> Matrix:
        """The output projection."""

    @property
    def config(self) -> DecoderConfig: ...

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        """(hidden (R, hidden size), logits (R, vocabulary)) of the R rows that the batch requests."""


class DecoderLayer(Protocol):
    """One layer of a decoder, from x (T, hidden size) to its output."""

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        """The layer's output, limited to the rows `wanted` if given (keys and values are stored for all rows)."""


def run_layers(layers: Sequence[DecoderLayer], ops: Ops, x: Array, batch: Any, cache: Cache) -> Array:
    """The rows of the last layer's output whose logits are wanted; for other rows, it only fills the cache."""
    for layer in layers[:-1]:
        x = layer(ops, x, batch, cache)
    return layers[-1](ops, x, batch, cache, batch.logit_rows)


def only(ops: Ops, x: Array, wanted: Array | None) -> Array:
    """The rows `wanted` of x, or all rows if it is None."""
    return x if wanted is None else ops.rows(x, wanted)


@dataclass(frozen=True)
class Attention:
    """Causal attention with its projections (Vaswani et al. 2017, arXiv:1706.03762).

    Several query heads may share one key/value head (Ainslie et al. 2023, arXiv:2305.13245), and heads may be
    normalised one by one before the rotation (Henry et al. 2020, arXiv:2010.04245).
    """

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
        mixed = ops.attention(q, k, v, cache, self.layer, batch, replace(self.params, rope=self.rope))
        return self.o_proj(ops, only(ops, mixed, wanted))


@dataclass(frozen=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x)): SwiGLU, GeGLU. Shazeer 2020, arXiv:2002.05202."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    activation: str

    def __call__(self, ops: Ops, x: Array) -> Array:
        return self.down_proj(ops, ops.gated_activation(self.gate_proj(ops, x), self.up_proj(ops, x), self.activation))


@dataclass(frozen=True)
class MLP:
    """down(activation(up(x))), the position-wise network of Vaswani et al. 2017, arXiv:1706.03762."""

    up_proj: Linear
    down_proj: Linear
    activation: str

    def __call__(self, ops: Ops, x: Array) -> Array:
        return self.down_proj(ops, ops.activation(self.up_proj(ops, x), self.activation))


@dataclass(frozen=True)
class HeadNorm:
    """Norms for each query and key head; `offset` is added to their weights."""

    epsilon: float
    offset: float = 0.0


def attention_params(
    config: DecoderConfig, layer: int, scale: float | None = None, softcap: float = 0.0
) -> AttentionParams:
    """The attention parameters of layer number `layer`; `scale` defaults to 1 / sqrt(head_dim)."""
    size = config.head_dim
    return AttentionParams(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=size,
        scale=size**-0.5 if scale is None else scale,
        window=config.windows[layer],
        softcap=softcap,
    )


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

    interleaved: for how many leading elements of each head the file pairs neighbours instead of halves.
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
        params=attention_params(config, layer, scale, softcap),
        rope=rope,
        q_norm=q_norm,
        k_norm=k_norm,
    )


def load_gated_mlp(weights: Weights, layer: int, config: GatedDecoderConfig, bias: bool = False) -> GatedMLP:
    """The block `layers.{layer}.mlp` with separate gate and up projections."""
    name, size, inner = f"layers.{layer}.mlp", config.hidden_size, config.intermediate_size
    return GatedMLP(
        gate_proj=weights.linear(f"{name}.gate_proj", inner, size, bias),
        up_proj=weights.linear(f"{name}.up_proj", inner, size, bias),
        down_proj=weights.linear(f"{name}.down_proj", size, inner, bias),
        activation=config.hidden_act,
    )


def load_head(
    weights: Weights,
    embedding: Matrix,
    config: DecoderConfig,
    name: str = "lm_head",
    embedding_name: str = "embed_tokens",
) -> Matrix:
    """The output projection: the embedding itself if the two are tied; in GGUF, if there is no other.

    A stored projection that differs from the embedding is used whatever the config says: training untied the two.
    """
    tied = not weights.has(name) if weights.is_gguf else config.tie_word_embeddings
    if tied and not (weights.has(name) and weights.differ(name, embedding_name)):
        weights.ignore(name)  # tied models may be saved with a copy
        return embedding
    return weights.matrix(name, config.vocab_size, config.hidden_size)


@cache
def half_split_rows(heads: int, head_dim: int, rotary_dim: int) -> npt.NDArray[np.intp]:
    """The index of each row of a half-split projection in one whose rotary pairs are neighbours."""
    if rotary_dim > head_dim or rotary_dim % 2:
        raise FormatError(f"{rotary_dim} interleaved elements do not fit into heads of {head_dim}")
    within = np.arange(head_dim)
    within[:rotary_dim] = np.concatenate((np.arange(0, rotary_dim, 2), np.arange(1, rotary_dim, 2)))
    return (np.arange(heads)[:, None] * head_dim + within).reshape(-1).astype(np.intp)
