"""What a memory-augmented model returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from mnemos.models.memory_transformer.routing import Route


@dataclass
class MemoryOutput:
    """What a forward call returns. Fields can be read by name too, as in a dict, or by number among those that are set.

    logits (B, T, vocabulary); loss where labels were given; past_key_values of a cached call; hidden (B, T, H): the
    input of the output projection; routes: the chapters of each memory layer.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden: Tensor | None = None
    routes: dict[int, Route] | None = None

    def keys(self) -> list[str]:
        """The names of the fields that are set."""
        return [entry.name for entry in fields(self) if getattr(self, entry.name) is not None]

    def __getitem__(self, key: str | int) -> Any:
        return getattr(self, key if isinstance(key, str) else self.keys()[key])
