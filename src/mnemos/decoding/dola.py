"""Decoding by contrasting layers. Chuang et al. 2023, arXiv:2309.03883; the details are those of transformers 4."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats, ModelSpec
from mnemos.decoding.history import History
from mnemos.errors import RequestError, UnsupportedError

PLAUSIBLE = 0.1  # of the most probable token's probability: less probable ones are left out
MOST_SPREAD = 40  # layers; in deeper models, the candidates are among the first or last 20


def early_layers(wanted: str | tuple[int, ...], spec: ModelSpec) -> tuple[int, ...]:
    """The layers, by number, whose inputs are contrasted with the model's output.

    UnsupportedError for a model that does not show them, RequestError for a layer that it does not have.
    """
    count = spec.layers
    if not count:
        raise UnsupportedError(
            f"dola_layers is {wanted!r} and {spec.architecture} does not show its layers; built-in architectures do"
        )
    half, far = (count // 2, count // 2) if count <= MOST_SPREAD else (20, count - 20)
    if wanted == "high":
        return tuple(range(far, count, 2))
    if wanted == "low":
        # Where the projection is the embedding, what enters the first layers is the last token itself.
        first = min(2, count - 1) if spec.tied_embeddings else 0
        return tuple(range(first, half, 2)) or (first,)
    layers = tuple(sorted({int(layer) for layer in wanted}))
    if layers[-1] >= count:
        raise RequestError(f"dola_layers has the layer {layers[-1]}; the model's are 0 to {count - 1}")
    return layers


class Dola:
    """Replaces logits by what the layers after an early one add to them, among the plausible tokens.

    Of the candidates in `history.early`, the layer whose distribution is farthest from the last one, by Jensen-Shannon
    divergence, is the one contrasted.
    """

    def __call__(self, history: History, logits: Floats) -> None:
        assert history.early is not None
        last = _log_softmax(logits[None])
        early = _log_softmax(history.early)
        base = early[int(np.argmax(_divergence(last, early)))] if len(early) > 1 else early[0]
        plausible = last[0] >= last.max() + np.float32(np.log(PLAUSIBLE))
        logits[:] = np.where(plausible, last[0] - base, np.float32(-np.inf))


def _log_softmax(rows: Floats) -> Floats:
    shifted = rows - rows.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    return np.asarray(shifted - np.log(total), dtype=np.float32)


def _divergence(last: Floats, early: Floats) -> npt.NDArray[np.float64]:
    """The Jensen-Shannon divergence, up to a factor, of each row of `early` from the row of `last`."""
    mixed = 0.5 * (np.exp(last) + np.exp(early))
    with np.errstate(divide="ignore", invalid="ignore"):
        log_mixed = np.log(mixed)
        terms = mixed * (log_mixed - last) + mixed * (log_mixed - early)
    return np.asarray(np.where(mixed > 0, terms, 0).mean(axis=1, dtype=np.float64))
