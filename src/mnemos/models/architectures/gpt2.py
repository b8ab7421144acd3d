"""GPT-2: learned positions, layer norms, a plain MLP. Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.errors import UnsupportedError
from mnemos.models.activations import read_activation
from mnemos.models.blocks import MLP, Attention, attention_params, load_head, only, run_layers
from mnemos.models.config import DecoderConfig, read_shape
from mnemos.models.fields import Fields
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops

NAMES_IN_CONFIG = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "layer_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}


@dataclass(frozen=True, kw_only=True)
class GPT2Config(DecoderConfig):
    """GPT-2's hyperparameters."""

    max_position_embeddings: int
    intermediate_size: int
    layer_norm_eps: float
    hidden_act: str
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    bias: bool

    @property
    def position_limit(self) -> int:
        """The length of the table of learned positions."""
        return self.context_length

    @classmethod
    def read(cls, fields: Fields) -> GPT2Config:
        """From a config.json or GGUF metadata; FormatError for a field that is missing or impossible."""
        fields = fields.renamed(**NAMES_IN_CONFIG)
        if fields.flag("add_cross_attention", False):
            raise UnsupportedError(
                f"{fields.path}: field 'add_cross_attention' is true; only plain decoders are supported"
            )
        shape = read_shape(fields, slides=lambda layer: False, tied=True)
        return cls(
            **shape,
            max_position_embeddings=fields.size("max_position_embeddings"),
            intermediate_size=fields.size("intermediate_size", None if fields.is_gguf else 4 * shape["hidden_size"]),
            layer_norm_eps=fields.number("layer_norm_eps", None if fields.is_gguf else 1e-5, most=1.0),
            hidden_act=read_activation(fields, "hidden_act", "gelu_new"),
            scale_attn_weights=fields.flag("scale_attn_weights", True),
            scale_attn_by_inverse_layer_idx=fields.flag("scale_attn_by_inverse_layer_idx", False),
            bias=fields.flag("bias", True),
        )

    def attention_scale(self, layer: int) -> float:
        """What layer number `layer` multiplies its scores by."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x)); queries, keys and values are one projection.

    transposed: the file holds matrices as (inputs, outputs).
    """

    def __init__(self, weights: Weights, i: int, config: GPT2Config, transposed: bool) -> None:
        name, size, inner, epsilon = f"h.{i}", config.hidden_size, config.intermediate_size, config.layer_norm_eps
        bias = config.bias
        q_proj, k_proj, v_proj = weights.split_linear(
            f"{name}.attn.c_attn", (size, size, size), size, bias, transposed=transposed
        )
        self.ln_1 = weights.layer_norm(f"{name}.ln_1", size, epsilon, bias=bias)
        self.attention = Attention(
            q_proj,
            k_proj,
            v_proj,
            o_proj=weights.linear(f"{name}.attn.c_proj", size, size, bias, transposed=transposed),
            layer=i,
            params=attention_params(config, i, config.attention_scale(i)),
            rope=None,
        )
        self.ln_2 = weights.layer_norm(f"{name}.ln_2", size, epsilon, bias=bias)
        self.mlp = MLP(
            up_proj=weights.linear(f"{name}.mlp.c_fc", inner, size, bias, transposed=transposed),
            down_proj=weights.linear(f"{name}.mlp.c_proj", size, inner, bias, transposed=transposed),
            activation=config.hidden_act,
        )

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.ln_1(ops, x), batch, cache, wanted)
        x = ops.add(only(ops, x, wanted), attended)
        return ops.add(x, self.mlp(ops, self.ln_2(ops, x)))


class GPT2:
    """Embeddings of tokens and of positions, layers, a last norm and the output projection."""

    gguf_names: ClassVar[dict[str, str]] = {
        "wte": "token_embd",
        "wpe": "position_embd",
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
        "ln_f": "output_norm",
    }
    ignored: ClassVar[tuple[str, ...]] = ()

    transposed: ClassVar[bool] = True  # Hugging Face keeps the layers' matrices as (inputs, outputs)

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = config = GPT2Config.read(fields)
        size, epsilon = config.hidden_size, config.layer_norm_eps
        self.wte = weights.matrix("wte", config.vocab_size, size)
        self.wpe = weights.matrix("wpe", config.max_position_embeddings, size)
        transposed = self.transposed and not weights.is_gguf
        self.layers = [Layer(weights, i, config, transposed) for i in range(config.num_hidden_layers)]
        self.ln_f = weights.layer_norm("ln_f", size, epsilon, bias=config.bias)
        self.lm_head = load_head(weights, self.wte, config, embedding_name="wte")

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        x = ops.add(ops.embed(self.wte, batch.token_ids), ops.embed(self.wpe, batch.positions))
        hidden = self.ln_f(ops, run_layers(self.layers, ops, x, batch, cache))
        return hidden, ops.linear(hidden, self.lm_head)
