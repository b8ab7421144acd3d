"""Where a checkpoint keeps the weights of a model's modules, by their names in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.formats.checkpoint import Checkpoint
from mnemos.formats.tensor import Tensor
from mnemos.models.load import describe_architecture
from mnemos.models.weights import Weights, without_prefix
from mnemos.ops.protocol import Matrix, Rows


@dataclass(frozen=True)
class Place:
    """The tensor of a weight.

    rows (rows,): which of its rows are those of transformers' weight, in that order; None: as they are, as in every
    Hugging Face file. transposed:
    whether it is stored as (in, out); None: not known, as transformers does.
    """

    tensor: str
    rows: npt.NDArray[np.intp] | None = None
    transposed: bool | None = None


class _Recorder(Weights):
    """Notes which tensor each weight is read from, and in which order."""

    def __init__(self, path: Path | str, tensors: Mapping[str, Tensor], names: Mapping[str, str] | None) -> None:
        super().__init__(path, tensors, None, names)
        self.found: dict[str, Place] = {}

    def matrix(
        self, name: str, rows: int, columns: int, *, take: Rows | slice | None = None, transposed: bool = False
    ) -> Matrix:
        # A Hugging Face file has the rows of transformers, in whatever order the model takes them.
        order = None if take is None or isinstance(take, slice) or not self.is_gguf else np.asarray(take)
        self.found[name] = Place(self.file_name(name), order, transposed)
        return super().matrix(name, rows, columns, take=take, transposed=transposed)


@dataclass(frozen=True)
class Places:
    """The weights of a checkpoint's model."""

    found: Mapping[str, Place]
    tensors: Mapping[str, Any]

    def find(self, module: str) -> Place | None:
        """Where the weight of a module is, by its full name, such as model.layers.0.self_attn.q_proj."""
        place = self.found.get(without_prefix(module))
        if place is None and f"{module}.weight" in self.tensors:
            return Place(f"{module}.weight")
        return place


def places(checkpoint: Checkpoint) -> Places:
    """Where the weights of a built-in architecture are. The errors of `describe_model`."""
    architecture, fields = describe_architecture(checkpoint)
    names = architecture.gguf_names if checkpoint.kind == "gguf" else None
    recorder = _Recorder(checkpoint.path, checkpoint.tensors, names)
    architecture(fields, recorder)
    return Places(recorder.found, checkpoint.tensors)
