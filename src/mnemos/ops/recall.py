"""Which earlier pages a row sees, as the reference computes it; see `Recall` in contract.py.

All arithmetic is exact, in integers or in single float32 operations: the choice is the same with any instruction set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats, Recall

Bytes = npt.NDArray[np.int8]
KEY_LEVELS, QUERY_LEVELS = 7, 127  # the largest quantized value of a key's component, and of a query's


def quantize(x: Floats, levels: int) -> tuple[Bytes, Floats]:
    """Whole numbers from -levels to levels, in proportion to the last axis of x, and the scale of each such row."""
    most = np.abs(x).max(axis=-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(most > 0, np.float32(levels) / most, np.float32(0))
    codes = np.rint(x * inverse[..., None]).astype(np.int8)
    return codes, (most / np.float32(levels)).astype(np.float32)


def index_keys(keys: Floats) -> tuple[Bytes, Floats]:
    """The index of keys (..., components): 4 bits a component, and scales (...) that are rounded to bfloat16."""
    codes, scales = quantize(keys, KEY_LEVELS)
    bits = scales.view(np.uint32)
    return codes, ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def page_scores(queries: Floats, codes: Bytes, scales: Floats) -> Floats:
    """How well each page suits a row in one key/value head: (pages,).

    queries (group, components), scaled as for attention; codes (pages, page_size, components) and scales
    (pages, page_size) as `index_keys` makes them. A query's score of a page is that of its best key, less that of the
    best key of all pages; the page has the best score that any query of the group gives it.
    """
    small, factors = quantize(queries, QUERY_LEVELS)
    dots = np.einsum("gd,pkd->gpk", small.astype(np.int32), codes.astype(np.int32)).astype(np.float32)
    best = (dots * scales).max(axis=2) * factors[:, None]
    return np.asarray((best - best.max(axis=1, keepdims=True)).max(axis=0))


def seen_pages(
    recall: Recall, page_size: int, page: int, queries: Floats, codes: Bytes, scales: Floats, recalls: bool
) -> npt.NDArray[np.bool_]:
    """Which pages a row in page number `page` sees in one key/value head: (page + 1,).

    queries (group, components); codes and scales hold the index of the pages before `page`, if the head recalls.
    """
    sinks, chosen, window = (n // page_size for n in (recall.sinks, recall.recall, recall.window))
    seen = np.ones(page + 1, dtype=np.bool_)
    if page < sinks + chosen + window:
        return seen
    if not recalls:
        seen[sinks : page - chosen - window + 1] = False
        return seen
    candidates = slice(sinks, page - window + 1)
    order = np.argsort(-page_scores(queries, codes, scales)[candidates], kind="stable")
    seen[candidates] = False
    seen[sinks + order[:chosen]] = True
    return seen
