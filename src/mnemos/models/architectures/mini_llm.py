"""Mini-LLM's Transformer: Llama in all but its names and its pairing of neighbours in the rotary embedding."""

from __future__ import annotations

from typing import ClassVar

from mnemos.models.architectures.llama import Decoder, Layer, LlamaConfig
from mnemos.models.fields import Fields
from mnemos.models.weights import Weights

_NAMES = (
    ("tok_embeddings.emb.", "embed_tokens."),
    ("tok_embeddings.", "embed_tokens."),
    ("output.", "lm_head."),
    (".attention.wq.", ".self_attn.q_proj."),
    (".attention.wk.", ".self_attn.k_proj."),
    (".attention.wv.", ".self_attn.v_proj."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
)


class MiniLLM(Decoder):
    """Llama's layers, from tensors of other names."""

    ignored: ClassVar[tuple[str, ...]] = ("*rope.freqs_cis",)

    def __init__(self, fields: Fields, weights: Weights) -> None:
        own = Weights(weights.path, {usual_name(name): t for name, t in weights.tensors.items()}, weights.ops, None)
        config = _read(fields, own)
        rope = config.rope.params(config.head_dim)
        super().__init__(own, config, lambda i: Layer(own, i, config, rope, interleaved=True))
        weights.used |= {name for name in weights.tensors if usual_name(name) in own.used}


def _read(fields: Fields, weights: Weights) -> LlamaConfig:
    """Llama's hyperparameters under the names of Mini-LLM's arguments; two are read from the tensors."""
    up = weights.tensors.get("layers.0.mlp.up_proj.weight")
    fields = fields.renamed(
        hidden_size="dim",
        num_hidden_layers="n_layers",
        num_attention_heads="n_heads",
        num_key_value_heads="n_kv_heads",
        max_position_embeddings="max_seq_len",
        rms_norm_eps="norm_eps",
    ).with_defaults({} if up is None else {"intermediate_size": up.rows})
    return LlamaConfig.read(fields, tied=not weights.has("lm_head"))


def usual_name(name: str) -> str:
    """Llama's name for one of Mini-LLM's tensors, such as "layers.3.self_attn.q_proj.weight"."""
    for theirs, usual in _NAMES:
        name = usual + name.removeprefix(theirs) if name.startswith(theirs) else name.replace(theirs, usual)
    return name
