"""Importance matrices as llama.cpp's `llama-imatrix` writes them: how large each input column of each weight is.

Two forms are read: GGUF (since 2025: sums of squares and counts by tensor) and the older binary one (`.dat`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnemos.contract import Floats
from mnemos.errors import FormatError
from mnemos.formats.gguf import MAGIC, GGUFFile
from mnemos.formats.gguf_writer import writing_gguf
from mnemos.formats.mapping import excerpt, map_file
from mnemos.formats.tensor_types import TensorType

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_NAME = 4096


@dataclass(frozen=True)
class ImportanceMatrix:
    """The mean square of every input column, by the weight's name in GGUF.

    values   float32 (columns,), or (experts, columns) of the weights of several experts
    source   the text that it was measured on, as the file names it; may be empty
    chunks   the number of pieces of that text, 0 if unknown
    """

    values: Mapping[str, Floats]
    source: str = ""
    chunks: int = 0


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Reads either form. FormatError names what is wrong: a truncated file, an entry that is not finite or negative."""
    content = map_file(path)
    found = _read_gguf(path) if content[: len(MAGIC)] == MAGIC else _read_legacy(path, memoryview(content))
    for name, values in found.values.items():
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise FormatError(f"{path}: importance of {excerpt(name)} has infinite, NaN or negative values")
    return found


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = GGUFFile.open(path)
    if file.metadata.get("general.type") != "imatrix":
        kind = excerpt(file.metadata.get("general.type"))
        raise FormatError(f"{path}: general.type is {kind}; an importance matrix has 'imatrix'")
    values: dict[str, Floats] = {}
    for name, tensor in file.tensors.items():
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        counts = file.tensors.get(weight + _COUNTS)
        if counts is None or counts.size != tensor.rows:
            raise FormatError(
                f"{path}: {excerpt(weight + _COUNTS)} must have one count for each row of {excerpt(name)}"
            )
        sums = tensor.dequantize().reshape(tensor.rows, tensor.columns)
        count = counts.dequantize().reshape(-1, 1)
        means = np.divide(sums, count, out=np.ones_like(sums), where=count > 0)
        values[weight] = means[0] if len(means) == 1 else means
    texts = file.metadata.get("imatrix.datasets", ())
    chunks = file.metadata.get("imatrix.chunk_count", 0)
    return ImportanceMatrix(values, ", ".join(texts), chunks if isinstance(chunks, int) else 0)


def _read_legacy(path: Path, content: memoryview) -> ImportanceMatrix:
    position = 0

    def take(count: int, what: str) -> memoryview:
        nonlocal position
        if not 0 <= count <= len(content) - position:
            left = len(content) - position
            problem = f"{what} needs {count} bytes at {position}, where {left} are left"
            raise FormatError(f"{path}: {problem}: cut off, or no importance matrix")
        position += count
        return content[position - count : position]

    def integer(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    values: dict[str, Floats] = {}
    for index in range(integer("number of entries")):
        length = integer(f"name of entry {index}")
        if not 0 < length <= _MAX_NAME:
            raise FormatError(f"{path}: name of entry {index} has {length} bytes; 1 to {_MAX_NAME} are possible")
        name = bytes(take(length, f"name of entry {index}")).decode(errors="replace")
        calls, count = integer(f"calls of {name}"), integer(f"length of {name}")
        numbers = np.frombuffer(take(4 * count, f"values of {name}"), dtype="<f4").astype(np.float32)
        values[name] = numbers / np.float32(calls) if calls > 0 else numbers
    chunks, source = 0, ""
    if position < len(content):  # files since 2024 say what they were made from
        chunks = integer("number of chunks")
        source = bytes(take(integer("name of the text"), "name of the text")).decode(errors="replace")
    return ImportanceMatrix(values, source, chunks)


def write_imatrix(path: Path, matrix: ImportanceMatrix, chunk_size: int = 512) -> None:
    """Writes the GGUF form, which llama.cpp's quantizer reads. Each mean counts as one observation a chunk."""
    count = np.float32(max(matrix.chunks, 1))
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [matrix.source or "unknown"],
        "imatrix.chunk_count": max(matrix.chunks, 1),
        "imatrix.chunk_size": chunk_size,
    }
    arrays: dict[str, Floats] = {}
    for name, values in sorted(matrix.values.items()):
        means = np.atleast_2d(np.asarray(values, dtype=np.float32))
        arrays[name + _SUMS] = means * count
        arrays[name + _COUNTS] = np.full((len(means), 1), count, dtype=np.float32)
    with writing_gguf(path, metadata, [(name, array.shape) for name, array in arrays.items()]) as writer:
        for name, array in arrays.items():
            writer.write(name, TensorType.F32, [array.reshape(-1).view(np.uint8)])
