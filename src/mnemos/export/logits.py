"""A written model beside its source: the logits of the same tokens."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats
from mnemos.errors import CapacityError, ModelError
from mnemos.formats.checkpoint import Checkpoint

LENGTHS = (1, 7, 33)  # tokens; shorter ones where the context is
SEEDS = 2
_TEXTS, _WRITTEN = 8, 63  # texts that a model writes, and their tokens after the first
Logits = list[Floats]


@dataclass(frozen=True)
class Found:
    """error: the largest difference over max(1, the largest logit); shapes and inputs that were tried; notes."""

    error: float
    shapes: tuple[str, ...]
    inputs: int
    notes: tuple[str, ...] = ()


def compare_logits(source: Checkpoint, module: Any, written: Checkpoint, tolerance: float | None, what: str) -> Found:
    """Runs what was written and its source, one after the other, on random tokens.

    module: a source in memory, which is run itself. tolerance: the largest error allowed; None: any, of weights in
    another type. ModelError: it is larger, or not a number. Where memory does not suffice for float32, both are run
    with the weights as they are stored, and where it does not for that, a note says that they were not compared.
    """
    for dtype in ("float32", "auto"):
        try:
            with _engine(written, dtype) as engine:
                prompts = _prompts(engine.spec.vocabulary_size, engine.spec.context_length)
                found = [engine.logits(ids) for ids in prompts]
            expected = _expected(source, module, dtype, prompts)
        except CapacityError as error:
            problem = f"not compared with its source: {error}"
            continue
        difference = float(np.max([_error(have, want) for have, want in zip(found, expected, strict=True)]))
        if not difference <= (np.finfo(np.float32).max if tolerance is None else tolerance):
            raise ModelError(
                f"{what} differs from the model by {difference:.3g} of the largest logit; expected {tolerance or 0:.0e}"
            )
        shapes = tuple(dict.fromkeys(f"{len(ids)} token{'s' if len(ids) > 1 else ''}" for ids in prompts))
        notes = () if dtype == "float32" else ("compared with the weights as they are stored, for lack of memory",)
        return Found(difference, shapes, len(prompts), notes)
    return Found(float("nan"), (), 0, (problem,))


def divergence(model: Checkpoint, other: Checkpoint) -> tuple[float, int]:
    """(the mean Kullback-Leibler divergence of the other's next-token probabilities from the model's, in nats; how many
    tokens it was measured on), of texts that the model writes at temperature 1, each from one random token."""
    with _engine(model, "float32") as engine:
        vocabulary, length = engine.spec.vocabulary_size, min(_WRITTEN, engine.spec.context_length - 1)
        starts = np.random.default_rng(0).integers(0, vocabulary, (_TEXTS, 1))
        free = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "ignore_eos": True, "seed": 0}
        written = engine.generate(starts, max_new_tokens=length, **free).tolist()
        own = [_log_probabilities(engine.logits(ids)) for ids in written]
    with _engine(other, "float32") as engine:
        others = [_log_probabilities(engine.logits(ids)) for ids in written]
    rows = [(np.exp(p) * (p - q)).sum(-1) for p, q in zip(own, others, strict=True)]
    values = np.concatenate(rows)
    return float(values.mean()), values.size


def _log_probabilities(logits: Floats) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def _prompts(vocabulary: int, context: int) -> list[list[int]]:
    lengths = dict.fromkeys(min(length, context) for length in LENGTHS)
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, length).tolist() for length in lengths for _ in range(SEEDS)]


@contextmanager
def _engine(checkpoint: Checkpoint, dtype: str) -> Iterator[Any]:
    from mnemos.engine.engine import InferenceEngine
    from mnemos.models.load import load_model

    engine = InferenceEngine(load_model(checkpoint, dtype=dtype))
    try:
        with engine:
            yield engine
    finally:
        del engine
        gc.collect()


def _expected(source: Checkpoint, module: Any, dtype: str, prompts: list[list[int]]) -> Logits:
    if module is None:
        with _engine(source, dtype) as engine:
            return [engine.logits(ids) for ids in prompts]
    import torch

    from mnemos.compress.modules.batches import evaluating, logits_of

    with evaluating(module), torch.no_grad():
        return [logits_of(module, torch.tensor([ids]))[0].float().cpu().numpy() for ids in prompts]


def _error(have: Floats, want: Floats) -> float:
    scale = max(1.0, float(np.abs(want).max(initial=0.0)))
    return float(np.abs(have.astype(np.float64) - want).max(initial=0.0)) / scale
