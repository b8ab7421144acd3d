"""The folder that sessions are kept in: a file for each, named after it."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from mnemos.errors import CapacityError, ConfigError, FormatError, shown
from mnemos.machine.home import state
from mnemos.machine.locks import lock
from mnemos.memory.session_file import summary_of
from mnemos.memory.session_records import BINARY, Summary, delete, sync_folder

SUFFIX = ".session"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def session_folder(chosen: str | os.PathLike[str] | None, tenant: str = "") -> Path:
    """Where sessions are kept: `chosen`, or `sessions` in the user's state folder. Each tenant has a folder in it."""
    folder = state() / "sessions" if chosen is None else Path(chosen).expanduser()
    return folder / f"tenant-{sha256(tenant.encode()).hexdigest()[:32]}" if tenant else folder


def session_path(folder: Path, name: str) -> Path:
    """A session's file. ConfigError for a name that no session can have."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"session is {shown(name)}; it must be 1 to 100 of a-z, A-Z, 0-9, '.', '_' and '-', the first of them "
            "a letter or digit"
        )
    return folder / (name + SUFFIX)


def session_files(folder: Path) -> dict[str, Path]:
    """The files of the sessions in a folder, by name."""
    return {path.name.removesuffix(SUFFIX): path for path in sorted(folder.glob(f"[!.]*{SUFFIX}"))}


def list_sessions(folder: Path) -> list[Summary | FormatError]:
    """The sessions in a folder, the most recently used first; for a file that cannot be read, its error, at the end.

    One in which nothing has been said yet is not among them: it is deleted when it is closed.
    """
    found: list[Summary] = []
    broken: list[FormatError] = []
    for path in session_files(folder).values():
        try:
            found.append(summary_of(path))
        except FormatError as error:
            broken.append(error)
    return [*sorted((one for one in found if one.turns), key=lambda one: -one.modified), *broken]


def bytes_of(folder: Path) -> int:
    """The size of all sessions in a folder."""
    total = 0
    for path in session_files(folder).values():
        with suppress(OSError):
            total += path.stat().st_size
    return total


def forget_session(folder: Path, name: str) -> None:
    """Deletes a session, whatever is in its file. CapacityError if it is in use, FormatError if there is none."""
    path = session_path(folder, name)
    try:
        descriptor = os.open(path, os.O_RDWR | BINARY)
    except FileNotFoundError as error:
        raise FormatError(f"{path}: there is no session {name!r} in this folder") from error
    except OSError as error:
        raise FormatError(f"{path}: the session cannot be deleted: {error.strerror or error}") from error
    if not lock(descriptor):
        os.close(descriptor)
        raise CapacityError(f"{path}: the session {name!r} is in use; close it before it is forgotten")
    try:
        delete(path, descriptor)
        sync_folder(folder)
    except OSError as error:
        raise FormatError(f"{path}: the session cannot be deleted: {error.strerror or error}") from error
