"""Runs a model step by step as the engine does: ragged batches, chunks, pages anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mnemos.contract import Batch, Model, Output


def ints(values: Sequence[int]) -> np.ndarray:
    return np.asarray(list(values), dtype=np.int32)


class Session:
    """A few texts, each with its own pages; `step` evaluates the next tokens of some of them in one batch."""

    def __init__(self, model: Model, page_lists: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.pages = [list(pages) for pages in page_lists]
        self.lengths = [0] * len(page_lists)

    def step(self, chunks: dict[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """Logits of every new token: text number -> float32 (new tokens, vocabulary)."""
        logits = self.outputs(chunks).logits.copy()
        starts = np.cumsum([0, *(len(chunk) for chunk in chunks.values())])
        return {text: logits[starts[i] : starts[i + 1]] for i, text in enumerate(chunks)}

    def outputs(self, chunks: dict[int, Sequence[int]], rows: Sequence[int] | None = None) -> Output:
        """The model's own output for some rows of the batch, or all; views that the next step may overwrite."""
        token_ids, positions, starts, pages, firsts, page_starts = [], [], [0], [], [], [0]
        page_size = self.model.spec.layout.page_size
        for text, chunk in chunks.items():
            token_ids += chunk
            positions += range(self.lengths[text], self.lengths[text] + len(chunk))
            self.lengths[text] += len(chunk)
            starts.append(len(token_ids))
            for _ in self.model.spec.layout.groups:
                pages += self.pages[text]
                firsts += range(0, page_size * len(self.pages[text]), page_size)
                page_starts.append(len(pages))
        wanted = range(len(token_ids)) if rows is None else rows
        arrays = token_ids, positions, starts, pages, firsts, page_starts, wanted
        return self.model.forward(Batch(*map(ints, arrays)))


def whole(model: Model, token_ids: Sequence[int], pages: Sequence[int]) -> np.ndarray:
    """All logits of one text, evaluated at once."""
    return Session(model, [pages]).step({0: list(token_ids)})[0]
