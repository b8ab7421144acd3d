"""Makes a module smaller in place: fewer layers, fewer feed-forward neurons, fewer attention heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from mnemos.compress.modules.batches import evaluating, split_batch
from mnemos.compress.modules.configs import resize_heads, resize_neurons
from mnemos.compress.modules.depth import Stack, find_stack, least_needed, remove_layers, spread_out
from mnemos.compress.modules.layers import matrices, matrix_of, stages
from mnemos.compress.modules.moments import measure, run_batch
from mnemos.compress.modules.structured import (
    Numbers,
    Removed,
    choose_and_fit,
    choose_by_weights,
    find_numbers,
    kept_count,
    remove,
)
from mnemos.compress.modules.units import Units, find_units
from mnemos.errors import ModelError
from mnemos.rules import real

SHARE = real(0, 1, open_high=True)
TRACED_ROWS, TRACED_TOKENS = 2, 8  # enough to see what depends on what


def shrink(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    neurons: float = 0.0,
    heads: float = 0.0,
    layers: int = 0,
    measured: bool = True,
) -> list[Removed]:
    """Removes shares of the neurons and heads, and a number of layers; returns what became of each.

    batches: what the module runs over, at least one. measured: the batches' activations decide what goes, and what
    reads the rest is fitted to them; else the weights' norms do, and layers go at even distances.
    ConfigError: a share that is not from 0 and below 1. ModelError: none of what was asked for can be removed.
    """
    shares = {"neurons": SHARE.apply("neurons", neurons), "heads": SHARE.apply("heads", heads)}
    done: list[Removed] = []
    if layers:
        done.append(_shorten(model, batches, layers, measured))
    wanted = [kind for kind, share in shares.items() if share]
    if not wanted:
        return done
    example = few_tokens(model, batches[0])
    found = [one for one in find_units(model, matrices(model), example) if one.kind in wanted]
    removable: dict[str, tuple[Units, Numbers]] = {}
    for units in found:
        numbers = find_numbers(model, units, example)
        if numbers is None:
            reason = "forward cannot do with fewer"
            done.append(Removed(units.reader, units.kind, units.count, units.count, reason))
        else:
            removable[units.reader] = units, numbers
    for kind in wanted:
        if not any(units.kind == kind for units, _ in removable.values()):
            why = next((f": {one.reason}" for one in done if one.kind == kind), "")
            raise ModelError(
                f"{type(model).__name__} has no {kind} that can be removed{why}; expected matrices that are called as "
                "modules, one after the other, and no weights such as a norm's between them"
            )
    for names in stages(model, removable):
        moments = measure(model, {name: model.get_submodule(name) for name in names}, batches) if measured else {}
        for name in names:
            units, numbers = removable[name]
            count = kept_count(units, shares[units.kind])
            done.append(Removed(name, units.kind, units.count, count))
            if count == units.count:
                continue
            if name not in moments:
                layer_of = {one: model.get_submodule(one) for one in (name, *units.rows)}
                remove(model, units, choose_by_weights(units, layer_of, count), numbers)
                continue
            reader = model.get_submodule(name)
            weight, biased = matrix_of(reader).float(), reader.bias is not None
            kept, fitted, shift = choose_and_fit(weight, moments[name], units, count, has_bias=biased)
            remove(model, units, kept, numbers, (fitted, shift))
    _update_config(model, done)
    return done


def _shorten(model: nn.Module, batches: Sequence[Any], count: int, measured: bool) -> Removed:
    stack = find_stack(model)
    before = len(cast(Stack, model.get_submodule(stack)))
    if not 0 < count < before:
        raise ModelError(f"{type(model).__name__} has {before} layers, of which {count} cannot go; at least one stays")
    remove_layers(model, stack, least_needed(model, stack, batches, count) if measured else spread_out(before, count))
    return Removed(stack, "layers", before, before - count)


def _update_config(model: nn.Module, done: list[Removed]) -> None:
    counts = {one.after for one in done if one.kind == "neurons"}
    if counts:
        resize_neurons(model, counts)
    heads = {(one.after, one.before) for one in done if one.kind == "heads"}
    if heads:
        resize_heads(model, heads)


def few_tokens(model: nn.Module, batch: Any) -> Any:
    """The inputs of a batch, cut down to a few tokens of a few rows. ConfigError: the module does not take them."""
    inputs, _ = split_batch(batch)
    if isinstance(inputs, Tensor):
        rows = inputs[:TRACED_ROWS]
        if len(rows) == 1:  # a single row of features may be a single position: too little to see what depends on what
            rows = rows.expand(TRACED_ROWS, *rows.shape[1:])
        few: Any = rows if inputs.is_floating_point() else rows[:, :TRACED_TOKENS]
    else:
        few = {
            name: value[:TRACED_ROWS, :TRACED_TOKENS] if isinstance(value, Tensor) and value.dim() == 2 else value
            for name, value in inputs.items()
        }
    with evaluating(model):
        run_batch(model, few, 0)
    return few
