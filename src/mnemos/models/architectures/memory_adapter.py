"""A built-in architecture with memory after some of its layers, and with LoRA merged into its weights."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.errors import FormatError
from mnemos.formats.memory_checkpoint import BASE
from mnemos.formats.tensor import Tensor
from mnemos.models.architectures.memory_transformer import read_config
from mnemos.models.blocks import Architecture, DecoderLayer, only
from mnemos.models.fields import Fields
from mnemos.models.memory_transformer.config import MemorySettings
from mnemos.models.memory_transformer.reader import MemoryReader, ReaderLoader
from mnemos.models.registry import find_architecture
from mnemos.models.weights import RMSNorm, Weights
from mnemos.ops.protocol import Array, Matrix, Ops

EPSILON = 1e-6  # of the norm before memory, whatever the config's norm_eps


@dataclass(frozen=True)
class ReadingLayer:
    """h + memory(norm(h)) for the output h of a layer, by which the router chooses too."""

    layer: DecoderLayer
    norm: RMSNorm
    reader: MemoryReader

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        router = self.reader.router
        if router is None or router.pool is None:
            h = self.layer(ops, x, batch, cache, wanted)
            return ops.add(h, self.reader(ops, self.norm(ops, h), h, batch, None))
        states = self.layer(ops, x, batch, cache)  # a pooling router sees all rows
        h = only(ops, states, wanted)
        return ops.add(h, self.reader(ops, self.norm(ops, h), states, batch, wanted))


class MemoryAdapter:
    """The base model, some of whose layers are followed by memory."""

    gguf_names: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = read_config(fields)
        settings, own = config.memory, config.memory.uses_lora
        base_config = fields.get("base")
        base_tensors = {n.removeprefix(BASE): t for n, t in weights.tensors.items() if n.startswith(BASE)}
        if own:
            base_tensors = merged(base_tensors, settings, weights)
        base_weights = Weights(weights.path, base_tensors, weights.ops, None)
        names = [*(base_config.get("architectures") or ()), base_config.get("model_type")]
        architecture = find_architecture([name for name in names if isinstance(name, str)], weights.path)
        base_fields = Fields(fields.path, base_config, context_length=fields.context_length)
        self.base: Architecture = architecture(base_fields, base_weights)
        base_weights.finish(self.base.ignored)
        weights.used |= {name for name in weights.tensors if name.startswith(BASE)}
        self.config = self.base.config
        hidden, heads = self.config.hidden_size, (self.config.num_attention_heads, self.config.num_key_value_heads)
        weights.prefix = ""
        readers = ReaderLoader.of(config, weights, hidden, heads, self.config.num_hidden_layers)
        self.routing = readers.routing
        self.layers = list(self.base.layers)
        for i in readers.layers:
            name = f"memory_adapters.{i}"
            norm = weights.rms_norm(f"{name}.memory_layernorm", hidden, EPSILON)
            self.layers[i] = ReadingLayer(self.layers[i], norm, readers.load(i, f"{name}.memory_attn"))

    @property
    def lm_head(self) -> Matrix:
        """The base model's output projection."""
        return self.base.lm_head

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        base = copy(self.base)
        base.layers = self.layers
        return base.forward(ops, batch, cache)


def merged(tensors: dict[str, Tensor], settings: MemorySettings, weights: Weights) -> dict[str, Tensor]:
    """The tensors with weight + alpha / rank * B A for those that have factors, which are left out."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith((".lora_A", ".lora_B"))}
    _check_targets(tensors, settings, weights)
    for name, b in tensors.items():
        if not name.endswith(".lora_B"):
            continue
        layer = name.removesuffix(".lora_B")
        a, weight = tensors.get(f"{layer}.lora_A"), tensors.get(f"{layer}.weight")
        if a is None or weight is None:
            raise FormatError(
                f"{weights.path}: tensor {BASE + name!r} comes without lora_A and weight; expected all three"
            )
        rows, columns = weight.shape
        if a.shape != (settings.lora_rank, columns) or b.shape != (rows, settings.lora_rank):
            raise FormatError(
                f"{weights.path}: the LoRA factors of {layer!r} have shapes {list(a.shape)} and {list(b.shape)}; "
                f"the config requires {[settings.lora_rank, columns]} and {[rows, settings.lora_rank]}"
            )
        if weights.ops is None:
            continue
        scaling = settings.lora_alpha / settings.lora_rank
        values = weight.dequantize() + scaling * (b.dequantize() @ a.dequantize())
        plain[f"{layer}.weight"] = Tensor.from_array(weight.name, values)
    return plain


def _check_targets(tensors: dict[str, Tensor], settings: MemorySettings, weights: Weights) -> None:
    """FormatError unless the layers that have factors are those that `lora_targets` names, or none: merged weights."""
    if not any(name.endswith(".lora_B") for name in tensors):
        return
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind not in ("weight", "lora_B") or len(tensor.shape) != 2 or layer.endswith("embed_tokens"):
            continue
        named, has = any(target in layer for target in settings.lora_targets), f"{layer}.lora_B" in tensors
        if named != has:
            raise FormatError(
                f"{weights.path}: {layer!r} has {'LoRA factors' if has else 'no LoRA factors'}, and "
                f"memory.lora_targets is {settings.lora_targets}; expected factors of the layers that it names"
            )
