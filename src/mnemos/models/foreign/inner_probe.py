"""Finds the cache that a module keeps inside itself: by what changes when it is called so that it uses one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mnemos.errors import ModelError
from mnemos.models.foreign.cache_styles import HUGGING_FACE_NAMES, Axes
from mnemos.models.foreign.call import Caller, drive
from mnemos.models.foreign.comparison import difference, tolerance
from mnemos.models.foreign.inner_cache import (
    SETUP_NAMES,
    Drive,
    Held,
    InnerState,
    InnerStyle,
    LayerCache,
    Swaps,
    set_up,
)
from mnemos.models.foreign.signature import describe
from mnemos.models.foreign.structures import Template, Watch, copied

_SHORT = 3  # tokens of the calls that are compared


def find_plain(caller: Caller, ids: Tensor, context: int) -> InnerStyle | None:
    """The style of a cache that every call of the module changes, so that no call can do without a state.

    None: there is no such cache. ModelError: the module asks for positions in a cache that could not be made.
    """
    names = caller.signature
    required = names.cache_positions is not None and names.cache_positions in names.required
    uses_offset = names.offset is not None and names.past is None
    if not (uses_offset or required or _remembers(caller, ids)):
        return None
    style = find_inner(caller, ids, context, always=True)
    if style is None and required:
        raise ModelError(
            f"{describe(caller.module)} requires {names.cache_positions}, and nothing was found in it that is a cache; "
            f"expected one of its own after {' or '.join(SETUP_NAMES[:3])}, or an argument such as past_kv"
        )
    return style


def _remembers(caller: Caller, ids: Tensor) -> bool:
    """Whether the same call gives other logits the second time. The module is left as it was."""
    positions = torch.arange(_SHORT, device=ids.device)[None, :]
    with caller.lock:
        watch = Watch(caller.module)
        try:
            one = caller(ids[:1, :_SHORT], positions=positions).logits
            if not watch.changed():
                return False
            other = caller(ids[:1, :_SHORT], positions=positions).logits
            remembers = one.shape != other.shape or difference(one, other) > tolerance(caller.module, one)
            if remembers:
                watch.undo()
            return remembers
        except ModelError:
            return False


def find_inner(caller: Caller, ids: Tensor, context: int, always: bool = False) -> InnerStyle | None:
    """The style of the module's own cache, if its logits depend on it; ids (2, time) are what it is tried on.

    context: the positions that it may need room for; always: whatever it is called with, it uses its cache. None: no
    way of calling it changes anything that could be a cache.
    """
    for way in _ways(caller, always):
        try:
            state = InnerState(way, _setup(caller, way, context))
            style = InnerProbe(caller, state, ids).run()
            found = style is not None and _matters(caller, style, ids)
        except Exception:  # what people's objects raise when they are copied or compared; then there is no cache
            continue
        if found:
            return style
    return None


def _ways(caller: Caller, always: bool) -> Iterator[Drive]:
    """Ways to call the module so that it may use a cache."""
    names = caller.signature
    if names.past is None and (names.use_cache or names.offset or always):
        yield Drive()
    if names.past is not None:
        yield Drive()  # it makes an object of its own
    if names.past in HUGGING_FACE_NAMES and hasattr(caller.inner, "generation_config"):
        yield Drive(given=partial(_cache_of_config, caller.inner.config))
    if names.cache_positions:
        yield Drive(cache_positions=True)
    if names.past is not None:
        yield Drive(given=LayerCache)


def _cache_of_config(config: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _setup(caller: Caller, way: Drive, context: int) -> tuple[Swaps, list[Any]] | None:
    if not way.cache_positions:
        return None
    try:
        return set_up(caller.inner, context)
    except Exception as error:
        raise ModelError(f"its own method could not make a cache: {error}") from error


class InnerProbe:
    """Calls the module on `ids` (2, time) with a state, and finds what it keeps in it."""

    def __init__(self, caller: Caller, state: InnerState, ids: Tensor) -> None:
        self.caller = caller
        self.state = state
        self.ids = ids

    def run(self) -> InnerStyle | None:
        """None: it keeps no tensors. ModelError: whatever it raises, or it keeps what cannot be a cache."""
        state = self.state
        self._find_places()
        short, before, origins = self._after(0)
        longer = self._continued(before)
        other, _, _ = self._after(1)
        kept = [index for index in range(len(state.pristine)) if _is_uniform(short, longer, other, index)]
        state.swaps.places = [state.swaps.places[index] for index in kept]
        state.pristine = [state.pristine[index] for index in kept]
        forms = [[*(held.values[index] for index in kept), held.given] for held in (short, longer, other)]
        template = Template(forms[0], forms[1], forms[2])
        leaves = [template.take(form)[0] for form in forms]
        wider = self._wider(template, kept)
        axes, extents, firsts = [], [], []
        for index in range(template.tensors):
            one, more = leaves[0][index], leaves[1][index]
            origin = origins.get(id(one))
            axes.append(_axes(one, more, None if wider is None else wider[index], origin))
            time = axes[-1].time
            extents.append(one.shape[time] if time is not None and one.shape == more.shape else None)
            firsts.append(origin)
            if origin is not None:
                state.axes[id(origin)] = axes[-1]
        return InnerStyle(state, template, axes, extents, firsts) if axes else None

    def _find_places(self) -> None:
        """Which attributes a call changes, and what they hold before."""
        state, caller = self.state, self.caller
        with caller.lock:
            if state.setup is not None:
                state.setup[0].install(state.setup[1])
            try:
                watch = Watch(caller.module)
                try:
                    self._run(InnerState(state.drive), None, self.ids[:1, :_SHORT], 0)
                    changed = watch.changed()
                finally:
                    watch.undo()
            finally:
                if state.setup is not None:
                    state.setup[0].release()
        state.swaps.places = [(owner, key) for owner, key, _ in changed]
        memo: dict[int, Any] = {}
        state.pristine = [copied(value, lambda tensor: tensor, memo) for _, _, value in changed]

    def _run(self, state: InnerState, past: Held | None, ids: Tensor, start: int) -> Held:
        positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand(ids.shape)
        return drive(self.caller, state, ids, past, positions)[1]

    def _after(self, row: int) -> tuple[Held, Held, dict[int, Tensor]]:
        """The state after a row's first tokens, once copied and once as it is; the origins of the copy's tensors."""
        held = self._run(self.state, None, self.ids[row : row + 1, :_SHORT], 0)
        memo: dict[int, Any] = {}
        *values, given = copied([*held.values, held.given], lambda tensor: tensor.detach().clone(), memo)
        origins = {id(memo[key]): origin for key, origin in self.state.origins.items() if key in memo}
        return Held(values, given), held, origins

    def _continued(self, held: Held) -> Held:
        return self._run(self.state, held, self.ids[:1, _SHORT : _SHORT + 1], _SHORT)

    def _wider(self, template: Template, kept: list[int]) -> list[Tensor] | None:
        """The tensors after two rows at once, where the module takes them."""
        try:
            held = self._run(self.state, None, self.ids[:, :_SHORT], 0)
            return template.take([*held.values, held.given])[0]
        except (ModelError, RuntimeError):
            return None


def _is_uniform(short: Held, longer: Held, other: Held, index: int) -> bool:
    """Whether an attribute keeps tensors and counts that follow the number of tokens; another is no cache."""
    values = [[held.values[index]] for held in (short, longer, other)]
    try:
        template = Template(values[0], values[1], values[2])
        tensors = [template.take(value)[0] for value in values[:2]]
    except ModelError:
        return False
    return all(_grown(one, more) is not None for one, more in zip(tensors[0], tensors[1], strict=True))


def _grown(one: Tensor, more: Tensor) -> list[int] | None:
    """The axes along which the second has one element more; None: they differ otherwise."""
    if one.dim() != more.dim():
        return None
    axes = [axis for axis in range(one.dim()) if one.shape[axis] != more.shape[axis]]
    fits = len(axes) <= 1 and all(more.shape[axis] == one.shape[axis] + 1 for axis in axes)
    return axes if fits else None


def _axes(one: Tensor, more: Tensor, wider: Tensor | None, origin: Tensor | None) -> Axes:
    """Where a tensor has its batch and its time, after 3 tokens and after one more.

    wider: of two rows; origin: what it held before. Of a tensor of the same shape, time is where the first indices were
    written to and then one more, and the batch where one alone was. One that moves on holds no positions.
    """
    grown = _grown(one, more)
    if grown is None:
        raise ModelError(f"it keeps a tensor of shape {tuple(one.shape)}, then {tuple(more.shape)}")
    times = grown or [axis for axis in range(one.dim()) if _follows(one, more, origin, axis)]
    time = next(iter(times), None)
    if grown and not torch.equal(more.narrow(grown[0], 0, one.shape[grown[0]]), one):
        raise ModelError(f"it keeps a tensor of shape {tuple(one.shape)} whose first positions change")
    batch = [] if wider is None or wider.dim() != one.dim() else _doubled(one, wider)
    if len(batch) != 1:
        batch = [
            axis
            for axis in range(one.dim())
            if axis != time and (one.shape[axis] == 1 or len(_written(one, origin, axis)) == 1)
        ]
    if not batch or batch[0] == time:
        raise ModelError(f"it keeps a tensor of shape {tuple(one.shape)}, in which no axis is the batch")
    return Axes(batch[0], time)


def _doubled(one: Tensor, wider: Tensor) -> list[int]:
    return [axis for axis in range(one.dim()) if one.shape[axis] != wider.shape[axis]]


def _follows(one: Tensor, more: Tensor, origin: Tensor | None, axis: int) -> bool:
    """Whether the positions along an axis are those of the tokens, in both of two tensors of the same shape."""
    if _written(one, origin, axis) != list(range(_SHORT)) or _written(more, origin, axis) != list(range(_SHORT + 1)):
        return False
    return torch.equal(one.narrow(axis, 0, _SHORT), more.narrow(axis, 0, _SHORT))


def _written(tensor: Tensor, origin: Tensor | None, axis: int) -> list[int]:
    """The indices along an axis at which anything differs from before."""
    changed = tensor != 0 if origin is None or origin.shape != tensor.shape else tensor != origin
    written: list[int] = changed.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist()
    return written


def _matters(caller: Caller, style: InnerStyle, ids: Tensor) -> bool:
    """Whether the logits of the last token are those of the whole text with the cache, and others without it."""
    last = ids.shape[1] - 1
    positions = torch.arange(last + 1, device=ids.device)[None, :]
    whole, _ = drive(caller, style.state, ids[:1], None, positions)
    _, past = drive(caller, style.state, ids[:1, :last], None, positions[:, :last])
    past = style.build(style.leaves(past), last)
    cached, _ = drive(caller, style.state, ids[:1, last:], past, positions[:, last:])
    try:
        alone, _ = drive(caller, style.state, ids[:1, last:], None, positions[:, last:])
    except ModelError:
        return True
    apart = difference(cached[:, -1], whole[:, -1])
    return apart <= tolerance(caller.module, whole) and 8 * apart < difference(alone[:, -1], whole[:, -1])
