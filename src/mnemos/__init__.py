"""Mnemos runs language models on the machine you have. Everything is imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig
    from mnemos.decoding.functions import (
        apply_temperature,
        enforce_repetition_penalty,
        sample_top_p,
        top_k_top_p_filtering,
    )
    from mnemos.engine.batching import BatchInference, BatchProcessor, ResponseStreamer, StreamingInference
    from mnemos.engine.cache_manager import CacheManager
    from mnemos.engine.config import InferenceConfig
    from mnemos.engine.engine import InferenceEngine
    from mnemos.engine.functions import generate, generate_batch
    from mnemos.engine.generator import Generator
    from mnemos.engine.optimized import OptimizedInferenceEngine
    from mnemos.errors import MnemosError
    from mnemos.models.cached_attention import CachedAttention, KVCache
    from mnemos.text.processor import TokenProcessor
    from mnemos.text.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "BatchInference",
    "BatchProcessor",
    "CacheManager",
    "CachedAttention",
    "GenerationConfig",
    "Generator",
    "InferenceConfig",
    "InferenceEngine",
    "KVCache",
    "MnemosError",
    "OptimizedInferenceEngine",
    "ResponseStreamer",
    "StreamingInference",
    "TokenProcessor",
    "Tokenizer",
    "__version__",
    "apply_temperature",
    "enforce_repetition_penalty",
    "generate",
    "generate_batch",
    "sample_top_p",
    "top_k_top_p_filtering",
]

_HOMES = {
    "BatchInference": "mnemos.engine.batching",
    "BatchProcessor": "mnemos.engine.batching",
    "CacheManager": "mnemos.engine.cache_manager",
    "CachedAttention": "mnemos.models.cached_attention",
    "GenerationConfig": "mnemos.decoding.config",
    "Generator": "mnemos.engine.generator",
    "InferenceConfig": "mnemos.engine.config",
    "InferenceEngine": "mnemos.engine.engine",
    "KVCache": "mnemos.models.cached_attention",
    "MnemosError": "mnemos.errors",
    "OptimizedInferenceEngine": "mnemos.engine.optimized",
    "ResponseStreamer": "mnemos.engine.batching",
    "StreamingInference": "mnemos.engine.batching",
    "TokenProcessor": "mnemos.text.processor",
    "Tokenizer": "mnemos.text.tokenizer",
    "apply_temperature": "mnemos.decoding.functions",
    "enforce_repetition_penalty": "mnemos.decoding.functions",
    "generate": "mnemos.engine.functions",
    "generate_batch": "mnemos.engine.functions",
    "sample_top_p": "mnemos.decoding.functions",
    "top_k_top_p_filtering": "mnemos.decoding.functions",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mnemos' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
