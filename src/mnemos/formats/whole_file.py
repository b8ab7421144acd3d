"""Files that appear under their names only when they are complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mnemos.errors import FormatError, MnemosError


@contextmanager
def replacing(path: Path, size: int = 0) -> Iterator[BinaryIO]:
    """A new file beside `path`, open for writing and reading, that takes its place when the block ends.

    If the block raises, nothing is left and a file that was there before stays. FormatError if it cannot be written,
    for example because the disk is full; `size` is the bytes that it needs, for that error.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise _explained(path, size, error) from error
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and not isinstance(error, MnemosError):
            raise _explained(path, size, error) from error
        raise


def write_whole(path: Path, write: Callable[[BinaryIO], Any], size: int) -> None:
    """Calls `write` with the file of `replacing`."""
    with replacing(path, size) as file:
        write(file)


def _explained(path: Path, size: int, error: OSError) -> MnemosError:
    needs = f"{size / 1e6:.1f} MB in " if size else ""
    problem = error.strerror or error
    return FormatError(
        f"{path}: cannot be written: {problem}; it needs {needs}a folder with room that can be written to"
    )


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
