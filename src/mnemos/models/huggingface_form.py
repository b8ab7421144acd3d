"""A GGUF file in the form of a Hugging Face checkpoint: config.json, and tensors with transformers' names and order.

What was converted is read again as if from the folder, and must give the same hyperparameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.errors import UnsupportedError
from mnemos.formats.checkpoint import Checkpoint
from mnemos.formats.tensor import Tensor
from mnemos.models.architectures.gpt2 import NAMES_IN_CONFIG as GPT2_NAMES
from mnemos.models.conversion import (
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
from mnemos.models.fields import GGUF_KEYS
from mnemos.models.load import open_architecture
from mnemos.models.rope import Rope
from mnemos.models.weights import GGUF_TENSORS, HARMLESS, swapped

_TRAINED_LENGTHS = (8192, 4096, 16384, 32768, 2048, 65536, 131072)  # tried in turn


@dataclass(frozen=True)
class Folder:
    """How transformers names a model of this architecture.

    kind, cls    `model_type` and its class
    prefix       before the names of the decoder's tensors; layers: before their numbers
    names        what its config calls a hyperparameter; None: it has none of that name
    experts      the block with experts, and their gate, up and down projections
    """

    kind: str
    cls: str
    prefix: str = "model."
    layers: str = "layers"
    names: Mapping[str, str | None] = field(default_factory=dict)
    experts: tuple[str, str, str, str] = ("mlp", "gate_proj", "up_proj", "down_proj")


_PLAIN = {"num_key_value_heads": None, "head_dim": None, "sliding_window": None}
_GEMMA = {"hidden_act": "hidden_activation"}
# By the module of the architecture.
FOLDERS = {
    "llama": Folder("llama", "LlamaForCausalLM"),
    "smollm3": Folder("smollm3", "SmolLM3ForCausalLM"),
    "mixtral": Folder("mixtral", "MixtralForCausalLM", experts=("block_sparse_moe", "w1", "w3", "w2")),
    "qwen2": Folder("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Folder("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": Folder("qwen3_moe", "Qwen3MoeForCausalLM", names={"num_local_experts": "num_experts"}),
    "gemma": Folder("gemma", "GemmaForCausalLM", names=_GEMMA),
    "gemma2": Folder("gemma2", "Gemma2ForCausalLM", names=_GEMMA),
    "gemma3": Folder("gemma3_text", "Gemma3ForCausalLM", names=_GEMMA),
    "olmo2": Folder("olmo2", "Olmo2ForCausalLM"),
    "phi3": Folder("phi3", "Phi3ForCausalLM"),
    "gpt2": Folder("gpt2", "GPT2LMHeadModel", "transformer.", "h", {**_PLAIN, **GPT2_NAMES}),
    "gpt_neox": Folder(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "gpt_neox.",
        names={**_PLAIN, "rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    ),
}


def huggingface_form(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The config.json and the tensors of a folder with this GGUF file's model; tensors in the types of the file.

    UnsupportedError if transformers' class cannot express the model, or it has no conversion here.
    """
    read = open_architecture(checkpoint)
    form = form_of(checkpoint, read)
    module = type(read).__module__.rpartition(".")[2]
    folder, config = FOLDERS[module], read.config
    if module == "llama" and any(config.windows):
        folder = replace(folder, kind="mistral", cls="MistralForCausalLM")
    values = _values(checkpoint, read, folder)
    tensors = {entry.name: entry for entry in _Entries(checkpoint, type(read), config, form, folder).all()}
    check_same(checkpoint, read, Checkpoint("huggingface", checkpoint.path, values, without_values(tensors)))
    return {name: _shortest(value) for name, value in values.items()}, tensors


def _shortest(value: Any) -> Any:
    """A float32 of a GGUF file as people write it: 1e-06, where as a float64 it would be 9.999999974752427e-07."""
    if isinstance(value, dict):
        return {name: _shortest(part) for name, part in value.items()}
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _values(checkpoint: Checkpoint, model: Any, folder: Folder) -> dict[str, Any]:
    config, kind = model.config, folder.kind
    values: dict[str, Any] = hyperparameters(config)
    values["hidden_act"] = activation_name(config)
    if is_gelu(config) and kind.startswith("gemma"):
        values["hidden_act"] = "gelu_pytorch_tanh"
    values["max_position_embeddings"] = config.context_length
    values["tie_word_embeddings"] = "output.weight" not in checkpoint.tensors
    values["sliding_window"] = max(config.windows) or None
    if any(config.windows) and kind not in ("mistral", "mixtral", "phi3"):
        values["layer_types"] = ["sliding_attention" if window else "full_attention" for window in config.windows]
        values["use_sliding_window"] = True
        values["max_window_layers"] = next(i for i, window in enumerate(config.windows) if window)
    for name, suffix in (("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_up.bias")):
        if kind in ("llama", "smollm3"):
            values[name] = f"blk.0.{suffix}" in checkpoint.tensors
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if hasattr(config, name):
            values[name] = getattr(config, name) or None
    if hasattr(config, "query_pre_attn_scalar"):  # which transformers wants as an integer
        scalar: float = config.query_pre_attn_scalar
        values["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
    if kind == "smollm3":
        values["no_rope_layers"] = [int(layer.attention.rope is not None) for layer in model.layers]
    if kind == "qwen3_moe":
        values |= {"norm_topk_prob": config.routing.normalise, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if hasattr(config, "rope"):
        values |= _rope(checkpoint, config)
    if hasattr(config, "local_rope"):
        values["rope_local_base_freq"] = config.local_rope.theta
    names = {name: folder.names.get(name, name) for name in values}
    named = {name: values[own] for own, name in names.items() if name is not None}
    return {"architectures": [folder.cls], "model_type": kind, **named, **_special_tokens(checkpoint)}


def _special_tokens(checkpoint: Checkpoint) -> dict[str, int | None]:
    """Null where there is none: the classes have defaults of their own."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: checkpoint.metadata.get(f"tokenizer.ggml.{role}_token_id") for name, role in keys.items()}
    return {name: token if type(token) is int else None for name, token in found.items()}


def _rope(checkpoint: Checkpoint, config: Any) -> dict[str, Any]:
    rope: Rope = config.rope
    values: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.rotary_dim != config.head_dim:
        values["partial_rotary_factor"] = rope.rotary_dim / config.head_dim
    if rope.divisors:
        values["rope_scaling"] = _llama3(checkpoint, rope)
    elif rope.kind == "linear":
        values["rope_scaling"] = {"rope_type": "linear", "factor": rope.factor}
    elif rope.kind == "yarn":
        values["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": rope.factor,
            "original_max_position_embeddings": rope.trained_length,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.magnitude,
        }
    elif rope.kind == "longrope":
        architecture = checkpoint.metadata["general.architecture"]
        values["max_position_embeddings"] = checkpoint.metadata[
            f"{architecture}.{GGUF_KEYS['max_position_embeddings']}"
        ]
        values["original_max_position_embeddings"] = rope.trained_length
        values["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
            "attention_factor": rope.magnitude,
        }
    elif rope.kind != "default":
        raise UnsupportedError(f"{checkpoint.path}: rotary scaling {rope.kind!r} is not converted from GGUF")
    return values


def _llama3(checkpoint: Checkpoint, rope: Rope) -> dict[str, Any]:
    """Llama 3's scaling that gives the table of divisors in the file: its factor is the largest of them."""
    divisors = np.asarray(rope.divisors, np.float32)
    plain = replace(rope, divisors=(), kind="default").frequencies()
    for scaled in _llama3_scalings(replace(rope, divisors=(), kind="llama3", factor=float(divisors.max())), divisors):
        if np.allclose(plain / scaled.frequencies(), divisors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": scaled.factor,
                "low_freq_factor": scaled.low_frequency_factor,
                "high_freq_factor": scaled.high_frequency_factor,
                "original_max_position_embeddings": scaled.trained_length,
            }
    raise UnsupportedError(
        f"{checkpoint.path}: tensor 'rope_freqs.weight' holds no scaling of Llama 3, and a config.json has no place "
        "for a table"
    )


def _llama3_scalings(rope: Rope, divisors: npt.NDArray[np.float32]) -> Iterator[Rope]:
    """What may have given the divisors: the usual scalings, then those of lines through two points of the ramp.

    Between its factors Llama 3's scaling is linear in the frequency, so two points on the ramp, or at its ends, give it
    for any trained length.
    """
    for length in _TRAINED_LENGTHS:
        yield replace(rope, trained_length=length)
    if rope.factor <= 1:
        return
    plain = replace(rope, kind="default").frequencies().astype(np.float64)
    kept = (1 / divisors.astype(np.float64) - 1 / rope.factor) / (1 - 1 / rope.factor)
    first, last = np.searchsorted(-kept, (-1 + 1e-5, -1e-5))  # of those between; kept falls with the frequency
    points = range(max(first - 1, 0), min(last + 1, len(kept)))
    length = _TRAINED_LENGTHS[0]
    for i, j in sorted(combinations(points, 2), key=lambda pair: (pair[0] < first) + (pair[1] >= last)):
        slope = (kept[i] - kept[j]) / (plain[i] - plain[j])
        if slope > 0:
            ends = (plain[j] - kept[j] / slope, plain[j] + (1 - kept[j]) / slope)  # where nothing and all is kept
            low, high = (float(length * end / (2 * np.pi)) for end in ends)
            yield replace(rope, trained_length=length, low_frequency_factor=low, high_frequency_factor=high)


@dataclass(frozen=True)
class _Entries:
    checkpoint: Checkpoint
    architecture: Any
    config: Any
    form: Form
    folder: Folder

    def all(self) -> Iterator[Entry]:
        """Every tensor of the folder, in the file's order."""
        merged = {**GGUF_TENSORS, **self.architecture.gguf_names}
        names = {theirs: own for own, theirs in merged.items()}
        names |= {theirs: own for own, theirs in self.architecture.gguf_names.items()}
        for original, tensor in self.checkpoint.tensors.items():
            if any(fnmatchcase(original, pattern) for pattern in (*HARMLESS, *self.architecture.ignored)):
                continue
            stem, _, suffix = original.rpartition(".")
            head, _, rest = stem.partition(".")
            if head != "blk":
                own = names[stem]
                prefix = "" if own in ("lm_head", "embed_out") else self.folder.prefix
                yield from self._entries(f"{prefix}{own}.{suffix}", stem, tensor)
                continue
            number, _, part = rest.partition(".")
            own = names[part]
            block = f"{self.folder.prefix}{self.folder.layers}.{number}"
            if own.startswith("mlp.experts."):
                yield from self._experts(f"{block}.{self.folder.experts[0]}.experts", own.rpartition(".")[2], tensor)
            else:
                own = f"{self.folder.experts[0]}.gate" if own == "mlp.gate" else own
                yield from self._entries(f"{block}.{own}.{suffix}", part, tensor)

    def _entries(self, name: str, part: str, tensor: Tensor) -> Iterator[Entry]:
        order = row_order(self.form, self.config, part)
        back: npt.NDArray[np.intp] | None = None if order is None else order.argsort()
        if part in self.form.transposed and len(tensor.shape) == 2:
            shape = tensor.shape[::-1]
            if tensor.type.is_quantized:
                yield Entry.of_values(name, shape, lambda: tensor.dequantize().T)
            else:
                yield Entry(name, tensor.type, shape, lambda: replace(swapped(tensor), name=name))
        elif len(tensor.shape) == 1:
            offset = np.float32(self.form.norm_offset if "norm" in part else 0.0)
            rows: Any = slice(None) if back is None else back
            if back is None and not offset:
                yield Entry.of_tensor(name, tensor)
            else:
                yield Entry.of_values(name, tensor.shape, lambda: tensor.dequantize()[rows] - offset)
        elif back is not None:
            yield Entry(name, tensor.type, tensor.shape, lambda: replace(tensor.take_rows(back), name=name))
        else:
            yield Entry.of_tensor(name, tensor)

    def _experts(self, block: str, projection: str, tensor: Tensor) -> Iterator[Entry]:
        """One tensor for each expert, or for the gate and up projections of each where the file has them together."""
        count, rows, columns = tensor.shape
        own = dict(zip(("gate_proj", "up_proj", "down_proj"), self.folder.experts[1:], strict=True))
        parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
        height = rows // len(parts)
        for expert in range(count):
            for place, part in enumerate(parts):
                start = expert * rows + place * height
                name = f"{block}.{expert}.{own[part]}.weight"
                yield Entry(name, tensor.type, (height, columns), _slice(tensor, name, start, start + height))


def _slice(tensor: Tensor, name: str, start: int, stop: int) -> Callable[[], Tensor]:
    return lambda: replace(tensor.slice_rows(start, stop), name=name)
