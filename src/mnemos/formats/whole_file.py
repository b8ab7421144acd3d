"""Files that appear under their names only when they are complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from mnemos.errors import FormatError


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], size: int) -> None:
    """Calls `write` with a file beside `path`, which takes that name when it is complete and on the disk.

    size: about how many bytes it needs, for the message. FormatError: it cannot be written; then nothing has changed.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                file.close()
                os.chmod(file.name, 0o666 & ~_umask())
                os.replace(file.name, path)
            except BaseException:
                file.close()
                os.unlink(file.name)
                raise
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be written: {error.strerror or error}; it needs {size / 1e6:.1f} MB in a folder that can "
            "be written to"
        ) from error


def _umask() -> int:
    """The process's, which temporary files ignore."""
    current = os.umask(0o077)
    os.umask(current)
    return current
