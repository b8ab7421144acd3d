"""Texts that a student or a teacher writes while the student is trained, by way of the engine."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mnemos.compress.modules.batches import IGNORED, ids_of

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine


class Writer:
    """Continues halves of texts with a module, whose weights may change in between. A context manager."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._engine: InferenceEngine | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is not None:
            self._engine.close()

    def continue_half(self, inputs: Any, seed: int) -> tuple[dict[str, Tensor] | Tensor, Tensor]:
        """(inputs, labels) of texts that begin with the first half of each row's tokens and go on as the module does.

        Sampled at temperature 1, to the rows' length at most; the labels are of what was written.
        """
        from mnemos.engine.engine import InferenceEngine

        if self._engine is None:
            self._engine = InferenceEngine(self._model, prefix_cache=False)
        ids = ids_of(inputs)
        mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
        rows = [row.tolist() if mask is None else row[mask[i].bool()].tolist() for i, row in enumerate(ids)]
        halves = [row[: max(len(row) // 2, 1)] for row in rows]
        handles = [
            self._engine.submit(
                half, do_sample=True, temperature=1.0, max_new_tokens=max(len(row) - len(half), 1), seed=seed + i
            )
            for i, (half, row) in enumerate(zip(halves, rows, strict=True))
        ]
        texts = [half + handle.result().token_ids for half, handle in zip(halves, handles, strict=True)]
        lengths = torch.tensor([len(text) for text in texts])
        new = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
        labels = torch.full_like(new, IGNORED)
        for i, (text, half) in enumerate(zip(texts, halves, strict=True)):
            new[i, : len(text)] = torch.tensor(text)
            labels[i, len(half) - 1 : len(text) - 1] = new[i, len(half) : len(text)]
        if mask is None:
            return new, labels
        return {"input_ids": new, "attention_mask": (torch.arange(new.shape[1]) < lengths[:, None]).long()}, labels
