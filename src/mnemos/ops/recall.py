"""Which earlier pages a row sees, as the reference computes it; see `Recall` in contract.py.

All arithmetic is exact, in integers or in single float32 operations: the choice is the same with any instruction set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats, Ints, Recall
from mnemos.ops.protocol import AttentionParams, RopeParams

Bytes = npt.NDArray[np.int8]
KEY_LEVELS, QUERY_LEVELS = 124, 127  # the largest whole numbers that a run's keys and a query are scaled to
RUN = 32  # neighbouring keys that are indexed together


def quantize(x: Floats, levels: int) -> tuple[Bytes, Floats]:
    """Whole numbers from -levels to levels, in proportion to the last axis of x, and the scale of each such row."""
    most = np.abs(x).max(axis=-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(most > 0, np.float32(levels) / most, np.float32(0))
    codes = np.rint(x * inverse[..., None]).astype(np.int8)
    return codes, (most / np.float32(levels)).astype(np.float32)


def index_keys(keys: Floats) -> tuple[Bytes, Floats]:
    """The index of keys (..., components), whose number is a multiple of 32: whole numbers, and their scales (...).

    In each run of 32 neighbouring keys a component takes eight values, equally far apart, so that it is stored in 3
    bits (KIVI, Liu et al. 2024, arXiv:2402.02750, shows why by component: those that are large are so in every key).
    """
    runs = keys.reshape(-1, RUN, keys.shape[-1])
    codes, scales = quantize(runs.reshape(len(runs), RUN * keys.shape[-1]), KEY_LEVELS)
    levels = codes.reshape(runs.shape).astype(np.int32)
    least, largest = levels.min(axis=1, keepdims=True), levels.max(axis=1, keepdims=True)
    step = np.maximum((largest - least + 3) // 7, 1)
    low = least + (largest - least - 7 * step >> 1)
    steps = np.minimum((2 * np.maximum(levels - low, 0) + step) // (2 * step), 7)
    values = (low + step * steps).astype(np.int8).reshape(keys.shape)
    return values, scales.repeat(RUN).reshape(keys.shape[:-1])


def page_scores(queries: Floats, codes: Bytes, scales: Floats) -> tuple[Floats, Floats]:
    """How well each page suits each query of a row in one key/value head: the product with the page's best key
    (group, pages), and what it is to be multiplied by (group,).

    queries (group, components), scaled as for attention; codes (pages, page_size, components) and scales
    (pages, page_size) as `index_keys` makes them of whole pages.
    """
    small, factors = quantize(queries, QUERY_LEVELS)
    dots = np.einsum("gd,pkd->gpk", small.astype(np.int32), codes.astype(np.int32)).astype(np.float32)
    return (dots * scales).max(axis=2), factors


def seen_pages(
    recall: Recall, page_size: int, page: int, queries: Floats, codes: Bytes, scales: Floats, recalls: bool
) -> npt.NDArray[np.bool_]:
    """Which pages a row in page number `page` sees in one key/value head: (page + 1,).

    queries (group, components); codes and scales hold the index of the pages before `page`, if the head recalls. Each
    query of the group names as many pages as the row recalls, those that suit it best. Of all that are named, the row
    recalls those whose score is nearest to that of the best page of a query that named them; ties go to the lower page.
    """
    sinks, chosen, window = (n // page_size for n in (recall.sinks, recall.recall, recall.window))
    seen = np.ones(page + 1, dtype=np.bool_)
    if page < sinks + chosen + window:
        return seen
    if not recalls:
        seen[sinks : page - chosen - window + 1] = False
        return seen
    candidates = slice(sinks, page - window + 1)
    scores, factors = page_scores(queries, codes, scales)
    named = sinks + np.argsort(-scores[:, candidates], axis=1, kind="stable")[:, :chosen]
    scores *= factors[:, None]
    scores -= scores.max(axis=1, keepdims=True)
    best = np.full(page + 1, -np.inf, dtype=np.float32)
    for own, pages in zip(scores, named, strict=True):
        best[pages] = np.maximum(best[pages], own[pages])
    seen[candidates] = False
    seen[np.argsort(-best, kind="stable")[:chosen]] = True
    return seen


def see_from_nearer(
    rotate: Callable[[Floats, Ints, RopeParams], Floats],
    scores: Floats,
    queries: Floats,
    keys: Floats,
    positions: Ints,
    page_size: int,
    farthest: int,
    params: AttentionParams,
) -> None:
    """Replaces the scores (heads, rows, keys) of pages that are too far back, see `Recall.farthest`.

    queries (rows, heads, head size), rotated for their positions (rows,) by params.rope; keys (keys, heads, head size).
    """
    assert params.rope is not None
    rope = replace(params.rope, magnitude=1.0)
    for first in range(0, len(keys), page_size):
        rows = positions // page_size * page_size - first > farthest
        if not rows.any():
            return
        own = queries[rows]
        moved = rotate(own.reshape(len(own), -1), first + farthest - positions[rows], rope).reshape(own.shape)
        page = slice(first, first + page_size)
        scores[:, rows, page] = np.einsum("ihd,jhd->hij", moved, keys[page]) * np.float32(params.scale)


def recalled_effects(recall: Recall, page_size: int, probabilities: Floats, values: Floats, positions: Ints) -> Floats:
    """What those rows that do not see all of their text get from between its sinks and their windows, (2, rows, heads):
    the share of their attention, and how far it moves their result from that of the other positions that they see.

    probabilities (heads, rows, keys); values (keys, heads, head size); positions (rows,).
    """
    first = (positions // page_size + 1) * page_size - recall.window  # of each row's window
    past = np.arange(probabilities.shape[2])
    recalled = np.where((past >= recall.sinks) & (past < first[:, None]), probabilities, 0)
    shares = recalled.sum(axis=2).T
    result, part = (np.einsum("hij,jhd->ihd", p, values) for p in (probabilities, recalled))
    changes = np.linalg.norm(part - shares[:, :, None] * result, axis=2) / np.maximum(1 - shares, 1e-3)
    return np.stack((shares, changes))[:, positions // page_size * page_size >= recall.positions]
