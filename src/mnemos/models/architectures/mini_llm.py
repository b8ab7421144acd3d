"""Mini-LLM's Transformer: Llama in all but its names and its pairing of neighbours in the rotary embedding."""

from __future__ import annotations

from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.architectures.llama import LlamaConfig, load_llama
from mnemos.models.fields import Fields
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops

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


class MiniLLM:
    gguf_names: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = ("*rope.freqs_cis",)

    def __init__(self, fields: Fields, weights: Weights) -> None:
        renamed = {_usual(name): tensor for name, tensor in weights.tensors.items()}
        up = renamed.get("layers.0.mlp.up_proj.weight")
        fields = fields.renamed(
            hidden_size="dim",
            num_hidden_layers="n_layers",
            num_attention_heads="n_heads",
            num_key_value_heads="n_kv_heads",
            max_position_embeddings="max_seq_len",
            rms_norm_eps="norm_eps",
        ).with_defaults({} if up is None else {"intermediate_size": up.rows})
        tied = "lm_head.weight" not in renamed
        config = LlamaConfig.read(fields, tied=tied)
        own = Weights(weights.path, renamed, weights.ops, None)
        self.config = config
        self.decoder = load_llama(own, config, (True,) * config.num_hidden_layers, neighbours=True)
        weights.used |= {name for name in weights.tensors if _usual(name) in own.used}

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        return self.decoder(ops, batch, cache)


def _usual(name: str) -> str:
    for theirs, usual in _NAMES:
        name = usual + name.removeprefix(theirs) if name.startswith(theirs) else name.replace(theirs, usual)
    return name
