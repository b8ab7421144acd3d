"""What attributes of modules hold: watched during a call, copied, and taken apart into tensors and counts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.errors import ModelError

# Objects of these libraries are never looked into.
_CLOSED = frozenset({*sys.stdlib_module_names, "torch", "numpy"})
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_DTYPES = frozenset({
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
})  # fmt: skip
_DEPTH = 8

Owner = dict[str, Any]


class Absent:
    """Stands for an attribute that is not there."""


ABSENT = Absent()


def owners(module: nn.Module) -> Iterator[Owner]:
    """The dicts in which the parts of a module have their attributes and buffers; TorchScript has none."""
    for member in module.modules():
        if not isinstance(member, torch.jit.ScriptModule):
            yield vars(member)
            yield vars(member)["_buffers"]


def own_attributes(owner: Owner) -> dict[str, Any]:
    """The attributes that are the author's, without those of every nn.Module."""
    return {key: value for key, value in owner.items() if key not in _MODULE_ATTRIBUTES}


def is_open(value: Any) -> bool:
    """Whether it is an object whose attributes may be state, such as a cache of the author's own class."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, Tensor, type, Absent))
        and type(value).__module__.partition(".")[0] not in _CLOSED
    )


def is_state(value: Any) -> bool:
    """Whether it is a tensor that a call may write to, of a kind that can be compared."""
    return type(value) is Tensor and value.dtype in _DTYPES and value.layout is torch.strided and not value.is_meta


def _inside(value: Any) -> Any:
    """The dict or list of what a container or object holds; None: it holds nothing that is looked at."""
    if isinstance(value, (dict, list, tuple)):
        return value
    return vars(value) if is_open(value) else None


def _items(inside: Any) -> list[Any]:
    return list(inside.values() if isinstance(inside, dict) else inside)


class Watch:
    """Remembers what the attributes of a module hold; says which ones a call has changed, and takes that back.

    A tensor is remembered by its values, unless all are zero, as those of an empty cache are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = [(owner, own_attributes(owner)) for owner in owners(module)]
        self._inside: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[int, tuple[Tensor, int, Tensor | None]] = {}
        for _, attributes in self._owners:
            for value in attributes.values():
                self._remember(value, _DEPTH)

    def _remember(self, value: Any, depth: int) -> None:
        if is_state(value):
            if id(value) not in self._tensors:
                saved = value.detach().clone() if value.numel() and bool((value != 0).any()) else None
                self._tensors[id(value)] = value, _version(value), saved
        elif depth and (inside := _inside(value)) is not None and id(inside) not in self._inside:
            self._inside[id(inside)] = inside, inside.copy() if isinstance(inside, (dict, list)) else inside
            for item in _items(inside):
                self._remember(item, depth - 1)

    def changed(self) -> list[tuple[Owner, str, Any]]:
        """(dict, key, what it held before or ABSENT) of the attributes that hold or reach anything else now."""
        found = []
        for owner, before in self._owners:
            now = own_attributes(owner)
            for key in {**before, **now}:
                old = before.get(key, ABSENT)
                if old is not now.get(key, ABSENT) or self._touched(old, set(), _DEPTH):
                    found.append((owner, key, old))
        return found

    def _touched(self, value: Any, seen: set[int], depth: int) -> bool:
        if is_state(value):
            return id(value) in self._tensors and _version(value) != self._tensors[id(value)][1]
        if not depth or (inside := _inside(value)) is None or id(inside) in seen or id(inside) not in self._inside:
            return False
        seen.add(id(inside))
        before = self._inside[id(inside)][1]
        if len(before) != len(inside):
            return True
        if isinstance(inside, dict) and list(before) != list(inside):
            return True
        if any(a is not b for a, b in zip(_items(before), _items(inside), strict=True)):
            return True
        return any(self._touched(item, seen, depth - 1) for item in _items(inside))

    def undo(self) -> None:
        """Everything holds again what it held."""
        for owner, before in self._owners:
            for key in own_attributes(owner).keys() - before.keys():
                del owner[key]
            owner.update(before)
        for inside, before in self._inside.values():
            if isinstance(inside, dict):
                inside.clear()
                inside.update(before)
            elif isinstance(inside, list):
                inside[:] = before
        for tensor, version, saved in self._tensors.values():
            if _version(tensor) != version:
                with torch.no_grad():
                    tensor.zero_() if saved is None else tensor.copy_(saved)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def copied(value: Any, copy_tensor: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Any:
    """A copy of the structure, with `copy_tensor` of every tensor; what is shared within it stays shared.

    memo: what was copied already, by the id of the original, which must stay alive.
    """
    if id(value) in memo:
        return memo[id(value)]
    if is_state(value):
        memo[id(value)] = copy_tensor(value)
    elif isinstance(value, list):
        items: list[Any] = type(value)()
        memo[id(value)] = items
        items.extend(copied(item, copy_tensor, memo) for item in value)
    elif isinstance(value, tuple):
        return _tuple(type(value), [copied(item, copy_tensor, memo) for item in value])
    elif isinstance(value, dict):
        mapping = memo[id(value)] = value.copy()
        mapping.update((key, copied(item, copy_tensor, memo)) for key, item in value.items())
    elif is_open(value):
        memo[id(value)] = made = object.__new__(type(value))
        vars(made).update((key, copied(item, copy_tensor, memo)) for key, item in vars(value).items())
    else:
        return value
    return memo[id(value)]


def _tuple(kind: type, items: list[Any]) -> Any:
    return kind(*items) if hasattr(kind, "_fields") else kind(items)


@dataclass(eq=False)
class _Constant:
    value: Any


@dataclass(eq=False)
class _Leaf:
    """Number `index` of the tensors."""

    index: int


@dataclass(eq=False)
class _Count:
    """A number that is `more` than the tokens so far; like: the tensor of one element in which it is, if it is."""

    more: int
    like: Tensor | None = None


@dataclass(eq=False)
class _Container:
    """A list, tuple, dict or object of the kind of `value`, with the parts that are not constant."""

    value: Any
    parts: list[tuple[Any, Any]] = field(default_factory=list)


class Template:
    """The form of some values, found from those of three calls: tensors, counts of tokens, and what stays the same.

    short, longer, other: after 3 tokens, after one more, and after 3 other tokens. ModelError: they differ in anything
    that is neither a tensor nor a count.
    """

    def __init__(self, short: list[Any], longer: list[Any], other: list[Any]) -> None:
        self.tensors = 0
        self.counts = False
        self._memo: dict[int, Any] = {}
        self._alive = short  # the memo knows them by their ids
        self._root = self._node(short, longer, other)

    def _node(self, short: Any, longer: Any, other: Any) -> Any:
        if id(short) in self._memo:
            return self._memo[id(short)]
        if not type(short) is type(longer) is type(other):
            raise _unlike(short, longer)
        if is_state(short):
            node = self._memo[id(short)] = self._tensor(short, longer, other)
            return node
        if type(short) is int:
            return self._number(short, longer, other)
        parts = [_inside(value) for value in (short, longer, other)]
        if parts[0] is None:
            if short is not longer and not bool(short == longer == other):
                raise _unlike(short, longer)
            return _Constant(short)
        if not len(parts[0]) == len(parts[1]) == len(parts[2]):
            raise _unlike(short, longer)
        node = _Container(short)
        if not isinstance(short, tuple):
            self._memo[id(short)] = node
        for key in list(parts[0]) if isinstance(parts[0], dict) else range(len(parts[0])):
            if isinstance(parts[0], dict) and not all(key in part for part in parts):
                raise _unlike(short, longer)
            part = self._node(*(one[key] for one in parts))
            if not isinstance(part, _Constant):
                node.parts.append((key, part))
        return node if node.parts else _Constant(short)

    def _tensor(self, short: Tensor, longer: Tensor, other: Tensor) -> Any:
        if torch.equal(short, longer) and torch.equal(short, other):
            return _Constant(short)
        if short.numel() == longer.numel() == other.numel() == 1 and short.dtype in (torch.int32, torch.int64):
            node = self._number(int(short), int(longer), int(other))
            return _Count(node.more, short) if isinstance(node, _Count) else node
        self.tensors += 1
        return _Leaf(self.tensors - 1)

    def _number(self, short: int, longer: int, other: int) -> Any:
        if short == longer == other:
            return _Constant(short)
        if short != other or longer != short + 1:
            raise _unlike(short, longer)
        self.counts = True
        return _Count(short - 3)

    def take(self, values: list[Any]) -> tuple[list[Tensor], set[int]]:
        """The tensors of such values in their order, and of how many tokens their counts tell."""
        found: dict[int, Tensor] = {}
        lengths: set[int] = set()
        self._take(self._root, values, found, lengths, set())
        if len(found) != self.tensors:
            raise ModelError(f"its cache holds {len(found)} tensors; expected {self.tensors}, as in the trial")
        return [found[index] for index in range(self.tensors)], lengths

    def _take(self, node: Any, value: Any, found: dict[int, Tensor], lengths: set[int], seen: set[int]) -> None:
        if isinstance(node, _Leaf):
            if not isinstance(value, Tensor):
                raise ModelError(f"its cache holds a {type(value).__name__}; expected a tensor, as in the trial")
            found[node.index] = value
        elif isinstance(node, _Count):
            lengths.add(int(value) - node.more)
        elif isinstance(node, _Container) and id(node) not in seen:
            seen.add(id(node))
            inside = _inside(value)
            for key, part in node.parts:
                self._take(part, inside[key], found, lengths, seen)

    def fill(self, leaves: list[Tensor], length: int) -> list[Any]:
        """Such values after `length` tokens, of these tensors."""
        filled: list[Any] = self._fill(self._root, leaves, length, {})
        return filled

    def _fill(self, node: Any, leaves: list[Tensor], length: int, made: dict[int, Any]) -> Any:
        if id(node) in made:
            return made[id(node)]
        if isinstance(node, _Constant):
            return node.value
        if isinstance(node, _Leaf):
            return leaves[node.index]
        if isinstance(node, _Count):
            count = length + node.more
            made[id(node)] = count if node.like is None else torch.full_like(node.like, count)
            return made[id(node)]
        value = node.value
        if isinstance(value, tuple):
            items = list(value)
            for key, part in node.parts:
                items[key] = self._fill(part, leaves, length, made)
            return _tuple(type(value), items)
        if is_open(value):
            made[id(node)] = filled = object.__new__(type(value))
            inside = vars(filled)
            inside.update(vars(value))
        else:
            made[id(node)] = filled = inside = value.copy()
        for key, part in node.parts:
            inside[key] = self._fill(part, leaves, length, made)
        return filled


def _unlike(one: Any, other: Any) -> ModelError:
    return ModelError(
        f"it keeps a {type(one).__name__} that is another, a {type(other).__name__}, after one more token; expected a "
        "tensor or a count of tokens"
    )
