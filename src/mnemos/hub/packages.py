"""Packages that are one .tar: unpacked once into the models folder, like a model that was fetched."""

from __future__ import annotations

from pathlib import Path

from mnemos.errors import FormatError
from mnemos.formats.package_tar import SUFFIX, peek_tar, unpack_tar
from mnemos.hub import cache
from mnemos.hub.cache import Progress


def unpacked(path: Path, progress: Progress) -> Path:
    """The folder of a .tar's package, NAME@SUM in the models folder; unpacked and verified if it is not there yet."""
    _, digest = peek_tar(path)
    folder = cache.folder_for(f"{path.name.removesuffix(SUFFIX)}@{digest[:12]}")
    if not folder.is_dir():
        with cache.lock(folder, lambda: progress("waiting for another process", 0, 0)):
            if not folder.is_dir():
                with cache.staging(folder, path.stat().st_size) as work:
                    unpack_tar(path, work, progress)
    return folder


def cached_package(name: str) -> Path | None:
    """The folder of an unpacked package by its name, with or without its sum. FormatError: there are several."""
    root = cache.models_folder()
    folders = [folder for folder in root.iterdir() if "@" in folder.name] if root.is_dir() else []
    wanted = cache.folder_for(name).name
    found = sorted(folder for folder in folders if wanted in (folder.name, folder.name.partition("@")[0]))
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise FormatError(f"{name!r} is the name of several packages; give one of {names}")
    return found[0] if found else None
