"""Which key/value heads of a model use what is far away, and which of their queries find it, measured once.

The model reads tokens drawn at random and then the same ones again: a head that looks for what followed an earlier
occurrence of a token attends to one copy while it reads the other. Heads differ in this far more than texts do
(DuoAttention, Xiao et al. 2024, arXiv:2410.10819); nothing of a user's text decides. Of the queries that share a head's
keys, those find what is far whose result it changes.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from mnemos.contract import Batch, Floats, KVLayout, Model, ModelSpec, PagedModel, Recall, RecallingCache
from mnemos.errors import ConfigError
from mnemos.machine.home import home

PERIOD = 1280  # tokens before they are repeated
CHUNK = 512
NAMING = 1 / 3  # of the queries of heads that recall name pages; others want nothing particular, and would crowd it out
_FORMAT = 3

Heads = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class FarHeads:
    """The `heads` and the `naming` of a `Recall`."""

    heads: Heads
    naming: tuple[tuple[tuple[int, ...], ...], ...] = ()


def far_heads(model: Model, share: float) -> FarHeads:
    """The heads whose attention goes far most: this share of those in layers without a window, at least one. Pages are
    named by the third of their queries whose result that changes most, and by the best query of each. Ties of heads go
    to the lower layer and head. Where all heads recall, nothing is measured, and all of their queries name pages."""
    layout = model.spec.layout
    whole = [layer for layer in range(layout.layers) if not (layout.windows and layout.windows[layer])]
    all_heads = tuple(tuple(range(layout.kv_heads)) if layer in whole else () for layer in range(layout.layers))
    count = far_count(layout, share)
    if count == len(whole) * layout.kv_heads:
        return FarHeads(all_heads)
    recalled = _stored(model.spec.fingerprint)
    if recalled is None or recalled.shape[:3] != (2, layout.layers, layout.kv_heads):
        recalled = measure(model, all_heads)
        _store(model.spec.fingerprint, recalled)
    shares, changes = recalled[0].mean(axis=2), recalled[1]
    pairs = sorted(((layer, head) for layer in whole for head in all_heads[layer]), key=lambda at: -shares[at])
    chosen = set(pairs[:count])
    heads = tuple(tuple(head for head in own if (layer, head) in chosen) for layer, own in enumerate(all_heads))
    return FarHeads(heads, _naming(heads, changes))


def _naming(heads: Heads, changes: Floats) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The queries of these heads that name pages; of a head of which nothing was measured, all of them.

    changes (layers, kv_heads, group).
    """
    own = np.sort([changes[layer, head] for layer, these in enumerate(heads) for head in these], axis=None)
    least = own[-max(1, round(NAMING * own.size))]
    return tuple(
        tuple(
            tuple(np.flatnonzero(found >= min(least, found.max())).tolist()) if head in these and found.any() else ()
            for head, found in enumerate(layer)
        )
        for layer, these in zip(changes, heads, strict=True)
    )


def usual_share(layout: KVLayout) -> float:
    """The share of heads that recall unless a memory says otherwise: half of them, but all in a model of which other
    layers have windows of their own: its few whole layers are those that it sees far with, and each is needed."""
    return 1.0 if any(layout.windows) else 0.5


def far_count(layout: KVLayout, share: float) -> int:
    """How many heads that share is."""
    whole = sum(not window for window in layout.windows) if layout.windows else layout.layers
    return max(1, round(share * whole * layout.kv_heads))


def indexed_components(spec: ModelSpec) -> tuple[int, ...]:
    """Which components of keys are indexed: those that turn slowly tell far keys apart as well as all, in half the
    memory; the others change with every position."""
    return spec.slow_components or tuple(range(spec.layout.head_dim))


def measure(model: Model, heads: Heads) -> Floats:
    """What each query of these heads recalls, (2, layers, kv_heads, group), see `RecallingCache.recalled`.

    It is measured in pages of a copy that shares the model's weights, so that the model's own stay as they are.
    """
    probe = copy(model)
    spec, layout = model.spec, model.spec.layout
    page = layout.page_size
    period = min(PERIOD, spec.context_length // 2) // page * page
    window = max(page, period // 2 // page * page)
    farther = min(15, max(period // page // 2, 1)) * page
    recall = Recall(window, farther, page, heads, indexed_components(spec), measured=True)
    tokens = np.random.default_rng(0).integers(0, spec.vocabulary_size, period).astype(np.int32)
    tokens = np.concatenate((tokens, tokens))
    probe.spec = replace(spec, layout=replace(layout, recall=recall))
    cast(PagedModel, probe).reserve(len(tokens) // page)
    for start in range(0, len(tokens), CHUNK):
        probe.forward(_batch(tokens, start, min(start + CHUNK, len(tokens)), page, len(layout.groups)))
    recalled = cast(RecallingCache, cast(PagedModel, probe).cache).recalled()
    # No row of a context this short sees only a part of it.
    return recalled if recalled.size else np.zeros((2, layout.layers, layout.kv_heads, 1), dtype=np.float32)


def _batch(tokens: np.ndarray, start: int, end: int, page: int, groups: int) -> Batch:
    pages = np.arange(-(-end // page), dtype=np.int32)
    return Batch(
        token_ids=tokens[start:end],
        positions=np.arange(start, end, dtype=np.int32),
        sequence_starts=np.array([0, end - start], dtype=np.int32),
        pages=np.tile(pages, groups),
        page_positions=np.tile(page * pages, groups),
        page_starts=(len(pages) * np.arange(groups + 1)).astype(np.int32),
        logit_rows=np.array([end - start - 1], dtype=np.int32),
    )


def _path(fingerprint: str) -> Path:
    return home() / "recall" / f"{fingerprint[:32]}.json"


def _stored(fingerprint: str) -> Floats | None:
    """What was measured before; None if there are none that this version understands."""
    try:
        values = json.loads(_path(fingerprint).read_text(encoding="utf-8"))
        if values["fingerprint"] != fingerprint or values["format"] != _FORMAT:
            return None
        return np.array(values["recalled"], dtype=np.float32)
    except (ConfigError, OSError, ValueError, TypeError, KeyError):
        return None


def _store(fingerprint: str, recalled: Floats) -> None:
    """Whole or not at all; a folder that cannot be written only means that the next process measures again."""
    if not fingerprint:
        return
    values = {"fingerprint": fingerprint, "format": _FORMAT, "recalled": recalled.tolist()}
    with suppress(OSError, ConfigError):
        path = _path(fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(values, file)
        os.replace(file.name, path)
