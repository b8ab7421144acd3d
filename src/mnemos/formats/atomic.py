"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mnemos.errors import CapacityError, FormatError, MnemosError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, open for writing and reading, that takes its place when the block ends.

    If the block raises, nothing is left and a file that was there before stays. CapacityError if the disk is full,
    FormatError if the file cannot be written for another reason.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise _explained(path, error) from error
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
            raise _explained(path, error) from error
        raise


def _explained(path: Path, error: OSError) -> MnemosError:
    if error.errno in _NO_ROOM:
        return CapacityError(
            f"{path}: cannot be written whole: {error.strerror}; nothing was left of it, free some room"
        )
    return FormatError(f"{path}: cannot be written: {error.strerror or error}")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
