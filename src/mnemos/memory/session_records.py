"""The records of a session's file, and how they are read and written.

    START   MAGIC, version, length of the header (little-endian uint32 each), the header as JSON, CRC-32 of all that
    PAGES   mark, number of pages, their bytes together, CRC-32; of each page its layer group, number and CRC-32;
            CRC-32 of these; then the pages, each of as many bytes as the header says for its group
    TURN    mark, length, the turn's number, CRC-32, then the turn as JSON

A turn's pages come before its record, and it counts once that is complete. Pages are checked when they are used. Files
of version 1 have, instead of PAGES or before them, a record for each page:

    PAGE    mark, layer group, page number, CRC-32, then the page
"""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mnemos.contract import Cache, ModelSpec
from mnemos.errors import FormatError
from mnemos.memory.prefix_file import layout_fields, page_bytes_of

MAGIC = b"MNEMOSSE"
VERSION = 2
PAGE, PAGES, TURN = b"PAGE", b"PAGS", b"TURN"
BINARY = getattr(os, "O_BINARY", 0)  # for Windows
_START = struct.Struct("<8sII")
_RECORD = struct.Struct("<4sIII")
_ENTRY = struct.Struct("<III")  # of a page in PAGES
_CHECKSUM = struct.Struct("<I")
_LONGEST_HEADER = 1 << 20
_MOST_PAGES = 1 << 16  # in one record
_PART = 8 << 20  # bytes of pages in one record, or a little more
_MOST = 1 << 30  # bytes that are read at once
_SEEKING = threading.Lock()  # for a place in a file, which its readers share

PageKey = tuple[int, int]  # layer group and number in the text


class Place(NamedTuple):
    """Where in a file a page is, and its checksum."""

    at: int
    checksum: int


Pages = dict[PageKey, Place]


@dataclass(frozen=True)
class Binding:
    """The model that a session's pages belong to, as the file's header has it.

    fingerprint  the model's; empty for one that has none, whose pages are not stored
    layout       of its cache
    page_bytes   of a page of each layer group
    page_size    positions in a page
    """

    model: str
    fingerprint: str
    layout: dict[str, Any]
    page_bytes: list[int]
    page_size: int

    @classmethod
    def of(cls, spec: ModelSpec, cache: Cache | None) -> Binding:
        """A model's; `cache` is None if its pages are not to be stored."""
        sizes = [] if cache is None or not spec.fingerprint else page_bytes_of(cache)
        name = str(spec.details.get("name") or spec.architecture)
        return cls(name, spec.fingerprint, layout_fields(spec), sizes, spec.layout.page_size)


@dataclass(frozen=True)
class Turn:
    """What one turn changed.

    keep      how many of the tokens so far stay; those after them are replaced
    tokens    that follow those
    messages  that were said, for a conversation
    removed   a range of earlier messages that is forgotten, as (start, stop)
    """

    keep: int
    tokens: list[int]
    messages: list[dict[str, Any]] = field(default_factory=list)
    removed: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class StoredPage:
    """A page's content, and its place in the text. checksum: that which was stored with it, None for a new page."""

    group: int
    number: int
    content: bytes
    checksum: int | None = None


@dataclass
class Ended:
    """A turn in the file: the places of its pages, and where its record ends."""

    turn: Turn
    pages: Pages
    end: int


@dataclass(frozen=True)
class Summary:
    """What can be said about a session without its model."""

    name: str
    model: str
    turns: int
    tokens: int
    bytes: int
    modified: float


def after(
    turn: Turn, messages: Sequence[dict[str, Any]], tokens: Sequence[int]
) -> tuple[list[dict[str, Any]], list[int]]:
    """The messages and tokens of a session after one turn more."""
    start, stop = turn.removed
    return [*messages[:start], *messages[stop:], *turn.messages], [*tokens[: turn.keep], *turn.tokens]


def start_record(name: str, binding: Binding) -> bytes:
    """What a file begins with."""
    header = json.dumps(
        {
            "name": name,
            "model": binding.model,
            "fingerprint": binding.fingerprint,
            "layout": binding.layout,
            "page_bytes": binding.page_bytes,
        }
    ).encode()
    content = _START.pack(MAGIC, VERSION, len(header)) + header
    return content + _CHECKSUM.pack(zlib.crc32(content))


def read_start(path: Path, descriptor: int) -> tuple[int, dict[str, Any]] | None:
    """Where the first record begins, and the header; None if the file ends before that."""
    start = read_at(descriptor, _START.size, 0)
    if start[:8] != MAGIC[: len(start)]:
        raise FormatError(f"{path}: not a session: it begins with {start[:8]!r}, expected {MAGIC!r}")
    if len(start) < _START.size:
        return None
    _, version, length = _START.unpack(start)
    if not 1 <= version <= VERSION:
        raise FormatError(f"{path}: a session of version {version}; this program reads versions 1 to {VERSION}")
    if length > _LONGEST_HEADER:
        raise FormatError(f"{path}: the header has {length} bytes; it can have {_LONGEST_HEADER}: damaged")
    end = _START.size + length
    rest = read_at(descriptor, length + _CHECKSUM.size, _START.size)
    if len(rest) < length + _CHECKSUM.size:
        return None
    if zlib.crc32(start + rest[:length]) != _CHECKSUM.unpack(rest[length:])[0]:
        raise FormatError(f"{path}: the header's checksum does not fit its content: damaged")
    try:
        header = json.loads(rest[:length])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not JSON: {error}") from error
    kinds = {"name": str, "model": str, "fingerprint": str, "layout": dict, "page_bytes": list}
    if (
        not isinstance(header, dict)
        or any(not isinstance(header.get(key), kind) for key, kind in kinds.items())
        or any(type(size) is not int or size < 1 for size in header["page_bytes"])
    ):
        raise FormatError(f"{path}: the header lacks one of {', '.join(kinds)}, or one has the wrong type")
    return end + _CHECKSUM.size, header


def read_turns(path: Path, descriptor: int, at: int, page_bytes: list[int]) -> Iterator[Ended]:
    """The turns that were ended. FormatError if something before the last of them is damaged."""
    size = os.fstat(descriptor).st_size
    pages: Pages = {}
    number = length = 0
    begin = at
    while at < size:
        head = read_at(descriptor, _RECORD.size, at)
        mark, first, second, checksum = _RECORD.unpack(head) if len(head) == _RECORD.size else (b"", 0, 0, 0)
        if mark == PAGE and first < len(page_bytes):
            pages[first, second] = Place(at + _RECORD.size, checksum)
            at += _RECORD.size + page_bytes[first]
            continue
        if mark == PAGES and first <= _MOST_PAGES and checksum == _sum(PAGES, first, second, b""):
            table = read_at(descriptor, first * _ENTRY.size + _CHECKSUM.size, at + _RECORD.size)
            at += _RECORD.size + first * _ENTRY.size + _CHECKSUM.size
            pages |= _places(table, at, page_bytes)
            at += second
            continue
        body = read_at(descriptor, first, at + _RECORD.size) if mark == TURN else b""
        turn = _turn(body, length) if second == number and _fits(mark, first, second, checksum, body) else None
        if turn is None:
            break
        at += _RECORD.size + first
        length = turn.keep + len(turn.tokens)
        yield Ended(turn, pages, at)
        pages, number, begin = {}, number + 1, at
    if at < size or pages:
        check_tail(path, descriptor, begin, size)


def _places(table: bytes, at: int, page_bytes: Sequence[int]) -> Pages:
    """The places of the pages of a table, the first of which begins at `at`; none if it is not as it was written."""
    entries, checksum = table[: -_CHECKSUM.size], table[-_CHECKSUM.size :]
    if len(table) < _CHECKSUM.size or _CHECKSUM.pack(zlib.crc32(entries)) != checksum:
        return {}
    found: Pages = {}
    for group, number, page_sum in _ENTRY.iter_unpack(entries):
        if group >= len(page_bytes):
            return {}
        found[group, number] = Place(at, page_sum)
        at += page_bytes[group]
    return found


def _fits(mark: bytes, length: int, number: int, checksum: int, body: bytes | memoryview) -> bool:
    """True for a record of a turn that is complete."""
    return mark == TURN and len(body) == length and checksum == _sum(mark, length, number, body)


def _turn(body: bytes, before: int) -> Turn | None:
    """The turn in a record, after `before` tokens; None if it is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    match content:
        case {"keep": int(keep), "tokens": list(tokens), "messages": list(messages), "removed": [int(a), int(b)]} if (
            0 <= keep <= before and all(type(token) is int for token in tokens)
        ):
            return Turn(keep, tokens, messages, (a, b))
        case _:
            return None


def check_tail(path: Path, descriptor: int, begin: int, size: int) -> None:
    """Tells a tail that was never completed, which may be dropped, from damage: after that, turns follow."""
    rest = read_at(descriptor, size - begin, begin)
    at = rest.find(TURN)
    while at >= 0:
        if len(rest) - at >= _RECORD.size:
            mark, length, number, checksum = _RECORD.unpack_from(rest, at)
            body = memoryview(rest)[at + _RECORD.size : at + _RECORD.size + length]
            if _fits(mark, length, number, checksum, body):
                raise FormatError(
                    f"{path}: the session is damaged between byte {begin} and byte {begin + at}, where its turn "
                    f"{number + 1} is stored; restore the file from a copy, or forget the session"
                )
        at = rest.find(TURN, at + 1)


def turn_record(turn: Turn, number: int) -> bytes:
    """A turn as it is stored; `number` counts from 0."""
    content = {"keep": turn.keep, "tokens": turn.tokens, "messages": turn.messages, "removed": list(turn.removed)}
    body = json.dumps(content, separators=(",", ":")).encode()
    return _RECORD.pack(TURN, len(body), number, _sum(TURN, len(body), number, body)) + body


def _sum(mark: bytes, first: int, second: int, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(_RECORD.pack(mark, first, second, 0)))


def read_page(descriptor: int, key: PageKey, place: Place, into: memoryview) -> bool:
    """Reads a page, as large as `into`; False if it is not as it was written."""
    try:
        count = _read_into(descriptor, into, place.at)
    except OSError:
        return False
    return count == len(into) and place.checksum == _sum(PAGE, *key, into)


def read_at(descriptor: int, size: int, at: int) -> bytes:
    """Up to `size` bytes; fewer at the file's end."""
    content = bytearray(size)
    return bytes(memoryview(content)[: _read_into(descriptor, memoryview(content), at)])


def _read_into(descriptor: int, into: memoryview, at: int) -> int:
    """Reads as many bytes as `into` has; returns how many there were. Several threads may at once."""
    done = 0
    while done < len(into):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [into[done : done + _MOST]], at + done)
        else:  # Windows
            with _SEEKING:
                os.lseek(descriptor, at + done, os.SEEK_SET)
                part = os.read(descriptor, min(len(into) - done, _MOST))
            count = len(part)
            into[done : done + count] = part
        if not count:
            break
        done += count
    return done


def write_all(descriptor: int, content: bytes, at: int) -> int:
    """Writes all of the content; returns where it ends."""
    os.lseek(descriptor, at, os.SEEK_SET)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    return at + len(content)


def write_pages(descriptor: int, pages: Iterable[StoredPage], at: int) -> tuple[int, Pages]:
    """Writes pages to a file from `at` on; returns where they end, and their places."""
    places: Pages = {}
    part: list[StoredPage] = []
    size = 0
    for page in pages:
        part.append(page)
        size += len(page.content)
        if size >= _PART or len(part) == _MOST_PAGES:
            at, part, size = _write_part(descriptor, part, at, places), [], 0
    return _write_part(descriptor, part, at, places) if part else at, places


def _write_part(descriptor: int, pages: Sequence[StoredPage], at: int, places: Pages) -> int:
    """Writes one record of pages, whose places it adds; returns where it ends."""
    record, checksums = _pages_record(pages)
    at = write_all(descriptor, record, at)
    for page, checksum in zip(pages, checksums, strict=True):
        places[page.group, page.number] = Place(at, checksum)
        at = write_all(descriptor, page.content, at)
    return at


def _pages_record(pages: Sequence[StoredPage]) -> tuple[bytes, list[int]]:
    """What is stored before the contents of these pages, and their checksums."""
    checksums = [
        _sum(PAGE, page.group, page.number, page.content) if page.checksum is None else page.checksum for page in pages
    ]
    entries = zip(pages, checksums, strict=True)
    table = b"".join(_ENTRY.pack(page.group, page.number, checksum) for page, checksum in entries)
    size = sum(len(page.content) for page in pages)
    head = _RECORD.pack(PAGES, len(pages), size, _sum(PAGES, len(pages), size, b""))
    return head + table + _CHECKSUM.pack(zlib.crc32(table)), checksums


def live_pages(turns: Iterable[Ended], page_size: int, before: Mapping[PageKey, Place] = MappingProxyType({})) -> Pages:
    """The places of the pages that the text has after these turns; `before`: of those that it had before them."""
    pages = dict(before)
    for ended in turns:
        pages = {key: at for key, at in pages.items() if (key[1] + 1) * page_size <= ended.turn.keep}
        pages |= ended.pages
    return pages


def delete(path: Path, descriptor: int) -> None:
    """Deletes an open file and closes it."""
    if os.name == "nt":  # where an open file cannot be deleted
        os.close(descriptor)
        os.unlink(path)
        return
    try:
        os.unlink(path)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes a new or deleted name in a folder last, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
