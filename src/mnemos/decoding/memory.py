"""What a request, or an engine for all of them, says about long texts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mnemos.errors import ConfigError
from mnemos.rules import Rule, hint, real, whole

_SIZE, _SHARE = whole(0), real(0, 1, open_low=True)
_PATH = Rule(lambda value: os.fspath(value) if isinstance(value, (str, os.PathLike)) and value else None, "a path")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a row of a long text sees, in place of all of it. Sizes are positions, multiples of a page (32).

    window: the working memory, its latest positions. sinks: the text's first positions, always seen. recall: how many
    positions of the pages between it sees besides, chosen for each row, layer and key/value head by its query.
    heads: the share of the key/value heads that recall: those whose attention reaches far, measured once for each
    model. The others have a window that is longer by `recall`. None: half of them, or all in a model of which other
    layers have windows of their own; of a request those of the engine.

    folder: where an engine stores pages that no row sees unless it recalls them, in a file that ends with the process;
    "auto": the system's folder for large temporary files; None: they stay in memory. Their index stays there anyway.

    Texts of up to sinks + recall + window positions are computed as without a memory, bit for bit. ConfigError for
    values that are not allowed.
    """

    window: int = 512
    recall: int = 480
    sinks: int = 32
    heads: float | None = None
    folder: str | None = "auto"

    def __post_init__(self) -> None:
        for name in ("window", "recall", "sinks"):
            _SIZE.apply(f"memory: {name}", getattr(self, name))
        if self.heads is not None:
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


def _number(text: str) -> int | float | str | None:
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
