"""Mnemos runs language models on the machine you have. Everything is imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemos.compat.batching import BatchInference, BatchProcessor, ResponseStreamer, StreamingInference
    from mnemos.compat.cache_manager import CacheManager
    from mnemos.compat.generate import generate, generate_batch
    from mnemos.compat.generator import Generator
    from mnemos.compat.inference_config import InferenceConfig
    from mnemos.compat.optimized import OptimizedInferenceEngine
    from mnemos.compat.sampling import (
        apply_temperature,
        enforce_repetition_penalty,
        sample_top_p,
        top_k_top_p_filtering,
    )
    from mnemos.compat.token_processor import TokenProcessor
    from mnemos.decoding.config import GenerationConfig
    from mnemos.engine.engine import InferenceEngine
    from mnemos.errors import MnemosError
    from mnemos.models.foreign.cached_attention import CachedAttention, KVCache
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
    "BatchInference": "mnemos.compat.batching",
    "BatchProcessor": "mnemos.compat.batching",
    "CacheManager": "mnemos.compat.cache_manager",
    "CachedAttention": "mnemos.models.foreign.cached_attention",
    "GenerationConfig": "mnemos.decoding.config",
    "Generator": "mnemos.compat.generator",
    "InferenceConfig": "mnemos.compat.inference_config",
    "InferenceEngine": "mnemos.engine.engine",
    "KVCache": "mnemos.models.foreign.cached_attention",
    "MnemosError": "mnemos.errors",
    "OptimizedInferenceEngine": "mnemos.compat.optimized",
    "ResponseStreamer": "mnemos.compat.batching",
    "StreamingInference": "mnemos.compat.batching",
    "TokenProcessor": "mnemos.compat.token_processor",
    "Tokenizer": "mnemos.text.tokenizer",
    "apply_temperature": "mnemos.compat.sampling",
    "enforce_repetition_penalty": "mnemos.compat.sampling",
    "generate": "mnemos.compat.generate",
    "generate_batch": "mnemos.compat.generate",
    "sample_top_p": "mnemos.compat.sampling",
    "top_k_top_p_filtering": "mnemos.compat.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mnemos' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
