"""Finds by trying what a module expects and the names of its arguments do not say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.errors import ModelError
from mnemos.models.foreign.answer import CausalMask, Conventions
from mnemos.models.foreign.call import Caller
from mnemos.models.foreign.inner_cache import LayerCache

# Methods that make a first state, for a number of sequences or for any.
INITIAL_NAMES = ("init_hidden", "init_state", "init_states", "initial_state", "get_initial_state", "zero_state")


def find_conventions(caller: Caller, ids: Tensor) -> None:
    """Sets the caller's conventions to the first with which it takes ids (batch, time) where it requires more than ids.

    ModelError, that of the plainest call: none of them does.
    """
    names = caller.signature
    if not names.required & {names.past, names.causal, names.positions} or names.cache_positions in names.required:
        return
    first: ModelError | None = None
    for found in _possible(caller):
        caller.conventions = found
        try:
            logits = _logits(caller, ids)
        except ModelError as error:
            first = first or error
            continue
        except TypeError:  # a method that makes no state of that many sequences
            continue
        if names.causal not in names.required or _sees_what_it_should(caller, logits, ids):
            return
    caller.conventions = Conventions()
    if first is not None:
        raise first


def find_axes(caller: Caller, ids: Tensor) -> bool:
    """Whether the module's axes are others than those known so far, which its logits contradict; they are set then."""
    known = caller.conventions
    if _has_logits(caller, ids):
        return False
    for one_sequence, vocabulary_second in ((False, True), (True, False), (True, True)):
        caller.conventions = replace(known, one_sequence=one_sequence, vocabulary_second=vocabulary_second)
        if _has_logits(caller, ids):
            return True
    caller.conventions = known
    return False


def _has_logits(caller: Caller, ids: Tensor) -> bool:
    try:
        _logits(caller, ids)
    except ModelError:
        return False
    return True


def find_causal_mask(caller: Caller, ids: Tensor) -> bool:
    """Whether the module is causal with a mask that it takes; the conventions say with which, then."""
    known = caller.conventions
    if caller.signature.causal is None or known.causal is not None:
        return False
    for mask in _masks():
        caller.conventions = replace(known, causal=mask)
        try:
            if _sees_what_it_should(caller, _logits(caller, ids), ids):
                return True
        except ModelError:
            continue
    caller.conventions = known
    return False


def empty_caches(module: nn.Module) -> Iterator[Callable[[], Any]]:
    """Empty lists and mappings of the kinds that a module may write its cache into."""
    lengths = {len(part) for part in module.modules() if isinstance(part, nn.ModuleList)}
    for layers in sorted(lengths, reverse=True):
        yield partial(_repeated, None, layers)
        yield partial(_repeated, dict, layers)
        yield partial(_repeated, list, layers)
    yield dict
    yield list


def _repeated(make: Callable[[], Any] | None, count: int) -> list[Any]:
    return [None if make is None else make() for _ in range(count)]


def _possible(caller: Caller) -> Iterator[Conventions]:
    names = caller.signature
    rows = [False, True] if names.positions in names.required else [False]
    masks: list[CausalMask | None] = [*_masks()] if names.causal in names.required else [None]
    for initial in _initials(caller) if names.past in names.required else [None]:
        for axes in ((False, False, False), (True, False, False), (False, True, False), (False, False, True)):
            for row in rows:
                for mask in masks:
                    yield Conventions(*axes, row, initial, mask)


def _initials(caller: Caller) -> Iterator[Callable[[int], Any] | None]:
    from mnemos.models.foreign.cached_attention import KVCache

    yield None
    for name in INITIAL_NAMES:
        method = getattr(caller.inner, name, None)
        if callable(method):
            yield method
            yield partial(_whatever_the_rows, method)
    for make in (*empty_caches(caller.inner), KVCache.growing, LayerCache):
        yield partial(_whatever_the_rows, make)


def _whatever_the_rows(make: Callable[[], Any], rows: int) -> Any:
    return make()


def _masks() -> Iterator[CausalMask]:
    """Masks as people write them: True or 1 for what is seen, -inf for what is not, True for what is not."""
    for axes in range(3):
        for kind in ("seen", "added", "hidden", "ones"):
            yield partial(_mask, kind, axes)


def _mask(kind: str, axes: int, new: int, total: int, device: torch.device) -> Tensor:
    """A mask (new, total) with so many leading axes of 1."""
    seen = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
    if kind == "added":
        mask = torch.zeros(new, total, device=device).masked_fill(~seen, -torch.inf)
    else:
        mask = {"seen": seen, "hidden": ~seen, "ones": seen.float()}[kind]
    return mask[(None,) * axes]


def _logits(caller: Caller, ids: Tensor) -> Tensor:
    """Of the first row; ModelError where they do not have the shape of logits."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None, :]
    logits = caller(ids[:1], positions=positions).logits
    if len(logits) != 1 or logits.shape[1] not in (1, ids.shape[1]):
        raise ModelError(f"logits of shape {tuple(logits.shape)} for ids of shape {tuple(ids[:1].shape)}")
    return logits


def _sees_what_it_should(caller: Caller, logits: Tensor, ids: Tensor) -> bool:
    """Whether the logits of one row, all numbers, depend on earlier tokens and on no later ones."""
    if logits.shape[1] == 1 or torch.isnan(logits).any():
        return False
    positions = torch.arange(ids.shape[1], device=ids.device)[None, :]
    shorter = caller(ids[:1, :-1], positions=positions[:, :-1]).logits
    if shorter.shape[1] != ids.shape[1] - 1:
        return False
    other = ids[:1].clone()
    other[0, 0] = ids[0, :].max() if ids[0, 0] != ids[0, :].max() else ids[0, :].min()
    changed = caller(other, positions=positions).logits
    close = 1e-3 * float(logits[torch.isfinite(logits)].abs().max())
    future = float((shorter - logits[:, :-1]).nan_to_num().abs().max())
    past = float((changed[:, -1] - logits[:, -1]).nan_to_num().abs().max())
    return future <= close < past
