"""How an engine remembers long texts: a working memory, and pages of the past that rows recall."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mnemos.contract import Model, ModelSpec, Recall, SpillingModel
from mnemos.errors import ConfigError, UnsupportedError
from mnemos.memory.calibration import far_heads, indexed_components
from mnemos.rules import Rule, hint, real, whole

_SIZE, _SHARE = whole(0), real(0, 1, open_low=True)
_PATH = Rule(lambda value: os.fspath(value) if isinstance(value, (str, os.PathLike)) and value else None, "a path")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a row of a long text sees, in place of all of it. Sizes are positions, multiples of a page (32).

    window: the working memory, its latest positions. sinks: the text's first positions, always seen. recall: how many
    positions of the pages between it sees besides, chosen for each row, layer and key/value head by its query.
    heads: the share of the key/value heads that recall: those whose attention reaches far, measured once for each
    model. The others have a window that is longer by `recall`.

    folder: where pages that no row sees unless it recalls them are stored, in a file that ends with the process;
    "auto": the system's folder for large temporary files; None: they stay in memory. Their index stays there anyway.

    Texts of up to sinks + recall + window positions are computed as without a memory, bit for bit. ConfigError for
    values that are not allowed.
    """

    window: int = 512
    recall: int = 480
    sinks: int = 32
    heads: float = 0.5
    folder: str | None = "auto"

    def __post_init__(self) -> None:
        for name in ("window", "recall", "sinks"):
            _SIZE.apply(f"memory: {name}", getattr(self, name))
        object.__setattr__(self, "heads", _SHARE.apply("memory: heads", self.heads))
        if self.folder is not None:
            object.__setattr__(self, "folder", _PATH.apply("memory: folder", self.folder))

    @classmethod
    def read(cls, value: Any) -> Memory | None:
        """A Memory from one, from a mapping of its fields, from a text like "window=512,recall=480", or from True for
        the defaults; None for anything else. ConfigError for an unknown field or a value that is not allowed."""
        if isinstance(value, cls):
            return value
        if value is True or value == "default":
            return cls()
        if isinstance(value, str):
            pairs = [part.partition("=") for part in value.split(",")]
            if not all(equals and number for _, equals, number in pairs):
                return None
            value = {name.strip(): _number(number) for name, _, number in pairs}
        if not isinstance(value, Mapping):
            return None
        known = [one.name for one in fields(cls)]
        for name in value:
            if name not in known:
                raise ConfigError(f"memory has no field {name!r}; {hint(str(name), known, 'its fields')}")
        return cls(**value)


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
    heads = far_heads(model, memory.heads) if memory.recall else ((),) * spec.layout.layers
    recall = Recall(memory.window, memory.recall, memory.sinks, heads, indexed_components(spec), distance)
    model.spec = replace(spec, layout=replace(spec.layout, recall=recall))
    if isinstance(model, SpillingModel):
        model.spill_folder = None if memory.folder is None else _folder(memory.folder)


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


def _number(text: str) -> int | float | str | None:
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
