"""A Hugging Face checkpoint in the form of a GGUF file: its metadata, and tensors with GGUF's names and order.

What was converted is read again as if from the file, and must give the same hyperparameters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.errors import FormatError
from mnemos.formats.checkpoint import Checkpoint
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.models.conversion import (
    FLOATS,
    Entry,
    Form,
    activation_name,
    check_same,
    form_of,
    hyperparameters,
    is_gelu,
    row_order,
    without_values,
)
from mnemos.models.fields import GGUF_KEYS, GGUF_TABLES
from mnemos.models.llama_cpp import other_in_long_texts
from mnemos.models.load import describe_architecture, open_architecture
from mnemos.models.memory_form import has_memory, memory_gguf_form
from mnemos.models.rope import Rope, yarn_magnitude
from mnemos.models.weights import HARMLESS, gguf_tensor_name, swapped, without_prefix
from mnemos.text.gguf_form import tokenizer_metadata
from mnemos.text.gguf_probes import NAME

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.((?:gate|up|down)_proj\.weight)")
_EMBEDDING = "token_embd.weight"
_TABLES = tuple(GGUF_TABLES.values())


def gguf_form(checkpoint: Checkpoint, tokenizer: Path | None = None) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The metadata and the tensors of a GGUF file of this model.

    tokenizer: the folder of its tokenizer; None: the model's own. UnsupportedError if GGUF cannot express the model, or
    its architecture or tokenizer has no conversion here.
    """
    metadata, tensors = bare_gguf_form(checkpoint)
    size = open_architecture(checkpoint).config.vocab_size
    found = tokenizer_metadata(tokenizer or checkpoint.folder, size)
    if found["tokenizer.ggml.model"] == "none":
        found |= _special_tokens(checkpoint)
    if NAME in found:
        found[NAME] = f"{metadata[NAME]} ({found[NAME]})"
    return metadata | found, tensors


def _special_tokens(checkpoint: Checkpoint) -> dict[str, int]:
    """The ids that begin, end and pad a text, where no tokenizer says so."""
    said = {**checkpoint.metadata, **checkpoint.generation_config}
    found = {}
    for name, role in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = said.get(name)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if type(value) is int and value >= 0:
            found[f"tokenizer.ggml.{role}_token_id"] = value
    return found


def bare_gguf_form(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Entry]]:
    """`gguf_form` without a tokenizer."""
    if has_memory(checkpoint):
        return memory_gguf_form(checkpoint)
    read = open_architecture(checkpoint)
    form = form_of(checkpoint, read)
    config: Any = read.config
    tensors = {entry.name: entry for entry in _Entries(checkpoint, type(read), config, form).all()}
    metadata: dict[str, Any] = {"general.architecture": form.name, "general.type": "model"}
    name = checkpoint.name or checkpoint.metadata.get("_name_or_path") or checkpoint.folder.resolve().name
    metadata["general.name"] = str(name)
    metadata |= {f"{form.name}.{key}": value for key, value in _hyperparameters(checkpoint, config, form)}
    if hasattr(config, "rope"):
        tensors |= {entry.name: entry for entry in _rope_tables(config.rope)}
    for difference in other_in_long_texts(form.name, config):
        warnings.warn(f"{checkpoint.path}: {difference}", stacklevel=3)
    small = without_values(tensors, _TABLES)
    check_same(checkpoint, read, Checkpoint("gguf", checkpoint.path, metadata, small))
    return metadata, tensors


def _hyperparameters(checkpoint: Checkpoint, config: Any, form: Form) -> Iterator[tuple[str, Any]]:
    values = hyperparameters(config) | {"max_position_embeddings": config.context_length}
    if is_gelu(config) and form.name in ("gpt2", "gptneox"):
        values["hidden_act"] = activation_name(config)
    if hasattr(config, "rope"):
        values |= _rope(checkpoint, config.rope)
    if hasattr(config, "local_rope"):
        values["rope_local_base_freq"] = config.local_rope.theta
    yield from ((GGUF_KEYS[name], value) for name, value in values.items())
    yield "attention.value_length", config.head_dim


def _rope(checkpoint: Checkpoint, rope: Rope) -> dict[str, Any]:
    values: dict[str, Any] = {"rotary_dim": rope.rotary_dim, "rope_theta": rope.theta}
    if rope.kind in ("linear", "yarn"):
        values |= {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        values |= {"attention_factor": rope.magnitude / yarn_magnitude(rope.factor)}
    if rope.kind == "longrope":
        _, fields = describe_architecture(checkpoint)
        values |= {"max_position_embeddings": fields.size("max_position_embeddings")}
        values |= {"rope_type": "longrope", "attention_factor": rope.magnitude}
    if rope.kind in ("yarn", "longrope"):
        values["original_max_position_embeddings"] = rope.trained_length
    return values


def _rope_tables(rope: Rope) -> Iterator[Entry]:
    if rope.kind == "llama3":
        divisors = np.asarray(replace(rope, kind="default").frequencies() / rope.frequencies(), np.float32)
        yield Entry.of_values(GGUF_TABLES["rope_freqs"], divisors.shape, lambda: divisors)
    for name, factors in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
        if factors:
            values = np.asarray(factors, np.float32)
            yield Entry.of_values(GGUF_TABLES[name], values.shape, lambda v=values: v)  # type: ignore[misc]


@dataclass(frozen=True)
class _Entries:
    checkpoint: Checkpoint
    architecture: Any
    config: Any
    form: Form

    def all(self) -> Iterator[Entry]:
        """Every tensor of the GGUF file, in the checkpoint's order; a warning for those for images."""
        self._say_what_is_left_out()
        names: set[str] = set()
        experts: dict[str, dict[int, Tensor]] = {}
        for original, tensor in self.checkpoint.tensors.items():
            if any(fnmatchcase(original, pattern) for pattern in (*HARMLESS, *self.architecture.ignored)):
                continue
            name = self.form.usual(without_prefix(original))
            if tensor.type not in FLOATS:
                raise FormatError(
                    f"{self.checkpoint.path}: tensor {original!r} is of type {tensor.type.name}; expected floats"
                )
            expert = _EXPERT.fullmatch(name)
            if expert is not None:
                experts.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = tensor
                continue
            for entry in self._entries(name, tensor):
                if not (entry.name.startswith("output.") and self.config.tie_word_embeddings):
                    names.add(entry.name)
                    yield entry
                if entry.name == _EMBEDDING and self.form.needs_head and self.config.tie_word_embeddings:
                    yield Entry.of_tensor("output.weight", tensor)
        for name, stack in experts.items():
            yield _stacked(self._name(name), [stack[number] for number in sorted(stack)])
        yield from self._missing_biases(names)

    def _say_what_is_left_out(self) -> None:
        ignored = self.architecture.ignored
        others = [name for name in self.checkpoint.tensors if any(fnmatchcase(name, one) for one in ignored)]
        if others:
            warnings.warn(
                f"{self.checkpoint.path}: has {len(others)} tensors of parts for other inputs than text, such as "
                f"{others[0]!r}; the GGUF file is the language model without them",
                stacklevel=4,
            )

    def _name(self, name: str) -> str:
        return gguf_tensor_name(name, self.architecture.gguf_names)

    def _entries(self, name: str, tensor: Tensor) -> Iterator[Entry]:
        if name.endswith(".mlp.experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for half, target in enumerate(("gate_proj", "up_proj")):
                yield _half(self._name(f"{stem}{target}.weight"), tensor, half)
            return
        if name.endswith(".mlp.experts.down_proj"):
            name += ".weight"
        target = self._name(name)
        part = target.rpartition(".")[0].rpartition(".")[2]
        order = row_order(self.form, self.config, part)
        if part in self.form.transposed and len(tensor.shape) == 2:
            yield Entry(target, tensor.type, tensor.shape[::-1], lambda: replace(swapped(tensor), name=target))
        elif len(tensor.shape) == 1 or tensor.type is TensorType.F64:
            offset = np.float32(self.form.norm_offset if "norm" in part else 0.0)
            rows: Any = slice(None) if order is None else order
            yield Entry.of_values(target, tensor.shape, lambda: tensor.dequantize()[rows] + offset)
        elif order is not None:
            yield Entry(target, tensor.type, tensor.shape, lambda: replace(tensor.take_rows(order), name=target))
        else:
            yield Entry.of_tensor(target, tensor)

    def _missing_biases(self, names: set[str]) -> Iterator[Entry]:
        for weight in sorted(names):
            stem, _, suffix = weight.rpartition(".")
            if suffix == "weight" and stem.split(".")[-1] in self.form.zero_biases and f"{stem}.bias" not in names:
                sizes = {"attn_qkv": 3 * self.config.hidden_size, "ffn_up": self.config.intermediate_size}
                size = sizes.get(stem.split(".")[-1], self.config.hidden_size)
                yield Entry.of_values(f"{stem}.bias", (size,), lambda n=size: np.zeros(n, np.float32))  # type: ignore[misc]


def _half(name: str, tensor: Tensor, half: int) -> Entry:
    """The first or the second half of each expert's rows."""
    experts, rows, columns = tensor.shape
    shape = (experts, rows // 2, columns)

    def load() -> Tensor:
        index = np.arange(experts * rows, dtype=np.intp).reshape(experts, 2, -1)[:, half].reshape(-1)
        return replace(tensor.take_rows(index), name=name, shape=shape)

    return Entry(name, tensor.type, shape, load)


def _stacked(name: str, tensors: list[Tensor]) -> Entry:
    """The matrices of all experts, one after the other; in float32 where their types differ."""
    shape = (len(tensors), *tensors[0].shape)
    if len({tensor.type for tensor in tensors}) > 1 or tensors[0].type is TensorType.F64:
        return Entry.of_values(name, shape, lambda: np.stack([tensor.dequantize() for tensor in tensors]))

    def load() -> Tensor:
        return Tensor(name, tensors[0].type, shape, np.concatenate([tensor.data for tensor in tensors]))

    return Entry(name, tensors[0].type, shape, load)
