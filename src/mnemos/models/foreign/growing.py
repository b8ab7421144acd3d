"""Cache tensors with room behind them: what a module appends to its cache is written there, and nothing is copied.

Modules append a step's keys and values with torch.cat, which copies all that is cached. The engine hands them tensors
that answer to it: where such a tensor is continued at its own end, the new part is written behind it and the longer
view returned. Everything else that is done with it is done as with any tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mnemos.models.foreign.past import Axes

LEAST_ROOM = 128  # positions
_JOINS = (torch.cat, torch.concat, torch.concatenate)


class Lane:
    """Memory for one cache tensor, whose first `filled` positions along `axis` are written."""

    def __init__(self, start: Tensor, axis: int) -> None:
        self.axis = axis
        self.filled = start.shape[axis]
        self.memory = self._room(start, self.filled)

    def _room(self, start: Tensor, needed: int) -> Tensor:
        shape = list(start.shape)
        shape[self.axis] = needed + max(LEAST_ROOM, needed // 2)
        memory = start.new_empty(shape)
        memory.narrow(self.axis, 0, start.shape[self.axis]).copy_(start)
        return memory

    def append(self, new: Tensor) -> Tensor:
        """All that is written, with `new` at its end."""
        end = self.filled + new.shape[self.axis]
        if end > self.memory.shape[self.axis]:
            self.memory = self._room(self.view(), end)
        self.memory.narrow(self.axis, self.filled, new.shape[self.axis]).copy_(new)
        self.filled = end
        return self.view()

    def view(self) -> Tensor:
        return self.memory.narrow(self.axis, 0, self.filled)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is just what is written here."""
        own = self.view()
        return tensor.data_ptr() == own.data_ptr() and tensor.shape == own.shape and tensor.stride() == own.stride()


class Growing(Tensor):
    """The contents of a lane, as a module gets them."""

    lane: Lane
    length: int

    @classmethod
    def of(cls, lane: Lane) -> Growing:
        tensor: Any = lane.view().as_subclass(cls)
        tensor.lane, tensor.length = lane, lane.filled
        return tensor  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _JOINS and (parts := _continued(*args, **(kwargs or {}))) is not None:
                return parts[0].lane.append(parts[1])
            return func(*args, **(kwargs or {}))


def _continued(tensors: Any, dim: int = 0, **others: Any) -> tuple[Growing, Tensor] | None:
    """(what is continued, by what), if a call of torch.cat does just that; None if it does anything else."""
    if others or len(tensors) != 2 or type(tensors[0]) is not Growing or type(tensors[1]) is not Tensor:
        return None
    old, new = tensors
    axis = old.lane.axis
    fits = (
        dim % old.dim() == axis
        and old.length == old.lane.filled  # nobody else has continued it
        and (new.dtype, new.device, new.dim()) == (old.dtype, old.device, old.dim())
        and all(a == b for i, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)) if i != axis)
    )
    return (old, new) if fits else None


def make_room(leaves: list[Tensor], axes: list[Axes], lanes: list[Lane]) -> tuple[list[Tensor], list[Lane]]:
    """Leaves of a cache as growing tensors, and their lanes; `lanes` are those of the step before, or none."""
    made = list(lanes) or [Lane(leaf, axis.time) for leaf, axis in zip(leaves, axes, strict=True)]
    for index, leaf in enumerate(leaves):
        if not made[index].holds(leaf):  # the module did something else with it
            made[index] = Lane(leaf, axes[index].time)
    return [Growing.of(lane) for lane in made], made
