"""Safetensors files, written so that nobody ever finds a part of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.formats.whole_file import replacing

_ALIGNMENT = 64  # of the first tensor's bytes in the file
_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
           "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its dtype by the format's name ("F32", "BF16", "U8", ...), shape, and bytes, uint8 (size,).

    The bytes are an array, or what gives them in pieces when they are written.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Bytes | Callable[[], Iterable[Bytes]]

    @property
    def size(self) -> int:
        """Bytes."""
        return _WIDTHS[self.dtype] * int(np.prod(self.shape, dtype=np.int64))

    def pieces(self) -> Iterable[Bytes]:
        """The bytes, in order."""
        return self.data() if callable(self.data) else [self.data]


def write_safetensors(path: Path, tensors: Mapping[str, Entry], notes: Mapping[str, str]) -> None:
    """Writes tensors and notes (the header's `__metadata__`) to a file, which replaces one of that name.

    It is written beside it and moved when it is complete and on the disk. Errors: those of `whole_file.replacing`.
    """
    # The widest first, so that all are aligned.
    order = sorted(tensors.items(), key=lambda item: (-_WIDTHS[item[1].dtype], item[0]))
    header: dict[str, Any] = {"__metadata__": dict(notes)}
    at = 0
    for name, entry in order:
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + entry.size]}
        at += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with replacing(path, 8 + len(text) + at) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in order:
            written = sum(file.write(np.ascontiguousarray(piece).data) for piece in entry.pieces())
            if written != entry.size:
                raise ValueError(f"tensor {name!r} has {written} bytes; {entry.shape} {entry.dtype} has {entry.size}")
