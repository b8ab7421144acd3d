"""Which architecture a file's name for it means. A new architecture is a new file and one line here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mnemos.errors import UnsupportedError

# module: class -> names in files: GGUF's general.architecture, Hugging Face's model_type and class
ARCHITECTURES = {
    "llama:Llama": ("llama", "mistral", "smollm3", "LlamaForCausalLM", "MistralForCausalLM", "SmolLM3ForCausalLM"),
}


def find_architecture(names: list[str], path: object) -> Any:
    """The class for the first of `names` that is known; UnsupportedError when none is."""
    known = {name: target for target, aliases in ARCHITECTURES.items() for name in aliases}
    for name in names:
        if name in known:
            module, _, cls = known[name].partition(":")
            return getattr(import_module(f"mnemos.models.{module}"), cls)
    supported = ", ".join(sorted(name for name in known if name.islower()))
    raise UnsupportedError(
        f"{path}: architecture {' / '.join(map(repr, names))} is not supported; supported are {supported}"
    )
