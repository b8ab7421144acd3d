"""A plan for quantizing a model: the type that every tensor gets, how large it becomes and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

from mnemos.compress.mixes import ALIASES, FALLBACKS, MIXES, Mix, Part, Place, is_quantizable, part_of
from mnemos.errors import ConfigError
from mnemos.formats.tensor_types import TensorType
from mnemos.rules import hint


class Described(Protocol):
    """What a plan needs to know of a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> TensorType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


Override = tuple[str, TensorType]  # (regular expression searched for in the tensor's name, type)

_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Row:
    """One tensor of a plan. `reason` says why its type is not the one that the mix gives it; it is empty otherwise."""

    name: str
    shape: tuple[int, ...]
    source: TensorType
    type: TensorType
    reason: str = ""

    @property
    def bytes(self) -> int:
        return self.type.row_bytes(self.shape[-1] if self.shape else 1) * prod(self.shape[:-1])

    @property
    def source_bytes(self) -> int:
        return self.source.row_bytes(self.shape[-1] if self.shape else 1) * prod(self.shape[:-1])

    @property
    def changes(self) -> bool:
        return self.type is not self.source


def mix_named(name: str) -> tuple[str, Mix]:
    """The mix of that name, in any case, and its proper name. ConfigError lists the names there are."""
    known = ALIASES.get(name.lower(), name.lower())
    if known not in MIXES:
        raise ConfigError(f"type is {name!r}; {hint(name.lower(), MIXES, 'the types')}")
    return known, MIXES[known]


def override_of(text: str) -> Override:
    """PATTERN=TYPE, as on the command line: a regular expression and a storage type."""
    pattern, equals, type_name = text.rpartition("=")
    names = [
        t.name.lower() for t in TensorType if t.is_quantized or t in (TensorType.F16, TensorType.BF16, TensorType.F32)
    ]
    if not equals or not pattern:
        raise ConfigError(f"tensor override is {text!r}; expected PATTERN=TYPE, such as 'ffn_down=q6_k'")
    if type_name.lower() not in names:
        raise ConfigError(f"type in {text!r} is {type_name!r}; {hint(type_name.lower(), names, 'the storage types')}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"pattern in {text!r} is no regular expression: {error}") from None
    return pattern, TensorType[type_name.upper()]


def plan(
    tensors: Mapping[str, Described],
    metadata: Mapping[str, Any],
    mix: Mix,
    *,
    calibrated: bool = False,
    overrides: Sequence[Override] = (),
) -> list[Row]:
    """What each tensor of a GGUF model becomes, in the file's order.

    tensors, metadata  of the model, by GGUF's names
    calibrated         whether there is an importance matrix, with which some mixes choose differently
    overrides          the first whose pattern is found in a tensor's name decides its type, if it is a matrix

    ConfigError for an override that matches no matrix, or whose type's block does not divide the rows of one.
    """
    places = _places(tensors, metadata, calibrated)
    unused = set(overrides)
    rows = []
    for name, tensor in tensors.items():
        chosen = next((o for o in overrides if re.search(o[0], name)), None) if tensor.rows > 1 else None
        if chosen is not None:
            unused.discard(chosen)
            rows.append(_overridden(tensor, chosen))
        elif is_quantizable(name, tensor.shape):
            rows.append(_by_mix(tensor, mix.type_for(places[name], tensor.columns)))
        else:
            rows.append(Row(name, tensor.shape, tensor.type, tensor.type))
    if unused:
        pattern, type_ = sorted(unused)[0]
        raise ConfigError(
            f"override {pattern}={type_.name.lower()} matches no matrix; names are like {_example(tensors)}"
        )
    return rows


def _example(tensors: Mapping[str, Described]) -> str:
    return next((repr(name) for name in reversed(list(tensors)) if tensors[name].rows > 1), "'blk.0.ffn_up.weight'")


def _overridden(tensor: Described, override: Override) -> Row:
    pattern, type_ = override
    if tensor.columns % type_.block[0]:
        raise ConfigError(
            f"override {pattern}={type_.name.lower()} matches {tensor.name} with rows of {tensor.columns} values; "
            f"{type_.name} needs a multiple of {type_.block[0]}"
        )
    return Row(tensor.name, tensor.shape, tensor.type, type_, "by override")


def _by_mix(tensor: Described, wanted: TensorType) -> Row:
    block = wanted.block[0]
    if tensor.columns % block == 0:
        return Row(tensor.name, tensor.shape, tensor.type, wanted)
    instead = FALLBACKS.get(wanted, TensorType.F16)
    if tensor.columns % instead.block[0]:
        instead = TensorType.F16
    reason = f"{wanted.name} needs rows of a multiple of {block} values, these have {tensor.columns}"
    return Row(tensor.name, tensor.shape, tensor.type, instead, reason)


def _places(tensors: Mapping[str, Described], metadata: Mapping[str, Any], calibrated: bool) -> dict[str, Place]:
    architecture = metadata.get("general.architecture", "")
    layers = _first(metadata.get(f"{architecture}.block_count"), 0)
    experts = _first(metadata.get(f"{architecture}.expert_count"), 0)
    heads = _first(metadata.get(f"{architecture}.attention.head_count"), 1)
    kv_heads = _first(metadata.get(f"{architecture}.attention.head_count_kv"), heads)
    with_values = sorted({_layer(name) for name in tensors if part_of(name) is Part.VALUES})
    with_down = sorted({_layer(name) for name in tensors if part_of(name) is Part.DOWN})
    tied = "output.weight" not in tensors
    places = {}
    for name in tensors:
        part, layer = part_of(name), _layer(name)
        rank, ranks = layer, layers
        if part is Part.VALUES:
            rank, ranks = with_values.index(layer), len(with_values)
        elif part is Part.DOWN and experts <= 1:
            rank = with_down.index(layer)
        elif part is Part.EMBEDDING:
            part = Part.OUTPUT if tied else Part.OTHER  # an embedding that is also the output gets the output's type
        places[name] = Place(part, rank, ranks, heads >= 4 * max(kv_heads, 1), experts, calibrated)
    return places


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else 0


def _first(value: Any, default: int) -> int:
    """A metadata integer; of a list with one a layer, the first."""
    if value is None:
        return default
    return int(value[0]) if hasattr(value, "__len__") else int(value)
