"""Safetensors files, written so that nobody ever finds a part of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.formats.whole_file import write_whole

_ALIGNMENT = 64  # of the first tensor's bytes in the file


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its dtype by the format's name ("F32", "BF16", "U8", ...), shape, and bytes, uint8 (size,)."""

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


def write_safetensors(path: Path, tensors: Mapping[str, Entry], notes: Mapping[str, str]) -> None:
    """Writes tensors and notes (the header's `__metadata__`) to a file, which replaces one of that name.

    FormatError: it cannot be written; then nothing has changed.
    """
    order = sorted(tensors.items(), key=lambda item: (-_width(item[1]), item[0]))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(notes)}
    at = 0
    for name, entry in order:
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + len(entry.data)]}
        at += len(entry.data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    pieces: list[Any] = [len(text).to_bytes(8, "little"), text, *(entry.data for _, entry in order)]
    write_whole(path, lambda file: file.writelines(pieces), len(text) + at)


def _width(entry: Entry) -> int:
    size = int(np.prod(entry.shape, dtype=np.int64))
    return len(entry.data) // size if size else 1
