"""What differs between an architecture's checkpoints and its GGUF files, for converting either into the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.checkpoint import Checkpoint
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.models.activations import ACTIVATION_NAMES
from mnemos.models.architectures.mini_llm import usual_name
from mnemos.models.blocks import half_split_rows
from mnemos.models.load import open_architecture
from mnemos.models.rope import Rope

FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16, TensorType.F64)
_EXPERTS_OF_MIXTRAL = (
    ("block_sparse_moe", "mlp"), (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."),
)  # fmt: skip


def _mixtral_name(name: str) -> str:
    if "block_sparse_moe" in name:
        for theirs, usual in _EXPERTS_OF_MIXTRAL:
            name = name.replace(theirs, usual)
    return name


@dataclass(frozen=True)
class Form:
    """How an architecture's GGUF files differ from its checkpoints.

    name         `general.architecture`
    interleaved  rows of queries and keys alternate between the halves of a head that rotate together
    norm_offset  what the norms' weights have more
    transposed   GGUF's names, within a layer, of the matrices that checkpoints keep as (inputs, outputs)
    by_head      in checkpoints, queries, keys and values of one head are together
    usual        makes a checkpoint's name one that `gguf_tensor_name` knows
    zero_biases  GGUF's names, within a layer and outside, of what must have a bias in files, be it zero
    needs_head   files must have an output projection, be it the embedding again
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()
    by_head: bool = False
    usual: Callable[[str], str] = str
    zero_biases: tuple[str, ...] = ()
    needs_head: bool = False


_BIASED = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm")
_CONV1D = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
# By the module of the architecture.
FORMS = {
    "llama": Form("llama", interleaved=True),
    "mini_llm": Form("llama", usual=usual_name),
    "smollm3": Form("smollm3", interleaved=True),
    "mixtral": Form("llama", interleaved=True, usual=_mixtral_name),
    "qwen2": Form("qwen2"),
    "qwen3": Form("qwen3"),
    "qwen3moe": Form("qwen3moe"),
    "gemma": Form("gemma", norm_offset=1.0),
    "gemma2": Form("gemma2", norm_offset=1.0),
    "gemma3": Form("gemma3", norm_offset=1.0),
    "olmo2": Form("olmo2", needs_head=True),
    "phi3": Form("phi3"),
    "gpt2": Form("gpt2", transposed=_CONV1D),
    "nano_gpt": Form("gpt2", zero_biases=_BIASED),
    "gpt_neox": Form("gptneox", by_head=True, zero_biases=_BIASED, needs_head=True),
}
_GELUS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}  # the operator's name -> one in files


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

    @classmethod
    def of_tensor(cls, name: str, tensor: Tensor) -> Entry:
        """The tensor under another name."""
        return cls(name, tensor.type, tensor.shape, lambda: replace(tensor, name=name))

    @classmethod
    def of_values(cls, name: str, shape: tuple[int, ...], values: Callable[[], npt.NDArray[np.float32]]) -> Entry:
        """A tensor in float32."""
        return cls(name, TensorType.F32, shape, lambda: Tensor.from_array(name, values()))


def form_of(checkpoint: Checkpoint, model: Any) -> Form:
    """The form of this model's architecture; UnsupportedError, which lists those that there are, if it has none."""
    module = type(model).__module__.rpartition(".")[2]
    if module not in FORMS:
        raise UnsupportedError(
            f"{checkpoint.path}: {module} models have no form that others read in GGUF; {', '.join(FORMS)} have"
        )
    return FORMS[module]


def row_order(form: Form, config: Any, part: str) -> npt.NDArray[np.intp] | None:
    """For each row of GGUF's tensor `part` within a layer ("attn_q"), the row of the checkpoint's; None: the same."""
    if form.by_head and part == "attn_qkv":
        rows: npt.NDArray[np.intp] = np.arange(3 * config.hidden_size)
        return np.ascontiguousarray(rows.reshape(config.num_attention_heads, 3, -1).swapaxes(0, 1)).reshape(-1)
    if not form.interleaved or part not in ("attn_q", "attn_k"):
        return None
    heads: int = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    order: npt.NDArray[np.intp] = half_split_rows(heads, config.head_dim, config.rope.rotary_dim).argsort()
    return order


def hyperparameters(config: Any) -> dict[str, Any]:
    """An architecture's hyperparameters by Hugging Face's names, without the rotary embedding's and the context."""
    routing = getattr(config, "routing", None)
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "sliding_window": max(config.windows) or None,
    }
    for name in ("rms_norm_eps", "layer_norm_eps", "use_parallel_residual"):
        values[name] = getattr(config, name, None)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        values[name] = getattr(config, name, None) or None  # 0: none
    if routing is not None:
        values |= {"num_local_experts": routing.experts, "num_experts_per_tok": routing.top_k}
        if hasattr(config, "sparse_layers"):
            values["moe_intermediate_size"] = routing.inner_size
    return {name: value for name, value in values.items() if value is not None}


def activation_name(config: Any) -> str:
    """The name in files of a config's activation."""
    return _GELUS.get(config.hidden_act, str(config.hidden_act))


def is_gelu(config: Any) -> bool:
    """Whether the activation is a form of GELU."""
    return config.hidden_act in _GELUS


assert all(name in ACTIVATION_NAMES for name in _GELUS.values())


def check_same(checkpoint: Checkpoint, model: Any, converted: Checkpoint) -> None:
    """Raises UnsupportedError if the converted form, read as if from its file, is another model than `model`."""
    what = "GGUF files" if converted.kind == "gguf" else "Hugging Face folders"
    try:
        read = open_architecture(converted)
    except FormatError as error:
        raise UnsupportedError(f"{checkpoint.path}: {what} cannot hold it: {_inner(checkpoint, error)}") from error
    config: Any = model.config
    # The format says it by which tensors there are.
    skipped = ("tie_word_embeddings", "attention_bias", "mlp_bias", "bias")
    for field in fields(config):
        ours, theirs = getattr(config, field.name), getattr(read.config, field.name)
        if field.name not in skipped and not _equal(ours, theirs, config.head_dim):
            shown = "its rotary embedding" if isinstance(ours, Rope) else repr(ours)
            raise UnsupportedError(
                f"{checkpoint.path}: {field.name} is {shown}, which {what} of {type(read).__name__} cannot say"
            )
    layers: Iterator[tuple[Any, Any]] = zip(model.layers, read.layers, strict=True)
    for i, (own, other) in enumerate(layers):
        if (own.attention.rope is None) != (other.attention.rope is None):
            raise UnsupportedError(f"{checkpoint.path}: {what} have another rotary embedding in layer {i}")


def without_values(entries: Mapping[str, Entry], needed: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors without their bytes, for `open_architecture`; those in `needed` with them."""
    return {
        name: entry.load() if name in needed else Tensor(entry.name, entry.type, entry.shape, np.zeros(0, np.uint8))
        for name, entry in entries.items()
    }


def _inner(checkpoint: Checkpoint, error: FormatError) -> str:
    return str(error).removeprefix(f"{checkpoint.path}: ")


def _equal(ours: Any, theirs: Any, head_dim: int) -> bool:
    if isinstance(ours, Rope):
        first, second = ours.params(head_dim), theirs.params(head_dim)
        same = np.allclose(first.frequencies, second.frequencies, rtol=1e-6, atol=0)
        return bool(
            same
            and first.rotary_dim == second.rotary_dim
            and np.isclose(first.magnitude, second.magnitude, rtol=1e-6, atol=0)
        )
    if isinstance(ours, float):
        return bool(np.float32(ours) == np.float32(theirs))
    return bool(ours == theirs)
