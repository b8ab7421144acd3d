"""Other forwards for parts of a module while it is exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(forwards: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each part of a module computes by the function given for it; afterwards by its own forward again."""
    own = {part: part.__dict__.get("forward") for part in forwards}  # one of this instance alone
    for part, forward in forwards.items():
        part.forward = forward
    try:
        yield
    finally:
        for part, before in own.items():
            del part.forward
            if before is not None:
                part.forward = before


def parts_of(module: nn.Module, kind: Any) -> list[Any]:
    """The module's parts of a kind, itself included, each once."""
    return [part for part in module.modules() if isinstance(part, kind)]
