"""Maps the names in files to architectures. A new architecture is a new file and one line here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from mnemos.errors import UnsupportedError

# "module:class" -> its names in files: GGUF's general.architecture, Hugging Face's model_type and class.
ARCHITECTURES = {
    "llama:Llama": ("llama", "mistral", "LlamaForCausalLM", "MistralForCausalLM"),
    "mini_llm:MiniLLM": ("mini-llm", "MiniLLM"),
    "smollm3:SmolLM3": ("smollm3", "SmolLM3ForCausalLM"),
    "mixtral:Mixtral": ("mixtral", "MixtralForCausalLM"),
    "qwen2:Qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3:Qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe:Qwen3Moe": ("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma:Gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2:Gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3:Gemma3": ("gemma3", "gemma3_text", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    "olmo2:Olmo2": ("olmo2", "Olmo2ForCausalLM"),
    "phi3:Phi3": ("phi3", "Phi3ForCausalLM"),
    "gpt2:GPT2": ("gpt2", "GPT2LMHeadModel"),
    "nano_gpt:NanoGPT": ("nanogpt", "NanoGPT"),
    "memory_transformer:MemoryTransformer": ("MemoryTransformer",),
    "memory_adapter:MemoryAdapter": ("MemoryAdapter",),
    "gpt_neox:GPTNeoX": ("gpt_neox", "gptneox", "GPTNeoXForCausalLM"),
}

_KNOWN = {name: target for target, aliases in ARCHITECTURES.items() for name in aliases}


def is_known(name: str) -> bool:
    """Whether an architecture in the table has this name."""
    return name in _KNOWN


def find_architecture(names: Sequence[str], path: object) -> type[Any]:
    """The class for the first known one of `names`; UnsupportedError, which lists all, if none is known."""
    for name in names:
        if name in _KNOWN:
            module, _, cls = _KNOWN[name].partition(":")
            found: type[Any] = getattr(import_module(f"mnemos.models.architectures.{module}"), cls)
            return found
    from mnemos.formats.package import READERS  # only for the error

    if names[0] in READERS.values():
        raise UnsupportedError(
            f"{path}: holds a module that mnemos.{names[0]} has made and InferenceEngine runs; expected a model "
            "that it can be made of"
        )
    asked = " / ".join(repr(name) for name in names)
    raise UnsupportedError(f"{path}: architecture {asked} is not supported; supported are {', '.join(sorted(_KNOWN))}")
