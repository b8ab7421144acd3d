"""Batches for models that keep slots and no pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mnemos.contract import Batch

Part = tuple[int, int, list[int]]  # slot, first position, new tokens


def batch_of(*parts: Part, rows: Sequence[int] | None = None) -> Batch:
    """The parts as one batch, with the logits of `rows` asked for, by default of all."""
    starts = np.cumsum([0, *(len(new) for _, _, new in parts)])
    return Batch(
        token_ids=_ints([token for _, _, new in parts for token in new]),
        positions=_ints([start + offset for _, start, new in parts for offset in range(len(new))]),
        sequence_starts=_ints(starts),
        pages=_ints([]),
        page_positions=_ints([]),
        page_starts=_ints([0] * (len(parts) + 1)),
        logit_rows=_ints(range(starts[-1]) if rows is None else rows),
        states=_ints([slot for slot, _, _ in parts]),
    )


def _ints(values: object) -> np.ndarray:
    return np.array(values, dtype=np.int32)
