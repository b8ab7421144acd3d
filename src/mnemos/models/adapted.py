"""A checkpoint's weights with adapters in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mnemos.contract import Floats
from mnemos.errors import FormatError
from mnemos.formats.adapters import Adapter, Pair
from mnemos.formats.blocks import encode
from mnemos.formats.checkpoint import Checkpoint
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.models.placement import Place, places

MERGED_TYPE = TensorType.F16  # of weights that were quantized: rounding to few bits again could undo an adapter


def with_adapters(checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> Checkpoint:
    """The checkpoint of a built-in architecture with adapters merged into it in memory, each with its strength.

    Changed weights keep their type; quantized ones become float16. FormatError: an adapter of another model.
    """
    changes = WeightChanges(checkpoint, adapters)
    tensors = dict(checkpoint.tensors)
    for name in changes.names:
        tensor = tensors[name]
        type_ = MERGED_TYPE if tensor.type.is_quantized else tensor.type
        tensors[name] = replace(tensor, type=type_, data=encode(changes.values(name)[1], type_))
    return replace(checkpoint, tensors=tensors)


class WeightChanges:
    """Which tensors of a checkpoint the adapters change, and how."""

    def __init__(self, checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self.tensors = checkpoint.tensors
        self._steps: dict[str, list[tuple[Place, Pair | Tensor, float]]] = {}
        known = places(checkpoint)
        for adapter, strength in adapters:
            for name, tensor in adapter.whole.items():  # first: they may be what the factors are added to
                module, _, suffix = name.rpartition(".")
                place = known.find(module) if suffix == "weight" else None
                if place is None or self.tensors[place.tensor].shape != tensor.shape:
                    raise FormatError(
                        f"{adapter.path}: holds {name} {list(tensor.shape)}, which has no place in {checkpoint.path}"
                    )
                self._steps.setdefault(place.tensor, []).append((place, tensor, strength))
            for module, pair in adapter.pairs.items():
                place = known.find(module)
                if place is None:
                    raise FormatError(
                        f"{adapter.path}: changes {module}, which {checkpoint.path} does not have; expected an adapter "
                        f"of this model{f' (it was trained on {adapter.base})' if adapter.base else ''}"
                    )
                if place.transposed is not None:
                    pair = replace(pair, transposed=place.transposed)
                shape = self.tensors[place.tensor].shape
                if shape != pair.shape:
                    raise FormatError(
                        f"{adapter.path}: {module} has factors for a weight of shape {list(pair.shape)}; that of "
                        f"{checkpoint.path} is {list(shape)}"
                    )
                self._steps.setdefault(place.tensor, []).append((place, pair, strength))

    @property
    def names(self) -> list[str]:
        """The tensors that are changed."""
        return list(self._steps)

    def __contains__(self, name: str) -> bool:
        return name in self._steps

    def values(self, name: str) -> tuple[Floats, Floats]:
        """(a tensor's values before, after), float32 as stored."""
        before = self.tensors[name].dequantize()
        after = before
        for place, change, strength in self._steps[name]:
            ordered = after if place.rows is None else after[place.rows]
            if isinstance(change, Pair):
                ordered = change.merged(ordered, strength)
            else:  # a tensor that was trained whole
                ordered = ordered + np.float32(strength) * (change.dequantize() - ordered)
            after = ordered
            if place.rows is not None:
                after = np.empty_like(ordered)
                after[place.rows] = ordered
        return before, after
