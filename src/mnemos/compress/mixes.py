"""The mixes of storage types that llama.cpp's quantizer offers, by its names: which tensor gets which type.

Most tensors get a mix's base type. Those whose errors cost most get a better one: the output, the values of attention,
what leads back into the residual stream, and the first and last layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from mnemos.formats.tensor_types import TensorType as T


class Part(Enum):
    """What a matrix of a transformer does, by its name in GGUF."""

    OUTPUT = r"output\.weight"
    EMBEDDING = r"(per_layer_)?token_embd\.weight"
    VALUES = r".*(attn_qkv|attn_kv_b|attn_v)\.weight"
    KEYS = r".*attn_k\.weight"
    ATTENTION_OUTPUT = r".*attn_output\.weight"
    DOWN = r".*ffn_down.*"
    OTHER = r".*"


@dataclass(frozen=True)
class Place:
    """Where a tensor stands.

    rank        how many layers before this one have such a tensor (of mixtures of experts: the layer)
    ranks       how many layers have one (of `DOWN`: all layers)
    grouped     whether at least four query heads share a key head
    experts     experts of a layer, 0 or 1 without
    calibrated  whether there is an importance matrix
    """

    part: Part
    rank: int
    ranks: int
    grouped: bool
    experts: int
    calibrated: bool

    @property
    def sensitive(self) -> bool:
        """In the first or last eighth of the layers, or the last of every three between."""
        eighth = self.ranks // 8
        return self.rank < eighth or self.rank >= 7 * self.ranks // 8 or (self.rank - eighth) % 3 == 2

    def among_first(self, share: int) -> bool:
        return self.rank < self.ranks // share


Choice = Callable[[Place], T | None]  # None: the base type


@dataclass(frozen=True)
class Mix:
    """A mix: its number in `general.file_type`, its base type, and the types of some parts."""

    number: int
    base: T
    parts: Mapping[Part, Choice] = field(default_factory=dict)
    # With eight experts a layer, attention is so small beside them that its output gets Q5_K.
    better_with_eight_experts: bool = False

    def type_for(self, place: Place, columns: int) -> T:
        """The type that the mix wants for a tensor with rows of `columns`, which may not be a multiple of its block."""
        if not self.base.is_quantized:
            return self.base
        if place.part is Part.OUTPUT:
            return T.Q8_0 if self.base is T.Q8_0 or columns % self.base.block[0] else T.Q6_K
        if place.experts == 8:
            if place.part in (Part.VALUES, Part.KEYS):
                return T.Q8_0
            if place.part is Part.ATTENTION_OUTPUT:
                return T.Q5_K if self.better_with_eight_experts else self.base
        choice = self.parts.get(place.part)
        chosen = (choice(place) if choice else None) or self.base
        # Models of 70 billion weights: eight query heads share a key head, so these matrices are small.
        large = place.part is Part.VALUES and place.ranks == 80 and place.grouped
        return T.Q5_K if large and chosen in (T.Q3_K, T.Q4_K) else chosen


def _always(type_: T) -> Choice:
    return lambda place: type_


def _where_sensitive(type_: T) -> Choice:
    return lambda place: type_ if place.sensitive else None


def _grouped(type_: T, otherwise: T | None = None) -> Choice:
    return lambda place: type_ if place.grouped else otherwise


def _first_layers(count: int, type_: T, otherwise: T | None = None) -> Choice:
    return lambda place: type_ if place.rank < count else otherwise


def _first_share(share: int, type_: T, otherwise: T | None = None, calibrated: bool | None = None) -> Choice:
    def choose(place: Place) -> T | None:
        concerned = calibrated is None or place.calibrated is calibrated
        return type_ if concerned and place.among_first(share) else otherwise

    return choose


_IQ4: dict[Part, Choice] = {
    Part.VALUES: _grouped(T.Q5_K),
    Part.DOWN: _first_share(8, T.Q5_K, calibrated=False),
}
MIXES: dict[str, Mix] = {
    "f32": Mix(0, T.F32),
    "f16": Mix(1, T.F16),
    "bf16": Mix(32, T.BF16),
    "q8_0": Mix(7, T.Q8_0),
    "q6_k": Mix(18, T.Q6_K),
    "q5_k_m": Mix(17, T.Q5_K, {Part.VALUES: _where_sensitive(T.Q6_K), Part.DOWN: _where_sensitive(T.Q6_K)}),
    "q5_k_s": Mix(16, T.Q5_K),
    "q5_1": Mix(9, T.Q5_1),
    "q5_0": Mix(8, T.Q5_0, {Part.DOWN: _first_share(8, T.Q5_1, calibrated=True)}),
    "q4_k_m": Mix(15, T.Q4_K, {Part.VALUES: _where_sensitive(T.Q6_K), Part.DOWN: _where_sensitive(T.Q6_K)}, True),
    "q4_k_s": Mix(14, T.Q4_K, {Part.VALUES: _first_layers(4, T.Q5_K), Part.DOWN: _first_share(8, T.Q5_K)}, True),
    "q4_1": Mix(3, T.Q4_1),
    "iq4_nl": Mix(25, T.IQ4_NL, _IQ4, True),
    "q4_0": Mix(2, T.Q4_0, {Part.DOWN: _first_share(8, T.Q4_1, calibrated=True)}),
    "iq4_xs": Mix(30, T.IQ4_XS, _IQ4, True),
    "q3_k_l": Mix(13, T.Q3_K, dict.fromkeys((Part.VALUES, Part.DOWN, Part.ATTENTION_OUTPUT), _always(T.Q5_K))),
    "q3_k_m": Mix(
        12,
        T.Q3_K,
        {
            Part.VALUES: _first_layers(2, T.Q5_K, T.Q4_K),
            Part.DOWN: _first_share(16, T.Q5_K, T.Q4_K),
            Part.ATTENTION_OUTPUT: _always(T.Q4_K),
        },
        True,
    ),
    "q3_k_s": Mix(11, T.Q3_K, better_with_eight_experts=True),
    "q2_k": Mix(
        10,
        T.Q2_K,
        {
            Part.VALUES: _grouped(T.Q4_K, T.Q3_K),
            Part.DOWN: _always(T.Q3_K),
            Part.ATTENTION_OUTPUT: _always(T.Q3_K),
        },
        True,
    ),
    "q2_k_s": Mix(21, T.Q2_K, {Part.VALUES: _grouped(T.Q4_K), Part.DOWN: _first_share(8, T.Q4_K)}),
}
ALIASES = {"q5_k": "q5_k_m", "q4_k": "q4_k_m", "q3_k": "q3_k_m"}

# What takes the place of a type whose block does not divide a row, unless the row is no multiple of 32 either.
FALLBACKS = {
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
    T.IQ4_XS: T.IQ4_NL,
}

# Small matrices in which errors cost much, as llama.cpp lists them: norms, gates of experts, convolutions, the small
# matrices of recurrent layers, positions.
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d|shortconv\.conv\.weight"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight|attn_rel_b\.weight"
    r"|^(position_embd|token_types)\.weight"
)


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a mix applies to the tensor: matrices, but not the few that are small and sensitive."""
    matrix = sum(extent > 1 for extent in shape) > 1
    return matrix and name.endswith("weight") and not _KEPT.search(name)


def part_of(name: str) -> Part:
    """The part that a tensor is, by its name in GGUF."""
    return next(part for part in Part if re.fullmatch(part.value, name))
