"""Packages that are one .tar, or an OCI image layout: unpacked once into the models folder."""

from __future__ import annotations

from pathlib import Path

from mnemos.errors import FormatError
from mnemos.formats.package_oci import is_oci_layout, peek_oci, unpack_oci
from mnemos.formats.package_tar import SUFFIX, peek_tar, unpack_tar
from mnemos.hub import cache
from mnemos.hub.cache import Progress

OCI_SUFFIX = ".oci"  # with which `mnemos package --oci` names a layout


def unpacked(path: Path, progress: Progress) -> Path:
    """The package in a .tar or an OCI layout, as the folder NAME@SUM among the models: unpacked if it is not there yet,
    with every file verified. FormatError, UnsupportedError: what `path` holds is damaged, or no package."""
    layout = is_oci_layout(path)
    digest = peek_oci(path) if layout else peek_tar(path)[1]
    folder = cache.folder_for(f"{path.resolve().name.removesuffix(SUFFIX).removesuffix(OCI_SUFFIX)}@{digest[:12]}")
    if not folder.is_dir():
        with cache.lock(folder, lambda: progress("waiting for another process", 0, 0)):
            if not folder.is_dir():
                size = sum(file.stat().st_size for file in path.rglob("*")) if layout else path.stat().st_size
                with cache.staging(folder, size) as work:
                    (unpack_oci if layout else unpack_tar)(path, work, progress)
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
