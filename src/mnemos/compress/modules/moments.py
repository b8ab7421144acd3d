"""What the inputs of a module's layers are like: their first and second moments over some batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.compress.modules.batches import call, evaluating, split_batch
from mnemos.errors import ModelError


@dataclass
class Moments:
    """Of one layer's inputs, over all their rows.

    mean    (columns,) float32
    second  (columns, columns) float32, the mean of x x^T
    rows    how many rows were seen
    """

    mean: Tensor
    second: Tensor
    rows: int

    def covariance(self) -> Tensor:
        """The second moments about the mean: what matters where a bias can make up for the mean."""
        return self.second - torch.outer(self.mean, self.mean)


def measure(model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any]) -> dict[str, Moments]:
    """The moments of the inputs of `layers` while `model` runs over the batches, in evaluation mode.

    A layer that is never called has no entry. Memory: columns^2 float32 for each layer. ModelError: an input is not
    finite.
    """
    sums: dict[str, list[Any]] = {}
    names = {layer: name for name, layer in layers.items()}

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2).float()
        held = sums.setdefault(names[layer], [0, 0, 0])
        held[0] = held[0] + rows.sum(0)
        held[1] = held[1] + rows.T @ rows
        held[2] += len(rows)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    try:
        with evaluating(model):
            for batch in batches:
                call(model, split_batch(batch)[0])
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, (total, products, rows) in sums.items():
        if not bool(torch.isfinite(products).all()):
            raise ModelError(f"the inputs of {name} are NaN or infinite on the batches given; expected finite values")
        if rows:
            found[name] = Moments(total / rows, products / rows, rows)
    return found
