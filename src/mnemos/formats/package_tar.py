"""A package as one .tar: uncompressed, since weights do not compress, with metadata.json and SHA256SUMS first."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from mnemos.errors import FormatError
from mnemos.formats.mapping import excerpt
from mnemos.formats.package import (
    METADATA,
    SIGNATURE,
    SUMS,
    Package,
    check_metadata,
    check_names,
    check_sums,
    parse_sums,
    read_package,
)
from mnemos.formats.strict_json import MAX_BYTES, parse_json_object
from mnemos.formats.whole_file import replacing

Progress = Callable[[str, int, int], None]
SUFFIX = ".tar"
_PIECE = 1 << 20


def is_package_tar(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file whose name ends in .tar."""
    return os.fspath(path).endswith(SUFFIX) and os.path.isfile(path)


def write_tar(package: Package, path: Path) -> None:
    """Writes a package as one file: the same bytes for the same package. FormatError: it cannot be written."""
    names = [METADATA, SUMS, *([SIGNATURE] if (package.path / SIGNATURE).is_file() else []), *sorted(package.files)]
    time = _seconds(package.metadata.get("created_at"))
    with (
        replacing(path, package.size) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = (package.path / name).stat().st_size, time, 0o644
            with (package.path / name).open("rb") as content:
                archive.addfile(entry, content)


def peek_tar(path: Path) -> tuple[dict[str, Any], str]:
    """(metadata.json, the SHA-256 of SHA256SUMS) of a package's .tar, of which nothing else is read."""
    with _opened(path) as archive:
        metadata, sums = (_small(archive, _next(archive, path, name), path) for name in (METADATA, SUMS))
    described = parse_json_object(metadata, f"{path}: {METADATA}")
    check_metadata(described, path)
    return described, hashlib.sha256(sums).hexdigest()


def unpack_tar(path: Path, folder: Path, progress: Progress = lambda stage, done, total: None) -> Package:
    """Unpacks a package into an empty folder, and verifies every file while it is read.

    Only plain files of the package's list are written, each once, under its own name. FormatError: the .tar holds
    anything else, or lacks something.
    """
    with _opened(path) as archive:
        metadata, sums_text = (_small(archive, _next(archive, path, name), path) for name in (METADATA, SUMS))
        files = check_metadata(parse_json_object(metadata, f"{path}: {METADATA}"), path)
        sums = parse_sums(sums_text, path)
        check_sums(sums, files, path)
        if hashlib.sha256(metadata).hexdigest() != sums[METADATA]:
            raise FormatError(f"{path}: {METADATA} has another SHA-256 than {SUMS} says: it was changed or damaged")
        (folder / METADATA).write_bytes(metadata)
        (folder / SUMS).write_bytes(sums_text)
        there = {METADATA, SUMS}
        total, done = sum(file.size for file in files.values()), 0
        while (entry := archive.next()) is not None:
            name = entry.name
            _check_entry(entry, path)
            if name in there or (name not in files and name != SIGNATURE):
                raise FormatError(f"{path}: {excerpt(name)} does not belong to the package, or is there twice")
            there.add(name)
            if name == SIGNATURE:
                (folder / SIGNATURE).write_bytes(_small(archive, entry, path))
                continue
            if entry.size != files[name].size:
                raise FormatError(f"{path}: {name} has {entry.size} bytes; it was packed with {files[name].size}")
            progress("unpacking", done, total)
            if _copy(archive, entry, folder / name, path) != files[name].sha256:
                raise FormatError(f"{path}: {name} has another SHA-256 than it was packed with: changed or damaged")
            done += entry.size
    progress("unpacking", total, total)
    check_names(there - {SIGNATURE}, files, path)
    return read_package(folder)


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, mode="r:") as archive:
            yield archive
    except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        raise FormatError(f"{path}: cannot be read as a .tar: {error}; expected one that mnemos wrote") from error
    except OSError as error:
        raise FormatError(f"{path}: cannot be unpacked: {error.strerror or error}") from error


def _next(archive: tarfile.TarFile, path: Path, name: str) -> tarfile.TarInfo:
    entry = archive.next()
    if entry is None or entry.name != name:
        found = "nothing" if entry is None else excerpt(entry.name)
        raise FormatError(f"{path}: holds {found} where {name} is expected; a package begins with it")
    _check_entry(entry, path)
    return entry


def _check_entry(entry: tarfile.TarInfo, path: Path) -> None:
    """FormatError unless it is a plain file, with nothing that changes what its header says."""
    if entry.type != tarfile.REGTYPE or entry.pax_headers or entry.isdev():
        raise FormatError(f"{path}: {excerpt(entry.name)} is no plain file; a package holds nothing else")


def _small(archive: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> bytes:
    if entry.size > MAX_BYTES:
        raise FormatError(f"{path}: {excerpt(entry.name)} has {entry.size} bytes; it may have {MAX_BYTES}")
    return _content(archive, entry).read()


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(entry)
    if content is None:  # no file, which `_check_entry` has refused
        raise FormatError(f"{entry.name} has no content")
    return content


def _copy(archive: tarfile.TarFile, entry: tarfile.TarInfo, target: Path, path: Path) -> str:
    """Writes an entry's content to a new file; its SHA-256."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    content = _content(archive, entry)
    with target.open("xb") as file:
        while piece := content.read(_PIECE):
            digest.update(piece)
            file.write(piece)
        if file.tell() != entry.size:
            raise FormatError(f"{path}: {entry.name} is cut off after {file.tell()} of {entry.size} bytes")
    return digest.hexdigest()


def _seconds(created_at: Any) -> int:
    """Seconds since 1970 of metadata.json's time; 0 for anything else."""
    try:
        return max(int(datetime.fromisoformat(created_at).timestamp()), 0)
    except (TypeError, ValueError, OverflowError, OSError):
        return 0
