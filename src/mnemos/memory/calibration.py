"""Which key/value heads of a model use what is far away, measured once.

The model reads tokens drawn at random and then the same ones again: a head that looks for what followed an earlier
occurrence of a token attends to one copy while it reads the other. Heads differ in this far more than texts do
(DuoAttention, Xiao et al. 2024, arXiv:2410.10819); nothing of a user's text decides.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from mnemos.contract import Batch, Floats, KVLayout, Model, ModelSpec, PagedModel, Recall, RecallingCache
from mnemos.errors import ConfigError
from mnemos.machine.home import home

PERIOD = 1280  # tokens before they are repeated
CHUNK = 512
_FORMAT = 1

Heads = tuple[tuple[int, ...], ...]


def far_heads(model: Model, share: float) -> Heads:
    """For each layer, the heads that use the far past most: this share of those in layers without a window, at least
    one. Ties go to the lower layer and head."""
    layout = model.spec.layout
    whole = [layer for layer in range(layout.layers) if not (layout.windows and layout.windows[layer])]
    all_heads = tuple(tuple(range(layout.kv_heads)) if layer in whole else () for layer in range(layout.layers))
    count = far_count(layout, share)
    if count == len(whole) * layout.kv_heads:
        return all_heads
    shares = _stored(model.spec.fingerprint)
    if shares is None or shares.shape != (layout.layers, layout.kv_heads):
        shares = measure(model, all_heads)
        _store(model.spec.fingerprint, shares)
    pairs = sorted(((layer, head) for layer in whole for head in all_heads[layer]), key=lambda at: -shares[at])
    chosen = set(pairs[:count])
    return tuple(tuple(head for head in heads if (layer, head) in chosen) for layer, heads in enumerate(all_heads))


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
    """The share of each head's attention that goes to what it recalls, (layers, kv_heads).

    It is measured in pages of a copy that shares the model's weights, so that the model's own stay as they are.
    """
    probe = copy(model)
    spec, layout = model.spec, model.spec.layout
    page = layout.page_size
    period = min(PERIOD, spec.context_length // 2) // page * page
    window = max(page, period // 2 // page * page)
    recall = Recall(window, 15 * page, page, heads, indexed_components(spec))
    tokens = np.random.default_rng(0).integers(0, spec.vocabulary_size, period).astype(np.int32)
    tokens = np.concatenate((tokens, tokens))
    probe.spec = replace(spec, layout=replace(layout, recall=recall))
    cast(PagedModel, probe).reserve(len(tokens) // page)
    for start in range(0, len(tokens), CHUNK):
        probe.forward(_batch(tokens, start, min(start + CHUNK, len(tokens)), page, len(layout.groups)))
    return cast(RecallingCache, cast(PagedModel, probe).cache).recalled()


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
    """The shares that were measured before; None if there are none that this version understands."""
    try:
        values = json.loads(_path(fingerprint).read_text(encoding="utf-8"))
        if values["fingerprint"] != fingerprint or values["format"] != _FORMAT:
            return None
        return np.array(values["shares"], dtype=np.float32)
    except (ConfigError, OSError, ValueError, TypeError, KeyError):
        return None


def _store(fingerprint: str, shares: Floats) -> None:
    """Whole or not at all; a folder that cannot be written only means that the next process measures again."""
    if not fingerprint:
        return
    values = {"fingerprint": fingerprint, "format": _FORMAT, "shares": [[float(x) for x in row] for row in shares]}
    with suppress(OSError, ConfigError):
        path = _path(fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(values, file)
        os.replace(file.name, path)
