"""Merges LoRA adapters into a model's files: `mnemos merge`.

Weights are expanded, changed and stored once. What is quantized is stored as float16 unless a type is asked for: a
second rounding to a few bits can undo what an adapter was trained for, and the report says how much of it is lost.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.errors import ConfigError, FormatError
from mnemos.formats.adapters import Adapter
from mnemos.formats.blocks import encode
from mnemos.formats.checkpoint import Checkpoint, open_checkpoint
from mnemos.formats.gguf import GGUFFile
from mnemos.formats.gguf_writer import RawValue, writing_gguf
from mnemos.formats.quants import dequantize
from mnemos.formats.safetensors import INDEX_NAME, SINGLE_NAME, TYPE_NAMES
from mnemos.formats.safetensors_writer import Entry, write_safetensors
from mnemos.formats.tensor_types import TensorType
from mnemos.formats.whole_file import check_new, new_folder
from mnemos.models.adapted import MERGED_TYPE, WeightChanges

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Merged:
    """What one tensor became.

    change  the norm of what was added, as a share of the weight's
    lost    the norm of the rounding, as a share of what was added: 0 is exact, from 1 on nothing may be left of it
    """

    name: str
    source: TensorType
    type: TensorType
    change: float
    lost: float


def merge_files(
    source: Path,
    adapters: Sequence[tuple[Adapter, float]],
    out: Path,
    *,
    type: TensorType | None = None,
    progress: Progress | None = None,
) -> list[Merged]:
    """Writes a model with adapters merged into it, and returns what became of the tensors that they changed.

    source    a GGUF file, or a Hugging Face folder of a built-in architecture; `out` is of the same kind
    adapters  with the strength of each, 1 for as it was trained; they are merged one after the other
    type      the storage type of the changed tensors; None keeps it, and stores quantized ones as float16

    `out` appears when it is whole. Errors: FormatError for an adapter of another model, ConfigError.
    """
    checkpoint = open_checkpoint(source)
    check_new(out)
    changes = WeightChanges(checkpoint, adapters)
    if checkpoint.kind == "gguf":
        return _write_gguf(GGUFFile.open(checkpoint.path), changes, out, type, progress)
    if type is not None and type not in TYPE_NAMES:
        raise ConfigError(
            f"type is {type.name}; a safetensors file stores one of {', '.join(t.name for t in TYPE_NAMES)}"
        )
    return _write_folder(checkpoint, changes, out, type, progress)


def _stored(name: str, changes: WeightChanges, type: TensorType | None) -> tuple[Merged, TensorType, Any]:
    """(the report, the type and the bytes) of a changed tensor."""
    source = changes.tensors[name].type
    before, after = changes.values(name)
    chosen = type or (MERGED_TYPE if source.is_quantized else source)
    try:
        content = encode(after, chosen)
    except (FormatError, ConfigError) as error:
        raise ConfigError(f"{name} cannot be stored as {chosen.name}: {error}; give another type") from error
    added = float(np.linalg.norm(after - before))
    rounding = float(np.linalg.norm(dequantize(content, chosen).reshape(after.shape) - after))
    size = float(np.linalg.norm(before)) or 1.0
    return Merged(name, source, chosen, added / size, rounding / added if added else 0.0), chosen, content


def _write_gguf(
    file: GGUFFile, changes: WeightChanges, out: Path, type: TensorType | None, progress: Progress | None
) -> list[Merged]:
    metadata: dict[str, Any] = {
        key: RawValue(bytes(stored)) for key, stored in file.stored_metadata.items() if not key.startswith("split.")
    }
    done: list[Merged] = []
    tensors = list(file.tensors.values())
    with writing_gguf(out, metadata, [(tensor.name, tensor.shape) for tensor in tensors]) as writer:
        for number, tensor in enumerate(tensors):
            if tensor.name in changes:
                report, chosen, content = _stored(tensor.name, changes, type)
                writer.write(tensor.name, chosen, [content])
                done.append(report)
            else:
                writer.write(tensor.name, tensor.type, [tensor.data])
            if progress is not None:
                progress("merging", number + 1, len(tensors))
    return done


def _write_folder(
    checkpoint: Checkpoint, changes: WeightChanges, out: Path, type: TensorType | None, progress: Progress | None
) -> list[Merged]:
    """A folder with the other files of the source, written under another name until it is whole."""
    done: list[Merged] = []
    with new_folder(out) as draft:
        for path in sorted(checkpoint.folder.iterdir()):
            if (
                path.is_file()
                and path.suffix not in (".safetensors", ".bin", ".pt", ".pth")
                and path.name != INDEX_NAME
            ):
                shutil.copyfile(path, draft / path.name)
        entries: dict[str, Entry] = {}
        for number, (name, tensor) in enumerate(checkpoint.tensors.items()):
            if name in changes:
                report, chosen, content = _stored(name, changes, type)
                entries[name] = Entry(TYPE_NAMES[chosen], tensor.shape, content)
                done.append(report)
            else:
                entries[name] = Entry(TYPE_NAMES[tensor.type], tensor.shape, tensor.data)
            if progress is not None:
                progress("merging", number + 1, len(checkpoint.tensors))
        write_safetensors(draft / SINGLE_NAME, entries, {"format": "pt"})
    return done
