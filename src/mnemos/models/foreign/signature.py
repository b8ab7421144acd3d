"""What a foreign module's forward takes, by the names that people write."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mnemos.errors import ModelError

MASK_NAMES = ("attention_mask",)
POSITION_NAMES = ("position_ids", "positions", "pos_ids", "position", "pos")
OFFSET_NAMES = (
    "start_pos", "past_length", "offset", "position_offset", "pos_offset", "start_index", "past_len", "cache_len",
)  # fmt: skip
CACHE_POSITION_NAMES = ("input_pos", "cache_position")
CAUSAL_NAMES = ("mask", "causal_mask", "attn_mask", "src_mask", "tgt_mask")  # (time, time): what each position sees
CACHE_FLAGS = ("use_cache", "return_cache", "return_kv_cache", "return_kv", "return_past", "return_state")
PAST_NAMES = (
    "past_key_values",
    "past_kv",
    "past_kvs",
    "past_key_value",
    "cache_params",
    "past",
    "layer_past",
    "kv_cache",
    "kv_caches",
    "cache",
    "caches",
    "state",
    "states",
    "hidden_state",
    "hidden",
    "rnn_state",
    "recurrent_state",
    "recurrent_states",
    "hx",
    "h",
)  # fmt: skip  keys and values, or a recurrent state


@dataclass(frozen=True)
class Signature:
    """The names under which a forward takes what the engine has to say; None where it takes no such thing.

    mask (batch, time): what is text and not padding; causal (time, time): what each position sees; positions (batch,
    time); offset: one number, the position of the first new token of all sequences; cache_positions (time,): where the
    new tokens of all sequences go in a cache; required: the names that have no default; others: those whose meaning is
    unknown and whose default is None.
    """

    ids: str
    by_keyword: bool
    mask: str | None
    causal: str | None
    positions: str | None
    offset: str | None
    cache_positions: str | None
    past: str | None
    use_cache: str | None
    logits_to_keep: bool
    required: frozenset[str]
    others: tuple[str, ...]


def describe(module: nn.Module) -> str:
    """The module's class and its forward's signature, for messages."""
    inner = unwrap(module)
    name = type(module).__name__ if inner is module else f"{type(module).__name__}({type(inner).__name__})"
    return f"{name}.forward{_signature(inner)}"


def unwrap(module: nn.Module) -> nn.Module:
    """The module that says what it takes, inside wrappers that hand on (*args, **kwargs) such as DataParallel."""
    while not any(p.kind in _NAMED for p in _signature(module).parameters.values()):
        children = list(module.children())
        if len(children) != 1:
            break
        module = children[0]
    return module


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are; of one without any, where it says that it is, or where its buffers are."""
    first: torch.Tensor | None = next(module.parameters(), None)
    if first is None:
        said = getattr(module, "device", None)
        if isinstance(said, torch.device):
            return said
        first = next(module.buffers(), None)
    return torch.device("cpu") if first is None else first.device


_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _signature(module: nn.Module) -> inspect.Signature:
    schema: Any = getattr(module.forward, "schema", None)
    if schema is None:
        return inspect.signature(module.forward)
    given = schema.arguments[1:]  # TorchScript keeps no signature, but says as much itself
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    defaults = [one.default_value if one.has_default_value() else empty for one in given]
    return inspect.Signature(
        [inspect.Parameter(one.name, kind, default=value) for one, value in zip(given, defaults, strict=True)]
    )


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of forward, by name; those of the module inside a wrapper that only hands them on."""
    return _signature(unwrap(module)).parameters


def read_signature(module: nn.Module) -> Signature:
    """What module.forward takes, by the names that people write. ModelError: token ids alone are not enough."""
    named = {name: p for name, p in parameters_of(module).items() if p.kind in _NAMED}
    if "input_ids" in named:
        ids = "input_ids"
    elif named:
        ids = next(iter(named))
    else:
        raise ModelError(
            f"{describe(module)} names no argument; expected forward(input_ids, ...) with int64 (batch, time)"
        )

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in named and name != ids), None)

    names = (MASK_NAMES, CAUSAL_NAMES, POSITION_NAMES, OFFSET_NAMES, CACHE_POSITION_NAMES, PAST_NAMES, CACHE_FLAGS)
    known = {ids, "logits_to_keep"}.union(*names)
    required = frozenset(name for name, p in named.items() if p.default is inspect.Parameter.empty)
    unknown = [name for name in named if name in required - known]
    if unknown:
        raise ModelError(
            f"{describe(module)} requires {', '.join(unknown)}, which the engine does not have; "
            f"expected forward(input_ids) with, at most, {', '.join(sorted(known - {ids}))} beside it"
        )
    positions, offset = first(POSITION_NAMES), first(OFFSET_NAMES)
    if positions is not None and offset is None and _is_number(named[positions]):
        positions, offset = None, positions
    return Signature(
        ids=ids,
        by_keyword=ids == "input_ids" or named[ids].kind is inspect.Parameter.KEYWORD_ONLY,
        mask=first(MASK_NAMES),
        causal=first(CAUSAL_NAMES),
        positions=positions,
        offset=offset,
        cache_positions=first(CACHE_POSITION_NAMES),
        past=first(PAST_NAMES),
        use_cache=first(CACHE_FLAGS),
        logits_to_keep="logits_to_keep" in named,
        required=required,
        others=tuple(name for name, p in named.items() if p.default is None and name not in known),
    )


def _is_number(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is annotated as an int, or has one as its default."""
    return parameter.annotation in (int, "int") or type(parameter.default) is int
