"""Mnemos runs language models on the machine you have. Everything is imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig
    from mnemos.engine.engine import InferenceEngine
    from mnemos.errors import MnemosError
    from mnemos.text.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["GenerationConfig", "InferenceEngine", "MnemosError", "Tokenizer", "__version__"]

_HOMES = {
    "GenerationConfig": "mnemos.decoding.config",
    "InferenceEngine": "mnemos.engine.engine",
    "MnemosError": "mnemos.errors",
    "Tokenizer": "mnemos.text.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mnemos' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
