"""Files as read-only memory maps."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

from mnemos.errors import FormatError


def require_file(path: Path) -> None:
    """FormatError unless `path` is a regular file; the functions of os.path never raise, whatever the name."""
    if not os.path.isfile(path):
        raise FormatError(f"{path}: {'is not a regular file' if os.path.exists(path) else 'does not exist'}")


def map_file(path: Path) -> mmap.mmap:
    """Maps a whole regular file, read-only and private.

    The map lives until its last view does. While it lives, Windows refuses to replace or delete the file, and on
    no platform may anybody truncate it; Mnemos itself replaces files and never truncates one.
    """
    require_file(path)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(f"{path}: is empty")
            if sys.platform == "win32":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    except (OSError, ValueError, OverflowError) as error:
        raise FormatError(f"{path}: cannot be mapped into memory: {error}") from error


def excerpt(value: object, limit: int = 80) -> str:
    """repr(value) cut to a length that fits into an error message; a file chooses the value, so it may be huge."""
    text = repr(value[:limit] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= limit + 20 else text[:limit] + "..."
