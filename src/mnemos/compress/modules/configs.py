"""What a transformers config says about a module's sizes, kept true when the sizes change.

A folder written by `save_pretrained` is loaded by what its config says, so a module whose config cannot express its new
sizes runs but cannot be loaded again that way; the caller is warned.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

NEURONS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff")
HEADS = ("num_attention_heads", "num_key_value_heads")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def config_of(model: nn.Module) -> Any:
    """The transformers config of a module that is saved and loaded with one, else None."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "to_dict") and hasattr(model, "save_pretrained") else None


def resize_neurons(model: nn.Module, counts: set[int]) -> None:
    """Feed-forward layers have this many neurons now; several numbers if they differ."""
    config = config_of(model)
    if config is None:
        return
    name = next((name for name in NEURONS if hasattr(config, name)), None)
    if name is None or len(counts) > 1:
        _warn(model, f"feed-forward layers of {_listed(counts)} neurons")
    else:
        setattr(config, name, counts.pop())


def resize_heads(model: nn.Module, shares: set[tuple[int, int]]) -> None:
    """Of every `before` groups of heads `after` are left, as (after, before)."""
    config = config_of(model)
    if config is None:
        return
    if getattr(config, "head_dim", None) is None or len(shares) > 1:
        _warn(model, "this number of heads of the size that they had")
        return
    after, before = shares.pop()
    for name in HEADS:
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name) * after // before)


def resize_layers(model: nn.Module, kept: Sequence[int], before: int) -> None:
    """Of `before` layers these are left, by their number."""
    config = config_of(model)
    if config is None:
        return
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, [value[i] for i in kept])
    names = [name for name in LAYERS if hasattr(config, name)]
    for name in names:
        setattr(config, name, len(kept))
    if not names:
        _warn(model, f"{len(kept)} layers")


def _warn(model: nn.Module, what: str) -> None:
    warnings.warn(
        f"the config of {type(model).__name__} cannot express {what}: the module runs, but from_pretrained cannot load "
        "it from a folder; save its state_dict instead",
        stacklevel=4,
    )


def _listed(counts: set[int]) -> str:
    return ", ".join(map(str, sorted(counts)))
