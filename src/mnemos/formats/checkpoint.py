"""A model's files, opened: what they say about it and its tensors, whatever the format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.gguf import GGUFFile
from mnemos.formats.safetensors import INDEX_NAME, SINGLE_NAME, open_safetensors, open_safetensors_folder
from mnemos.formats.strict_json import read_json_object
from mnemos.formats.tensor import Tensor, unwrapped

if TYPE_CHECKING:
    from mnemos.formats.package import Package
    from mnemos.formats.pickled import PickledState

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
EXPECTED = "a .gguf file, or a folder with config.json and model.safetensors (or shards and their index) is needed"


@dataclass
class Checkpoint:
    """Metadata and memory-mapped tensors, under the names that the files use.

    kind                "gguf" or "huggingface"
    path                what was opened: a file, or the folder of a Hugging Face model
    metadata            GGUF's key-value pairs (large arrays decoded lazily), or the parsed config.json
    generation_config   the parsed generation_config.json, if there is one
    base                the folder of the model that an adapter belongs to
    name                what the model is called, where its files and their folder do not say it
    """

    kind: Literal["gguf", "huggingface"]
    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    base: Path | None = None
    name: str = ""

    @property
    def folder(self) -> Path:
        """The folder of the files that belong to the model (tokenizer.json, ...)."""
        return self.path if os.path.isdir(self.path) else self.path.parent

    def close(self) -> None:
        """Lets go of the tensors and metadata. Views taken from them stay valid and keep the file mapped."""
        self.metadata, self.tensors = {}, {}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a GGUF file; a folder of Hugging Face, with one GGUF or with a config.yaml; a .safetensors or a .pt file; a
    package.

    Raises FormatError that says what is there and what would be right, UnsupportedError for storage types that are
    known but not supported. Nothing but headers is read: tensors are read when they are used.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, it never raises
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return _open_huggingface(path, path.parent, open_safetensors(path))
    if path.suffix in PICKLED_SUFFIXES and os.path.exists(path):
        return _open_pickled(path)
    file = GGUFFile.open(path)
    return Checkpoint("gguf", path, file.metadata, file.tensors)


PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_PICKLED = "is a PyTorch pickle, which can run any code when it is read; save the model as safetensors"


def _open_pickled(path: Path) -> Checkpoint:
    """A training script's checkpoint, with its hyperparameters in it or in a config.json beside it."""
    from mnemos.formats.pickled import read_pickled

    state = read_pickled(path)
    config = path.parent / CONFIG_NAME
    if os.path.exists(config) and not state.arguments:
        return Checkpoint("huggingface", path, read_json_object(config), state.tensors)
    if not state.arguments:
        raise FormatError(
            f"{path}: holds a state dict without hyperparameters; expected 'model_args' beside it or a config.json in "
            "the same folder, or load it into your own module and give that to InferenceEngine"
        )
    return Checkpoint(
        "huggingface", path, {"architectures": [_trained_by(path, state)], **state.arguments}, state.tensors
    )


def _trained_by(path: Path, state: PickledState) -> str:
    """The architecture of a training script's checkpoint, by the names of its hyperparameters."""
    for name, needed in TRAINED_BY.items():
        if needed <= state.arguments.keys():
            return name
    forms = " or ".join(f"{', '.join(sorted(needed))} ({name})" for name, needed in TRAINED_BY.items())
    raise FormatError(
        f"{path}: its hyperparameters are {', '.join(sorted(state.arguments))[:200]}; expected {forms}, or a "
        "config.json in the same folder: load another model into your own module and give that to InferenceEngine"
    )


# A training script's architecture -> names of hyperparameters that only its checkpoints have together.
TRAINED_BY = {"MiniLLM": {"dim", "n_layers", "n_heads"}, "NanoGPT": {"n_embd", "n_layer", "n_head", "block_size"}}


def _open_huggingface(path: Path, folder: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    config = read_json_object(folder / CONFIG_NAME)
    generation = folder / GENERATION_CONFIG_NAME
    generation_config = read_json_object(generation) if os.path.exists(generation) else {}
    return Checkpoint("huggingface", path, config, unwrapped(tensors), generation_config)


def _open_folder(folder: Path) -> Checkpoint:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise FormatError(f"{folder}: cannot be listed: {error}") from error
    if "metadata.json" in names:
        from mnemos.formats.package import is_package, read_package

        if is_package(folder):
            return open_package(read_package(folder))
    if "config.yaml" in names and CONFIG_NAME not in names:
        from mnemos.formats.memory_checkpoint import open_memory_folder

        metadata, tensors, generation_config, base = open_memory_folder(folder)
        return Checkpoint("huggingface", folder, metadata, tensors, generation_config, base)
    if SINGLE_NAME in names or INDEX_NAME in names:
        return _open_huggingface(folder, folder, open_safetensors_folder(folder))
    models = [name for name in names if name.endswith(".gguf") and ("-of-" not in name or "-00001-of-" in name)]
    if len(models) == 1:
        return open_checkpoint(folder / models[0])
    if models:
        raise FormatError(f"{folder}: holds {len(models)} GGUF models ({_listing(models)}); name one of the files")
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise FormatError(f"{folder / pickles[0]}: {_PICKLED}; {EXPECTED}")
    found = f"holds no model but {_listing(names)}" if names else "is an empty folder"
    raise FormatError(f"{folder}: {found}; {EXPECTED}")


def open_package(package: Package, *, without_adapter: bool = False) -> Checkpoint:
    """The model in a package. UnsupportedError: it is a module of a class that only its author has, or it has an
    adapter, and `without_adapter` does not say that the caller sees to that."""
    folder = package.path
    if package.adapter is not None and not without_adapter:
        raise UnsupportedError(
            f"{folder}: is a model with a LoRA adapter, which this would leave out; expected what `mnemos merge` "
            "makes of the two"
        )
    checkpoint = _open_packed(package)
    if isinstance(name := package.metadata.get("name"), str):
        checkpoint.name = name
    return checkpoint


def _open_packed(package: Package) -> Checkpoint:
    folder = package.path
    if package.kind == "module":
        return _open_packed_module(package)
    if package.changed_by:
        return _open_changed_module(package, package.changed_by)
    if SINGLE_NAME in package.files or INDEX_NAME in package.files:
        return _open_huggingface(folder, folder, open_safetensors_folder(folder))
    models = sorted(name for name in package.files if name.endswith(".gguf") and "/" not in name)
    if not models:
        raise FormatError(f"{folder}: lists no weights; expected {SINGLE_NAME} or a .gguf file")
    return open_checkpoint(folder / models[0])


def _open_changed_module(package: Package, reader: str) -> Checkpoint:
    """A quantized or pruned module of transformers: its architecture is the class that reads it, which adapts like any
    module; its tensors are as that class stores them."""
    folder = package.path
    if package.needs_class:
        raise UnsupportedError(f"{folder}: holds a module that was {package.kind}; {_load(package)}")
    return Checkpoint("huggingface", folder, {"architectures": [reader]}, open_safetensors(folder / SINGLE_NAME))


def _open_packed_module(package: Package) -> Checkpoint:
    """A module whose class is a known one: its config is that of an architecture, or of a training script."""
    folder, config = package.path, read_json_object(package.path / CONFIG_NAME)
    name = next((name for name, needed in TRAINED_BY.items() if needed <= config.keys()), None)
    named = config if {"architectures", "model_type"} & config.keys() else {"architectures": [name], **config}
    if named is not config and name is None:
        raise UnsupportedError(f"{folder}: holds a {package.metadata.get('model_class')}; {_load(package)}")
    if SINGLE_NAME not in package.files:
        raise UnsupportedError(f"{folder}: holds its weights as model.pt; {_load(package)}")
    types = package.metadata.get("types")  # complex rotations and masks that a training script keeps
    left_out = types if isinstance(types, dict) else {}
    tensors = {n: t for n, t in open_safetensors(folder / SINGLE_NAME).items() if n not in left_out}
    ties = package.metadata.get("ties")
    for name, owner in ties.items() if isinstance(ties, dict) else ():
        if isinstance(owner, str) and owner in tensors:
            tensors[name] = replace(tensors[owner], name=name)
    return Checkpoint("huggingface", folder, named, unwrapped(tensors))


def _load(package: Package) -> str:
    name = str(package.metadata.get("model_class"))[:60]
    return f"expected InferenceEngine(*ModelPackager.load_package({str(package.path)!r}, model_class={name})[:2])"


def _listing(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
