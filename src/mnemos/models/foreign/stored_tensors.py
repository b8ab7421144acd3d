"""Tensors that a module stores during its calls: tables made when first needed, the last activations, caches.

Tensors made in PyTorch's inference mode, which is the fastest one, can never take part in training. So a module that
stores some must not run in it: it may be trained afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 3  # of dicts, lists and tuples within each other
_OWN = ("_parameters", "_modules")

Place = tuple[Any, Any, Tensor]  # a tensor, the dict or list that it is in, and its key there; None for a tuple


class StoredTensors:
    """Compares the tensors that a module holds, parameters aside, with those that it held before its calls."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._places = list(_places(module))

    def any_new(self) -> bool:
        """Whether the module has any that it did not have."""
        before = {id(tensor) for _, _, tensor in self._places}
        return any(id(tensor) not in before for _, _, tensor in _places(self._module))

    def replace_new(self) -> None:
        """After a call in inference mode: puts copies that can be trained with where the call replaced a tensor.

        Such are tables that grow; what a module stores elsewhere, `any_new` finds after its first calls.
        """
        for index, (owner, key, tensor) in enumerate(self._places):
            if owner is None or (now := _get(owner, key)) is tensor:
                continue
            if isinstance(now, Tensor):
                if now.is_inference():
                    owner[key] = now = now.clone()
                self._places[index] = owner, key, now


def move_plain(module: nn.Module, device: torch.device) -> None:
    """Moves the tensors that a module holds as plain attributes, which `module.to` leaves where they are."""
    for member in module.modules():
        attributes = vars(member)
        for name in [name for name in attributes if name not in (*_OWN, "_buffers")]:
            for owner, key, tensor in list(_within(attributes, name, attributes[name], _DEPTH)):
                if owner is not None and tensor.device != device:
                    owner[key] = tensor.to(device)


def _get(owner: Any, key: Any) -> Any:
    if isinstance(owner, dict):
        return owner.get(key)
    return owner[key] if key < len(owner) else None


def _places(module: nn.Module) -> Iterator[Place]:
    for member in module.modules():
        attributes = vars(member)
        for name, value in attributes.items():
            if name not in _OWN:
                yield from _within(attributes, name, value, _DEPTH)


def _within(owner: Any, key: Any, value: Any, depth: int) -> Iterator[Place]:
    if isinstance(value, Tensor):
        yield owner, key, value
    elif depth > 0 and isinstance(value, dict):
        for name, inner in value.items():
            yield from _within(value, name, inner, depth - 1)
    elif depth > 0 and isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _within(value if isinstance(value, list) else None, index, inner, depth - 1)
