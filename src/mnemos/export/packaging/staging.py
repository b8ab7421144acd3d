"""Folders that appear under their names only when they are complete, and the files that list what a package holds."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mnemos.errors import ConfigError, MnemosError
from mnemos.export.packaging.files import write_json
from mnemos.formats.package import (
    FORMAT,
    METADATA,
    SIGNATURE,
    SUMS,
    VERSION,
    PackedFile,
    check_name,
    is_package,
    sha256_of,
    sums_text,
)
from mnemos.formats.whole_file import not_written


def moment(given: int | None = None) -> str:
    """The time of packing, ISO 8601 in UTC: `given` in seconds since 1970, else $SOURCE_DATE_EPOCH, else now.

    With one of the first two, the same model becomes the same bytes. ConfigError: they are no such numbers.
    """
    stated = os.environ.get("SOURCE_DATE_EPOCH") if given is None else given
    if stated is None:
        return datetime.now(timezone.utc).replace(microsecond=0).isoformat()
    try:
        return datetime.fromtimestamp(int(stated), timezone.utc).isoformat()
    except (ValueError, OverflowError, OSError, TypeError):
        what = "SOURCE_DATE_EPOCH" if given is None else "created_at"
        raise ConfigError(f"{what} is {stated!r}; expected seconds since 1970") from None


@contextmanager
def staging(target: Path, overwrite: bool, *, keep: bool = True) -> Iterator[Path]:
    """An empty folder beside `target` that takes its place when the block ends, and vanishes if it raises.

    Without `keep` it vanishes in any case. An empty folder is replaced, and with `overwrite` a package or image layout.
    ConfigError: something else is there; CapacityError: the disk is full; FormatError: it cannot be written to.
    """
    there = os.path.lexists(target)
    if there and not _may_replace(target, overwrite):
        raise ConfigError(f"{target} exists; choose another name, or replace a package with overwrite=True")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise not_written(target, error) from error
    try:
        yield work
        if not keep:
            return
        _settle(work)
        if there:
            _exchange(work, target)
        else:
            os.replace(work, target)
    except MnemosError as error:
        if str(work) not in str(error):
            raise
        raise type(error)(str(error).replace(str(work), str(target))) from error
    except OSError as error:
        raise not_written(target, error) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(work)


def _may_replace(target: Path, overwrite: bool) -> bool:
    if not target.is_dir() or target.is_symlink():
        return False
    return not any(target.iterdir()) or (overwrite and (is_package(target) or (target / "oci-layout").is_file()))


def _exchange(work: Path, target: Path) -> None:
    """Puts a folder in another one's place; that one is back if this fails."""
    old = work.with_suffix(".old")
    os.replace(target, old)
    try:
        os.replace(work, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def _settle(folder: Path) -> None:
    """Everything on the disk, readable as new files are."""
    mask = os.umask(0o077)
    os.umask(mask)
    for place, _, names in os.walk(folder):
        os.chmod(place, 0o777 & ~mask)
        for name in names:
            path = os.path.join(place, name)
            os.chmod(path, 0o666 & ~mask)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def list_files(folder: Path) -> dict[str, PackedFile]:
    """Every file of a package in the making, with its size and sum. FormatError: a name that a package may not hold."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            check_name(name, folder)
            files[name] = packed(path)
    return {name: file for name, file in files.items() if name not in (METADATA, SUMS, SIGNATURE)}


def packed(path: Path) -> PackedFile:
    """A file's size and sum."""
    return PackedFile(path.stat().st_size, sha256_of(path))


def write_lists(folder: Path, files: dict[str, PackedFile], facts: dict[str, Any]) -> None:
    """Writes metadata.json and SHA256SUMS."""
    listed = {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()}
    write_json(folder / METADATA, {"format": FORMAT, "version": VERSION, **facts, "files": listed})
    sums = {name: file.sha256 for name, file in files.items()} | {METADATA: sha256_of(folder / METADATA)}
    (folder / SUMS).write_text(sums_text(sums), encoding="ascii", newline="\n")
