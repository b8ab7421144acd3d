"""What llama.cpp makes of a GGUF file that Mnemos reads: some models it does not load, some it computes otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mnemos.models.fields import GGUF_KEYS, GGUF_TABLES
from mnemos.models.rope import Rope
from mnemos.text.llama_cpp import other_tokens

_OWN_SCALING = ("llama",)  # architectures with a place for Llama 3's table of divisors
_TIED = ("gemma", "gemma2")  # those whose output projection is the embedding
_WITHOUT_WINDOWS = ("llama", "phi3")  # those for which it ignores the sliding window


def refused_because(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> str | None:
    """Why llama.cpp cannot run a GGUF file with this metadata and these tensors, by their names; None if it can.

    Of what Mnemos' converted files may hold; measured with llama.cpp b11549.
    """
    name = metadata["general.architecture"]

    def value(field: str) -> Any:
        return metadata.get(f"{name}.{GGUF_KEYS[field]}")

    if name not in _OWN_SCALING and GGUF_TABLES["rope_freqs"] in tensors:
        return f"it has no scaling of rotary embeddings as Llama 3's for {name} models"
    if value("beta_fast") not in (None, 32.0) or value("beta_slow") not in (None, 1.0):
        return "its YaRN always has the betas 32 and 1"
    if name in _TIED and "output.weight" in tensors:
        return f"the output projection of its {name} models is the embedding"
    if name == "gemma2" and not (value("attn_logit_softcapping") and value("final_logit_softcapping")):
        return "it limits the scores and logits of all gemma2 models (softcapping)"
    if name == "olmo2" and value("head_dim") * value("num_attention_heads") != value("hidden_size"):
        return "the heads of its olmo2 models are together as wide as the model"
    if name == "smollm3" and any(tensor.endswith(".bias") for tensor in tensors):
        return "its smollm3 models have no biases"
    return other_tokens(metadata)


def other_in_long_texts(name: str, config: Any) -> Iterator[str]:
    """What llama.cpp computes otherwise than the model where a text is long: clauses for a warning.

    name: the architecture in GGUF; config: its hyperparameters.
    """
    reach = max(config.windows)
    if name in _WITHOUT_WINDOWS and 0 < reach < config.context_length:
        yield (
            f"its attention reaches back {reach} tokens, which llama.cpp does not limit in {name} models: in longer "
            "texts it computes something else than the model"
        )
    rope = getattr(config, "rope", None)
    if isinstance(rope, Rope) and rope.kind == "dynamic":
        yield (
            f"GGUF has no dynamic scaling of rotary embeddings: its file takes texts of up to {rope.trained_length} "
            "tokens, within which nothing is scaled"
        )
