"""GGUF, version 2 and 3: metadata and tensors of a memory-mapped file, checked completely when it is opened.

Described in ggml's docs/gguf.md: a header, key-value pairs, tensor infos, padding to `general.alignment`, data.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.mapping import excerpt, map_file
from mnemos.formats.string_array import locate_strings
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_TEXT = 1 << 22  # bytes of one key, name or string value; the longest chat templates stay below a hundredth of it
ALIGNMENT_KEY = "general.alignment"

_BOOL, _STRING, _ARRAY = 7, 8, 9
_LETTERS = "BbHhIifB--Qqd"  # of struct and of NumPy alike, by GGUF's number; a boolean is a byte
_SCALARS = {code: struct.Struct("<" + letter) for code, letter in enumerate(_LETTERS) if letter != "-"}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_INFO_TAILS = [struct.Struct(f"<{n}QIQ") for n in range(MAX_DIMENSIONS + 1)]  # dimensions, type, offset
_SMALLEST_PAIR = 13  # an empty key, a type, one byte
_SMALLEST_INFO = 24  # an empty name, no dimensions, a type, an offset

# GGUF's own numbers; TensorType has more, for other formats.
_TYPES = {int(t): t for t in TensorType if t < 1000}
_UNSUPPORTED_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_PART_NAME = r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf"


@dataclass(frozen=True)
class GGUFFile:
    """What an open GGUF file holds.

    `metadata` has plain Python scalars and strings; numeric arrays are read-only NumPy views, string arrays are
    `StringArray`s, which decode on request. `tensors` are in the file's order, with row-major shapes: GGUF's
    dimensions reversed. Everything views the map of the file, which lives as long as its last view.
    `stored_metadata` are the metadata's bytes: each value's type and content, for copying it unchanged.
    """

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    stored_metadata: Mapping[str, memoryview]

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Opens a GGUF file, or the first file of a model in parts (`name-00001-of-00003.gguf`) with all others."""
        first = _read(Path(path))
        parts = _integer(first, "split.count", 1)
        return first if parts <= 1 else _join_parts(first, parts)


def _read(path: Path) -> GGUFFile:
    cursor = _Cursor(path, map_file(path))
    version, tensor_count, pair_count = _read_header(cursor)
    stored: dict[str, memoryview] = {}
    metadata = _read_metadata(cursor, pair_count, stored)
    alignment = _check_alignment(path, metadata)
    tensors = _read_tensors(cursor, tensor_count, alignment)
    return GGUFFile(path, version, alignment, metadata, tensors, stored)


class _Cursor:
    """A position in the mapped file; every read is checked against the file's end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path = path
        self.content = content
        self.size = len(content)
        self.position = 0
        self.bytes = np.frombuffer(content, dtype=np.uint8)

    def error(self, field: str, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {field} {problem}")

    def advance(self, size: int, field: str) -> int:
        """Steps over `size` bytes and returns where they begin."""
        start = self.position
        if size > self.size - start:
            problem = f"needs {size} bytes at offset {start}, where the file has {self.size - start} left"
            raise self.error(field, f"{problem}: it is cut off or corrupt")
        self.position = start + size
        return start

    def unpack(self, kind: struct.Struct, field: str) -> tuple[Any, ...]:
        return kind.unpack_from(self.content, self.advance(kind.size, field))

    def string(self, field: str) -> str:
        (length,) = self.unpack(_U64, field)
        if length > MAX_TEXT:
            raise self.error(field, f"has {length} bytes of text; at most {MAX_TEXT} are allowed")
        start = self.advance(length, field)
        raw = self.content[start : start + length]
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(field, f"is {excerpt(raw)}, which is not UTF-8") from error


def _read_header(cursor: _Cursor) -> tuple[int, int, int]:
    """(version, number of tensors, number of key-value pairs)"""
    start = cursor.advance(len(MAGIC), "magic")
    magic = cursor.content[start : start + len(MAGIC)]
    if magic != MAGIC:
        raise cursor.error("magic", f"is {magic!r}; a GGUF file begins with {MAGIC!r}")
    (version,) = cursor.unpack(_U32, "version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            raise cursor.error("version", f"is {swapped} in big-endian order; only little-endian files are supported")
        raise cursor.error("version", f"is {version}; versions {VERSIONS} are supported")
    (tensor_count,) = cursor.unpack(_U64, "tensor count")
    (pair_count,) = cursor.unpack(_U64, "metadata count")
    left = cursor.size - cursor.position
    if tensor_count * _SMALLEST_INFO > left:
        raise cursor.error("tensor count", f"is {tensor_count}, more than {left} bytes can describe")
    if pair_count * _SMALLEST_PAIR > left:
        raise cursor.error("metadata count", f"is {pair_count}, more than {left} bytes can hold")
    return version, tensor_count, pair_count


def _read_metadata(cursor: _Cursor, count: int, stored: dict[str, memoryview]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    content = memoryview(cursor.content)
    for index in range(count):
        key = cursor.string(f"metadata key {index}")
        if key in metadata:
            raise cursor.error(f"metadata key {excerpt(key)}", "appears twice")
        field = f"metadata {excerpt(key)}"
        start = cursor.position
        (kind,) = cursor.unpack(_U32, field)
        metadata[key] = _read_array(cursor, field) if kind == _ARRAY else _read_value(cursor, field, kind)
        stored[key] = content[start : cursor.position]
    return metadata


def _read_value(cursor: _Cursor, field: str, kind: int) -> Any:
    if kind == _STRING:
        return cursor.string(field)
    if kind not in _SCALARS:
        raise cursor.error(field, f"has value type {kind}; GGUF defines 0 to 12")
    (value,) = cursor.unpack(_SCALARS[kind], field)
    if kind != _BOOL:
        return value
    if value > 1:
        raise cursor.error(field, f"is the boolean {value}; it must be 0 or 1")
    return value == 1


def _read_array(cursor: _Cursor, field: str) -> Any:
    (kind,) = cursor.unpack(_U32, field)
    (count,) = cursor.unpack(_U64, field)
    if kind == _STRING:
        start = cursor.position
        array = locate_strings(f"{cursor.path}: {field}", cursor.bytes[start:], count)
        cursor.advance(len(array.data), field)
        return array
    if kind == _ARRAY:
        raise cursor.error(field, "is an array of arrays, which no known model has")
    if kind not in _SCALARS:
        raise cursor.error(field, f"is an array of value type {kind}; GGUF defines 0 to 12")
    start = cursor.advance(count * _SCALARS[kind].size, field)
    values = cursor.bytes[start : cursor.position]
    if kind != _BOOL:
        return values.view("<" + _LETTERS[kind])
    if count and values.max() > 1:
        raise cursor.error(field, f"holds the boolean {values.max()}; each must be 0 or 1")
    return values.view(np.bool_)


def _check_alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise FormatError(f"{path}: {ALIGNMENT_KEY} is {excerpt(alignment)}; it must be a power of two")
    return alignment


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, Tensor]:
    infos: dict[str, tuple[TensorType, tuple[int, ...], int, int]] = {}  # type, shape, offset, bytes
    for index in range(count):
        name = cursor.string(f"name of tensor {index}")
        if name in infos:
            raise cursor.error(f"tensor {excerpt(name)}", "appears twice")
        infos[name] = _read_info(cursor, f"tensor {excerpt(name)}", alignment)
    start = -(-cursor.position // alignment) * alignment

    tensors: dict[str, Tensor] = {}
    for name, (type_, shape, offset, size) in infos.items():
        begin = start + offset
        if begin + size > cursor.size:
            problem = f"is stored at {begin} to {begin + size}, but the file has {cursor.size} bytes"
            raise cursor.error(f"tensor {excerpt(name)}", f"{problem}: it is cut off or corrupt")
        tensors[name] = Tensor(name, type_, shape, cursor.bytes[begin : begin + size])

    ordered = sorted((offset, size, name) for name, (_, _, offset, size) in infos.items())
    for (offset, size, name), (following, _, other) in pairwise(ordered):
        if offset + size > following:
            raise cursor.error(f"tensor {excerpt(name)}", f"overlaps tensor {excerpt(other)}")
    return tensors


def _read_info(cursor: _Cursor, field: str, alignment: int) -> tuple[TensorType, tuple[int, ...], int, int]:
    """(type, row-major shape, offset from the data's start, bytes)"""
    (dimensions,) = cursor.unpack(_U32, field)
    if dimensions > MAX_DIMENSIONS:
        raise cursor.error(field, f"has {dimensions} dimensions; at most {MAX_DIMENSIONS} are allowed")
    *sizes, code, offset = cursor.unpack(_INFO_TAILS[dimensions], field)
    type_ = _TYPES.get(code)
    if type_ is None:
        raise _unknown_type(cursor, field, code)
    if 0 in sizes:
        raise cursor.error(field, f"has dimensions {sizes}; none may be zero")
    block, block_bytes = type_.block
    columns = sizes[0] if sizes else 1
    if columns % block:
        raise cursor.error(field, f"has rows of {columns} values; {type_.name} needs a multiple of {block}")
    size = block_bytes
    for extent in (columns // block, *sizes[1:]):
        size *= extent
    if size > cursor.size:
        problem = f"has dimensions {sizes}, {size} bytes as {type_.name}"
        raise cursor.error(field, f"{problem}; the whole file has {cursor.size}")
    if offset % alignment:
        raise cursor.error(field, f"is stored at offset {offset}, which is not a multiple of the alignment {alignment}")
    return type_, tuple(reversed(sizes)), offset, size


def _unknown_type(cursor: _Cursor, field: str, code: int) -> FormatError | UnsupportedError:
    if code in _UNSUPPORTED_TYPES:
        supported = ", ".join(t.name for t in _TYPES.values())
        problem = f"{field} is of type {_UNSUPPORTED_TYPES[code]}"
        return UnsupportedError(f"{cursor.path}: {problem}; supported are {supported}")
    return cursor.error(field, f"is of type {code}, which GGUF does not define")


def _integer(file: GGUFFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise FormatError(f"{file.path}: metadata {key!r} is {excerpt(value)}; it must be an integer of at least 0")
    return value


def _join_parts(first: GGUFFile, parts: int) -> GGUFFile:
    """One model from `stem-00001-of-0000N.gguf` to `stem-0000N-of-0000N.gguf`; all metadata is in the first."""
    match = re.fullmatch(_PART_NAME, first.path.name)
    if match is None or int(match["parts"]) != parts or int(match["part"]) != 1:
        problem = f"is one of {parts} files of a model (split.count)"
        raise FormatError(f"{first.path}: {problem}; open the first, named like model-00001-of-{parts:05d}.gguf")
    tensors = dict(first.tensors)
    for index in range(1, parts):
        part = _read(first.path.with_name(f"{match['stem']}-{index + 1:05d}-of-{parts:05d}.gguf"))
        for key, expected in (("split.count", parts), ("split.no", index)):
            if _integer(part, key, 0) != expected:
                raise FormatError(f"{part.path}: {key} is {_integer(part, key, 0)}; it must be {expected}")
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise FormatError(f"{part.path}: tensor {excerpt(name)} is also in an earlier part")
            tensors[name] = tensor
    total = _integer(first, "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise FormatError(f"{first.path}: split.tensors.count is {total}, but the parts hold {len(tensors)} tensors")
    return GGUFFile(first.path, first.version, first.alignment, first.metadata, tensors, first.stored_metadata)
