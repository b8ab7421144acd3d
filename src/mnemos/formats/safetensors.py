"""Safetensors: single files and sharded folders, memory-mapped, checked completely when they are opened.

A file is the header's length (64 bits), a JSON header and the tensors' bytes, which must fill the rest without gap or
overlap. The format is described in the safetensors project's README.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from mmap import mmap
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.mapping import excerpt, map_file
from mnemos.formats.strict_json import MAX_BYTES, parse_json_object, read_json_object
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_PREFIX = 8
_MAX_SIZE = 1 << 62
_TYPES = {
    "F32": TensorType.F32,
    "F16": TensorType.F16,
    "BF16": TensorType.BF16,
    "F64": TensorType.F64,
    "I8": TensorType.I8,
    "I16": TensorType.I16,
    "I32": TensorType.I32,
    "I64": TensorType.I64,
    "U8": TensorType.U8,
    "BOOL": TensorType.U8,
}
TYPE_NAMES = {type_: name for name, type_ in _TYPES.items() if name != "BOOL"}  # what a type is called in a file


def open_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one file, in the header's order, as views of its map."""
    path = Path(path)
    content, start, header = _read_header(path)
    infos = {name: _read_info(f"{path}: tensor {excerpt(name)}", info) for name, info in header.items()}
    _check_coverage(path, {name: span for name, (_, _, span) in infos.items()}, len(content) - start)
    data = np.frombuffer(content, dtype=np.uint8)[start:]
    return {name: Tensor(name, type_, shape, data[begin:end]) for name, (type_, shape, (begin, end)) in infos.items()}


def read_notes(path: str | Path) -> dict[str, str]:
    """What the header of a file says besides its tensors, its `__metadata__`."""
    path = Path(path)
    content, _, _ = _read_header(path)
    length = int.from_bytes(content[:_PREFIX], "little")
    notes: dict[str, str] = parse_json_object(content[_PREFIX : _PREFIX + length], f"{path}: header").get(
        "__metadata__", {}
    )
    return notes


def _read_header(path: Path) -> tuple[mmap, int, dict[str, Any]]:
    """The file's content, where its tensors begin, and their entries."""
    content = map_file(path)
    if len(content) < _PREFIX:
        raise FormatError(f"{path}: has {len(content)} bytes; a safetensors file has at least {_PREFIX}")
    length = int.from_bytes(content[:_PREFIX], "little")
    if length > min(len(content) - _PREFIX, MAX_BYTES):
        limit = f"the file has {len(content)} bytes and {MAX_BYTES} are allowed"
        raise FormatError(f"{path}: header length is {length}, but {limit}: not a safetensors file, or cut off")
    start = _PREFIX + length
    header = parse_json_object(content[_PREFIX:start], f"{path}: header")
    _check_notes(path, header.pop("__metadata__", {}))
    return content, start, header


def open_safetensors_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder as Hugging Face writes it: one model.safetensors, or shards and their index."""
    if not os.path.exists(folder / INDEX_NAME):
        return open_safetensors(folder / SINGLE_NAME)
    index = folder / INDEX_NAME
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map is {excerpt(weight_map)}; it must map tensor names to files")
    shards: dict[str, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for name, file in weight_map.items():
        _check_shard_name(index, name, file)
        if file not in shards:
            shards[file] = open_safetensors(folder / file)
        if name not in shards[file]:
            raise FormatError(f"{index}: tensor {excerpt(name)} should be in {file}, which does not hold it")
        tensors[name] = shards[file][name]
    return tensors


def _check_notes(path: Path, notes: Any) -> None:
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise FormatError(f"{path}: __metadata__ is {excerpt(notes)}; it must map strings to strings")


def _read_info(field: str, info: Any) -> tuple[TensorType, tuple[int, ...], tuple[int, int]]:
    """(type, shape, (begin, end)) of a header's entry."""
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{field} is described by {excerpt(info)}; dtype, shape and data_offsets are needed")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not _are_sizes(shape):
        raise FormatError(f"{field} has shape {excerpt(shape)}; a list of integers of at least 0 is needed")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{field} has data_offsets {excerpt(offsets)}; [begin, end] is needed")
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise UnsupportedError(f"{field} has dtype {excerpt(dtype)}; supported are {', '.join(_TYPES)}")
    type_ = _TYPES[dtype]
    size = _byte_size(shape, type_)
    if size != offsets[1] - offsets[0]:
        raise FormatError(f"{field} has shape {excerpt(shape)}, {size} bytes as {dtype}, but data_offsets {offsets}")
    return type_, tuple(shape), (offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 32 and all(type(x) is int and 0 <= x < _MAX_SIZE for x in value)


def _byte_size(shape: list[int], type_: TensorType) -> int:
    """Bytes of a tensor; _MAX_SIZE where even the non-zero extents of an empty one are beyond what NumPy can shape."""
    size = type_.block[1]
    for extent in shape:
        size = min(size * max(extent, 1), _MAX_SIZE)
    return 0 if 0 in shape and size < _MAX_SIZE else size


def _check_coverage(path: Path, spans: Mapping[str, tuple[int, int]], available: int) -> None:
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else f"leaves a hole after {position}"
            raise FormatError(f"{path}: tensor {excerpt(name)} has data_offsets [{begin}, {end}], which {problem}")
        position = end
    if position != available:
        problem = f"the header describes {position} bytes of tensors, the file holds {available}"
        raise FormatError(f"{path}: {problem}: cut off or corrupt")


def _check_shard_name(index: Path, name: str, file: Any) -> None:
    """A shard is in the index's own folder; nothing else is ever opened."""
    plain = (
        isinstance(file, str) and file.isprintable() and PurePosixPath(file).name == file == PureWindowsPath(file).name
    )
    if not plain or not file.endswith(".safetensors"):
        rule = "the plain name of a .safetensors file in the same folder is needed"
        raise FormatError(f"{index}: tensor {excerpt(name)} is in {excerpt(file)}; {rule}")
