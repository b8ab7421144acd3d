"""Memory transformers: Llama's layers, some of which also attend to a bank of learned vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.blocks import MLP, GatedMLP, load_attention, load_head, only, run_layers
from mnemos.models.config import DecoderConfig, read_shape
from mnemos.models.fields import Fields
from mnemos.models.memory_transformer.config import Config, parse_config
from mnemos.models.memory_transformer.reader import MemoryReader, ReaderLoader
from mnemos.models.rope import read_rope
from mnemos.models.weights import LayerNorm, RMSNorm, Weights
from mnemos.ops.protocol import Array, Ops, RopeParams

Norm = RMSNorm | LayerNorm


@dataclass(frozen=True, kw_only=True)
class MemoryTransformerConfig(DecoderConfig):
    """The hyperparameters as other architectures name them, and the whole config.yaml."""

    memory: Config

    @classmethod
    def read(cls, fields: Fields) -> MemoryTransformerConfig:
        """From a checkpoint's metadata; `fields.context_length` is honoured."""
        config = read_config(fields)
        model = config.model
        values = {
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_dim,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.kv_heads,
            "max_position_embeddings": model.max_seq_len,
            "rope_theta": model.rope_theta,
            "tie_word_embeddings": model.tie_embeddings,
        }
        shape = read_shape(Fields(fields.path, values, context_length=fields.context_length))
        return cls(**shape, memory=config)

    def rope_params(self, fields: Fields) -> RopeParams | None:
        """The rotary embedding; None if positions have none."""
        model = self.memory.model
        if not model.use_rope:
            return None
        values = {"rope_theta": model.rope_theta, "max_position_embeddings": model.max_seq_len}
        chosen = Fields(fields.path, values, context_length=fields.context_length)
        return read_rope(chosen, self.head_dim).params(self.head_dim)


def read_config(fields: Fields) -> Config:
    """The config.yaml that a checkpoint's metadata hold."""
    return parse_config(fields.get("memory_config"), Path(fields.path) / "config.yaml")


class Layer:
    """x + attention(norm(x)), x + memory(norm(x)), x + mlp(norm(x)); in variant B memory and another mlp come last.

    The router sees what enters the layer.
    """

    def __init__(
        self, weights: Weights, i: int, config: MemoryTransformerConfig, rope: RopeParams | None, readers: ReaderLoader
    ) -> None:
        name = f"layers.{i}"
        self.input_norm = load_norm(weights, f"{name}.input_layernorm", config)
        self.attention = load_attention(weights, i, config, rope)
        self.mlp_norm = load_norm(weights, f"{name}.post_attention_layernorm", config)
        self.mlp = load_mlp(weights, f"{name}.mlp", config)
        self.reader: MemoryReader | None = None
        self.last = config.memory.memory.memory_block_variant == "B"
        if i in readers.layers:
            self.memory_norm = load_norm(weights, f"{name}.memory_layernorm", config)
            self.reader = readers.load(i, f"{name}.memory_attn")
            if self.last:
                self.second_norm = load_norm(weights, f"{name}.post_memory_layernorm", config)
                self.second_mlp = load_mlp(weights, f"{name}.post_memory_mlp", config)

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        states, reader = x, self.reader
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = ops.add(only(ops, x, wanted), attended)
        if reader is not None and not self.last:
            x = ops.add(x, reader(ops, self.memory_norm(ops, x), states, batch, wanted))
        x = ops.add(x, self.mlp(ops, self.mlp_norm(ops, x)))
        if reader is not None and self.last:
            x = ops.add(x, reader(ops, self.memory_norm(ops, x), states, batch, wanted))
            x = ops.add(x, self.second_mlp(ops, self.second_norm(ops, x)))
        return x


class MemoryTransformer:
    """Embedding, layers, a last norm and the output projection."""

    gguf_names: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = ("*.rotary.inv_freq",)

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = config = MemoryTransformerConfig.read(fields)
        hidden, heads = config.hidden_size, (config.num_attention_heads, config.memory.model.num_kv_heads)
        rope = config.rope_params(fields)
        readers = ReaderLoader.of(config.memory, weights, hidden, heads, config.num_hidden_layers)
        self.routing = readers.routing
        self.embed_tokens = weights.matrix("embed_tokens", config.vocab_size, hidden)
        self.layers = [Layer(weights, i, config, rope, readers) for i in range(config.num_hidden_layers)]
        self.norm = load_norm(weights, "norm", config)
        self.lm_head = load_head(weights, self.embed_tokens, config)

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        x = ops.embed(self.embed_tokens, batch.token_ids)
        hidden = self.norm(ops, run_layers(self.layers, ops, x, batch, cache))
        return hidden, ops.linear(hidden, self.lm_head)


def load_norm(weights: Weights, name: str, config: MemoryTransformerConfig) -> Norm:
    """The norm `name`, of the config's kind."""
    model = config.memory.model
    load: Callable[..., Norm] = weights.rms_norm if model.use_rms_norm else weights.layer_norm
    return load(name, config.hidden_size, model.norm_eps)


def load_mlp(weights: Weights, name: str, config: MemoryTransformerConfig) -> MLP | GatedMLP:
    """The network `name`: gated for swiglu, plain for any other activation."""
    model, hidden = config.memory.model, config.hidden_size
    inner, activation = model.intermediate_dim, model.hidden_activation
    up = weights.linear(f"{name}.up_proj", inner, hidden)
    down = weights.linear(f"{name}.down_proj", hidden, inner)
    if activation == "swiglu":
        return GatedMLP(weights.linear(f"{name}.gate_proj", inner, hidden), up, down, "silu")
    return MLP(up, down, activation)
