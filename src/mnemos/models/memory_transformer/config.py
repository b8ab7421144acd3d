"""The config.yaml of a memory-augmented transformer: its fields, their rules, and what follows from them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from mnemos.errors import ConfigError, FormatError
from mnemos.formats.yaml_file import read_yaml
from mnemos.rules import FLAG, Rule, hint, one_of, real, several, text, whole

STRATEGIES = ("sequence", "sequence-rolling", "rolling", "hybrid", "token")
SECTIONS = ("model", "memory", "training")
_COUNT = whole(1)
_NATURAL = whole(0)
_SHARE = real(0, 1, open_high=True)
_POSITIVE = real(0, 1e12, open_low=True)
_AMOUNT = real(0, 1e12)
_NAME = text(4096)
_BITS = Rule(
    lambda value: value if type(value) is int and value in (4, 8) else None, "4 or 8", "integer", low=4, high=8
)
Section = TypeVar("Section", bound="ModelConfig | MemorySettings")


def _row(rule: Rule, default: Any, *, optional: bool = False) -> Any:
    """A field with its rule; `optional`: null is allowed."""
    return field(default=default, metadata={"rule": rule, "optional": optional})


@dataclass
class ModelConfig:
    """The section `model`: the transformer itself. The names are the file's."""

    hidden_dim: int = _row(_COUNT, 768)
    num_heads: int = _row(_COUNT, 12)
    num_kv_heads: int | None = _row(_COUNT, None, optional=True)
    num_layers: int = _row(_COUNT, 12)
    intermediate_dim: int = _row(_COUNT, 3072)
    vocab_size: int = _row(_COUNT, 32000)
    max_seq_len: int = _row(_COUNT, 8192)
    max_position_embeddings: int | None = _row(_COUNT, None, optional=True)
    tokenizer_name: str | None = _row(_NAME, None, optional=True)
    chat_template: str | None = _row(text(10**7), None, optional=True)
    bos_token_id: int | None = _row(_NATURAL, None, optional=True)
    eos_token_id: int | None = _row(_NATURAL, None, optional=True)
    pad_token_id: int | None = _row(_NATURAL, None, optional=True)
    use_rope: bool = _row(FLAG, True)
    rope_theta: float = _row(_POSITIVE, 10000.0)
    dropout: float = _row(_SHARE, 0.0)
    attention_dropout: float = _row(_SHARE, 0.0)
    hidden_activation: str = _row(one_of("swiglu", "silu", "relu", "gelu", "sigmoid", "tanh"), "swiglu")
    initializer_range: float = _row(_AMOUNT, 0.02)
    self_attn_wo_init_std: float | None = _row(_AMOUNT, None, optional=True)
    mlp_down_proj_init_std: float | None = _row(_AMOUNT, None, optional=True)
    norm_eps: float = _row(_POSITIVE, 1e-6)
    use_rms_norm: bool = _row(FLAG, True)
    base_model_name: str | None = _row(_NAME, None, optional=True)
    freeze_base_model: bool = _row(FLAG, True)
    use_flash_attention: bool = _row(FLAG, True)
    tie_embeddings: bool = _row(FLAG, True)

    def check(self) -> None:
        """Makes the two lengths one. ConfigError for values that do not fit each other."""
        if self.max_position_embeddings is not None:
            self.max_seq_len = self.max_position_embeddings
        self.max_position_embeddings = self.max_seq_len
        if self.base_model_name is not None:
            return  # the base model's own config has the shape
        if self.hidden_dim % self.num_heads:
            raise ConfigError(f"model.num_heads is {self.num_heads}; it must divide hidden_dim, {self.hidden_dim}")
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"model.num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}")
        if self.use_rope and self.hidden_dim // self.num_heads % 2:
            size = self.hidden_dim // self.num_heads
            raise ConfigError(
                f"model.num_heads is {self.num_heads}; a rotary embedding needs even heads, not of {size}"
            )

    @property
    def kv_heads(self) -> int:
        """Key/value heads of self-attention."""
        return self.num_kv_heads or self.num_heads


_STRATEGY = Rule(
    lambda value: value.replace("_", "-") if isinstance(value, str) and value.replace("_", "-") in STRATEGIES else None,
    f"one of {', '.join(STRATEGIES)}",
    "name",
    names=STRATEGIES,
)


@dataclass
class MemorySettings:
    """The section `memory`: banks, the layers that read them, chapters and their routing, LoRA."""

    vanilla_mode: bool = _row(FLAG, False)
    use_memory_adapter: bool = _row(FLAG, True)
    num_memory_tokens: int = _row(_COUNT, 1024)
    memory_dim: int | None = _row(_COUNT, None, optional=True)
    memory_num_heads: int | None = _row(_COUNT, None, optional=True)
    memory_num_kv_heads: int | None = _row(_COUNT, None, optional=True)
    memory_layer_placement: str = _row(one_of("all", "first_k", "last_k", "every_n", "custom", "none"), "all")
    memory_layer_k: int = _row(_NATURAL, 5)
    memory_layer_n: int = _row(_COUNT, 3)
    memory_layer_indices: list[int] | None = field(
        default=None, metadata={"rule": several(whole(-(2**31)), 100_000, single=False), "optional": True}
    )
    memory_sharing: str = _row(one_of("shared", "per_layer", "every_k_layers"), "shared")
    memory_sharing_k: int = _row(_COUNT, 2)
    memory_block_variant: str = _row(one_of("A", "B"), "A")
    memory_dropout: float | None = _row(_SHARE, None, optional=True)
    use_low_rank_memory: bool = _row(FLAG, False)
    memory_rank: int = _row(_COUNT, 64)
    low_rank_mode: str = _row(one_of("factorized", "reduced_dim"), "factorized")
    use_low_rank_projections: bool = _row(FLAG, False)
    projection_rank: int = _row(_COUNT, 64)
    use_chapters: bool = _row(FLAG, False)
    num_chapters: int = _row(_COUNT, 100)
    top_k_chapters: int = _row(_COUNT, 20)
    num_shared_chapters: int = _row(_NATURAL, 0)
    routed_scaling_factor: float = _row(_AMOUNT, 1.0)
    normalize_shared_routed_before_mixing: bool = _row(FLAG, False)
    shared_routed_norm_type: str = _row(one_of("rms", "layernorm"), "rms")
    shared_routed_norm_eps: float = _row(_POSITIVE, 1e-6)
    routing_strategy_train: str = _row(_STRATEGY, "sequence")
    routing_strategy_inference: str = _row(_STRATEGY, "sequence")
    routing_window_size: int = _row(_COUNT, 128)
    token_routing_kernel_version: str = _row(one_of("v1", "v2", "v3", "v4", "v5"), "v2")
    use_load_balance_loss: bool = _row(FLAG, True)
    load_balance_coefficient: float = _row(_AMOUNT, 0.01)
    use_auxiliary_loss: bool = _row(FLAG, False)
    auxiliary_loss_coefficient: float = _row(_AMOUNT, 0.01)
    use_z_loss: bool = _row(FLAG, False)
    z_loss_coefficient: float = _row(_AMOUNT, 0.001)
    memory_gradient_checkpointing: bool = _row(FLAG, True)
    quantize_memory: bool = _row(FLAG, False)
    memory_quant_bits: int = _row(_BITS, 8)
    wo_init_zero: bool = _row(FLAG, True)
    memory_init_std: float = _row(_AMOUNT, 0.02)
    use_lora: bool = _row(FLAG, False)
    use_both_memory_and_lora: bool = _row(FLAG, False)
    lora_rank: int = _row(_COUNT, 16)
    lora_alpha: float = _row(_POSITIVE, 32)
    lora_dropout: float = _row(_SHARE, 0.05)
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"rule": several(_NAME, 1000), "optional": False}
    )

    def check(self) -> None:
        """ConfigError for values that do not fit each other."""
        if self.routing_strategy_train in ("rolling", "hybrid"):
            raise ConfigError(
                f"memory.routing_strategy_train is {self.routing_strategy_train!r}, which follows a text as it is "
                "generated; it must be one of sequence, sequence-rolling, token"
            )
        if self.memory_layer_placement == "custom" and self.memory_layer_indices is None:
            raise ConfigError("memory.memory_layer_indices is null; placement custom needs a list of layers")
        if not self.use_chapters:
            return
        if self.num_memory_tokens % self.num_chapters:
            raise ConfigError(
                f"memory.num_chapters is {self.num_chapters}; it must divide num_memory_tokens, "
                f"{self.num_memory_tokens}"
            )
        for name in ("top_k_chapters", "num_shared_chapters"):
            if getattr(self, name) > self.num_chapters:
                raise ConfigError(
                    f"memory.{name} is {getattr(self, name)}; it must be at most num_chapters, {self.num_chapters}"
                )

    @property
    def uses_lora(self) -> bool:
        """Whether the base model's projections get low-rank additions."""
        return self.use_lora or self.use_both_memory_and_lora

    @property
    def is_reduced(self) -> bool:
        """Whether banks are narrow and attention takes place at their width (`reduced_dim`)."""
        return self.use_low_rank_memory and self.low_rank_mode == "reduced_dim"

    @property
    def is_factorized(self) -> bool:
        """Whether banks are products of two factors."""
        return self.use_low_rank_memory and self.low_rank_mode == "factorized"

    @property
    def routed(self) -> int:
        """How many chapters are routed to."""
        return min(self.top_k_chapters, self.num_chapters - self.num_shared_chapters)

    @property
    def normalizes(self) -> bool:
        """Whether memory vectors are normalized; only where shared and routed ones meet."""
        both = self.use_chapters and self.num_shared_chapters > 0 and self.routed > 0
        return both and self.normalize_shared_routed_before_mixing

    def memory_layers(self, layers: int) -> list[int]:
        """The layers of a model with `layers` that read a bank, as the file lists them: duplicates count for banks."""
        if self.vanilla_mode or not self.use_memory_adapter:
            return []
        match self.memory_layer_placement:
            case "all":
                return list(range(layers))
            case "first_k":
                return list(range(min(self.memory_layer_k, layers)))
            case "last_k":
                return list(range(layers - min(self.memory_layer_k, layers), layers))
            case "every_n":
                return list(range(0, layers, self.memory_layer_n))
            case "custom":
                return sorted(i for i in self.memory_layer_indices or () if 0 <= i < layers)
        return []

    def banks(self, layers: int) -> tuple[dict[int, int], int]:
        """(the bank of each memory layer, the number of banks) of a model with `layers`."""
        reading = self.memory_layers(layers)
        shared = {"shared": max(len(reading), 1), "per_layer": 1, "every_k_layers": self.memory_sharing_k}
        share = shared[self.memory_sharing]
        return {layer: i // share for i, layer in enumerate(reading)}, -(-len(reading) // share)


@dataclass
class Config:
    """A whole config.yaml. `training` is kept as it is, apart from its `mixed_precision`; `path`: the file, if any."""

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemorySettings = field(default_factory=MemorySettings)
    training: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def __post_init__(self) -> None:
        _normalize(self.model, "model")
        _normalize(self.memory, "memory")
        self.check()

    def check(self) -> None:
        """ConfigError for values that do not fit each other."""
        self.model.check()
        self.memory.check()
        if self.model.base_model_name is None:
            self.attention_shape(self.model.num_heads, self.model.num_kv_heads, self.model.hidden_dim)

    @property
    def mixed_precision(self) -> str:
        """The type that an adapter's base model is loaded in: bf16, fp16, or anything else for float32."""
        return str(self.training.get("mixed_precision", "bf16"))

    def attention_shape(self, heads: int, kv_heads: int | None, hidden: int) -> tuple[int, int, int]:
        """(heads, key/value heads, head width) of memory attention; the arguments are those of self-attention.

        ConfigError if they do not divide each other.
        """
        memory = self.memory
        count = memory.memory_num_heads or heads
        kv_count = memory.memory_num_kv_heads or kv_heads or count
        width = memory.memory_rank if memory.is_reduced else hidden
        if width % count:
            raise ConfigError(f"memory.memory_num_heads is {count}; it must divide the attention's width, {width}")
        if count % kv_count:
            raise ConfigError(f"memory.memory_num_kv_heads is {kv_count}; it must divide the {count} memory heads")
        return count, kv_count, width // count

    def bank_width(self, hidden: int) -> int:
        """The width of a memory vector in a model with this hidden size."""
        return self.memory.memory_rank if self.memory.is_reduced else self.memory.memory_dim or hidden

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The three sections as plain values, as in the file."""
        return {
            "model": {f.name: getattr(self.model, f.name) for f in fields(self.model)},
            "memory": {f.name: getattr(self.memory, f.name) for f in fields(self.memory)},
            "training": dict(self.training),
        }


def load_config(path: str | os.PathLike[str]) -> Config:
    """Reads a config.yaml. FormatError: no such file, or not YAML; ConfigError: an unknown field, or a wrong value."""
    path = Path(path)
    return parse_config(read_yaml(path), path)


def parse_config(content: Any, path: Path) -> Config:
    """The config that a file's content says."""
    if not isinstance(content, dict):
        raise FormatError(f"{path}: holds no map; expected the maps model, memory and training")
    for name, value in content.items():
        if name not in SECTIONS:
            raise ConfigError(
                f"{path}: field {name!r} is unknown; {hint(name, ('model', 'memory', 'training'), 'known')}"
            )
        if not isinstance(value, dict | None):
            raise ConfigError(f"{path}: {name} is {value!r}; it must be a map")
    try:
        return Config(
            _section(ModelConfig, content.get("model") or {}, "model"),
            _section(MemorySettings, content.get("memory") or {}, "memory"),
            content.get("training") or {},
            path,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _section(kind: type[Section], values: dict[str, Any], name: str) -> Section:
    known = [f.name for f in fields(kind)]
    if "routing_window_size" in known and "routing_window_size" not in values:  # the routers' classes name it shorter
        values = {"routing_window_size" if key == "window_size" else key: value for key, value in values.items()}
    for key in values:
        if key not in known:
            raise ConfigError(f"{name}.{key} is unknown; {hint(key, known, f'the fields of {name}')}")
    return kind(**values)


def _normalize(section: ModelConfig | MemorySettings, name: str) -> None:
    """Brings every value into its normal form. ConfigError for one that its rule does not allow."""
    for entry in fields(section):
        value = getattr(section, entry.name)
        if value is None and entry.metadata["optional"]:
            continue
        normal = entry.metadata["rule"].apply(f"{name}.{entry.name}", value)
        setattr(section, entry.name, list(normal) if isinstance(normal, tuple) else normal)
