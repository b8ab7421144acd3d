"""How models see long texts: a working memory, and pages of the past that rows recall."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from mnemos.contract import WHOLE_TEXT, Model, ModelSpec, PagedModel, Recall, RecallingCache, SpillingModel
from mnemos.decoding.memory import Memory
from mnemos.errors import ConfigError, UnsupportedError
from mnemos.memory.calibration import FarHeads, far_count, far_heads, indexed_components, usual_share
from mnemos.memory.prefix import PrefixTree


def remember(model: Model, memory: Memory, context_length: int | None = None) -> None:
    """Has a model, before its pages are reserved, see long texts as `memory` says.

    context_length: its new one, which may exceed the trained length up to the model's farthest position; None: its own.
    UnsupportedError for a model that cannot, ConfigError for a policy that does not fit it.
    """
    spec, distance = model.spec, 0
    _check(spec, memory)
    if context_length is not None:
        farthest = max(spec.context_length, spec.position_limit)
        if context_length > farthest:
            raise ConfigError(f"context_length is {context_length}; with a memory, this model takes 1 to {farthest}")
        page = spec.layout.page_size
        if context_length > spec.context_length > page:
            distance = spec.context_length // 2 // page * page
        spec = replace(spec, context_length=context_length)
    nobody = FarHeads(((),) * spec.layout.layers)
    far = far_heads(model, memory.heads or usual_share(spec.layout)) if memory.recall else nobody
    sizes = memory.window, memory.recall, memory.sinks
    recall = Recall(*sizes, far.heads, indexed_components(spec), distance, far.naming)
    model.spec = replace(spec, layout=replace(spec.layout, recall=recall))
    if isinstance(model, SpillingModel):
        model.spill_folder = None if memory.folder is None else _folder(memory.folder)


def begin_recall(model: Model, tree: PrefixTree | None) -> None:
    """Has a model without a memory keep an index of keys from now on, for requests that have one; once is enough.

    tree: what it holds may come from a file, and is indexed too. Which heads use the far past is measured now if that
    was never done: a few seconds.
    """
    cache = cast(RecallingCache, cast(PagedModel, model).cache)
    if cache.layout.recall is not None:
        return
    far = far_heads(model, usual_share(model.spec.layout))
    cache.begin_recall(Recall(WHOLE_TEXT, 0, 0, far.heads, indexed_components(model.spec), naming=far.naming))
    for node in tree.nodes() if tree is not None else ():
        page = node.pages[0]  # of the layers without a window, whose group is the first
        if page is not None:
            cache.write(page, cache.read(page))


def sizes_of(spec: ModelSpec, wanted: Memory | Literal[False]) -> tuple[int, int, int] | None:
    """What the rows of a request see, as in `Batch.memories`; None where that is what the model's rows see anyway.

    wanted: the request's own memory, False for none. UnsupportedError or ConfigError if the model cannot do that.
    """
    own, page = spec.layout.recall, spec.layout.page_size
    if isinstance(wanted, Memory):
        _check(spec, wanted)
        _check_request(spec, wanted)
        sizes = wanted.window, wanted.recall, wanted.sinks
    elif own is None:
        return None
    elif own.farthest:
        raise ConfigError(
            f"memory is False, and the engine's context_length, {spec.context_length}, is beyond what the model was "
            "trained for; only with a memory does it read such texts: leave it out"
        )
    else:
        sizes = WHOLE_TEXT, 0, 0
    if own is not None and sizes == (own.window, own.recall, own.sinks):
        return None
    return sizes[0] // page, sizes[1] // page, sizes[2] // page


def _check_request(spec: ModelSpec, memory: Memory) -> None:
    """Raises the error of what is decided for an engine as a whole."""
    recall = spec.layout.recall
    if memory.folder not in ("auto", None):
        raise ConfigError(
            f"memory: folder is {memory.folder!r} in a request; where pages are stored is decided for the engine: give "
            "the engine a memory with it, and leave it out here"
        )
    if memory.recall == 0:
        return
    indexed = far_count(spec.layout, usual_share(spec.layout)) if recall is None else sum(map(len, recall.heads))
    if indexed == 0:
        raise ConfigError(
            f"memory: recall is {memory.recall} in a request, and the engine's own memory recalls nothing, so that it "
            "keeps no index; give the engine a memory with recall, or this request recall=0"
        )
    if memory.heads is not None and far_count(spec.layout, memory.heads) != indexed:
        raise ConfigError(
            f"memory: heads is {memory.heads} in a request, and {indexed} heads of the engine keep an index; leave it "
            f"out, or give the engine a memory with heads={memory.heads}"
        )


def _check(spec: ModelSpec, memory: Memory) -> None:
    """Raises the error of a policy that the model cannot hold."""
    if not spec.recalls or spec.states:
        kept = "keeps a state for each text" if spec.states else "does not choose pages"
        raise UnsupportedError(
            f"memory is set for a model ({spec.architecture}) that {kept}; "
            "it needs a built-in architecture on backend native or numpy"
        )
    if spec.window:
        raise UnsupportedError(
            f"memory is set for a model ({spec.architecture}) in which every layer has a window, of {spec.window} "
            "positions at most: it forgets by itself; leave memory out"
        )
    page = spec.layout.page_size
    for name in ("window", "recall", "sinks"):
        value = getattr(memory, name)
        if value % page or (name == "window" and value < page):
            least = page if name == "window" else 0
            raise ConfigError(f"memory: {name} is {value}; expected a multiple of {page}, the page size, from {least}")


def _folder(name: str) -> Path:
    """The system's folder for large temporary files is not the ordinary one, which may be in memory itself."""
    if name != "auto":
        return Path(name)
    large = Path("/var/tmp")
    return large if os.access(large, os.W_OK) else Path(tempfile.gettempdir())
