"""Memory-augmented models as GGUF files, which only Mnemos reads, and the models that they are without their memory."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from mnemos.errors import ConfigError, UnsupportedError
from mnemos.formats.checkpoint import Checkpoint
from mnemos.formats.memory_checkpoint import BASE
from mnemos.models.architectures.memory_adapter import merged
from mnemos.models.architectures.memory_transformer import read_config
from mnemos.models.conversion import Entry
from mnemos.models.fields import Fields
from mnemos.models.load import OWN_FORM_KEY, open_architecture
from mnemos.models.memory_transformer.config import Config
from mnemos.models.weights import HARMLESS, Weights
from mnemos.ops.numpy import NumpyOps

# Parts of the names of memory's tensors in a `MemoryTransformer`.
_MEMORY = ("memory_bank", "memory_attn", "memory_layernorm", "post_memory_mlp", "router")


def has_memory(checkpoint: Checkpoint) -> bool:
    """Whether it is a memory-augmented model."""
    return "memory_config" in checkpoint.metadata


def memory_gguf_form(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The metadata, without a tokenizer, and the tensors of a GGUF file that only Mnemos reads.

    Names, shapes and types are the checkpoint's own, and so is what it says of itself, as JSON under one key.
    """
    read = open_architecture(checkpoint)
    patterns = (*HARMLESS, *read.ignored)
    tensors = {
        name: Entry.of_tensor(name, tensor)
        for name, tensor in checkpoint.tensors.items()
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    metadata = {
        "general.architecture": type(read).__module__.rpartition(".")[2],
        "general.type": "model",
        "general.name": checkpoint.folder.resolve().name,
        OWN_FORM_KEY: json.dumps(dict(checkpoint.metadata), sort_keys=True),
    }
    loaded = {name: entry.load() for name, entry in tensors.items()}  # views
    open_architecture(Checkpoint("gguf", checkpoint.path, metadata, loaded))
    return metadata, tensors


def without_memory(checkpoint: Checkpoint) -> Checkpoint:
    """The base model of a memory-augmented one: an adapter's base with LoRA merged into it, or a Llama.

    ConfigError: it has no memory; UnsupportedError: what is left is no known architecture.
    """
    if OWN_FORM_KEY in checkpoint.metadata:
        raise UnsupportedError(
            f"{checkpoint.path}: memory is dropped from the folder that a model was saved to, not from its GGUF file"
        )
    if not has_memory(checkpoint):
        raise ConfigError(f"{checkpoint.path}: has no memory to drop; leave drop_memory out")
    config = read_config(Fields(checkpoint.path, checkpoint.metadata))
    if "base" in checkpoint.metadata:
        return _base_of_adapter(checkpoint, config)
    return _plain_transformer(checkpoint, config)


def _base_of_adapter(checkpoint: Checkpoint, config: Config) -> Checkpoint:
    tensors = {name.removeprefix(BASE): t for name, t in checkpoint.tensors.items() if name.startswith(BASE)}
    if config.memory.uses_lora:
        tensors = merged(tensors, config.memory, Weights(checkpoint.path, tensors, NumpyOps(), None))
    values = {**checkpoint.metadata["base"], **_special_tokens(checkpoint)}
    return replace(checkpoint, metadata=values, tensors=tensors)


def _plain_transformer(checkpoint: Checkpoint, config: Config) -> Checkpoint:
    model = config.model
    for name, value, needed in (
        ("use_rms_norm", model.use_rms_norm, True),
        ("use_rope", model.use_rope, True),
        ("hidden_activation", model.hidden_activation, "swiglu"),
    ):
        if value != needed:
            raise UnsupportedError(
                f"{checkpoint.path}: {name} is {value!r}, so that no Llama is left without its memory (which needs "
                f"{needed!r}); export it with its memory"
            )
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_dim,
        "intermediate_size": model.intermediate_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tie_embeddings,
        **_special_tokens(checkpoint),
    }
    kept = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not any(part in name for part in _MEMORY) and not fnmatchcase(name, "*.rotary.inv_freq")
    }
    return replace(checkpoint, metadata=values, tensors=kept)


def _special_tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: checkpoint.metadata[name] for name in names if checkpoint.metadata.get(name) is not None}
