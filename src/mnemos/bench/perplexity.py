"""Log likelihood of a text, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine


def score_chunks(
    engine: InferenceEngine, token_ids: Sequence[int], chunk: int
) -> Iterator[tuple[npt.NDArray[np.float64], int]]:
    """Yields, for each chunk, the log likelihoods of its tokens but the first, and the number of tokens done so far.

    Chunks of `chunk` tokens follow one another without overlap; a last one that is shorter counts if it has two tokens.
    """
    for start in range(0, len(token_ids), chunk):
        part = list(token_ids[start : start + chunk])
        if len(part) > 1:
            yield log_likelihoods(engine.logits(part)[:-1], part[1:]), start + len(part)


def log_likelihoods(logits: npt.NDArray[np.float32], targets: Sequence[int]) -> npt.NDArray[np.float64]:
    """log softmax(logits (T, vocabulary))[t, targets[t]], (T,)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))
    return np.asarray(shifted[np.arange(len(targets)), np.asarray(targets)] - normaliser)
