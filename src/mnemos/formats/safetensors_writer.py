"""Safetensors files, written so that nobody ever finds a part of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.errors import FormatError

_ALIGNMENT = 64  # of the first tensor's bytes in the file


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its dtype by the format's name ("F32", "BF16", "U8", ...), shape, and bytes, uint8 (size,)."""

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


def write_safetensors(path: Path, tensors: Mapping[str, Entry], notes: Mapping[str, str]) -> None:
    """Writes tensors and notes (the header's `__metadata__`) to a file, which replaces one of that name.

    It is written beside it and moved when it is complete and on the disk. FormatError: it cannot be written.
    """
    order = sorted(tensors.items(), key=lambda item: (-_width(item[1]), item[0]))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(notes)}
    at = 0
    for name, entry in order:
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + len(entry.data)]}
        at += len(entry.data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    try:
        _write(path, [len(text).to_bytes(8, "little"), text, *(entry.data for _, entry in order)])
    except OSError as error:
        problem = error.strerror or error
        raise FormatError(
            f"{path}: cannot be written: {problem}; it needs {(len(text) + at) / 1e6:.1f} MB in a folder that can be "
            "written to"
        ) from error


def _width(entry: Entry) -> int:
    size = int(np.prod(entry.shape, dtype=np.int64))
    return len(entry.data) // size if size else 1


def _write(target: Path, pieces: list[Any]) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, suffix=".part", delete=False) as file:
        try:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, target)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise


def _umask() -> int:
    """The process's, which temporary files ignore."""
    current = os.umask(0o077)
    os.umask(current)
    return current
