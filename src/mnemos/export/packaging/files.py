"""Models that are files: GGUF, Hugging Face folders, checkpoints of training scripts, LoRA folders on their bases."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mnemos.contract import FirstLogits
from mnemos.errors import ConfigError, FormatError
from mnemos.export.packaging.exports import check_file_formats, export_files
from mnemos.export.packaging.source import Begun, Facts, engine_first_logits
from mnemos.formats.adapters import CONFIG, WEIGHTS, read_adapter
from mnemos.formats.checkpoint import CONFIG_NAME, GENERATION_CONFIG_NAME, Checkpoint, open_checkpoint
from mnemos.formats.package import ADAPTER
from mnemos.formats.safetensors import INDEX_NAME, SINGLE_NAME, TYPE_NAMES
from mnemos.formats.safetensors_writer import Entry, write_safetensors
from mnemos.formats.strict_json import read_json_object
from mnemos.models.load import architecture_names

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_LEGAL = re.compile(r"(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)[\w.-]*", re.ASCII | re.IGNORECASE)
_PART = re.compile(r"(.*)-00001-of-(\d{5})\.gguf")


class FileSource:
    """A GGUF file, a folder or a checkpoint. own_tokenizer: its tokenizer is packed too."""

    def __init__(self, path: Path, *, own_tokenizer: bool, licence: str | None) -> None:
        self.path, self._own_tokenizer, self._licence = path, own_tokenizer, licence
        self._adapter = path if (path / CONFIG).is_file() else None
        if self._adapter is not None:
            self.path = _base_of(path)
        self._checkpoint = open_checkpoint(self.path)

    def write(self, folder: Path) -> Facts:
        """See `Source`."""
        checkpoint = self._checkpoint
        facts = _facts(checkpoint, self._licence)
        if checkpoint.kind == "gguf":
            _copy_gguf(checkpoint, folder)
        elif checkpoint.path.is_dir() and "memory_config" not in checkpoint.metadata:
            copy_named(checkpoint.path, folder, [CONFIG_NAME, GENERATION_CONFIG_NAME, *_weight_names(checkpoint.path)])
        else:
            write_checkpoint(checkpoint, folder)
        if checkpoint.path.is_dir():  # else who knows whose licence it is
            copy_legal(checkpoint.path, folder)
        if self._own_tokenizer and checkpoint.kind != "gguf":
            places = [place for place in (checkpoint.folder, checkpoint.base) if place is not None]
            if place := next((p for p in places if any((p / name).is_file() for name in TOKENIZER_FILES)), None):
                copy_tokenizer(place, folder)
        if self._adapter is not None:
            (folder / ADAPTER).mkdir()
            copy_named(self._adapter, folder / ADAPTER, [CONFIG, WEIGHTS])
            facts.kind, facts.name = "adapter", self._adapter.name
            facts.details["base"] = self.path.name
        return facts

    def first_logits(self, folder: Path, facts: Facts) -> FirstLogits | None:
        """See `Source`."""
        return engine_first_logits(folder, None if self._adapter is None else folder / ADAPTER, facts)

    def check_formats(self, names: Sequence[str]) -> None:
        """See `Source`."""
        check_file_formats(names)

    def export(self, folder: Path, names: Sequence[str], facts: Facts, begun: Begun) -> list[dict[str, Any]]:
        """See `Source`."""
        return export_files(folder, facts, names, begun)


def _base_of(adapter: Path) -> Path:
    """The model that a LoRA folder was trained on: as its config names it, there or beside it, or by a known name."""
    from mnemos.hub.sources import resolve

    base = read_adapter(adapter).base
    if not base:
        raise ConfigError(
            f"{adapter / CONFIG}: base_model_name_or_path is absent; expected the path or name of the base model"
        )
    places = (Path(base), adapter / base, adapter.parent / base, adapter.parent / Path(base).name)
    found = next((place for place in places if place.exists()), None)
    return found or resolve(f"hf:{base}" if base.count("/") == 1 and not os.path.isabs(base) else base)


def _facts(checkpoint: Checkpoint, licence: str | None) -> Facts:
    metadata, tensors = checkpoint.metadata, checkpoint.tensors
    if not tensors:
        raise FormatError(f"{checkpoint.path}: holds no tensors; expected a model's weights")
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.type.name] += len(tensor.data)
    path = checkpoint.path
    stated = metadata.get("general.name") or metadata.get("_name_or_path")
    name = path.stem if path.suffix in (".gguf", ".pt", ".pth", ".safetensors") else path.name
    kind = "gguf" if checkpoint.kind == "gguf" else "memory" if "memory_config" in metadata else "huggingface"
    own = metadata.get("general.license") or metadata.get("license") or _stated_licence(path)
    return Facts(
        kind=kind,
        model_class=architecture_names(checkpoint)[0],
        dtype=sizes.most_common(1)[0][0].lower(),
        parameters=sum(tensor.size for tensor in tensors.values()),
        name=Path(str(stated)).name if stated else name,
        licence=licence or (str(own) if own else None),
    )


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """A checkpoint's metadata as config.json and its tensors as model.safetensors."""
    write_json(folder / CONFIG_NAME, checkpoint.metadata)
    if checkpoint.generation_config:
        write_json(folder / GENERATION_CONFIG_NAME, checkpoint.generation_config)
    entries = {}
    for name, tensor in checkpoint.tensors.items():
        if tensor.type not in TYPE_NAMES:
            raise FormatError(f"{checkpoint.path}: tensor {name!r} is {tensor.type.name}, which safetensors has not")
        entries[name] = Entry(TYPE_NAMES[tensor.type], tensor.shape, tensor.data)
    write_safetensors(folder / SINGLE_NAME, entries, {"format": "pt"})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file with sorted keys. ConfigError: a value that JSON does not have."""
    try:
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path.name} cannot be written: {error}; expected text, numbers, lists and dicts") from error
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _weight_names(folder: Path) -> list[str]:
    if not (folder / INDEX_NAME).exists():
        return [SINGLE_NAME]
    shards: Any = read_json_object(folder / INDEX_NAME)["weight_map"].values()
    return [INDEX_NAME, *sorted(set(shards))]


def _copy_gguf(checkpoint: Checkpoint, folder: Path) -> None:
    """The file as model.gguf, or all parts of it, and its own settings, arrays aside, as config.json."""
    path = checkpoint.path
    if part := _PART.fullmatch(path.name):
        count = int(part[2])
        for i in range(1, count + 1):
            end = f"-{i:05d}-of-{count:05d}.gguf"
            shutil.copyfile(path.with_name(part[1] + end), folder / f"model{end}")
    else:
        shutil.copyfile(path, folder / "model.gguf")
    plain = {
        name: value
        for name, value in checkpoint.metadata.items()
        if type(value) in (bool, int, float, str) and name != "tokenizer.chat_template" and value == value
    }
    write_json(folder / CONFIG_NAME, plain)


def copy_named(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copies the files of these names that there are."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a folder's tokenizer and its chat templates."""
    copy_named(source, folder, TOKENIZER_FILES)
    if not (folder / GENERATION_CONFIG_NAME).exists():  # it names the tokens that end a text
        copy_named(source, folder, [GENERATION_CONFIG_NAME])
    templates = sorted((source / _TEMPLATES).glob("*.jinja"))
    if templates:
        (folder / _TEMPLATES).mkdir()
        copy_named(source / _TEMPLATES, folder / _TEMPLATES, [template.name for template in templates])


def copy_legal(source: Path, folder: Path) -> None:
    """Copies licences and notices."""
    names = [entry.name for entry in source.iterdir() if _LEGAL.fullmatch(entry.name)]
    copy_named(source, folder, sorted(names))


def _stated_licence(path: Path) -> str | None:
    """The licence in the head of a folder's model card."""
    card = path / "README.md"
    if not card.is_file() or card.stat().st_size > 1 << 20:
        return None
    match = re.match(r"---\n(?:.*\n)*?license: *([\w.+-]+) *\n", card.read_text(encoding="utf-8", errors="replace"))
    return match[1] if match else None
