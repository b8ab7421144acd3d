"""What is exported to GGUF files and safetensors folders: a model's files, or a module in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mnemos.errors import ConfigError, UnsupportedError
from mnemos.formats.checkpoint import TRAINED_BY, Checkpoint, open_checkpoint
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.hub.sources import resolve
from mnemos.text.tokenizer_files import has_tokenizer

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Source:
    """A model to export.

    checkpoint  its hyperparameters and tensors
    tokenizer   the folder of its tokenizer
    module      the module itself where that was given, for comparing
    """

    checkpoint: Checkpoint
    tokenizer: Path
    module: nn.Module | None = None


@contextmanager
def open_source(model: Any, tokenizer: Any = None) -> Iterator[Source]:
    """A model as `Source`, while the block runs.

    model: a known name, the path of a GGUF file, a Hugging Face folder or a training checkpoint, an open `Checkpoint`,
    or a module: one of transformers, a `MemoryTransformer` or `MemoryAdapter`, or one whose `config` or `args` are the
    hyperparameters of Mini-LLM or nanoGPT.
    tokenizer: one of transformers, or the path of a folder; None: the one among the model's files.
    ConfigError: something else.
    """
    with TemporaryDirectory(prefix="mnemos-tokenizer-") as scratch:
        folder = _tokenizer_folder(tokenizer, Path(scratch))
        if isinstance(model, Checkpoint):
            yield Source(model, folder or _own_folder(model))
        elif isinstance(model, (str, os.PathLike)):
            checkpoint = open_checkpoint(resolve(model))
            yield Source(checkpoint, folder or _own_folder(checkpoint))
        else:
            checkpoint = checkpoint_of(model)
            yield Source(checkpoint, folder or checkpoint.folder, model)


def _own_folder(checkpoint: Checkpoint) -> Path:
    """The folder of the model's tokenizer; an adapter's may be its base's."""
    if checkpoint.base is None or has_tokenizer(checkpoint):
        return checkpoint.folder
    return checkpoint.base


def _tokenizer_folder(tokenizer: Any, scratch: Path) -> Path | None:
    if tokenizer is None:
        return None
    if isinstance(tokenizer, (str, os.PathLike)):
        path = Path(tokenizer)
        if not path.is_dir():
            raise ConfigError(f"tokenizer is {str(path)!r}; expected a folder with a tokenizer.json or tokenizer.model")
        return path
    if not hasattr(tokenizer, "save_pretrained"):
        kind = type(tokenizer).__name__
        raise ConfigError(f"tokenizer is a {kind}; expected one of transformers, or the path of its folder")
    tokenizer.save_pretrained(scratch)
    return scratch


def measured_without_memory(checkpoint: Checkpoint) -> tuple[Checkpoint, str]:
    """A memory-augmented model's base, and a note of what that loses, which is given as a warning, too.

    Measured on tokens that the model writes itself, so that the mean divergence of the base's next-token probabilities
    is what the base loses on texts like its model's. ConfigError: it has no memory.
    """
    from mnemos.export.logits import divergence
    from mnemos.models.memory_form import without_memory

    base = without_memory(checkpoint)
    lost, tokens = divergence(checkpoint, base)
    note = f"without its memory the model loses {lost:.3g} nats a token, on {tokens} tokens that it wrote itself"
    warnings.warn(f"{checkpoint.path}: {note}", stacklevel=3)
    return base, note


def checkpoint_of(module: Any) -> Checkpoint:
    """A module's hyperparameters and tensors, which share the module's memory where it is on the CPU.

    ConfigError: it is no module; UnsupportedError: its hyperparameters are not those of an architecture known here.
    """
    state = getattr(module, "state_dict", None)
    if not callable(state):
        raise ConfigError(f"model is a {type(module).__name__}; expected a path, a known name or a torch.nn.Module")
    metadata = _hyperparameters(module)
    path = Path(str(metadata.get("_name_or_path") or type(module).__name__))
    tensors = {name: tensor for name, value in state().items() if (tensor := tensor_of(name, value)) is not None}
    generation: Any = getattr(module, "generation_config", None)
    values = generation.to_dict() if hasattr(generation, "to_dict") else {}
    return Checkpoint("huggingface", path, metadata, tensors, values)


def _hyperparameters(module: Any) -> Mapping[str, Any]:
    config: Any = getattr(module, "config", None)
    if type(module).__name__ in ("MemoryTransformer", "MemoryAdapter"):
        return _memory_metadata(module)
    if hasattr(config, "to_dict") and hasattr(config, "model_type"):
        return {**config.to_dict(), "architectures": [type(module).__name__], "_name_or_path": config._name_or_path}
    for own in (config, getattr(module, "args", None)):
        values = asdict(own) if is_dataclass(own) and not isinstance(own, type) else own
        if isinstance(values, Mapping):
            known = next((name for name, needed in TRAINED_BY.items() if needed <= values.keys()), None)
            if known is not None:
                return {"architectures": [known], **values}
    raise UnsupportedError(
        f"{type(module).__name__} has no config of transformers, and no config or args of {' or '.join(TRAINED_BY)}; "
        "export it to ONNX, TorchScript or pt2 (docs/export.md), which take any module"
    )


def _memory_metadata(module: Any) -> Mapping[str, Any]:
    """As `open_memory_folder` says it of a folder."""
    kind, model = type(module).__name__, module.config.model
    metadata = {"architectures": [kind], "memory_config": module.config.to_dict()}
    metadata |= {name: getattr(model, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if kind == "MemoryAdapter":
        base = module.base_model
        metadata["base"] = {**base.config.to_dict(), "architectures": [type(base).__name__]}
    return metadata


def tensor_of(name: str, value: Any) -> Tensor | None:
    """A tensor of PyTorch, whose memory is shared if it is contiguous and on the CPU; None for a buffer of indices
    or complex numbers, which no weight is."""
    import torch

    kinds = {
        torch.float32: TensorType.F32,
        torch.float16: TensorType.F16,
        torch.bfloat16: TensorType.BF16,
        torch.float64: TensorType.F64,
        torch.int8: TensorType.I8,  # codes of a quantized memory bank
    }
    if value.dtype not in kinds:
        return None
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Tensor(name, kinds[value.dtype], tuple(value.shape), data)
