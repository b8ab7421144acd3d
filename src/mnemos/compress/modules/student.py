"""`student_of`: a smaller copy of a model, made of its own layers, to distill it into."""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

from torch import nn

from mnemos.compress.modules.batches import listed
from mnemos.compress.modules.depth import Stack, find_stack
from mnemos.compress.modules.layers import check_module, matrices
from mnemos.compress.modules.own_text import own_text
from mnemos.compress.modules.shrink import few_tokens, shrink
from mnemos.compress.modules.units import find_units, size_of
from mnemos.errors import ConfigError, shown
from mnemos.rules import real

SHARE = real(0, 1, open_low=True)
MOST_NEURONS = 0.9  # of them may go; what is still too large then loses layers,
MOST_NEURONS_TOO = 0.75  # and no more of its neurons than this where there are layers left to lose


def student_of(
    model: nn.Module,
    layers: int | float | None = None,
    width: float | None = None,
    *,
    heads: float | None = None,
    size: float | None = None,
    batches: Any = None,
) -> nn.Module:
    """A smaller copy of a model that keeps of its layers, neurons and heads those that matter most.

    layers   how many stay, or which share of them
    width    the share of the feed-forward neurons that stays
    heads    the share of the attention heads that stays, where forward can do with fewer
    size     the share of the parameters that stays, instead of these: first fewer neurons, then fewer layers. 0.5 if
             nothing is given
    batches  what decides what matters, as for `PrunedModel`; None: a language model's own guesses

    Errors: ConfigError for values that are not allowed, ModelError for a model without such parts.
    """
    check_module(model)
    own = {"layers": layers, "width": width, "heads": heads}
    if size is not None and any(value is not None for value in own.values()):
        given = ", ".join(name for name, value in own.items() if value is not None)
        raise ConfigError(f"size is {size} together with {given}; give one or the other")
    for name, value in (("width", width), ("heads", heads), ("size", size)):
        if value is not None:
            SHARE.apply(name, value)
    matrices(model)  # named where its weights are not finite
    student = copy.deepcopy(model)
    data = [own_text(student)] if batches is None else listed(batches)
    if data[0] is None:
        raise ConfigError(
            f"{type(model).__name__} is no language model that could be run over its own text; give batches"
        )
    if all(value is None for value in own.values()):
        _shrink_to(student, data, 0.5 if size is None else size)
        return student
    gone = 0 if layers is None else _layers_gone(student, layers)
    shrink(
        student,
        data,
        neurons=0.0 if width is None else 1 - width,
        heads=0.0 if heads is None else 1 - heads,
        layers=gone,
    )
    return student


def _layers_gone(model: nn.Module, layers: int | float) -> int:
    before = len(cast(Stack, model.get_submodule(find_stack(model))))
    whole = isinstance(layers, int) and not isinstance(layers, bool)
    kept = layers if whole else round(before * SHARE.apply("layers", layers))
    if not 1 <= kept <= before:
        raise ConfigError(f"layers is {shown(layers)}; the model has {before}, of which 1 to {before} can stay")
    return before - int(kept)


def _shrink_to(student: nn.Module, data: list[Any], size: float) -> None:
    """Removes neurons, and layers where these are not enough, until `size` of the parameters are left."""
    total = sum(p.numel() for p in student.parameters())
    layers = matrices(student)
    found = find_units(student, layers, few_tokens(student, data[0]))
    neurons = sum(size_of(units, layers) for units in found if units.kind == "neurons")
    gone = (1 - size) * total
    if neurons * MOST_NEURONS >= gone:
        shrink(student, data, neurons=gone / neurons)
        return
    stack = student.get_submodule(find_stack(student))
    count = len(cast(Stack, stack))
    each = sum(p.numel() for p in stack.parameters()) / count
    best = (float("inf"), 0.0, 0)
    for fewer in range(count):
        inside = neurons * (count - fewer) / count
        most = MOST_NEURONS_TOO if fewer else MOST_NEURONS
        share = min(max((gone - fewer * each) / inside, 0.0), most) if inside else 0.0
        best = min(best, (abs(gone - fewer * each - share * inside), share, fewer))
    shrink(student, data, neurons=best[1], layers=best[2])
    left = sum(p.numel() for p in student.parameters()) / total
    if left > 1.1 * size:
        warnings.warn(
            f"size is {size} and {left:.2f} of the parameters are left: the others are in no layer or neuron",
            stacklevel=3,
        )
