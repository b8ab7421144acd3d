"""The steps of sampling as functions on your own arrays: NumPy arrays or PyTorch tensors, (vocabulary,) or (batch,
vocabulary). They are the engine's own processors; the input is not changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mnemos.contract import Floats
from mnemos.decoding.cutoffs import TopK, TopP
from mnemos.decoding.fields import RULES
from mnemos.decoding.history import History
from mnemos.decoding.processors import Processor, RepetitionPenalty
from mnemos.decoding.ranking import nucleus
from mnemos.errors import ConfigError

COLDEST = 1e-5  # lower temperatures are raised to this, so that 0 almost always means the most probable token


def apply_temperature(logits: Any, temperature: float) -> Any:
    """logits / temperature: sharper below 1, flatter above 1. ConfigError if it is negative."""
    if not temperature >= 0:
        raise ConfigError(f"temperature is {temperature!r}; it must be a number of at least 0")
    if not hasattr(logits, "shape"):
        raise ConfigError(f"logits is a {type(logits).__name__}; expected an array or tensor")
    return logits / max(temperature, COLDEST)


def top_k_top_p_filtering(logits: Any, top_k: int = 0, top_p: float = 1.0, filter_value: float = -np.inf) -> Any:
    """Sets all but the top_k largest logits, then all outside the top_p nucleus, to `filter_value`."""
    top_k, top_p = RULES["top_k"].apply("top_k", top_k), RULES["top_p"].apply("top_p", top_p)
    chain: list[Processor] = [TopK(top_k)] if top_k else []
    if top_p < 1:
        chain.append(TopP(top_p))

    def cut(rows: Floats) -> None:
        for row in rows:
            before = row.copy()
            for processor in chain:
                processor(History([]), row)
            row[(row == -np.inf) & (before > -np.inf)] = filter_value

    return _on_rows(logits, "logits", cut)


def enforce_repetition_penalty(logits: Any, token_ids: Any, penalty: float) -> Any:
    """Makes seen tokens less probable: positive logits are divided by `penalty`, negative ones multiplied.

    token_ids: the tokens that each row has seen, (time,) for one row or (batch, time), lengths may differ.
    """
    processor = RepetitionPenalty(RULES["repetition_penalty"].apply("repetition_penalty", penalty))

    def punish(rows: Floats) -> None:
        seen = _ids(token_ids, len(rows))
        for row, ids in zip(rows, seen, strict=True):
            wrong = [token for token in ids if not 0 <= token < len(row)]
            if wrong:
                raise ConfigError(f"token_ids has {wrong[0]}; the logits have ids from 0 to {len(row) - 1}")
            processor(History(ids), row)

    return _on_rows(logits, "logits", punish)


def sample_top_p(probs: Any, p: float) -> Any:
    """Draws a token from the nucleus: the fewest most probable tokens whose sum reaches `p`.

    Returns token ids, (..., 1), as int64. Random numbers come from torch for tensors, else from numpy.random.
    """
    if not 0 < p <= 1:
        raise ConfigError(f"p is {p!r}; it must be above 0 and at most 1")
    chosen: list[int] = []

    def draw(rows: Floats) -> None:
        for row, random in zip(rows, _randoms(probs, len(rows)), strict=True):
            if not (row >= 0).all() or not 0 < row.sum(dtype=np.float64) < np.inf:
                raise ConfigError(f"the probabilities sum to {row.sum()}; they must be at least 0, some above")
            order, cumulative = nucleus(row, p)
            place = int(np.searchsorted(cumulative, random * cumulative[-1], side="right"))
            chosen.append(int(order[min(place, len(order) - 1)]))

    _on_rows(probs, "probs", draw)
    shape = (*probs.shape[:-1], 1)
    if hasattr(probs, "new_tensor"):
        import torch

        return torch.tensor(chosen, device=probs.device).reshape(shape)
    return np.array(chosen, dtype=np.int64).reshape(shape)


def _randoms(like: Any, count: int) -> list[float]:
    if hasattr(like, "new_tensor"):
        import torch

        return list(torch.rand(count, dtype=torch.float64).tolist())
    return list(np.random.random(count).tolist())


def _on_rows(values: Any, name: str, change: Callable[[Floats], None]) -> Any:
    """Applies `change` to a float32 copy (rows, vocabulary), and returns that as the same kind of array."""
    if not hasattr(values, "shape") or len(values.shape) not in (1, 2) or 0 in values.shape:
        shape = tuple(values.shape) if hasattr(values, "shape") else type(values).__name__
        raise ConfigError(f"{name} is {shape}; expected an array or tensor (vocabulary,) or (batch, vocabulary)")
    tensor = hasattr(values, "new_tensor")
    array = values.detach().float().cpu().numpy() if tensor else values
    rows = np.array(array, dtype=np.float32, ndmin=2)
    change(rows)
    rows = rows.reshape(tuple(values.shape))
    if not tensor:
        return rows.astype(values.dtype if np.issubdtype(values.dtype, np.floating) else np.float32)
    import torch

    dtype = values.dtype if values.dtype.is_floating_point else torch.float32
    return torch.from_numpy(rows).to(device=values.device, dtype=dtype)


def _ids(token_ids: Any, rows: int) -> Sequence[list[int]]:
    listed = token_ids.tolist() if hasattr(token_ids, "tolist") else list(token_ids)
    if not any(isinstance(item, (list, tuple)) for item in listed):
        listed = [listed]
    if len(listed) != rows:
        raise ConfigError(f"token_ids has {len(listed)} rows; the logits have {rows}")
    return [[int(token) for token in row] for row in listed]
