"""Caches in the styles that people write, seen as a flat list of tensors with a batch and a time axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mnemos.errors import ModelError

HUGGING_FACE_NAMES = ("past_key_values", "cache")  # of arguments that take transformers' Cache objects


class CacheStyle(Protocol):
    """Translates between a module's own cache, `past`, and the flat list of its tensors."""

    def empty(self) -> Any:
        """What the first call of a text gets."""
        ...

    def leaves(self, past: Any) -> list[Tensor]:
        """The tensors of `past`, always in the same order."""
        ...

    def build(self, leaves: list[Tensor], length: int) -> Any:
        """A cache of `length` positions from its tensors."""
        ...

    def replace(self, past: Any, leaves: list[Tensor], length: int) -> Any:
        """`past` with other tensors of the same contents; it may be changed itself."""
        ...


class NestedStyle:
    """A tuple, list or mapping of tensors, nested to any depth; the first call gets none.

    template: such a cache after `length` tokens. A number in it that is just that is taken to be the length;
    `counts` says whether there is one.
    """

    def __init__(self, template: Any, length: int) -> None:
        self.template = template
        self.template_length = length
        self.counts = _holds_number(template, length)

    def empty(self) -> Any:
        return None

    def leaves(self, past: Any) -> list[Tensor]:
        found: list[Tensor] = []
        _collect(past, found)
        return found

    def build(self, leaves: list[Tensor], length: int) -> Any:
        waiting, known = iter(leaves), self.template_length
        return mapped(
            self.template,
            lambda _: next(waiting),
            lambda value: length if type(value) is int and value == known else value,
        )

    def replace(self, past: Any, leaves: list[Tensor], length: int) -> Any:
        return self.build(leaves, length)


class GivenStyle(NestedStyle):
    """A list or mapping that the first call is given empty, and that each call changes in place.

    make: an empty one; template: one after `length` tokens.
    """

    def __init__(self, make: Callable[[], Any], template: Any, length: int) -> None:
        super().__init__(template, length)
        self._make = make

    def empty(self) -> Any:
        return self._make()


def mapped(item: Any, tensor: Callable[[Tensor], Any], other: Callable[[Any], Any] = lambda value: value) -> Any:
    """A tuple, list or mapping of any depth with `tensor` applied to its tensors and `other` to what else it holds."""
    if isinstance(item, Tensor):
        return tensor(item)
    if isinstance(item, (tuple, list)):
        filled = [mapped(value, tensor, other) for value in item]
        if isinstance(item, list):
            return filled
        return type(item)(*filled) if hasattr(item, "_fields") else tuple(filled)
    if isinstance(item, Mapping):
        return {name: mapped(value, tensor, other) for name, value in item.items()}
    return other(item)


def _holds_number(item: Any, number: int) -> bool:
    if isinstance(item, Mapping):
        item = tuple(item.values())
    if isinstance(item, (tuple, list)):
        return any(_holds_number(value, number) for value in item)
    return type(item) is int and item == number


def _collect(item: Any, found: list[Tensor]) -> None:
    if isinstance(item, Tensor):
        found.append(item)
    elif isinstance(item, (tuple, list)):  # before mappings, which are slow to tell
        for value in item:
            _collect(value, found)
    elif isinstance(item, Mapping):
        for value in item.values():
            _collect(value, found)


class HuggingFaceStyle:
    """transformers' Cache objects: every layer a plain growing one, so that any position can be dropped again."""

    def empty(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache()

    def leaves(self, past: Any) -> list[Tensor]:
        if hasattr(past, "layers"):
            found = [tensor for layer in past.layers for tensor in (layer.keys, layer.values)]
            if not all(isinstance(tensor, Tensor) for tensor in found):
                raise ModelError("some of its layers keep no keys and values in transformers' DynamicCache")
            return found
        if not hasattr(past, "key_cache"):
            raise ModelError(f"it returned a {type(past).__name__} for transformers' DynamicCache")
        return [tensor for pair in zip(past.key_cache, past.value_cache, strict=True) for tensor in pair]

    def build(self, leaves: list[Tensor], length: int) -> Any:
        cache = self.empty()
        for layer, (key, value) in enumerate(zip(leaves[::2], leaves[1::2], strict=True)):
            cache.update(key, value, layer)
        return cache

    def replace(self, past: Any, leaves: list[Tensor], length: int) -> Any:
        if not hasattr(past, "layers"):
            past.key_cache, past.value_cache = leaves[::2], leaves[1::2]
            return past
        for layer, key, value in zip(past.layers, leaves[::2], leaves[1::2], strict=True):
            layer.keys, layer.values = key, value
        return past


class AttentionStyle:
    """Modules whose `CachedAttention` layers hold keys and values themselves; `past` is the list of their caches."""

    def __init__(self, module: nn.Module) -> None:
        from mnemos.models.foreign.cached_attention import CachedAttention

        self.layers = [layer for layer in module.modules() if isinstance(layer, CachedAttention)]

    def empty(self) -> Any:
        return None

    def install(self, past: list[tuple[Tensor, Tensor]] | None, real: Tensor | None) -> None:
        for index, layer in enumerate(self.layers):
            layer.cache = past[index] if past is not None else None
            layer.drive(real)

    def release(self) -> list[tuple[Tensor, Tensor]]:
        """Takes the caches out, so that the module is left as its owner knows it."""
        past = [layer.cache for layer in self.layers]
        for layer in self.layers:
            layer.reset_cache()
            layer.always_cache, layer.real = False, None
        return [pair for pair in past if pair is not None]

    def leaves(self, past: Any) -> list[Tensor]:
        return [tensor for pair in past for tensor in pair]

    def build(self, leaves: list[Tensor], length: int) -> Any:
        return list(zip(leaves[::2], leaves[1::2], strict=True))

    def replace(self, past: Any, leaves: list[Tensor], length: int) -> Any:
        return self.build(leaves, length)


class KVCacheStyle:
    """Modules that take a `KVCache` and call its `update`; it grows with the batch and the time that it is given."""

    def empty(self) -> Any:
        from mnemos.models.foreign.cached_attention import KVCache

        return KVCache.growing()

    def leaves(self, past: Any) -> list[Tensor]:
        return list(past.leaves())

    def build(self, leaves: list[Tensor], length: int) -> Any:
        cache = self.empty()
        cache.fill(leaves, length)
        return cache

    def replace(self, past: Any, leaves: list[Tensor], length: int) -> Any:
        return self.build(leaves, length)


@dataclass(frozen=True)
class Axes:
    """Where a cache tensor has its batch and its time; None: it has a state of fixed size in place of positions."""

    batch: int
    time: int | None


def find_axes(short: list[Tensor], longer: list[Tensor], wider: list[Tensor] | None) -> list[Axes] | None:
    """The axes of each leaf, from caches of one more position and of two sequences instead of one; None: not found.

    wider: None for a module that takes one sequence; any axis of length 1 stands for the batch, then.
    """
    found = []
    for a, b, c in zip(short, longer, wider or short, strict=True):
        if not a.dim() == b.dim() == c.dim():
            return None
        time = [i for i in range(a.dim()) if b.shape[i] != a.shape[i]]
        if wider is None:
            batch = [i for i in range(a.dim()) if a.shape[i] == 1 and i not in time][:1]
        else:
            batch = [i for i in range(a.dim()) if c.shape[i] != a.shape[i]]
        if len(batch) != 1 or len(time) > 1 or time == batch:
            return None
        if time and b.shape[time[0]] != a.shape[time[0]] + 1:
            return None
        found.append(Axes(batch[0], time[0] if time else None))
    return found


@dataclass
class Snapshot:
    """The cache tensors of several sequences after a call over `length` positions, padding included.

    A tensor may hold fewer: a module that attends to a window can keep the last positions alone.
    real (batch, length) bool says which are real where padding left gaps; None where all are.
    """

    leaves: list[Tensor]
    axes: list[Axes]
    length: int
    real: Tensor | None = None
    cross: Snapshot | None = None  # of an encoder-decoder model: keys and values over the encoder's output

    def holds(self, row: int, length: int) -> bool:
        """Whether all that is needed of the row's first `length` real positions is there."""
        shortest, fixed = self.length, False
        for leaf, axes in zip(self.leaves, self.axes, strict=True):
            if axes.time is None:
                fixed = True
            else:
                shortest = min(shortest, leaf.shape[axes.time])
        dropped = self.length - shortest
        if not dropped and not fixed:
            return True
        columns = list(range(self.length)) if self.real is None else self.real[row].nonzero().flatten().tolist()
        return len(columns) == length and columns[length - min(length, shortest)] >= dropped

    def row(self, index: int, row: int, length: int) -> Tensor:
        """Leaf `index` of one sequence: batch axis of 1, of its first `length` real positions those that are there."""
        axes, leaf = self.axes[index], self.leaves[index]
        one = leaf.narrow(axes.batch, row, 1)
        if axes.time is None:
            return one
        held = leaf.shape[axes.time]
        if self.real is None:
            return one.narrow(axes.time, 0, min(length, held))
        columns = self.real[row].nonzero().flatten()[:length]
        return one.index_select(axes.time, columns[-held:] - (self.length - held))


def side_by_side(parts: list[tuple[Snapshot, int, int]]) -> tuple[list[Tensor], Tensor | None]:
    """Sequences (snapshot, row, length) joined: leaves padded on the left, and which positions are real (None: all).

    Padded on the left, tokens stay as far from each other as they are, which is what a module with a window counts.
    """
    first = parts[0][0]
    lengths = [length for _, _, length in parts]
    longest = max(lengths)
    if first.real is None and all(one is first for one, _, _ in parts) and min(lengths) == longest:
        rows = [row for _, row, _ in parts]
        return [_rows(leaf, axes, rows, longest) for leaf, axes in zip(first.leaves, first.axes, strict=True)], None
    leaves = []
    for index, axes in enumerate(first.axes):
        padded = []
        for snapshot, row, length in parts:
            one = snapshot.row(index, row, length)
            if length < longest and axes.time is not None:
                shape = list(one.shape)
                shape[axes.time] = longest - length
                one = torch.cat((one.new_zeros(shape), one), dim=axes.time)
            padded.append(one)
        leaves.append(torch.cat(padded, dim=axes.batch))
    if min(lengths) == longest:
        return leaves, None
    device = leaves[0].device
    gaps = torch.tensor([longest - length for length in lengths], device=device)
    return leaves, torch.arange(longest, device=device)[None, :] >= gaps[:, None]


def _rows(leaf: Tensor, axes: Axes, rows: list[int], length: int) -> Tensor:
    """These rows of a leaf, of at most the first `length` positions; a state, which modules write to, as a copy."""
    if rows != list(range(leaf.shape[axes.batch])):
        leaf = leaf.index_select(axes.batch, torch.tensor(rows, device=leaf.device))
    elif axes.time is None:
        leaf = leaf.clone()
    return leaf if axes.time is None else leaf.narrow(axes.time, 0, min(length, leaf.shape[axes.time]))
