"""The first logits of a model: a record by which it is recognized, and how far another answer is from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mnemos.contract import FirstLogits, Floats


def prompt_for(vocabulary_size: int) -> tuple[int, ...]:
    """Eight ids from all over a vocabulary."""
    return tuple((11 + 7919 * i) % vocabulary_size for i in range(8))


def record(prompt: Sequence[int], row: Floats) -> FirstLogits:
    """The record of a row of finite logits (vocabulary,) after a prompt, rounded to 5 digits."""
    tokens = tuple(int(i) for i in np.linspace(0, len(row) - 1, min(16, len(row))).astype(np.int64))
    logits = tuple(float(f"{row[token]:.5g}") for token in tokens)
    return FirstLogits(tuple(prompt), tokens, logits, float(f"{row.max() - row.min():.5g}"))


def distance(expected: FirstLogits, row: Floats) -> float:
    """The largest difference of the logits of a row (vocabulary,) from the recorded ones, over the spread."""
    differences = np.abs(row[list(expected.tokens)] - np.asarray(expected.logits, dtype=np.float32))
    return float(differences.max() / max(expected.spread, float(np.finfo(np.float32).tiny)))
