"""Checked reading of a model's hyperparameters from any file format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.errors import FormatError, shown
from mnemos.formats.tensor import Tensor

LARGEST = 2**31 - 1  # positions, ids and sizes are 32-bit integers from here on
_MISSING: Any = object()

# Hugging Face's name for a hyperparameter -> its GGUF key after "{architecture}.".
GGUF_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "norm_topk_prob": "expert_weights_norm",
    "use_parallel_residual": "use_parallel_residual",
    "hidden_act": "hidden_activation",
    "rotary_dim": "rope.dimension_count",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
# Hyperparameters that GGUF keeps as tensors.
GGUF_TABLES = {
    "rope_freqs": "rope_freqs.weight",
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
}


@dataclass(frozen=True)
class Fields:
    """Hyperparameters by their Hugging Face names, read from a config.json or from GGUF metadata.

    Every method raises FormatError with the file, the field's name in it, its value and the rule. `keys` translates
    names into the file's own; in GGUF, a name that it lacks is absent. `context_length` is the length that the user
    asked for, None for the model's own.
    """

    path: Path | str
    values: Mapping[str, Any]
    keys: Mapping[str, str] = field(default_factory=dict)
    is_gguf: bool = False
    context_length: int | None = None

    def renamed(self, **names: str) -> Fields:
        """These fields with other names: the config.json's own name for each usual name."""
        return self if self.is_gguf else replace(self, keys={**self.keys, **names})

    def with_defaults(self, defaults: Mapping[str, Any]) -> Fields:
        """These fields with defaults for those that a config.json may leave out."""
        return replace(self, values={**defaults, **self.values})

    def key(self, name: str) -> str:
        """The file's own name for `name`."""
        return self.keys.get(name, name)

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value; null counts as absent."""
        value = None if self.is_gguf and name not in self.keys else self.values.get(self.key(name))
        return default if value is None else value

    def wrong(self, name: str, rule: str) -> FormatError:
        """The error for a field `name` that breaks `rule`."""
        value = self.get(name, _MISSING)
        found = "is absent" if value is _MISSING else f"is {shown(value)}"
        return FormatError(f"{self.path}: field {self.key(name)!r} {found}; expected {rule}")

    def _single(self, name: str, default: Any) -> Any:
        """The raw value; a list that repeats one value for every layer counts as that value."""
        value = self.get(name, default)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            return value[0]
        return value

    def size(self, name: str, default: int | None = None, *, least: int = 1, largest: int = LARGEST) -> int:
        """An integer from `least` to `largest`."""
        value = self._single(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= largest:
            raise self.wrong(name, f"an integer from {least} to {largest}")
        return value

    def number(self, name: str, default: float | None = None, *, above: float = 0.0, most: float = 1e12) -> float:
        """A finite number with above < value <= most."""
        value = self._single(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not isfinite(value)
            or not above < value <= most
        ):
            raise self.wrong(name, f"a number above {above:g}, at most {most:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._single(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, str], default: str | None = None) -> str:
        """The value in `choices` for the field's text."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(name, "one of " + ", ".join(sorted(choices)))
        return choices[value]

    def sizes(self, name: str, count: int | None = None) -> tuple[int, ...]:
        """A list of integers of at least 0, with `count` entries if given; empty if the field is absent."""
        value = self.get(name, ())
        if (
            not isinstance(value, Sequence)
            or isinstance(value, str)
            or not all(type(v) is int and v >= 0 for v in value)
        ):
            raise self.wrong(name, "a list of integers of at least 0")
        if value and count is not None and len(value) != count:
            raise self.wrong(name, f"a list of {count} integers")
        return tuple(value)

    def table(self, name: str) -> Fields | None:
        """The fields of a nested object, None if it is absent or empty."""
        value = self.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Fields(f"{self.path}: {self.key(name)}", value, context_length=self.context_length)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers above 0."""
        values = self.get(name)
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
            raise self.wrong(name, f"a list of {count} numbers")
        if not all(type(v) in (int, float) and 0 < v < inf for v in values):
            raise self.wrong(name, "finite numbers above 0")
        return tuple(float(v) for v in values)


def gguf_fields(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], context_length: int | None
) -> Fields:
    """The hyperparameters of a GGUF file, including those stored as tensors."""
    architecture = metadata["general.architecture"]
    keys = {name: f"{architecture}.{suffix}" for name, suffix in GGUF_KEYS.items()} | GGUF_TABLES
    values = {key: _plain(metadata[key]) for key in keys.values() if key in metadata}
    for key in GGUF_TABLES.values():
        if key in tensors:
            if tensors[key].size > 65536:
                raise FormatError(
                    f"{path}: tensor {key!r} has {tensors[key].size} values; expected one for two elements of a head"
                )
            values[key] = tensors[key].dequantize().reshape(-1).tolist()
    if GGUF_TABLES["long_factor"] in values:
        values.setdefault(keys["rope_type"], "longrope")
    if "token_embd.weight" in tensors:
        values.setdefault(keys["vocab_size"], tensors["token_embd.weight"].rows)
    return Fields(path, values, keys, True, context_length)


def _plain(value: Any) -> Any:
    """A value as in a config.json: GGUF's arrays as lists."""
    return value.tolist() if isinstance(value, np.ndarray) else value
