"""Zeros that stay zero while a module is trained.

A layer's mask is held beside its weight, which remains an ordinary parameter under its own name. Its gradient is
masked, and whatever an optimizer, a momentum from before or a loaded state makes of the zeros is undone before the
layer is next used or saved.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mnemos.compress.modules.layers import is_transposed

_MASK, _HOOKS, _SEEN = "pruning_mask", "_pruning_hooks", "_pruning_version"


def hold_zeros(layer: nn.Module, mask: Tensor) -> None:
    """From now on the weights of a layer where `mask` (out, in) is False are zero, whatever trains them."""
    release_zeros(layer)
    held: Any = layer
    layer.register_buffer(_MASK, mask.T.contiguous() if is_transposed(layer) else mask, persistent=False)
    setattr(layer, _SEEN, -1)
    _restore(layer)
    hooks = [layer.register_forward_pre_hook(_before_use), held.register_state_dict_pre_hook(_before_saving)]
    if held.weight.requires_grad:
        hooks.append(held.weight.register_hook(_MaskedGradient(layer)))
    setattr(layer, _HOOKS, hooks)


def release_zeros(layer: nn.Module) -> None:
    """Ends that; the weights stay as they are, zeros included."""
    if not is_held(layer):
        return
    _restore(layer)
    for hook in getattr(layer, _HOOKS):
        hook.remove()
    for name in (_MASK, _HOOKS, _SEEN):
        delattr(layer, name)


def is_held(layer: nn.Module) -> bool:
    """Whether a layer has a mask."""
    return _MASK in layer._buffers


def mask_held(layer: nn.Module) -> Tensor:
    """A layer's mask as (out, in)."""
    mask = cast(Tensor, layer._buffers[_MASK])
    return mask.T if is_transposed(layer) else mask


class _MaskedGradient:
    """A gradient without its entries for weights that are held at zero."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, gradient: Tensor) -> Tensor:
        mask = self.layer._buffers.get(_MASK)
        return gradient if mask is None else gradient * mask


def _restore(layer: nn.Module) -> None:
    weight, mask = cast(Tensor, layer.weight), cast(Tensor, layer._buffers[_MASK])
    with torch.no_grad():
        weight.mul_(mask)
    setattr(layer, _SEEN, weight._version)


def _before_use(layer: nn.Module, inputs: Any) -> None:
    # Only after a change: between two calls and their gradients, the weight must not be written to.
    if cast(Tensor, layer.weight)._version != getattr(layer, _SEEN):
        _restore(layer)


def _before_saving(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    _restore(layer)
