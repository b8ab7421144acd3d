"""Writes GGUF, version 3: metadata first, then one tensor after the other, in pieces."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mnemos.errors import ConfigError
from mnemos.formats.gguf import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMENSIONS
from mnemos.formats.string_array import StringArray
from mnemos.formats.tensor_types import TensorType
from mnemos.formats.whole_file import replacing

Bytes = npt.NDArray[np.uint8]

_BOOL, _STRING, _ARRAY = 7, 8, 9
_DTYPES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": _BOOL, "u8": 10, "i8": 11, "f8": 12}


@dataclass(frozen=True)
class RawValue:
    """A metadata value as a GGUF file stores it: its type and its bytes."""

    data: bytes


def encode_value(key: str, value: Any) -> bytes:
    """A metadata value's type and bytes.

    A bool; a str; an int as uint32 (int32 if negative, 64 bits if larger); a float as float32; a NumPy scalar or array
    of a type that GGUF has, as that; a sequence of str, int or float as an array (int32, float32); a RawValue as it is.
    ConfigError names the key of anything else.
    """
    if isinstance(value, RawValue):
        return value.data
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, StringArray):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + value.data.tobytes()
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    array = _array_of(value)
    code = _DTYPES.get(array.dtype.str[1:]) if array.ndim <= 1 else None
    if isinstance(value, (list, tuple)) and not value:
        code = None  # of which type would it be?
    if code is None:
        raise ConfigError(
            f"metadata {key!r} is {type(value).__name__} {str(value)[:60]!r}; GGUF has booleans, integers, floats, "
            "strings and flat arrays of one of them"
        )
    content = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
    return struct.pack("<I", code) + content if array.ndim == 0 else _array_header(code, array.size) + content


def _array_header(code: int, count: int) -> bytes:
    return struct.pack("<IIQ", _ARRAY, code, count)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _array_of(value: Any) -> npt.NDArray[Any]:
    """The value as an array of the type in which GGUF's users expect it."""
    array = np.asarray(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return array
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.kind in "iu" and array.size:
        low, high = int(array.min()), int(array.max())
        small = ("i4" if low < 0 else "u4") if array.ndim == 0 else "i4"
        limits = np.iinfo(small)
        return array.astype(small) if limits.min <= low and high <= limits.max else array
    return array


class GGUFWriter:
    """A GGUF file being written: `write` each tensor that was announced, in that order. See `writing_gguf`."""

    def __init__(
        self,
        file: BinaryIO,
        metadata: Mapping[str, Any],
        tensors: Sequence[tuple[str, tuple[int, ...]]],
        alignment: int,
    ) -> None:
        self._file = file
        self._alignment = alignment
        self._metadata = b"".join(_string(key) + encode_value(key, value) for key, value in metadata.items())
        self._pairs = len(metadata)
        self._announced = list(tensors)
        self._infos: list[tuple[TensorType, int]] = []  # type and offset of each tensor written
        for name, shape in tensors:
            if len(shape) > MAX_DIMENSIONS or 0 in shape:
                raise ConfigError(
                    f"tensor {name!r} has shape {shape}; GGUF allows {MAX_DIMENSIONS} dimensions, none of them zero"
                )
        # Types and offsets have a fixed size, so the header's length is known before them.
        self._start = _up(len(self._header([(TensorType.F32, 0)] * len(tensors))), alignment)
        self._end = self._start
        file.seek(self._start)

    def write(self, name: str, type: TensorType, pieces: Iterable[Bytes]) -> None:
        """Appends a tensor's bytes. If `pieces` raises, the tensor has not been written and can be written again."""
        expected, shape = self._announced[len(self._infos)]
        if name != expected:
            raise ConfigError(f"tensor {name!r} is written where {expected!r} was announced")
        begin = _up(self._end, self._alignment)
        self._file.seek(begin)
        size = 0
        for piece in pieces:
            size += self._file.write(np.ascontiguousarray(piece).data)
        columns = shape[-1] if shape else 1
        needed = type.row_bytes(columns) * int(np.prod(shape[:-1], dtype=np.int64))
        if size != needed:
            raise ConfigError(f"tensor {name!r} got {size} bytes; {shape} as {type.name} needs {needed}")
        self._infos.append((type, begin - self._start))
        self._end = begin + size

    def finish(self) -> None:
        """Writes the header, now that every type is known."""
        if len(self._infos) != len(self._announced):
            raise ConfigError(f"tensor {self._announced[len(self._infos)][0]!r} was announced and not written")
        self._file.truncate(_up(self._end, self._alignment))
        self._file.seek(0)
        self._file.write(self._header(self._infos))

    def _header(self, infos: Sequence[tuple[TensorType, int]]) -> bytes:
        parts = [MAGIC, struct.pack("<IQQ", 3, len(infos), self._pairs), self._metadata]
        for (name, shape), (type_, offset) in zip(self._announced, infos, strict=True):
            parts += [_string(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type_, offset)]
        return b"".join(parts)


def _up(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


@contextmanager
def writing_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...]]]
) -> Iterator[GGUFWriter]:
    """A GGUF file that appears at `path` when all its tensors are written, and not at all if the block raises.

    metadata  see `encode_value`
    tensors   the names and row-major shapes, in the file's order; the types are given as they are written
    """
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if isinstance(alignment, RawValue):
        (alignment,) = struct.unpack("<I", alignment.data[4:8])
    with replacing(path) as file:
        writer = GGUFWriter(file, metadata, tensors, int(alignment))
        yield writer
        writer.finish()
