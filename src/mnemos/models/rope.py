"""Rotary position embeddings: the scalings in use, as one table of frequencies each.

All of them are fixed when a model is loaded, for the context length in use, so that a token's rotation never depends
on how long the text later became or on how a prompt was cut:
- dynamic NTK scales its base for the context length in use, not for the text so far. Up to the trained length it is
  the plain embedding; with a longer context it equals the usual form for a text that fills the context.
- LongRoPE uses its short factors when the context length in use is within the trained one, else its long ones. The
  default context of such a model is therefore the trained one; request a longer one with `context_length`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor, log, pi, sqrt

import numpy as np

from mnemos.contract import Floats
from mnemos.errors import ConfigError, FormatError
from mnemos.models.fields import Fields
from mnemos.ops.protocol import RopeParams

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
KINDS_IN_FILES = {kind: kind for kind in KINDS} | {"none": "default", "su": "longrope"}


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one kind of layer. Lengths are positions; betas are rotations over the trained length."""

    theta: float
    rotary_dim: int
    kind: str = "default"
    factor: float = 1.0
    trained_length: int = 0
    context_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    divisors: tuple[float, ...] = ()  # GGUF's rope_freqs: Llama 3's scaling, computed by the converter

    def params(self, head_dim: int) -> RopeParams:
        """The table for heads of `head_dim`."""
        frequencies = self.frequencies()
        if self.divisors:
            frequencies = np.asarray(frequencies / np.asarray(self.divisors, np.float32), np.float32)
        return RopeParams(head_dim, self.rotary_dim, frequencies, self.magnitude)

    def slowest(self, head_dim: int) -> tuple[int, ...]:
        """The half of a head's components that turn slowest, those that do not turn included."""
        params = self.params(head_dim)
        speeds = np.zeros(head_dim)
        speeds[: params.rotary_dim] = np.tile(np.abs(params.frequencies), 2)
        return tuple(sorted(int(i) for i in np.argsort(speeds, kind="stable")[: head_dim // 2]))

    def frequencies(self) -> Floats:
        """Radians per position, (rotary_dim / 2,)."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        plain = np.asarray(1 / np.float32(self._base()) ** exponents, np.float32)
        if self.kind == "linear":
            return np.asarray(plain / np.float32(self.factor), np.float32)
        if self.kind == "yarn":
            return self._yarn(plain)
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "longrope":
            factors = self.short_factors if self.context_length <= self.trained_length else self.long_factors
            return np.asarray(plain / np.asarray(factors, np.float32), np.float32)
        return plain

    def _base(self) -> float:
        """Dynamic NTK: bloc97 and emozilla 2023, as in Peng et al. 2023, arXiv:2309.00071, section 3.3."""
        if self.kind != "dynamic" or self.context_length <= self.trained_length:
            return self.theta
        stretch = self.factor * self.context_length / self.trained_length - (self.factor - 1)
        return float(self.theta * stretch ** (self.rotary_dim / (self.rotary_dim - 2)))

    def _yarn(self, plain: Floats) -> Floats:
        """Peng et al. 2023, arXiv:2309.00071: fast dimensions stay, slow ones are interpolated, with a ramp between."""

        def dimension(rotations: float) -> float:
            return self.rotary_dim * log(self.trained_length / (rotations * 2 * pi)) / (2 * log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = floor(low), ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(len(plain), dtype=np.float32) - low) / np.float32(high - low), 0, 1)
        return np.asarray(plain / np.float32(self.factor) * ramp + plain * (1 - ramp), np.float32)

    def _llama3(self, plain: Floats) -> Floats:
        """Llama 3.1's scaling: wavelengths beyond the trained length are divided by factor, with a smooth ramp."""
        turns = self.trained_length * plain.astype(np.float64) / (2 * pi)
        span = self.high_frequency_factor - self.low_frequency_factor
        keep = np.clip((turns - self.low_frequency_factor) / span, 0, 1)
        return np.asarray(plain / self.factor * (1 - keep) + plain * keep, np.float32)


def read_rope(
    fields: Fields, head_dim: int, *, theta: float = 10000.0, fraction: float = 1.0, layer_type: str = "full_attention"
) -> Rope:
    """The rotary embedding of a config's `rope_parameters`, `rope_scaling`, or GGUF `rope.*` fields.

    theta and fraction (of each head that is rotated) are defaults; layer_type is "full_attention" or
    "sliding_attention" if a config may have an embedding for each.
    """
    positions = fields.size("max_position_embeddings")
    table = _table(fields, layer_type)
    kind = _kind(table)
    rope = Rope(
        theta=table.number("rope_theta", fields.number("rope_theta", theta, above=1.0), above=1.0),
        rotary_dim=_rotary_dim(fields, table, head_dim, fraction),
        kind=kind,
        trained_length=_trained_length(fields, table, positions) if kind != "dynamic" else positions,
        context_length=context_in_use(fields),
    )
    if fields.get("rope_freqs") is not None:
        rope = replace(rope, divisors=fields.numbers("rope_freqs", rope.rotary_dim // 2))
    if kind == "default":
        return rope
    if kind == "dynamic" and rope.rotary_dim < 4:
        raise FormatError(f"{fields.path}: dynamic scaling rotates {rope.rotary_dim} elements; expected at least 4")
    rope = replace(rope, factor=_factor(table, kind, positions / rope.trained_length))
    if kind == "llama3":
        low = table.number("low_freq_factor", 1.0)
        return replace(
            rope, low_frequency_factor=low, high_frequency_factor=table.number("high_freq_factor", above=low)
        )
    if kind == "yarn":
        fast, slow = table.number("beta_fast", 32.0), table.number("beta_slow", 1.0)
        magnitude = _yarn_magnitude(table, rope.factor)
        return replace(rope, beta_fast=fast, beta_slow=slow, truncate=table.flag("truncate", True), magnitude=magnitude)
    if kind == "longrope":
        usual = 1.0 if rope.factor <= 1 else sqrt(1 + log(rope.factor) / log(rope.trained_length))
        short, long = (table.numbers(name, rope.rotary_dim // 2) for name in ("short_factor", "long_factor"))
        magnitude = table.number("attention_factor", usual)
        return replace(rope, magnitude=magnitude, short_factors=short, long_factors=long)
    return rope


def context_in_use(fields: Fields) -> int:
    """The requested context length, else the model's own; ConfigError if the model cannot reach it."""
    positions = fields.size("max_position_embeddings")
    table = _table(fields, "full_attention")
    kind = _kind(table)
    trained = _trained_length(fields, table, positions)
    own = longest = positions
    if kind == "longrope":
        own = min(trained, positions)
    elif kind == "yarn":
        own = longest = max(positions, int(trained * _factor(table, kind, positions / trained)))
    elif kind in ("linear", "dynamic"):
        longest = int(positions * _factor(table, kind, 1.0))
    wanted = fields.context_length
    if wanted is None:
        return own
    if type(wanted) is not int or not 1 <= wanted <= longest:
        raise ConfigError(f"context_length is {wanted}; this model takes 1 to {longest}")
    return wanted


def _table(fields: Fields, layer_type: str | None) -> Fields:
    """The fields of the scaling: a nested object in config.json, the top level in GGUF or if there is none."""
    if fields.is_gguf:
        return fields
    table = fields.table("rope_parameters") or fields.table("rope_scaling")
    if table is None:
        return fields
    return (table.table(layer_type) or table) if layer_type else table


def _kind(table: Fields) -> str:
    name = "type" if table.get("rope_type") is None and table.get("type") is not None else "rope_type"
    kind = table.choice(name, KINDS_IN_FILES, "default")
    # The first Phi-3 files call LongRoPE "yarn".
    return "longrope" if kind == "yarn" and table.get("short_factor") is not None else kind


def _rotary_dim(fields: Fields, table: Fields, head_dim: int, fraction: float) -> int:
    if fields.is_gguf:
        size = fields.size("rotary_dim", head_dim, largest=head_dim)
    else:
        owner = table if table.get("partial_rotary_factor") is not None else fields
        size = int(head_dim * owner.number("partial_rotary_factor", fraction, most=1.0))
    if size < 2 or size % 2:
        raise FormatError(
            f"{fields.path}: {size} elements of each head are rotated; expected an even number of at least 2"
        )
    return size


def _trained_length(fields: Fields, table: Fields, positions: int) -> int:
    """original_max_position_embeddings, at the top level (Phi-3) or with the scaling."""
    name = "original_max_position_embeddings"
    owner = fields if fields.get(name) is not None else table
    return fields.size("max_position_embeddings", least=2) if owner.get(name) is None else owner.size(name, least=2)


def _factor(table: Fields, kind: str, default: float) -> float:
    if kind in ("yarn", "longrope"):
        return table.number("factor", max(default, 1.0), above=0.0)
    return table.number("factor", above=0.0)


def _yarn_magnitude(table: Fields, factor: float) -> float:
    """The attention temperature of YaRN; GGUF files store a multiple of the usual one."""

    if table.is_gguf:
        return yarn_magnitude(factor) * table.number("attention_factor", 1.0)
    if table.get("mscale") and table.get("mscale_all_dim"):
        usual, all_dimensions = (yarn_magnitude(factor, table.number(name)) for name in ("mscale", "mscale_all_dim"))
        return table.number("attention_factor", usual / all_dimensions)
    return table.number("attention_factor", yarn_magnitude(factor))


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies rotated queries and keys by, if a config says nothing else; weight: its `mscale`."""
    return 1.0 if factor <= 1 else 0.1 * weight * log(factor) + 1.0
