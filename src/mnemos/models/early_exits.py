"""Logits of what enters a model's layers, by its own output projection, besides its last ones."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from mnemos.contract import Cache
from mnemos.models.blocks import Architecture, DecoderLayer
from mnemos.ops.protocol import Array, Ops


class EarlyExits:
    """An architecture's forward with the logits of some layers' inputs after its own output; see `Batch.early_layers`.

    As in transformers, the last norm and what follows the output projection are left out.
    """

    def __init__(self, architecture: Architecture, layers: Sequence[int]) -> None:
        self._architecture = architecture
        self._layers = tuple(layers)

    def __call__(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, ...]:
        inputs: dict[int, Array] = {}
        watched = copy(self._architecture)
        watched.layers = [
            _Watched(layer, inputs, number) if number in self._layers else layer
            for number, layer in enumerate(self._architecture.layers)
        ]
        hidden, logits = watched.forward(ops, batch, cache)
        return hidden, logits, *(ops.linear(inputs[number], watched.lm_head) for number in self._layers)


@dataclass(frozen=True)
class _Watched:
    """A layer that keeps the rows of its input whose logits are wanted."""

    layer: DecoderLayer
    inputs: dict[int, Array]
    number: int

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        self.inputs[self.number] = ops.rows(x, batch.logit_rows)
        return self.layer(ops, x, batch, cache, wanted)
