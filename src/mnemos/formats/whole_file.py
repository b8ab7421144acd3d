"""Files and folders that appear under their names only when they are complete."""

from __future__ import annotations

import errno
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from mnemos.errors import CapacityError, ConfigError, FormatError, MnemosError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a limit of the process or of the file system


def check_new(out: Path, is_file: bool = False) -> None:
    """ConfigError if there is a file or folder of this name, for what is never written over anything.

    is_file: also if the folder is missing that it would be in, before what is to be written has been computed.
    """
    if out.exists():
        raise ConfigError(f"out is {str(out)!r}, which exists; give a new name")
    if is_file and not out.parent.is_dir():
        raise ConfigError(f"out is {str(out)!r}, and there is no folder {str(out.parent)!r}; make it first")


@contextmanager
def replacing(path: Path, size: int = 0) -> Iterator[BinaryIO]:
    """A new file beside `path`, open for writing and reading, that takes its place when the block ends.

    If the block raises, nothing is left and a file that was there before stays. Errors: those of `not_written`, also
    for a device or a pipe, which would be replaced by a file; `size` is the bytes that it needs, for them.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(errno.EINVAL, "it is a device, a pipe or a socket, not a file")
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise not_written(path, error, size) from error
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
            raise not_written(path, error, size) from error
        raise


def write_whole(path: Path, write: Callable[[BinaryIO], Any], size: int = 0) -> None:
    """Calls `write` with the file of `replacing`."""
    with replacing(path, size) as file:
        write(file)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, which does not exist, that takes its name when the block ends.

    If the block raises, nothing is left. Errors: those of `not_written`.
    """
    from shutil import rmtree  # slow to import, and most starts write nothing

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise not_written(path, error) from error
    try:
        yield work
        os.chmod(work, 0o777 & ~_umask())
        os.replace(work, path)
    except BaseException as error:
        rmtree(work, ignore_errors=True)
        # A file in the folder has said so already, by a path that nobody knows.
        cause = error.__cause__ if isinstance(error, MnemosError) and str(work) in str(error) else error
        if isinstance(cause, OSError) and not isinstance(cause, MnemosError):
            raise not_written(path, cause) from error
        raise


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A folder beside `path` for what will take its place; it is gone when the block ends. Errors: `not_written`'s.

    What Mnemos' errors say of a file or folder in it, they say of `path`. Folders on the way there that were made for
    it and stay empty are gone then, too.
    """
    from shutil import rmtree  # see `new_folder`

    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise not_written(path, error) from error
    try:
        yield work
    except MnemosError as error:
        named = re.sub(rf"{re.escape(str(work))}(/[^/:\s]+)?", lambda _: str(path), str(error))
        if named == str(error):
            raise
        raise type(error)(named) from error
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        rmtree(work, ignore_errors=True)
        with suppress(OSError):  # the first one that has something in it
            for parent in made:
                parent.rmdir()


@contextmanager
def late_errors(file: BinaryIO) -> Iterator[BinaryIO]:
    """A file for writers that cannot bear an OSError: what writing to `file` raises is raised when the block ends.

    PyTorch's writers end the process, or raise a RuntimeError about positions in the file.
    """
    patient = _Patient(file)
    yield cast(BinaryIO, patient)
    if patient.error is not None:
        raise patient.error


class _Patient(io.RawIOBase):
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)


def not_written(path: str | os.PathLike[str], error: OSError, size: int = 0, what: str = "") -> MnemosError:
    """The error for a file or folder that could not be written: CapacityError if there is no room, else FormatError.

    size: the bytes that it needs, 0 if that is not known; what: what it holds, where the path does not tell.
    """
    needs = f"{size / 1e6:.1f} MB in " if size else ""
    return kind_of(error)(
        f"{path}: {what}{' ' if what else ''}cannot be written: {error.strerror or error}; "
        f"it needs {needs}a folder with room that can be written to"
    )


def kind_of(error: OSError) -> type[MnemosError]:
    """The class of the error for what could not be written: CapacityError if there is no room, else FormatError."""
    return CapacityError if error.errno in _NO_ROOM else FormatError


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
