"""A Hugging Face folder with its weights in another floating-point type."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from mnemos.compress.plan import Row
from mnemos.compress.quantize import Bytes, Quantized, Unfit, encoded
from mnemos.errors import ConfigError, FormatError
from mnemos.formats.checkpoint import CONFIG_NAME, Checkpoint, open_checkpoint
from mnemos.formats.package import METADATA, SIGNATURE, SUMS, is_package
from mnemos.formats.safetensors import SINGLE_NAME
from mnemos.formats.safetensors_writer import Entry, write_safetensors
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.formats.whole_file import check_new, new_folder
from mnemos.hub.cache import Progress

TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # names in config.json
_FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16, TensorType.F64)
_OF_PACKAGES = (METADATA, SUMS, SIGNATURE, "sbom.cdx.json", "Modelfile")  # they describe the files as they were
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def convert_folder(source: Path, out: Path, type: str, *, progress: Progress | None = None) -> Quantized:
    """Writes the folder `out`: the model of the Hugging Face folder `source` in "f32", "f16" or "bf16".

    The other files (config, tokenizer, templates) are copied; the config names the new type. `out` must not exist, and
    appears when it is whole. ConfigError for another type or a GGUF file; FormatError for a value that the type cannot
    hold, by its tensor's name.
    """
    if type not in TYPES:
        raise ConfigError(
            f"type is {type!r}; a folder of safetensors holds {', '.join(TYPES)}: give --out a name that ends in .gguf"
        )
    checkpoint = open_checkpoint(source)
    if checkpoint.kind != "huggingface" or not source.is_dir():
        raise ConfigError(f"{source}: is no Hugging Face folder; give --out a name that ends in .gguf")
    check_new(out)
    chosen = TensorType[type.upper()]
    rows = [
        Row(name, t.shape, t.type, chosen if t.type in _FLOATS else t.type) for name, t in checkpoint.tensors.items()
    ]
    with new_folder(out) as work:
        copy_others(source, work)
        config = dict(checkpoint.metadata)
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = TYPES[type]
        (work / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write(checkpoint, rows, work / SINGLE_NAME, progress)
    return Quantized(out, type, rows)


def copy_others(source: Path, folder: Path) -> None:
    """Copies the files of a Hugging Face folder that are neither weights, nor its config, nor a package's lists."""
    left = {CONFIG_NAME, *(_OF_PACKAGES if is_package(source) else ())}
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in left and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, folder / file.name)


def _write(checkpoint: Checkpoint, rows: list[Row], path: Path, progress: Progress | None) -> None:
    total, done = sum(tensor.size for tensor in checkpoint.tensors.values()), 0

    def pieces(tensor: Tensor, row: Row) -> Iterator[Bytes]:
        nonlocal done
        if progress is not None:
            progress("converting", done, total)
        try:
            yield from encoded(tensor, row.type, None) if row.changes else [tensor.data]
        except Unfit as error:
            raise FormatError(f"{row.name}: {error}") from None
        done += tensor.size

    entries = {}
    for row in rows:
        tensor = checkpoint.tensors[row.name]
        entries[row.name] = Entry(row.type.name, row.shape, lambda t=tensor, r=row: pieces(t, r))  # type: ignore[misc]
    write_safetensors(path, entries, {"format": "pt"})
    if progress is not None:
        progress("converting", total, total)
