"""Texts that are kept to be found again: a file of JSON lines, appended to and synced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnemos.errors import CapacityError, FormatError
from mnemos.machine.locks import lock
from mnemos.memory.session_records import BINARY, sync_folder, write_all

FILE = "texts.jsonl"


class TextStore:
    """The texts of one folder. Other processes may add to it at the same time; each call sees what they have added.

    A line is {"name", "text"}; one that was never completed is dropped.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._texts: dict[str, str] = {}
        self._read: tuple[int, int] = (0, 0)  # the file's identity, and how far it was read

    def texts(self) -> dict[str, str]:
        """All texts by name, in the order of their addition."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | BINARY)
        except FileNotFoundError:
            self._texts, self._read = {}, (0, 0)
            return self._texts
        except OSError as error:
            raise FormatError(f"{self._path}: the texts cannot be read: {error.strerror or error}") from error
        try:
            self._update(descriptor)
        finally:
            os.close(descriptor)
        return self._texts

    def add(self, name: str, text: str) -> None:
        """Keeps a text, in place of one of the same name; it is on the disk when this returns."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked() as descriptor:
            self._append(descriptor, {"name": name, "text": text})

    def forget(self, name: str) -> bool:
        """Deletes a text, from the file too; False if there is none of this name."""
        if name not in self.texts():
            return False
        with self._locked() as descriptor:
            self._update(descriptor)
            kept = {other: text for other, text in self._texts.items() if other != name}
            temporary = self._path.with_name(f".{FILE}.part")
            target = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | BINARY, 0o600)
            try:
                lines = b"".join(_line({"name": other, "text": text}) for other, text in kept.items())
                write_all(target, lines, 0)
                os.fsync(target)
            finally:
                os.close(target)
            os.replace(temporary, self._path)
            sync_folder(self._path.parent)
        self.texts()
        return True

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file for this process alone. CapacityError if another one is writing, FormatError if it cannot be."""
        try:
            while True:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | BINARY, 0o600)
                try:
                    if not lock(descriptor):
                        raise CapacityError(f"{self._path}: another process is writing; try again")
                    if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                        yield descriptor
                        return
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise FormatError(f"{self._path}: the texts cannot be written: {error.strerror or error}") from error

    def _append(self, descriptor: int, entry: dict[str, str]) -> None:
        self._update(descriptor)
        end = self._read[1]
        try:
            write_all(descriptor, _line(entry), end)
            os.ftruncate(descriptor, end + len(_line(entry)))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end)
            raise
        self._update(descriptor)

    def _update(self, descriptor: int) -> None:
        """Reads what was added since the last time, up to the last complete line."""
        status = os.fstat(descriptor)
        identity, done = self._read
        if identity != status.st_ino or done > status.st_size:
            self._texts, done = {}, 0
        os.lseek(descriptor, done, os.SEEK_SET)
        content = b""
        while part := os.read(descriptor, 1 << 24):
            content += part
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines()):
            entry = _entry(line)
            if entry is None:
                raise FormatError(
                    f"{self._path}: line {number + 1} after byte {done} is {line[:40]!r}; expected a JSON object with "
                    "name and text: mend or delete it"
                )
            name, text = entry
            self._texts.pop(name, None)
            self._texts[name] = text
        self._read = (status.st_ino, done + len(whole))


def _line(entry: dict[str, str]) -> bytes:
    return json.dumps(entry, ensure_ascii=True).encode() + b"\n"


def _entry(line: bytes) -> tuple[str, str] | None:
    try:
        content: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match content:
        case {"name": str(name), "text": str(text)}:
            return name, text
        case _:
            return None
