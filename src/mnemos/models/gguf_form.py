"""A Hugging Face checkpoint in the form of a GGUF file: its metadata, and tensors with GGUF's names and order.

What was converted is read again as if from the file, and must give the same hyperparameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import numpy as np

from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.checkpoint import Checkpoint
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.models.fields import GGUF_KEYS, gguf_fields
from mnemos.models.load import open_architecture
from mnemos.models.rope import Rope
from mnemos.models.weights import HARMLESS, Weights, gguf_tensor_name
from mnemos.text.gguf_form import tokenizer_metadata


@dataclass(frozen=True)
class Convertible:
    """How an architecture's GGUF files differ from its checkpoints.

    interleaved: rows of queries and keys alternate between the halves of a head that rotate together.
    norm_offset: what the norms' weights have more.
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0


CONVERTIBLE = {
    "llama": Convertible("llama", interleaved=True),
    "smollm3": Convertible("smollm3", interleaved=True),
    "qwen2": Convertible("qwen2"),
    "qwen3": Convertible("qwen3"),
    "gemma": Convertible("gemma", norm_offset=1.0),
    "gemma2": Convertible("gemma2", norm_offset=1.0),
    "gemma3": Convertible("gemma3", norm_offset=1.0),
    "olmo2": Convertible("olmo2"),
}
_FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16, TensorType.F64)


@dataclass(frozen=True)
class Entry:
    """A tensor of the converted model; `load` makes it when it is written."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def columns(self) -> int:
        """Elements of the last axis."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """How often the last axis is repeated."""
        return prod(self.shape[:-1])

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)


def gguf_form(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The metadata and the tensors of a GGUF file of this model.

    UnsupportedError if GGUF cannot express the model, or its architecture or tokenizer has no conversion here.
    """
    read = open_architecture(checkpoint)
    cls = type(read)
    module = cls.__module__.rpartition(".")[2]
    if module not in CONVERTIBLE:
        known = ", ".join(CONVERTIBLE)
        raise UnsupportedError(f"{checkpoint.path}: {module} models are not converted to GGUF; those of {known} are")
    form = CONVERTIBLE[module]
    config: Any = read.config
    tensors = {entry.name: entry for entry in _entries(checkpoint, cls, config, form)}
    metadata: dict[str, Any] = {"general.architecture": form.name, "general.type": "model"}
    name = checkpoint.metadata.get("_name_or_path") or checkpoint.folder.name
    metadata["general.name"] = str(name)
    metadata |= {f"{form.name}.{key}": value for key, value in _hyperparameters(checkpoint, config)}
    if config.rope.kind == "llama3":
        tensors["rope_freqs.weight"] = _values("rope_freqs.weight", _divisors(config.rope))
    _check(checkpoint, read, metadata, tensors)
    metadata |= tokenizer_metadata(checkpoint.folder, config.vocab_size)
    return metadata, tensors


def _hyperparameters(checkpoint: Checkpoint, config: Any) -> Iterator[tuple[str, Any]]:
    rope: Rope = config.rope
    values = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rotary_dim": rope.rotary_dim,
        "rope_theta": rope.theta,
        "sliding_window": max(config.windows) or None,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None) or None,
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None) or None,
    }
    if rope.kind in ("linear", "yarn"):
        values |= {"rope_type": rope.kind, "factor": rope.factor}
    elif rope.kind not in ("default", "llama3"):
        raise UnsupportedError(f"{checkpoint.path}: rotary scaling {rope.kind!r} is not converted to GGUF")
    if rope.kind == "yarn":
        values["original_max_position_embeddings"] = rope.trained_length
    if "local_rope" in {f.name for f in fields(config)}:
        values["rope_local_base_freq"] = config.local_rope.theta
    yield from ((GGUF_KEYS[name], value) for name, value in values.items() if value is not None)
    yield "attention.value_length", config.head_dim


def _divisors(rope: Rope) -> Any:
    return np.asarray(replace(rope, kind="default").frequencies() / rope.frequencies(), np.float32)


def _entries(checkpoint: Checkpoint, cls: Any, config: Any, form: Convertible) -> Iterator[Entry]:
    for name, tensor in checkpoint.tensors.items():
        if any(fnmatchcase(name, pattern) for pattern in (*HARMLESS, *cls.ignored)):
            continue
        target = gguf_tensor_name(name, cls.gguf_names)
        if target.startswith("output.") and config.tie_word_embeddings:
            continue
        if tensor.type not in _FLOATS:
            raise FormatError(f"{checkpoint.path}: tensor {name!r} is of type {tensor.type.name}; expected floats")
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        part = target.split(".")[-2]
        if form.interleaved and part in heads:
            yield _interleaved(target, tensor, heads[part])
        elif len(tensor.shape) == 1 or tensor.type is TensorType.F64:
            offset = form.norm_offset if "norm" in part else 0.0
            yield Entry(target, TensorType.F32, tensor.shape, _plus(target, tensor, offset))
        else:
            yield Entry(target, tensor.type, tensor.shape, lambda t=tensor, n=target: replace(t, name=n))  # type: ignore[misc]


def _plus(name: str, tensor: Tensor, offset: float) -> Callable[[], Tensor]:
    return lambda: Tensor.from_array(name, tensor.dequantize() + np.float32(offset))


def _values(name: str, values: Any) -> Entry:
    return Entry(name, TensorType.F32, values.shape, lambda: Tensor.from_array(name, values))


def _interleaved(name: str, tensor: Tensor, heads: int) -> Entry:
    """Row i and row i + half of each head become neighbours."""
    rows = tensor.shape[0]
    order = np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)

    def load() -> Tensor:
        if len(tensor.shape) == 1:
            return Tensor.from_array(name, tensor.dequantize()[order])
        return replace(tensor.take_rows(order), name=name)

    return Entry(name, TensorType.F32 if len(tensor.shape) == 1 else tensor.type, tensor.shape, load)


def _check(checkpoint: Checkpoint, model: Any, metadata: Mapping[str, Any], tensors: Mapping[str, Entry]) -> None:
    """Reads what was converted, and raises UnsupportedError if it is another model."""
    cls, config = type(model), model.config
    small = {n: e.load() if n == "rope_freqs.weight" else _empty(e) for n, e in tensors.items()}
    weights = Weights(checkpoint.path, small, None, cls.gguf_names)
    read = cls(gguf_fields(checkpoint.folder, metadata, small, None), weights)
    weights.finish(cls.ignored)
    skipped = ("tie_word_embeddings", "attention_bias", "mlp_bias")  # GGUF says it by which tensors there are
    for field in fields(config):
        ours, theirs = getattr(config, field.name), getattr(read.config, field.name)
        if field.name not in skipped and not _equal(ours, theirs, config.head_dim):
            shown = "its rotary embedding" if isinstance(ours, Rope) else repr(ours)
            raise UnsupportedError(
                f"{checkpoint.path}: {field.name} is {shown}, which GGUF files of {cls.__name__} cannot say"
            )
    for i, (ours, theirs) in enumerate(zip(model.layers, read.layers, strict=True)):
        if (ours.attention.rope is None) != (theirs.attention.rope is None):
            raise UnsupportedError(f"{checkpoint.path}: GGUF files have another rotary embedding in layer {i}")


def _empty(entry: Entry) -> Tensor:
    return Tensor(entry.name, entry.type, entry.shape, np.zeros(0, np.uint8))


def _equal(ours: Any, theirs: Any, head_dim: int) -> bool:
    if isinstance(ours, Rope):
        first, second = ours.params(head_dim), theirs.params(head_dim)
        same = np.allclose(first.frequencies, second.frequencies, rtol=1e-6, atol=0)
        return bool(same and first.rotary_dim == second.rotary_dim and first.magnitude == second.magnitude)
    if isinstance(ours, float):
        return bool(np.float32(ours) == np.float32(theirs))
    assert not is_dataclass(ours)
    return bool(ours == theirs)
