"""A session as a file: what was said, turn by turn, and the cache pages that it was read into.

The file is only ever appended to, cut off at the end of a turn, or replaced as a whole; `session_records` says what it
consists of. A turn is synced to the disk when it ends, so a process that is killed leaves every turn that was ended,
and perhaps a tail that is dropped when the file is opened again. Tokens are what a session consists of: a page that is
missing or damaged costs the time to compute it again. The header binds pages to a model and to its cache's layout.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from mnemos.errors import CapacityError, FormatError
from mnemos.formats.whole_file import kind_of
from mnemos.machine.locks import lock
from mnemos.memory.prefix_file import difference_of
from mnemos.memory.session_records import (
    BINARY,
    Binding,
    Ended,
    PageKey,
    Pages,
    StoredPage,
    Summary,
    Turn,
    after,
    check_tail,
    delete,
    live_pages,
    read_at,
    read_page,
    read_start,
    read_turns,
    start_record,
    sync_folder,
    turn_record,
    write_all,
    write_pages,
)

PART = ".part"  # the suffix of unfinished files
_SLACK = 16 << 20  # bytes of pages that later turns have replaced, beyond which the file is written anew


class SessionFile:
    """An open session, locked for this process until it is closed. Not safe to use from several threads at once.

    turns     all turns, oldest first
    tokens    what they make together
    messages  likewise
    """

    def __init__(self, path: Path, binding: Binding, name: str) -> None:
        """Opens a session, or makes one. CapacityError if somebody else has it open.

        FormatError if the file is none of a session, of a later version, damaged, or of another model.
        """
        self.path = path
        self.binding = binding
        self.name = name
        self.turns: list[Turn] = []
        self.tokens: list[int] = []
        self.messages: list[dict[str, Any]] = []
        self._ended: list[Ended] = []
        self._pages: Pages = {}
        self._begin = 0
        self._checked = False  # the file is this session's
        self._descriptor = -1
        try:
            self._descriptor = self._open()
            self._read()
            self._drop_leftovers()
        except OSError as error:
            self.close()
            raise FormatError(f"{path}: the session cannot be opened: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    # Reading.

    def page(self, key: PageKey, buffer: memoryview) -> memoryview | None:
        """A page's content; None if it is not stored, or not any longer as it was written.

        buffer: for a page of any group; the content is a part of it. Several threads may read different pages.
        """
        place = self._pages.get(key)
        if place is None:
            return None
        content = buffer[: self.binding.page_bytes[key[0]]]
        if read_page(self._descriptor, key, place, content):
            return content
        del self._pages[key]
        return None

    @property
    def closed(self) -> bool:
        """True after `close` or `remove`."""
        return self._descriptor < 0

    @property
    def keys(self) -> set[PageKey]:
        """The pages that are stored."""
        return set(self._pages)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._ended[-1].end if self._ended else self._begin

    def turns_within(self, tokens: int) -> int:
        """How many of a text's first turns have at most that many tokens together."""
        lengths = accumulate(len(turn.tokens) for turn in self.turns)
        return sum(length <= tokens for length in lengths)

    # Writing.

    def append(self, turn: Turn, pages: Iterable[StoredPage] = ()) -> None:
        """Ends a turn: it is on the disk when this returns.

        Where there is no room for its pages, the turn is stored without them. CapacityError if there is none for the
        turn either, FormatError if it cannot be stored for another reason; the file is what it was then.
        """
        try:
            try:
                self._write(turn, pages)
            except OSError as error:
                self._cut()
                self._write(turn, ())
                warnings.warn(
                    f"{self.path}: there was room for the turn, but not for its cache pages "
                    f"({error.strerror or error}): it is read again when the session is opened again",
                    stacklevel=2,
                )
        except OSError as error:
            self._cut()
            raise kind_of(error)(
                f"{self.path}: the turn cannot be stored: {error.strerror or error}; the session ends with the turn "
                "before, and needs a disk with room that can be written to"
            ) from error
        except BaseException:
            self._cut()
            raise
        self._compact()

    def rewind(self, turns: int) -> None:
        """Keeps the first `turns` turns; what came after them leaves the file."""
        del self._ended[turns:]
        self._replay()
        try:
            os.ftruncate(self._descriptor, self.size)
            os.fsync(self._descriptor)
        except OSError as error:
            raise FormatError(f"{self.path}: the session cannot be rewound: {error.strerror or error}") from error

    def copy(self, path: Path, name: str, turns: int) -> None:
        """Writes the first `turns` turns as another session. FormatError if it exists or cannot be written."""
        ended = self._ended[:turns]
        try:
            temporary, descriptor, _ = self._written(path, name, ended)
            try:
                os.close(descriptor)
                _give_name(temporary, path)
                sync_folder(path.parent)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
        except FileExistsError as error:
            raise FormatError(f"{path}: the session {name!r} exists; use another name, or forget it") from error
        except OSError as error:
            needed = sum(self.binding.page_bytes[group] for group, _ in live_pages(ended, self.binding.page_size)) / 1e6
            raise kind_of(error)(
                f"{path}: the session cannot be copied: {error.strerror or error}; it needs {needed:.1f} MB in a "
                "folder that can be written to"
            ) from error

    def remove(self) -> None:
        """Deletes the file."""
        descriptor, self._descriptor = self._descriptor, -1
        self._ended, self._pages, self.turns, self.tokens, self.messages = [], {}, [], [], []
        try:
            delete(self.path, descriptor)
            self._drop_leftovers()
            sync_folder(self.path.parent)
        except OSError as error:
            raise FormatError(f"{self.path}: the session cannot be deleted: {error.strerror or error}") from error

    def close(self) -> None:
        """Closes the file and gives its lock back. One without turns is deleted."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0 and self._checked and not self._ended:
            with suppress(OSError):
                delete(self.path, descriptor)
        elif descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    # Internals.

    def _open(self) -> int:
        """The file, locked. Whoever replaces or deletes it holds its lock, so it is looked up again after locking."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | BINARY, 0o600)
            try:
                if not lock(descriptor):
                    raise CapacityError(
                        f"{self.path}: the session {self.name!r} is in use, here or by another process; close it "
                        "there, or use another name"
                    )
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _read(self) -> None:
        header = read_start(self.path, self._descriptor)
        if header is None:  # new, or killed while it was made
            check_tail(self.path, self._descriptor, 0, os.fstat(self._descriptor).st_size)
            os.ftruncate(self._descriptor, 0)
            write_all(self._descriptor, start_record(self.name, self.binding), 0)
            os.fsync(self._descriptor)
            sync_folder(self.path.parent)
            header = read_start(self.path, self._descriptor)
            assert header is not None
        self._begin, found = header
        self._check_binding(found)
        end = self._begin
        for ended in read_turns(self.path, self._descriptor, self._begin, found["page_bytes"]):
            self._ended.append(ended)
            end = ended.end
        self._replay()
        self._checked = True
        if os.fstat(self._descriptor).st_size > end:  # a turn that was never ended
            os.ftruncate(self._descriptor, end)

    def _check_binding(self, header: dict[str, Any]) -> None:
        wanted = self.binding
        if header["name"] != self.name:
            raise FormatError(
                f"{self.path}: the file is that of the session {header['name']!r}, not {self.name!r}: it was renamed, "
                "or the folder does not tell capital letters from small ones; use that name"
            )
        same = header["fingerprint"] == wanted.fingerprint and header["layout"] == wanted.layout
        if not same or (wanted.page_bytes and header["page_bytes"] not in (wanted.page_bytes, [])):
            raise FormatError(
                f"{self.path}: the session {self.name!r} was made by the model {header['model']!r} "
                f"({header['fingerprint'][:12]!r}); this one is {wanted.model!r}, and "
                f"{difference_of(header, wanted.fingerprint, wanted.layout) or 'its pages have other sizes'}: "
                "load that one with the same settings, or use another name"
            )
        self.binding = replace(wanted, page_bytes=header["page_bytes"])

    def _replay(self) -> None:
        """What the turns in the file make together."""
        self.turns, self.tokens, self.messages = [], [], []
        for ended in self._ended:
            self._take(ended.turn)
        self._pages = live_pages(self._ended, self.binding.page_size)

    def _take(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.messages, self.tokens = after(turn, self.messages, self.tokens)

    def _write(self, turn: Turn, pages: Iterable[StoredPage]) -> None:
        at, places = write_pages(self._descriptor, pages, self.size)
        at = write_all(self._descriptor, turn_record(turn, len(self._ended)), at)
        os.fsync(self._descriptor)
        self._ended.append(Ended(turn, places, at))
        self._take(turn)
        self._pages = live_pages(self._ended[-1:], self.binding.page_size, self._pages)

    def _cut(self) -> None:
        with suppress(OSError):
            os.ftruncate(self._descriptor, self.size)

    def _compact(self) -> None:
        """Writes the file anew, without pages that were replaced, once those are most of it."""
        live = sum(self.binding.page_bytes[group] for group, _ in self._pages)
        stored = sum(self.binding.page_bytes[group] for ended in self._ended for group, _ in ended.pages)
        if stored <= 2 * live + _SLACK:
            return
        try:
            temporary, descriptor, kept = self._written(self.path, self.name, self._ended)
            try:
                lock(descriptor)
                os.replace(temporary, self.path)
            except BaseException:
                os.close(descriptor)
                os.unlink(temporary)
                raise
        except OSError:  # the file as it is has everything
            return
        sync_folder(self.path.parent)
        os.close(self._descriptor)
        self._descriptor, self._ended = descriptor, kept
        self._pages = live_pages(kept, self.binding.page_size)

    def _written(self, path: Path, name: str, turns: list[Ended]) -> tuple[str, int, list[Ended]]:
        """A new file beside `path` with these turns and the pages that the last of them has: its name, open."""
        descriptor, temporary = tempfile.mkstemp(prefix=_leftover(path), suffix=PART, dir=path.parent)
        try:
            live, kept = live_pages(turns, self.binding.page_size), []
            at = write_all(descriptor, start_record(name, self.binding), 0)
            for number, ended in enumerate(turns):
                at, places = write_pages(descriptor, self._stored(ended, live), at)
                at = write_all(descriptor, turn_record(ended.turn, number), at)
                kept.append(Ended(ended.turn, places, at))
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            os.unlink(temporary)
            raise
        return temporary, descriptor, kept

    def _stored(self, ended: Ended, live: Pages) -> Iterator[StoredPage]:
        """The pages of a turn that are live, as they are stored."""
        for key, place in ended.pages.items():
            size = self.binding.page_bytes[key[0]]
            if live.get(key) == place and len(content := read_at(self._descriptor, size, place.at)) == size:
                yield StoredPage(*key, content, place.checksum)

    def _drop_leftovers(self) -> None:
        """Deletes what a process that was killed while it wrote the file anew has left."""
        for path in self.path.parent.iterdir():
            if path.name.startswith(_leftover(self.path)) and path.suffix == PART:
                path.unlink(missing_ok=True)


def summary_of(path: Path) -> Summary:
    """What a session's file says about it, also while it is in use. FormatError if it is none."""
    with _reading(path) as (descriptor, header, ended):
        status = os.fstat(descriptor)
        tokens = ended[-1].turn.keep + len(ended[-1].turn.tokens) if ended else 0
        return Summary(header["name"], header["model"], len(ended), tokens, status.st_size, status.st_mtime)


def said_in(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The messages and the tokens of a session, also while it is in use. FormatError if its file is none."""
    messages: list[dict[str, Any]] = []
    tokens: list[int] = []
    with _reading(path) as (_, _, ended):
        for one in ended:
            messages, tokens = after(one.turn, messages, tokens)
    return messages, tokens


@contextmanager
def _reading(path: Path) -> Iterator[tuple[int, dict[str, Any], list[Ended]]]:
    """A session's file, open for reading only: its descriptor, header and turns."""
    try:
        descriptor = os.open(path, os.O_RDONLY | BINARY)
    except OSError as error:
        raise FormatError(f"{path}: the session cannot be read: {error.strerror or error}") from error
    try:
        found = read_start(path, descriptor)
        if found is None:
            raise FormatError(f"{path}: the session is empty; forget it")
        begin, header = found
        yield descriptor, header, list(read_turns(path, descriptor, begin, header["page_bytes"]))
    finally:
        os.close(descriptor)


def _give_name(temporary: str, path: Path) -> None:
    """Renames a file. FileExistsError if there is one of that name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError from None
        os.rename(temporary, path)
        return
    os.unlink(temporary)


def _leftover(path: Path) -> str:
    """How the names of unfinished files of a session begin."""
    return f".{path.name}."
