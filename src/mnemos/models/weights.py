"""A checkpoint's tensors, found by their Hugging Face names, checked and passed to a backend."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mnemos.errors import FormatError
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.ops.protocol import Array, Matrix, Ops, Rows

# Hugging Face's name within a layer (or of the model) -> GGUF's. Architectures add or replace entries.
GGUF_TENSORS = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PREFIXES = ("model.", "", "transformer.", "gpt_neox.", "language_model.model.", "model.language_model.")
_HEAD_PREFIXES = ("", "language_model.", "model.")
# Buffers that old versions of transformers saved, and what gguf_fields reads.
HARMLESS = (
    "*rotary_emb.inv_freq", "*.attn.bias", "*.attn.masked_bias", "*.attention.bias", "*.attention.masked_bias",
    "*.attn_rot_embd.weight", "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight",
)  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """x @ matrix.T + bias, with a matrix (outputs, inputs)."""

    matrix: Matrix
    bias: Array | None

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.linear(x, self.matrix, self.bias)


@dataclass(frozen=True)
class RMSNorm:
    """x / root mean square of x * weight. Zhang & Sennrich 2019, arXiv:1910.07467."""

    weight: Array
    epsilon: float

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.rms_norm(x, self.weight, self.epsilon)


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / standard deviation * weight + bias. Ba et al. 2016, arXiv:1607.06450."""

    weight: Array
    bias: Array | None
    epsilon: float

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.layer_norm(x, self.weight, self.bias, self.epsilon)


class Weights:
    """Passes tensors to `ops`, each in the shape that the config requires; FormatError if they disagree.

    With `ops` None, nothing is read or allocated and every parameter is None: building a model this way
    checks all names, shapes and types of a file, and `finish` then finds the tensors that nothing used.
    """

    def __init__(
        self, path: Path | str, tensors: Mapping[str, Tensor], ops: Ops | None, gguf_names: Mapping[str, str] | None
    ) -> None:
        self.path = path
        self.tensors = tensors
        self.ops = ops
        self.used: set[str] = set()
        self._gguf_names = None if gguf_names is None else {**GGUF_TENSORS, **gguf_names}
        anchors = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
        # Before the names of the decoder's tensors in the file.
        self.prefix = next((p for p in _PREFIXES if any(p + a in tensors for a in anchors)), _PREFIXES[0])

    @property
    def is_gguf(self) -> bool:
        """Whether the tensors have the names and the order of a GGUF file."""
        return self._gguf_names is not None

    def file_name(self, name: str, suffix: str = ".weight") -> str:
        """The file's name for `name`, given as "norm", "layers.3.self_attn.q_proj", ..."""
        if self._gguf_names is None:
            if name in ("lm_head", "embed_out"):
                names = [prefix + name + suffix for prefix in _HEAD_PREFIXES]
                return next((n for n in names if n in self.tensors), names[0])
            return self.prefix + name + suffix
        return _gguf_name(name, self._gguf_names) + suffix

    def has(self, name: str, suffix: str = ".weight") -> bool:
        """Whether the file holds this tensor."""
        return self.file_name(name, suffix) in self.tensors

    def tensor(self, name: str, shape: tuple[int, ...], suffix: str = ".weight") -> Tensor:
        """The tensor as stored, with exactly this shape; FormatError if there is none."""
        key = self.file_name(name, suffix)
        tensor = self.tensors.get(key)
        if tensor is None:
            raise FormatError(f"{self.path}: tensor {key!r} is missing; expected one with shape {list(shape)}")
        self.used.add(key)
        if tensor.shape != shape:
            raise FormatError(
                f"{self.path}: tensor {key!r} has shape {list(tensor.shape)}; the config requires {list(shape)}"
            )
        if tensor.type in (TensorType.I8, TensorType.I16, TensorType.I32, TensorType.I64):
            raise FormatError(
                f"{self.path}: tensor {key!r} is of type {tensor.type.name}; expected floating point or quantized"
            )
        return tensor

    def codes(self, name: str, suffix: str, rows: int, widths: Sequence[int]) -> npt.NDArray[np.int8]:
        """An int8 tensor (rows, one of `widths`) as it is; FormatError if there is none."""
        key = self.file_name(name, suffix)
        tensor = self.tensors.get(key)
        shapes = [(rows, width) for width in widths]
        if tensor is None or tensor.type is not TensorType.I8 or tensor.shape not in shapes:
            found = "is missing" if tensor is None else f"has type {tensor.type.name} and shape {list(tensor.shape)}"
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise FormatError(f"{self.path}: tensor {key!r} {found}; expected I8 of shape {expected}")
        self.used.add(key)
        return tensor.data.view(np.int8).reshape(tensor.shape)

    def matrix(
        self,
        name: str,
        rows: int,
        columns: int,
        *,
        take: Rows | slice | None = None,
        transposed: bool = False,
    ) -> Matrix:
        """The weight of `name`, (rows, columns), or only its `take` rows.

        transposed: the file holds (columns, rows), as GPT-2's layers do.
        """
        tensor = self.tensor(name, (columns, rows) if transposed else (rows, columns))
        if self.ops is None:
            return None
        if transposed:
            tensor = swapped(tensor)
        if isinstance(take, slice):
            return self.ops.matrix(tensor.slice_rows(take.start, take.stop))
        return self.ops.matrix(tensor, take)

    def linear(
        self,
        name: str,
        rows: int,
        columns: int,
        bias: bool = False,
        *,
        take: Rows | slice | None = None,
        transposed: bool = False,
    ) -> Linear:
        """The projection `name` with its bias, or only its `take` outputs."""
        matrix = self.matrix(name, rows, columns, take=take, transposed=transposed)
        if not bias:
            return Linear(matrix, None)
        tensor = self.tensor(name, (rows,), ".bias")
        if self.ops is None:
            return Linear(None, None)
        values = tensor.dequantize()
        return Linear(matrix, self.ops.vector(Tensor.from_array(tensor.name, values if take is None else values[take])))

    def split_linear(
        self, name: str, sizes: Sequence[int], columns: int, bias: bool = False, *, transposed: bool = False
    ) -> list[Linear]:
        """The projections that one tensor holds one after the other, with `sizes` outputs each."""
        ends = list(accumulate(sizes))
        parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        return [self.linear(name, ends[-1], columns, bias, take=part, transposed=transposed) for part in parts]

    def vector(self, name: str, size: int, suffix: str = ".weight", *, offset: float = 0.0) -> Array:
        """A norm's weight or a bias, plus `offset`."""
        tensor = self.tensor(name, (size,), suffix)
        if self.ops is None:
            return None
        return self.ops.vector(Tensor.from_array(tensor.name, tensor.dequantize() + np.float32(offset)))

    def rms_norm(self, name: str, size: int, epsilon: float, *, offset: float = 0.0) -> RMSNorm:
        """The norm `name`, with `offset` added to its weight."""
        return RMSNorm(self.vector(name, size, offset=offset), epsilon)

    def layer_norm(self, name: str, size: int, epsilon: float, *, bias: bool = True) -> LayerNorm:
        """The norm `name`, with its bias if it has one."""
        return LayerNorm(self.vector(name, size), self.vector(name, size, ".bias") if bias else None, epsilon)

    def stack(
        self, name: str, shape: tuple[int, int, int], *, take: slice | None = None, suffix: str = ".weight"
    ) -> list[Matrix]:
        """The matrices of all experts, from one tensor (experts, rows, columns), or the `take` rows of each."""
        tensor = self.tensor(name, shape, suffix)
        if self.ops is None:
            return [None] * shape[0]
        experts = (tensor.slice_rows(e * shape[1], (e + 1) * shape[1]) for e in range(shape[0]))
        if take is not None:
            experts = (expert.slice_rows(take.start, take.stop) for expert in experts)
        return [self.ops.matrix(expert) for expert in experts]

    def differ(self, name: str, other: str) -> bool:
        """Whether two tensors of the same shape have different values; False if the shapes differ."""
        first, second = (self.tensors[self.file_name(n)] for n in (name, other))
        if first.shape != second.shape:
            return False
        if first.type == second.type:
            return not np.array_equal(first.data, second.data)
        return not np.array_equal(first.dequantize(), second.dequantize())

    def ignore(self, name: str) -> None:
        """Allows the file to hold this tensor although the model does not use it."""
        self.used.add(self.file_name(name))

    def _is_beside(self, name: str) -> bool:
        """Whether a tensor is outside the decoder and its output projection, under a separate name."""
        if self._gguf_names is not None:
            return name.startswith("cls.")
        part = name.partition(".")[0]
        return self.prefix != "" and all(part != used.partition(".")[0] for used in (self.prefix, *self.used))

    def finish(self, ignored: Sequence[str] = ()) -> None:
        """Raises FormatError if the model has tensors that were not used and match no pattern of `ignored`.

        Those outside the model, such as the value head of a training run, are left out with a warning: nothing that the
        model computes can need them.
        """
        patterns = (*HARMLESS, *ignored)
        extra = [n for n in self.tensors if n not in self.used and not any(fnmatchcase(n, p) for p in patterns)]
        inside = [name for name in extra if not self._is_beside(name)]
        if inside:
            raise FormatError(f"{self.path}: tensor {_and_more(inside)} has no place in a model with this config")
        if extra and self.ops is None:
            warnings.warn(f"{self.path}: tensor {_and_more(extra)} is not in the model and is left out", stacklevel=2)


def gguf_tensor_name(name: str, gguf_names: Mapping[str, str]) -> str:
    """GGUF's name for a tensor of a Hugging Face checkpoint.

    gguf_names: the architecture's own, as `Architecture.gguf_names`. A name that GGUF does not have is left as it is.
    """
    stem, _, suffix = without_prefix(name).rpartition(".")
    return f"{_gguf_name(stem, {**GGUF_TENSORS, **gguf_names})}.{suffix}" if stem else name


def without_prefix(name: str) -> str:
    """A name in a Hugging Face checkpoint as architectures give it to `Weights`: "layers.3.self_attn.q_proj"."""
    return name.removeprefix(next((p for p in _PREFIXES if p and name.startswith(p)), ""))


def _gguf_name(name: str, gguf_names: Mapping[str, str]) -> str:
    head, _, rest = name.partition(".")
    if head in ("layers", "h") and rest:
        layer, _, rest = rest.partition(".")
        return f"blk.{layer}.{gguf_names.get(rest, rest)}"
    return gguf_names.get(name, name)


def _and_more(names: Sequence[str]) -> str:
    return f"{names[0]!r} (and {len(names) - 1} more)" if len(names) > 1 else repr(names[0])


def swapped(tensor: Tensor) -> Tensor:
    """A matrix with rows and columns exchanged, in its own storage type; quantized ones become float32."""
    rows, columns = tensor.shape
    if tensor.type.is_quantized:
        return Tensor.from_array(tensor.name, tensor.dequantize().T)
    width = tensor.type.block[1]
    flipped = np.ascontiguousarray(tensor.data.reshape(rows, columns, width).transpose(1, 0, 2))
    return Tensor(tensor.name, tensor.type, (columns, rows), flipped.reshape(prod(flipped.shape)))
