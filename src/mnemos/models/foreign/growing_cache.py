"""Cache tensors with room to grow: what a module appends to its cache is written there, and nothing is copied.

Modules append a step's keys and values with torch.cat, which copies all that is cached. The engine hands them tensors
that answer to it: where such a tensor is continued at its own end, the new part is written into the room after it and
the longer view returned. Attention of one token over such tensors is done by the native core, where it can. Everything
else is done as with any tensor.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mnemos.models.foreign.native_steps import NativeOperators, copy_position

LEAST_ROOM = 128  # positions
LINE = 64  # bytes of memory that the processor takes at once
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_ATTENTION = torch.nn.functional.scaled_dot_product_attention


class Buffer:
    """Memory for one cache tensor, whose first `filled` positions along `axis` are written.

    memory: as `start`, longer along `axis`. native: what computes attention over it, where it can; None: PyTorch does.
    """

    def __init__(self, start: Tensor, axis: int, memory: Tensor, native: NativeOperators | None = None) -> None:
        self.axis = axis
        self.native = native if start.dtype is torch.float32 else None
        self.filled = start.shape[axis]
        self._take(memory)
        memory.narrow(axis, 0, self.filled).copy_(start)
        self.single = memory.narrow(axis, 0, 1).shape  # of one position

    def _take(self, memory: Tensor) -> None:
        self.memory, self.room = memory, memory.shape[self.axis]
        # (address of the first position, bytes to the next, floats to the next batch, to the next head), where the
        # native core can write positions.
        self._place: tuple[int, int, int, int] | None = None
        if self.native is not None and self.axis == 2 and memory.dim() == 4 and memory.is_cpu:
            batch, head, position, value = memory.stride()
            if value == 1:
                self._place = (memory.data_ptr(), memory.element_size() * position, batch, head)

    def takes(self, new: Tensor) -> bool:
        """Whether `new` can be written after what is there."""
        single, shape, axis, memory = self.single, new.shape, self.axis, self.memory
        fits = shape == single or (
            len(shape) == len(single) and shape[:axis] == single[:axis] and shape[axis + 1 :] == single[axis + 1 :]
        )
        return fits and new.dtype is memory.dtype and new.device == memory.device

    def append(self, new: Tensor) -> Tensor:
        """All that is written, with `new` at its end."""
        axis, filled, count = self.axis, self.filled, new.shape[self.axis]
        end = filled + count
        if end > self.room:
            longer = self.memory.new_empty(_roomy(self.view(), axis, count))
            longer.narrow(axis, 0, filled).copy_(self.view())
            self._take(longer)
        place = self._place
        if place is None or not copy_position(new, (place[0] + filled * place[1], place[2], place[3])):
            self.memory.narrow(axis, filled, count).copy_(new)
        self.filled = end
        return self.view() if self.native is None else GrowingTensor.of(self)

    def view(self) -> Tensor:
        return self.memory.narrow(self.axis, 0, self.filled)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is just what is written here."""
        own = self.view()
        return tensor.data_ptr() == own.data_ptr() and tensor.shape == own.shape and tensor.stride() == own.stride()


class GrowingTensor(Tensor):
    """The contents of a buffer, as a module gets them."""

    buffer: Buffer
    length: int

    @classmethod
    def of(cls, buffer: Buffer) -> GrowingTensor:
        tensor: Any = buffer.view().as_subclass(cls)
        tensor.buffer, tensor.length = buffer, buffer.filled
        return tensor  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _JOINS and (parts := _continued(*args, **(kwargs or {}))) is not None:
            return parts[0].buffer.append(parts[1])
        with torch._C.DisableTorchFunctionSubclass():
            if func is _ATTENTION and (attended := _attended(*args, **(kwargs or {}))) is not None:
                return attended
            return func(*args, **(kwargs or {}))


def _continued(tensors: Any, dim: int = 0, **others: Any) -> tuple[GrowingTensor, Tensor] | None:
    """(what is continued, by what), if a call of torch.cat does just that; None if it does anything else."""
    if others or len(tensors) != 2:
        return None
    old, new = tensors
    if type(old) is not GrowingTensor or type(new) is not Tensor:
        return None
    buffer = old.buffer
    fits = (
        dim in (buffer.axis, buffer.axis - len(buffer.single))
        and old.length == buffer.filled  # nobody else has continued it
        and buffer.takes(new)
    )
    return (old, new) if fits else None


def _attended(query: Any = None, key: Any = None, value: Any = None, *rest: Any, **others: Any) -> Tensor | None:
    """Attention over two buffers by the native core; None if it is not of the kind that it does."""
    if (
        type(query) is not Tensor
        or type(key) is not GrowingTensor
        or type(value) is not GrowingTensor
        or key.buffer.native is None
    ):
        return None
    return key.buffer.native.attend(query, key, value, *rest, **others)


def make_room(
    leaves: list[Tensor], axes: list[int], buffers: list[Buffer], count: int, native: NativeOperators | None = None
) -> tuple[list[Tensor], list[Buffer]]:
    """Leaves of a cache as growing tensors with room for `count` more positions, and their buffers.

    axes: of time; buffers: those of the step before, or none.
    """
    made: list[Buffer | None] = list(buffers) if buffers else [None] * len(leaves)
    grown: list[Tensor | None] = []
    for leaf, buffer in zip(leaves, made, strict=True):
        if buffer is None or buffer.filled + count > buffer.room:
            grown.append(None)
        elif type(leaf) is GrowingTensor and leaf.buffer is buffer and leaf.length == buffer.filled:
            grown.append(leaf)
        else:  # if it is not there, the module did something else with it
            grown.append(GrowingTensor.of(buffer) if buffer.holds(leaf) else None)
    missing = [index for index, leaf in enumerate(grown) if leaf is None]
    if not missing:
        return cast(list[Tensor], grown), buffers
    shapes = [_roomy(leaves[index], axes[index], count) for index in missing]
    for index, memory in zip(missing, _memory([leaves[index] for index in missing], shapes), strict=True):
        buffer = made[index] = Buffer(leaves[index], axes[index], memory, native)
        grown[index] = GrowingTensor.of(buffer)
    return cast(list[Tensor], grown), cast(list[Buffer], made)


def _roomy(start: Tensor, axis: int, count: int) -> list[int]:
    """The shape of `start` with room for `count` more positions and then some."""
    needed = start.shape[axis] + count
    shape = list(start.shape)
    shape[axis] = needed + max(LEAST_ROOM, needed // 2)
    return shape


def _memory(like: list[Tensor], shapes: list[list[int]]) -> list[Tensor]:
    """Tensors of these shapes; on a CPU in one piece of memory from NumPy, which asks for large pages."""
    if any(tensor.device.type != "cpu" for tensor in like):
        return [tensor.new_empty(shape) for tensor, shape in zip(like, shapes, strict=True)]
    sizes = [
        -(-math.prod(shape) * tensor.element_size() // LINE) * LINE for tensor, shape in zip(like, shapes, strict=True)
    ]
    pieces = torch.split(torch.from_numpy(np.empty(sum(sizes), dtype=np.uint8)), sizes)
    return [
        piece[: math.prod(shape) * tensor.element_size()].view(tensor.dtype).view(shape)
        for piece, tensor, shape in zip(pieces, like, shapes, strict=True)
    ]
