"""What all kinds of models tell a package."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mnemos.contract import FirstLogits
from mnemos.errors import CapacityError, MissingDependencyError, UnsupportedError

Begun = Callable[[str], None]
"""Called with what comes next, such as "writing the weights"."""


@dataclass
class Facts:
    """What metadata.json says about a model.

    kind: of `mnemos.formats.package.KINDS`; model_class: the class's name, or the architecture's; dtype: of most of the
    weights; device: where they were; parameters: values, shared ones once; licence: an SPDX identifier, or whatever the
    model's own files say; details: further fields; notes: what was left out and why.
    """

    kind: str
    model_class: str
    dtype: str
    parameters: int
    name: str
    device: str = "cpu"
    licence: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Extras:
    """What a package holds beside the model.

    exports: formats for other runtimes; ollama: a Modelfile; sbom: a bill of materials; sign: the private key, a PEM
    file, that signs it.
    """

    exports: Sequence[str] = ()
    ollama: bool = False
    sbom: bool = False
    sign: str | os.PathLike[str] | None = None


class Source(Protocol):
    """A model to be packed."""

    def write(self, folder: Path) -> Facts:
        """Writes the weights, config.json, and the tokenizer if it is a part of the model's files."""
        ...

    def first_logits(self, folder: Path, facts: Facts) -> FirstLogits | None:
        """What the model answers; None, and a note, where that cannot be found out here. folder: as `write` left it."""
        ...

    def check_formats(self, names: Sequence[str]) -> None:
        """ConfigError: a format that `export` does not know."""
        ...

    def export(self, folder: Path, names: Sequence[str], facts: Facts, begun: Begun) -> list[dict[str, Any]]:
        """Exports the model into the folder; what metadata.json says about each format."""
        ...


def engine_first_logits(folder: Path, adapter: Path | None, facts: Facts) -> FirstLogits | None:
    """What the model in a folder answers when the engine runs it."""
    from mnemos.engine.engine import InferenceEngine
    from mnemos.engine.first_logits import first_logits

    beside = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = folder if beside else None  # also of a GGUF file that has none
    try:
        engine = InferenceEngine.from_pretrained(
            folder, adapter=adapter, tokenizer=tokenizer, max_sequences=1, prefix_cache=False
        )
    except (CapacityError, MissingDependencyError, UnsupportedError) as error:
        facts.notes.append(f"no fingerprint: the model could not be run here: {error}")
        return None
    with engine:
        return first_logits(engine.logits, engine.spec)
