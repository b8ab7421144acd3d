"""The string arrays of GGUF metadata (vocabulary, merges), located quickly and decoded only when read."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from mnemos.errors import FormatError
from mnemos.formats.mapping import excerpt

MAX_STRINGS = 1 << 24  # thirty times the largest vocabulary known; keeps the slow walk within seconds
_HEADER = 8  # a string is a 64-bit little-endian length and that many bytes
_WINDOW = 1 << 16
_STEPS = 256
_LENGTH = struct.Struct("<Q")

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]


class StringArray(Sequence[str]):
    """n strings as a file stores them; indexing decodes one, `strings` all of them at once.

    data      uint8, a view of the array's bytes in the file: each string after its 8-byte length
    headers   int64 (n+1,): string i has its length at data[headers[i]] and its text up to headers[i + 1]
    label     file and key, for errors
    """

    def __init__(self, label: str, data: Bytes, headers: Offsets) -> None:
        self.label = label
        self.data = data
        self.headers = headers

    def __len__(self) -> int:
        return len(self.headers) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._decode(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.label}: index {index} is outside of {len(self)} strings")
        return self._decode(index % len(self))

    def __iter__(self) -> Iterator[str]:
        return iter(self.strings())

    def __repr__(self) -> str:
        return f"StringArray({self.label}, {len(self)} strings)"

    def bytes_at(self, index: int) -> bytes:
        """The undecoded bytes of one string."""
        return self.data[self.headers[index] + _HEADER : self.headers[index + 1]].tobytes()

    def joined(self) -> tuple[bytes, Offsets]:
        """All strings' bytes one after the other, and where each starts: int64 (n+1,)."""
        keep = np.ones(len(self.data), dtype=np.bool_)
        for i in range(_HEADER):
            keep[self.headers[:-1] + i] = False
        return self.data[keep].tobytes(), self.headers - _HEADER * np.arange(len(self.headers))

    def strings(self) -> list[str]:
        """Every string, decoded in one go. Text that is not UTF-8 is a FormatError that names the string."""
        text, starts = self.joined()
        separator = next((c for c in range(32) if c not in text), None)
        if separator is None or len(self) == 0:
            return [self._decode(i) for i in range(len(self))]
        # One decode and one split cost a tenth of a slice and a decode for each string.
        gaps = np.insert(np.frombuffer(text, np.uint8), starts[1:-1], separator)
        try:
            return gaps.tobytes().decode().split(chr(separator))
        except UnicodeDecodeError as error:
            index = int(np.searchsorted(starts + np.arange(len(starts)), error.start, side="right")) - 1
            raise self._not_utf8(index) from error

    def _decode(self, index: int) -> str:
        text = self.bytes_at(index)
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self._not_utf8(index) from error

    def _not_utf8(self, index: int) -> FormatError:
        return FormatError(f"{self.label}: string {index} is {excerpt(self.bytes_at(index))}, which is not UTF-8")


def locate_strings(label: str, data: Bytes, count: int) -> StringArray:
    """Finds `count` strings that begin at data[0]; `data` reaches to the end of the file.

    Walking 100,000 lengths one by one takes tens of milliseconds in Python. Nearly all strings are shorter than 256
    bytes and hold no zero bytes, so a run of seven zeros marks a length: all are found at once, and the chain from
    each length to the next proves the guess. Where it breaks, some strings are walked one by one.
    """
    if count > len(data) // _HEADER:
        raise FormatError(f"{label}: has {count} strings, but only {len(data)} bytes of the file are left")
    if count > MAX_STRINGS:
        raise FormatError(f"{label}: has {count} strings; at most {MAX_STRINGS} are allowed")
    headers = np.zeros(count + 1, dtype=np.int64)
    found = position = 0
    while found < count:
        chain = _chain(data[position : position + _WINDOW])[: count - found]
        if len(chain):
            headers[found : found + len(chain)] = chain + position
            found += len(chain)
            last = int(headers[found - 1])
            next_position = last + _HEADER + int(data[last])
        else:
            next_position = position
        if found < count and next_position - position < _WINDOW // 2:
            steps = _walk(label, data, next_position, min(_STEPS, count - found), found)
            headers[found : found + len(steps) - 1] = steps[:-1]
            found += len(steps) - 1
            next_position = steps[-1]
        position = next_position
    if position > len(data):
        raise FormatError(f"{label}: string {count - 1} ends {position - len(data)} bytes after the end of the file")
    headers[count] = position
    return StringArray(label, data[:position], headers)


def _chain(window: Bytes) -> Offsets:
    """Where the strings from window[0] on have their lengths, as far as that is certain; may be empty."""
    zero = window == 0
    zero = zero[1:] & zero[:-1]
    zero = zero[2:] & zero[:-2]
    zero = zero[3:] & zero[:-3]  # a run of seven starts here
    lengths_at = np.flatnonzero(zero[1:])
    if len(lengths_at) == 0 or lengths_at[0] != 0:
        return lengths_at[:0]
    ends = lengths_at + _HEADER + window[lengths_at]
    broken = np.flatnonzero(lengths_at[1:] != ends[:-1])
    return lengths_at[: broken[0] + 1] if len(broken) else lengths_at


def _walk(label: str, data: Bytes, position: int, count: int, index: int) -> list[int]:
    """Positions of the next `count` lengths and of the byte after the last string."""
    positions, memory = [position], data.data
    for i in range(count):
        if position + _HEADER > len(data):
            raise FormatError(f"{label}: the file ends before string {index + i}")
        (length,) = _LENGTH.unpack_from(memory, position)
        position += _HEADER + length
        if position > len(data):
            raise FormatError(f"{label}: string {index + i} has {length} bytes, more than the file has left")
        positions.append(position)
    return positions
