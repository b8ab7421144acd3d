"""Caches that a module keeps inside itself, or in an object of a kind of its own, lent to it for a call at a time.

Meta's Llama has `cache_k` and `cache_v` in each attention, gpt-fast and LitGPT make theirs in `setup_caches` and
`set_kv_cache`, others append to buffers and count tokens in attributes. All are found alike: by what a call changes.
Those attributes hold a sequence's own values during a call, and what they held before it afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.models.foreign.cache_styles import Axes
from mnemos.models.foreign.structures import ABSENT, Owner, Template, copied, owners

SETUP_NAMES = ("setup_caches", "setup_cache", "set_kv_cache", "setup_kv_cache", "init_kv_cache", "init_cache")
_BATCH_NAMES = ("max_batch_size", "batch_size", "bsz", "max_bsz")
_LENGTH_NAMES = ("max_seq_length", "max_seq_len", "max_length", "max_cache_len", "seq_len", "context_length")


class LayerCache:
    """A cache object of the simplest kind: one value for each layer, by `get` and `update`."""

    def __init__(self) -> None:
        self.cache: dict[int, Any] = {}

    def get(self, layer_idx: int) -> Any:
        """What the layer keeps; None before its first `update`."""
        return self.cache.get(layer_idx)

    def update(self, layer_idx: int, value: Any) -> None:
        """The layer keeps `value`, as a rule (keys, values), from now on."""
        self.cache[layer_idx] = value

    def get_all(self) -> list[Any]:
        """The values of all layers in order."""
        return [self.cache[layer] for layer in sorted(self.cache)]

    def reset(self) -> None:
        """Forgets everything."""
        self.cache.clear()


@dataclass(frozen=True)
class Drive:
    """How a module is called so that it uses its cache.

    cache_positions: give the new tokens' positions (time,); given: makes the cache object of the first call, None: the
    module makes it, or has none.
    """

    cache_positions: bool = False
    given: Callable[[], Any] | None = None


class Swaps:
    """Attributes that hold something else for a time."""

    def __init__(self, places: list[tuple[Owner, str]]) -> None:
        self.places = places
        self._own: list[Any] = []

    def install(self, values: list[Any]) -> None:
        """The attributes hold `values`, of which ABSENT is none at all."""
        self._own = [owner.get(key, ABSENT) for owner, key in self.places]
        self.write(values)

    def release(self) -> list[Any]:
        """What the attributes hold now; they hold again what they held before `install`."""
        values = [owner.get(key, ABSENT) for owner, key in self.places]
        self.write(self._own)
        self._own = []
        return values

    def write(self, values: list[Any]) -> None:
        """Puts `values` into the attributes."""
        for (owner, key), value in zip(self.places, values, strict=True):
            if value is ABSENT:
                owner.pop(key, None)
            else:
                owner[key] = value


@dataclass
class Held:
    """A state of the module: what its attributes hold, and the cache object that it is given."""

    values: list[Any]
    given: Any


class InnerState:
    """The attributes of a module that change in a call which is driven so, and how they are before the first call.

    setup: attributes that hold something else while the engine calls it, as its own method makes it.
    """

    def __init__(self, drive: Drive, setup: tuple[Swaps, list[Any]] | None = None) -> None:
        self.drive = drive
        self.setup = setup
        self.swaps = Swaps([])
        self.pristine: list[Any] = []
        self.axes: dict[int, Axes] = {}  # of the tensors of `pristine` that are written to, by their ids
        self.origins: dict[int, Tensor] = {}  # the tensors of `pristine` by the ids of their last copies

    def fresh(self, rows: int) -> Held:
        """The state before the first token of `rows` sequences."""
        self.origins = {}

        def copy_tensor(tensor: Tensor) -> Tensor:
            axes = self.axes.get(id(tensor))
            if axes is None:
                made = tensor.detach().clone()
            else:
                shape = list(tensor.shape)
                shape[axes.batch] = rows
                made = tensor.detach().narrow(axes.batch, 0, 1).expand(shape).clone()
            self.origins[id(made)] = tensor
            return made

        memo: dict[int, Any] = {}
        values = [copied(value, copy_tensor, memo) for value in self.pristine]
        return Held(values, self.drive.given() if self.drive.given is not None else None)

    def install(self, held: Held) -> None:
        """Lends the state to the module."""
        if self.setup is not None:
            self.setup[0].install(self.setup[1])
        self.swaps.install(held.values)

    def release(self) -> list[Any]:
        """Takes it back; the module is as its owner knows it."""
        values = self.swaps.release()
        if self.setup is not None:
            self.setup[0].release()
        return values


class InnerStyle:
    """A `CacheStyle` for what is inside a module; `past` is a `Held`, None before the first token.

    extents: of tensors that have room from the start the most positions, None for those that grow; origins: what such
    a tensor holds before the first token, None: zeros.
    """

    def __init__(
        self,
        state: InnerState,
        template: Template,
        axes: list[Axes],
        extents: list[int | None],
        origins: list[Tensor | None],
    ) -> None:
        self.state = state
        self.axes = axes
        self.extents = extents
        self.counts = template.counts
        self.extent = min((extent for extent in extents if extent is not None), default=None)
        self._template = template
        self._origins = origins

    def empty(self) -> Any:
        return None

    def leaves(self, past: Held) -> list[Tensor]:
        return self._template.take([*past.values, past.given])[0]

    def counts_right(self, past: Held, length: int) -> bool:
        """Whether the module counts as many tokens as there are."""
        return self._template.take([*past.values, past.given])[1] <= {length}

    def trimmed(self, leaves: list[Tensor], length: int) -> list[Tensor]:
        """Of tensors with room from the start the first `length` positions, in memory of their own."""
        return [
            leaf if extent is None or axes.time is None else leaf.narrow(axes.time, 0, min(length, extent)).clone()
            for leaf, axes, extent in zip(leaves, self.axes, self.extents, strict=True)
        ]

    def build(self, leaves: list[Tensor], length: int) -> Held:
        roomy = [self._with_room(index, leaf, length) for index, leaf in enumerate(leaves)]
        *values, given = self._template.fill(roomy, length)
        return Held(values, given)

    def _with_room(self, index: int, leaf: Tensor, length: int) -> Tensor:
        axes, extent, origin = self.axes[index], self.extents[index], self._origins[index]
        if axes.time is None or extent is None:
            return leaf
        shape = list(leaf.shape)
        shape[axes.time] = extent
        made = leaf.new_zeros(shape) if origin is None else origin.narrow(axes.batch, 0, 1).expand(shape).clone()
        filled = min(length, leaf.shape[axes.time])
        made.narrow(axes.time, 0, filled).copy_(leaf.narrow(axes.time, 0, filled))
        return made

    def replace(self, past: Held, leaves: list[Tensor], length: int) -> Held:
        return self.build(leaves, length)


def set_up(module: nn.Module, context: int) -> tuple[Swaps, list[Any]] | None:
    """Has the module make its caches for one sequence, by its own method, and takes them out again.

    None: it has no such method that can be called with a batch size, a length, a device and a dtype. Errors: whatever
    the method raises.
    """
    method = next((getattr(module, name) for name in SETUP_NAMES if hasattr(module, name)), None)
    if method is None:
        return None
    weight = next(module.parameters())
    known: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    known.update(dict.fromkeys(_BATCH_NAMES, 1), **dict.fromkeys(_LENGTH_NAMES, context))
    arguments = {}
    for name, parameter in inspect.signature(method).parameters.items():
        if name in known:
            arguments[name] = known[name]
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            return None
    dicts = [*owners(module), *(vars(member)["_modules"] for member in module.modules())]
    before = [{key: _frozen(value) for key, value in owner.items()} for owner in dicts]
    sizes = {name: vars(module)[name] for name in ("max_batch_size", "max_seq_length") if name in vars(module)}
    vars(module).update(dict.fromkeys(sizes, -1))  # with larger caches than are asked for, it may do nothing
    places: list[tuple[Owner, str]] = []
    values: list[Any] = []
    olds: list[Any] = []
    try:
        with torch.no_grad(), weight.device:
            method(**arguments)
    finally:
        vars(module).update((name, size) for name, size in sizes.items() if vars(module)[name] == -1)
        for owner, old in zip(dicts, before, strict=True):
            for key in [*{**old, **owner}]:
                was, now = old.get(key, ABSENT), owner.get(key, ABSENT)
                if key in ("_buffers", "_modules", "_parameters") or was is now or (type(was) is set and was == now):
                    continue
                places.append((owner, key))
                values.append(now)
                olds.append(was)
        swaps = Swaps(places)
        swaps.write(olds)
    return swaps, values


def _frozen(value: Any) -> Any:
    return set(value) if isinstance(value, set) else value
