"""Folders of safetensors, as transformers and everything around it read them: from GGUF files too."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mnemos.compress.quantize import Unfit, encoded
from mnemos.compress.safetensors import TYPES, copy_others
from mnemos.errors import ConfigError, FormatError, UnsupportedError
from mnemos.export.gguf import MODULE_TOLERANCE, TOLERANCE
from mnemos.export.logits import compare_logits
from mnemos.export.report import ExportReport
from mnemos.export.sources import Source, measured_without_memory, open_source
from mnemos.formats.checkpoint import CONFIG_NAME, GENERATION_CONFIG_NAME, Checkpoint, open_checkpoint
from mnemos.formats.safetensors import SINGLE_NAME
from mnemos.formats.safetensors_writer import Entry as Stored
from mnemos.formats.safetensors_writer import write_safetensors
from mnemos.formats.tensor_types import TensorType
from mnemos.formats.whole_file import beside
from mnemos.hub.cache import Progress
from mnemos.models.conversion import Entry
from mnemos.models.gguf_form import bare_gguf_form
from mnemos.models.huggingface_form import huggingface_form
from mnemos.models.memory_form import has_memory
from mnemos.text.tokenizer_files import has_tokenizer, write_tokenizer

_DTYPES = {TensorType.F32: "float32", TensorType.F16: "float16", TensorType.BF16: "bfloat16", TensorType.F64: "float64"}


def export_to_safetensors(
    model: Any,
    output_path: str | os.PathLike[str],
    dtype: str | None = None,
    *,
    tokenizer: Any = None,
    drop_memory: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a model as a folder that transformers reads: config.json, model.safetensors and the tokenizer's files.

    dtype  f32, f16 or bf16; None: the types of the source, and float32 for quantized weights
    The others are those of `export_to_gguf`.

    The folder is read again and run before it gets its name: its logits must be those of the model, unless weights lost
    bits to `dtype`. Tensors are made and written one at a time. Errors: those of `export_to_gguf`.
    """
    if dtype is not None and dtype not in TYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(TYPES)}")
    target = Path(output_path)
    if target.is_file():
        raise ConfigError(f"{target} is a file; expected the path of a folder to write")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists; choose another path, or replace it (overwrite)")
    with open_source(model, tokenizer) as source:
        lost: tuple[str, ...] = ()
        if drop_memory:
            base, note = measured_without_memory(source.checkpoint)
            source, lost = Source(base, source.tokenizer), (note,)
        config, entries = _described(source.checkpoint)
        with beside(target) as work:
            report = _write(source, config, entries, work / "model", dtype, progress)
            if target.exists():
                os.replace(target, work / "old")
            os.replace(work / "model", target)
    return replace(report, path=target, notes=(*report.notes, *lost))


def _described(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The config.json and the tensors to write."""
    if checkpoint.kind == "gguf":
        return huggingface_form(checkpoint)
    if has_memory(checkpoint):
        raise UnsupportedError(
            f"{checkpoint.path}: transformers has no class for memory-augmented models; export it to GGUF for "
            "Mnemos, or without its memory (drop_memory)"
        )
    if "model_type" not in checkpoint.metadata:  # a training checkpoint, whose GGUF form transformers has a class for
        metadata, converted = bare_gguf_form(checkpoint)
        tensors = {name: entry.load() for name, entry in converted.items()}
        return huggingface_form(Checkpoint("gguf", checkpoint.path, metadata, tensors))
    seen: set[int] = set()
    entries = {}
    for name, tensor in checkpoint.tensors.items():
        place = tensor.data.ctypes.data
        if not (tensor.size and place in seen):  # tied weights are stored once
            entries[name] = Entry.of_tensor(name, tensor)
        seen.add(place)
    return dict(checkpoint.metadata), entries


def _write(
    source: Source,
    config: dict[str, Any],
    entries: Mapping[str, Entry],
    folder: Path,
    dtype: str | None,
    progress: Progress | None,
) -> ExportReport:
    folder.mkdir()
    types = {name: _type(entry.type, dtype) for name, entry in entries.items()}
    exact = all(type in (entries[name].type, TensorType.F32) for name, type in types.items())
    config["torch_dtype" if "dtype" not in config else "dtype"] = _DTYPES[_common(types.values())]
    _write_files(source, config, folder)
    _write_weights(entries, types, folder / SINGLE_NAME, progress)
    module = source.module if exact and types.keys() and set(types.values()) == {TensorType.F32} else None
    what = f"the folder of {source.checkpoint.path.name}"
    tolerance = MODULE_TOLERANCE if module is not None else TOLERANCE
    found = compare_logits(source.checkpoint, module, open_checkpoint(folder), tolerance if exact else None, what)
    return ExportReport(
        "safetensors" if dtype is None else f"safetensors {dtype}",
        folder,
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        sum(len(tensor.data) for tensor in source.checkpoint.tensors.values()),
        found.error,
        found.shapes,
        found.inputs,
        {},
        notes=found.notes,
    )


def _type(stored: TensorType, dtype: str | None) -> TensorType:
    if stored not in _DTYPES and not stored.is_quantized:
        return stored  # integers, such as a buffer's
    if dtype is not None:
        return TensorType[dtype.upper()]
    return TensorType.F32 if stored.is_quantized else stored


def _common(types: Iterable[TensorType]) -> TensorType:
    """The type in which a model computes that loses nothing of its weights."""
    found = {type for type in types if type in _DTYPES}
    return found.pop() if len(found) == 1 else TensorType.F32


def _write_files(source: Source, config: dict[str, Any], folder: Path) -> None:
    checkpoint = source.checkpoint
    if checkpoint.kind == "huggingface" and (checkpoint.path / CONFIG_NAME).is_file() and source.module is None:
        copy_others(checkpoint.path, folder)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if checkpoint.generation_config and source.module is not None:
        text = json.dumps(dict(checkpoint.generation_config), indent=2) + "\n"
        (folder / GENERATION_CONFIG_NAME).write_text(text, encoding="utf-8")
    own = checkpoint.kind == "gguf" and source.tokenizer == checkpoint.folder
    tokenizer = checkpoint if own else Checkpoint("huggingface", source.tokenizer, {}, {})
    if has_tokenizer(tokenizer):
        write_tokenizer(tokenizer, folder)


def _write_weights(
    entries: Mapping[str, Entry], types: Mapping[str, TensorType], path: Path, progress: Progress | None
) -> None:
    total, done = sum(entry.size for entry in entries.values()), 0

    def pieces(entry: Entry) -> Iterator[Any]:
        nonlocal done
        if progress is not None:
            progress("writing", done, total)
        tensor, type = entry.load(), types[entry.name]
        try:
            yield from [tensor.data] if tensor.type is type else encoded(tensor, type, None)
        except Unfit as error:
            raise FormatError(f"{entry.name}: {error}") from None
        done += entry.size

    stored = {
        name: Stored(types[name].name, entry.shape, lambda e=entry: pieces(e))  # type: ignore[misc]
        for name, entry in entries.items()
    }
    write_safetensors(path, stored, {"format": "pt"})
