"""Logits processors and stopping criteria of transformers, which work on PyTorch tensors of a batch of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from mnemos.contract import Floats

_PROCESSORS = {"LogitsProcessor", "LogitsProcessorList", "LogitsWarper"}
_CRITERIA = {"StoppingCriteria", "StoppingCriteriaList"}


def plain_processor(function: Any) -> Callable[[Sequence[int], Floats], Any]:
    """f(token_ids, logits) of a processor: of transformers' classes and what derives from them, or as it is.

    Theirs get all token ids, int64 (1, time), and the logits, float32 (1, vocabulary).
    """
    if not derives(function, _PROCESSORS):
        return cast("Callable[[Sequence[int], Floats], Any]", function)

    def process(token_ids: Sequence[int], logits: Floats) -> Any:
        import torch

        return function(torch.tensor([token_ids]), torch.from_numpy(logits.copy())[None]).numpy(force=True)

    process.__name__ = type(function).__name__  # for errors
    return process


def plain_criterion(function: Any) -> Callable[[Sequence[int]], Any]:
    """f(token_ids) of a stopping criterion: of transformers' classes and what derives from them, or as it is.

    Theirs get all token ids, int64 (1, time), and no scores.
    """
    if not derives(function, _CRITERIA):
        return cast("Callable[[Sequence[int]], Any]", function)

    def met(token_ids: Sequence[int]) -> Any:
        import torch

        return function(torch.tensor([token_ids]), None)

    met.__name__ = type(function).__name__  # for errors
    return met


def derives(function: Any, names: set[str]) -> bool:
    """Whether it is of one of transformers' classes; told by their names, as importing that library takes seconds."""
    return any(
        kind.__name__ in names and kind.__module__.partition(".")[0] == "transformers"
        for kind in type(function).__mro__
    )
