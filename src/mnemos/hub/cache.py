"""The models folder: where it is, who may write to it, and how a model is stored whole or not at all."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mnemos.errors import DownloadError
from mnemos.machine.home import home

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, bytes done, total bytes); a total of 0 means unknown."""

_LOCK_POLL_SECONDS = 0.1
_ESCAPES = (("%", "%25"), ("/", "%2F"), (":", "%3A"))


def models_folder() -> Path:
    """Where fetched models are stored, a folder each; it need not exist."""
    return home() / "models"


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache: its name, its folder, and what it takes on disk in bytes."""

    name: str
    folder: Path
    size: int


def cached_models() -> list[CachedModel]:
    """All models in the cache, by name. What an interrupted pull may have left is not among them."""
    root = models_folder()
    if not root.is_dir():
        return []
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    return [CachedModel(_name_of(folder), folder, _folder_size(folder)) for folder in folders]


def folder_for(name: str) -> Path:
    """The cache folder of a model: its name, with what cannot be in a file's name written as %XX."""
    for character, code in _ESCAPES:
        name = name.replace(character, code)
    return models_folder() / name


def remove(name: str) -> int:
    """Deletes a cached model and returns the bytes that this freed; DownloadError when there is no such model."""
    models = {model.name: model for model in cached_models()}
    if name not in models:
        known = ", ".join(models) or "none"
        raise DownloadError(f"model {name!r} is not in {models_folder()}; cached models: {known}")
    folder = models[name].folder
    with lock(folder):
        # The rename takes the model away at once, so that an interrupted removal leaves no half of it.
        condemned = _staging_path(folder)
        _delete(condemned)
        os.replace(folder, condemned)
        _delete(condemned)
    return models[name].size


@contextmanager
def staging(folder: Path, needed: int) -> Iterator[Path]:
    """An empty folder to build a model in; it moves to `folder` when the block succeeds, else it vanishes.

    The caller holds `lock(folder)`, so what is in the staging place was left by a process that died, and is removed.
    `needed` is the room in bytes that the work takes; DownloadError when the disk has less.
    """
    work = _staging_path(folder)
    try:
        _delete(work)
        work.mkdir(parents=True)
        check_room(work, needed)
        yield work
        _delete(folder)
        os.replace(work, folder)
    except OSError as error:
        raise DownloadError(f"cannot store the model in {folder}: {error.strerror or error}") from error
    finally:
        _delete(work)


@contextmanager
def lock(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock of one cached model, across threads and processes; `waiting` is called once if another holds it.

    The operating system drops the lock of a process that dies. The lock's file is removed on release, hence the check
    that the file which was locked is still the one at that path.
    """
    path = folder.with_name(f".{folder.name}.lock")
    handle = _acquire(path, waiting)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file; an empty lock file does no harm
            path.unlink()
        handle.close()


def _acquire(path: Path, waiting: Callable[[], None] | None) -> IO[bytes]:
    told = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("ab")
        except OSError as error:
            place = f"the models folder {path.parent}"
            raise DownloadError(f"cannot write to {place}: {error.strerror}; set MNEMOS_HOME") from error
        if _try_lock(handle):
            if _is_at(handle, path):
                return handle
        elif waiting and not told:
            waiting()
            told = True
        handle.close()
        time.sleep(_LOCK_POLL_SECONDS)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: IO[bytes]) -> bool:
        try:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(handle: IO[bytes]) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _is_at(handle: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _staging_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _delete(path: Path) -> None:
    if path.exists():
        from shutil import rmtree  # slow to import, and most starts fetch nothing

        rmtree(path)


def check_room(folder: Path, needed: int) -> None:
    """DownloadError when the disk of `folder` has less than `needed` bytes free."""
    from shutil import disk_usage

    free = disk_usage(folder).free
    if free < needed:
        megabytes = (needed - free + 999_999) // 1_000_000
        raise DownloadError(
            f"the disk of {folder.parent} has {free / 1e6:.0f} MB free, the model needs {needed / 1e6:.0f} MB: "
            f"{megabytes} MB are missing; free some, or set MNEMOS_HOME to another disk"
        )


def _folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _name_of(folder: Path) -> str:
    name = folder.name
    for character, code in reversed(_ESCAPES):
        name = name.replace(code, character)
    return name
