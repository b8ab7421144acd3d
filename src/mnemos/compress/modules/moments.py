"""What the inputs of a module's layers are like: their first and second moments over some batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.compress.modules.batches import call, evaluating, split_batch
from mnemos.errors import ConfigError, MnemosError, ModelError
from mnemos.formats.mapping import excerpt

FEWEST_ROWS = 16  # fewer say next to nothing about a layer's inputs


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

    A layer that is never called has no entry. Memory: columns^2 float32 for each layer. ConfigError: the module takes
    no such batch, or all together have fewer than FEWEST_ROWS rows. ModelError: an input is not finite.
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
            for number, batch in enumerate(batches):
                run_batch(model, batch, number)
    finally:
        for hook in hooks:
            hook.remove()
    most = max((rows for _, _, rows in sums.values()), default=FEWEST_ROWS)
    if most < FEWEST_ROWS:
        raise ConfigError(
            f"batches have {most} rows or tokens in all; expected {FEWEST_ROWS} or more, better thousands"
        )
    found = {}
    for name, (total, products, rows) in sums.items():
        if not bool(torch.isfinite(products).all()):
            raise ModelError(f"the inputs of {name} are NaN or infinite on the batches given; expected finite values")
        if rows:
            found[name] = Moments(total / rows, products / rows, rows)
    return found


def run_batch(model: nn.Module, batch: Any, number: int) -> None:
    """Runs the module over one of the batches. ConfigError: it does not take it; its own error is the cause."""
    try:
        call(model, split_batch(batch)[0])
    except MnemosError:
        raise
    except Exception as error:
        raise ConfigError(
            f"batch {number} cannot be run: {type(error).__name__}: {excerpt(str(error))}; expected what "
            f"{type(model).__name__}.forward takes"
        ) from error
