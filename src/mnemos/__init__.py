"""Mnemos runs language models on the machine you have. Everything is imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what _NAMES says, for type checkers and editors
    from mnemos.compat.batching import (  # noqa: I001  names that are exported again, in one statement a module
        BatchInference as BatchInference,
        BatchProcessor as BatchProcessor,
        BatchRequest as BatchRequest,
        ResponseStreamer as ResponseStreamer,
        StreamingInference as StreamingInference,
    )
    from mnemos.compat.cache_manager import CacheManager as CacheManager
    from mnemos.compat.caches import ConceptCache as ConceptCache, ContextCache as ContextCache, LRUCache as LRUCache
    from mnemos.compat.decoding_strategies import DecodingStrategies as DecodingStrategies
    from mnemos.compat.generate import generate as generate, generate_batch as generate_batch
    from mnemos.compat.generator import Generator as Generator
    from mnemos.compat.hardware_optimizer import (
        HardwareOptimizer as HardwareOptimizer,
        MacBookOptimizer as MacBookOptimizer,
    )
    from mnemos.compat.inference_config import InferenceConfig as InferenceConfig
    from mnemos.compat.memory_cache import MemoryCache as MemoryCache
    from mnemos.compat.merge import (
        extract_memory_weights as extract_memory_weights,
        load_memory_weights as load_memory_weights,
        merge_adapter_weights as merge_adapter_weights,
        quantize_memory_for_deployment as quantize_memory_for_deployment,
    )
    from mnemos.compat.model_server import InferenceAPI as InferenceAPI, ModelServer as ModelServer
    from mnemos.compat.optimized import OptimizedInferenceEngine as OptimizedInferenceEngine
    from mnemos.compat.routing_strategies import (
        HybridRouter as HybridRouter,
        RollingWindowRouter as RollingWindowRouter,
        SequenceLevelRouter as SequenceLevelRouter,
        SequenceRollingRouter as SequenceRollingRouter,
        TokenLevelRouter as TokenLevelRouter,
        create_inference_router as create_inference_router,
    )
    from mnemos.compat.sampling import (
        apply_temperature as apply_temperature,
        enforce_repetition_penalty as enforce_repetition_penalty,
        sample_top_p as sample_top_p,
        top_k_top_p_filtering as top_k_top_p_filtering,
    )
    from mnemos.compat.token_processor import TokenProcessor as TokenProcessor
    from mnemos.compress.modules.distill import distill as distill
    from mnemos.compress.modules.distilled_model import DistilledModel as DistilledModel
    from mnemos.compress.modules.full_model import quantize_full_model as quantize_full_model
    from mnemos.compress.modules.optimize import OptimizationConfig as OptimizationConfig, optimize as optimize
    from mnemos.compress.modules.pruned_model import PrunedModel as PrunedModel
    from mnemos.compress.modules.quantized_model import QuantizedModel as QuantizedModel
    from mnemos.compress.modules.student import student_of as student_of
    from mnemos.decoding.config import GenerationConfig as GenerationConfig
    from mnemos.decoding.memory import Memory as Memory
    from mnemos.engine.engine import InferenceEngine as InferenceEngine
    from mnemos.errors import MnemosError as MnemosError
    from mnemos.export.gguf import export_to_gguf as export_to_gguf
    from mnemos.export.onnx import ONNXExporter as ONNXExporter
    from mnemos.export.exporter import ModelExporter as ModelExporter
    from mnemos.export.coreml import CoreMLExporter as CoreMLExporter
    from mnemos.export.executorch import ExecuTorchExporter as ExecuTorchExporter
    from mnemos.export.litert import LiteRTExporter as LiteRTExporter
    from mnemos.export.openvino import OpenVINOExporter as OpenVINOExporter
    from mnemos.export.packaging.packager import ModelPackager as ModelPackager
    from mnemos.export.tensorrt import TensorRTExporter as TensorRTExporter
    from mnemos.export.programs import ProgramExporter as ProgramExporter
    from mnemos.export.safetensors import export_to_safetensors as export_to_safetensors
    from mnemos.export.torchscript import TorchScriptExporter as TorchScriptExporter
    from mnemos.memory.response_cache import ResponseCache as ResponseCache
    from mnemos.models.foreign.cached_attention import CachedAttention as CachedAttention, KVCache as KVCache
    from mnemos.models.memory_transformer.adapter import MemoryAdapter as MemoryAdapter
    from mnemos.models.memory_transformer.config import load_config as load_config
    from mnemos.models.memory_transformer.transformer import MemoryTransformer as MemoryTransformer
    from mnemos.text.tokenizer import Tokenizer as Tokenizer
    from mnemos.version import __version__ as __version__


# The public names by the modules that they are imported from.
_NAMES = {
    "mnemos.compat.batching": "BatchInference BatchProcessor BatchRequest ResponseStreamer StreamingInference",
    "mnemos.compat.cache_manager": "CacheManager",
    "mnemos.compat.caches": "ConceptCache ContextCache LRUCache",
    "mnemos.compat.decoding_strategies": "DecodingStrategies",
    "mnemos.compat.generate": "generate generate_batch",
    "mnemos.compat.generator": "Generator",
    "mnemos.compat.hardware_optimizer": "HardwareOptimizer MacBookOptimizer",
    "mnemos.compat.inference_config": "InferenceConfig",
    "mnemos.compat.memory_cache": "MemoryCache",
    "mnemos.compat.merge": (
        "extract_memory_weights load_memory_weights merge_adapter_weights quantize_memory_for_deployment"
    ),
    "mnemos.compat.model_server": "InferenceAPI ModelServer",
    "mnemos.compat.optimized": "OptimizedInferenceEngine",
    "mnemos.compat.routing_strategies": (
        "HybridRouter RollingWindowRouter SequenceLevelRouter SequenceRollingRouter TokenLevelRouter "
        "create_inference_router"
    ),
    "mnemos.compat.sampling": "apply_temperature enforce_repetition_penalty sample_top_p top_k_top_p_filtering",
    "mnemos.compat.token_processor": "TokenProcessor",
    "mnemos.compress.modules.distill": "distill",
    "mnemos.compress.modules.distilled_model": "DistilledModel",
    "mnemos.compress.modules.full_model": "quantize_full_model",
    "mnemos.compress.modules.optimize": "OptimizationConfig optimize",
    "mnemos.compress.modules.pruned_model": "PrunedModel",
    "mnemos.compress.modules.quantized_model": "QuantizedModel",
    "mnemos.compress.modules.student": "student_of",
    "mnemos.decoding.config": "GenerationConfig",
    "mnemos.decoding.memory": "Memory",
    "mnemos.engine.engine": "InferenceEngine",
    "mnemos.errors": "MnemosError",
    "mnemos.export.exporter": "ModelExporter",
    "mnemos.export.gguf": "export_to_gguf",
    "mnemos.export.safetensors": "export_to_safetensors",
    "mnemos.export.onnx": "ONNXExporter",
    "mnemos.export.coreml": "CoreMLExporter",
    "mnemos.export.executorch": "ExecuTorchExporter",
    "mnemos.export.litert": "LiteRTExporter",
    "mnemos.export.openvino": "OpenVINOExporter",
    "mnemos.export.packaging.packager": "ModelPackager",
    "mnemos.export.programs": "ProgramExporter",
    "mnemos.export.tensorrt": "TensorRTExporter",
    "mnemos.export.torchscript": "TorchScriptExporter",
    "mnemos.memory.response_cache": "ResponseCache",
    "mnemos.models.foreign.cached_attention": "CachedAttention KVCache",
    "mnemos.models.memory_transformer.adapter": "MemoryAdapter",
    "mnemos.models.memory_transformer.config": "load_config",
    "mnemos.models.memory_transformer.transformer": "MemoryTransformer",
    "mnemos.text.tokenizer": "Tokenizer",
    "mnemos.version": "__version__",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mnemos' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from mnemos.errors import MissingDependencyError

        raise MissingDependencyError(f"mnemos.{name} needs PyTorch: pip install 'mnemos[torch]'") from error


def __dir__() -> list[str]:
    return list(__all__)
