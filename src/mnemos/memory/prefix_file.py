"""The prefix cache as a file.

Layout: MAGIC, a version and the header's length (little-endian uint32 each), the header as JSON, the bytes of the pages
one after the other, and the SHA-256 of everything before it. The header binds the file to a model: its fingerprint, its
cache layout and the bytes per page of each layer group. Its nodes are [parent's number or -1, salt's number, token ids,
the numbers of the layer groups whose page follows], parents first.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mnemos.contract import Cache, ModelSpec
from mnemos.errors import FormatError, UnsupportedError, shown
from mnemos.formats.whole_file import not_written
from mnemos.memory.prefix import Node, PrefixTree

MAGIC = b"MNEMOSPC"
VERSION = 2
_START = struct.Struct("<8sII")
_DIGEST_BYTES = 32
_LONGEST_HEADER = 1 << 30


@dataclass(frozen=True)
class _Entry:
    parent: int
    salt: str | None
    tokens: tuple[int, ...]
    groups: tuple[int, ...]


def save_prefixes(path: str | os.PathLike[str], tree: PrefixTree, cache: Cache, spec: ModelSpec) -> int:
    """Writes the tree's pages; the file is written whole or not at all. Returns the number of nodes."""
    if not spec.fingerprint:
        raise UnsupportedError(f"the model ({spec.architecture}) has no fingerprint to bind a prefix cache to")
    nodes = list(tree.nodes())[::-1]
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            raise FormatError(f"{path}: the prefix cache cannot be written: this is no file; name one, or a new one")
        _write(target, nodes, cache, spec)
    except ValueError as error:  # a null character in the path
        raise FormatError(f"{path}: the prefix cache cannot be written: {error}; name another file") from error
    except OSError as error:
        needed = sum(count * size for count, size in zip(tree.held, page_bytes_of(cache), strict=True))
        raise not_written(path, error, needed, "the prefix cache") from error
    return len(nodes)


def _write(target: Path, nodes: list[Node], cache: Cache, spec: ModelSpec) -> None:
    header = json.dumps(_header(nodes, cache, spec)).encode()
    digest = sha256()
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, suffix=".part", delete=False) as file:
        try:
            for piece in _pieces(header, nodes, cache):
                digest.update(piece)
                file.write(piece)
            file.write(digest.digest())
            file.close()
            os.replace(file.name, target)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise


def load_prefixes(path: str | os.PathLike[str], tree: PrefixTree, cache: Cache, spec: ModelSpec) -> int:
    """Adds a file's nodes to the tree, the most recently used first, as far as pages are free. Returns how many.

    FormatError, before anything is changed, if the file is missing, truncated, damaged or for another model.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            entries, start, page_bytes = _check(path, file, tree, cache, spec)
            return _load(file, entries, start, page_bytes, tree, cache)
    except (OSError, ValueError) as error:  # the second: a null character in the path
        problem = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: the prefix cache cannot be read: {problem}") from error


def _header(nodes: list[Node], cache: Cache, spec: ModelSpec) -> dict[str, Any]:
    numbers: dict[Node | None, int] = {node: number for number, node in enumerate(nodes)}
    salts = {salt: number for number, salt in enumerate(dict.fromkeys(node.salt for node in nodes))}
    entries = [
        [numbers.get(node.parent, -1), salts[node.salt], list(node.tokens), [group for group, _ in _pages(node)]]
        for node in nodes
    ]
    return {
        "fingerprint": spec.fingerprint,
        "layout": layout_fields(spec),
        "page_bytes": page_bytes_of(cache),
        "salts": list(salts),
        "nodes": entries,
    }


def layout_fields(spec: ModelSpec) -> dict[str, Any]:
    """The layout as it is read from JSON."""
    layout: dict[str, Any] = json.loads(json.dumps(asdict(spec.layout)))
    return layout


def difference_of(header: dict[str, Any], fingerprint: str, layout: dict[str, Any]) -> str:
    """What of a model and its cache is not as in a file's header, for an error message."""
    found = []
    if header["fingerprint"] != fingerprint:
        found.append(f"the model is {fingerprint[:12]!r} (other weights, or another dtype, backend or context_length)")
    for name, value in layout.items():
        before = header["layout"].get(name)
        if before != value:
            name = {"dtype": "kv_dtype", "recall": "memory"}.get(name, name)
            here, there = _setting(value), _setting(before)
            differs = f"is {here}, there {there}" if here != there else "recalls in other heads or by other queries"
            found.append(f"{name} {differs}")
    return " and ".join(found)


def _setting(value: Any) -> str:
    """A field of a layout; of a memory what was asked for."""
    if isinstance(value, dict):
        return ",".join(f"{name}={value.get(name)}" for name in ("window", "recall", "sinks"))
    return shown(value)


def page_bytes_of(cache: Cache) -> list[int]:
    """Of each layer group."""
    return [int(cache.read(0, group).nbytes) for group in range(len(cache.layout.groups))]


def _pages(node: Node) -> list[tuple[int, int]]:
    """The layer groups for which the tree holds a page, and those pages."""
    return [(group, page) for group, page in enumerate(node.pages) if page is not None]


def _pieces(header: bytes, nodes: list[Node], cache: Cache) -> Iterator[bytes | memoryview]:
    yield _START.pack(MAGIC, VERSION, len(header))
    yield header
    for node in nodes:
        for group, page in _pages(node):
            yield np.ascontiguousarray(cache.read(page, group)).data


def _check(
    path: Path, file: BinaryIO, tree: PrefixTree, cache: Cache, spec: ModelSpec
) -> tuple[list[_Entry], int, list[int]]:
    """The file's entries, where its pages begin and their bytes by group; the checksum and every field are verified."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(_START.size)
    if len(start) < _START.size or start[:8] != MAGIC:
        raise FormatError(f"{path}: not a prefix cache: it begins with {start[:8]!r}, expected {MAGIC!r}")
    _, version, header_bytes = _START.unpack(start)
    if version != VERSION:
        raise FormatError(f"{path}: prefix cache of version {version}; this program reads version {VERSION}")
    if header_bytes > min(size - _START.size - _DIGEST_BYTES, _LONGEST_HEADER):
        raise FormatError(f"{path}: the header should have {header_bytes} bytes; the file has {size}: truncated")
    _check_digest(path, file, size)
    file.seek(_START.size)
    header = _read_header(path, file.read(header_bytes))
    if header["fingerprint"] != spec.fingerprint or header["layout"] != layout_fields(spec):
        difference = difference_of(header, spec.fingerprint, layout_fields(spec))
        raise FormatError(f"{path}: made for the model {header['fingerprint'][:12]!r}; here {difference}")
    if header["page_bytes"] != page_bytes_of(cache):
        raise FormatError(f"{path}: pages of {header['page_bytes']} bytes; this backend's have {page_bytes_of(cache)}")
    page_bytes: list[int] = header["page_bytes"]
    entries = _read_entries(path, header, tree, spec.vocabulary_size)
    pages_start = _START.size + header_bytes
    stored = [group for entry in entries for group in entry.groups]
    expected = pages_start + sum(page_bytes[group] for group in stored) + _DIGEST_BYTES
    if expected != size:
        raise FormatError(f"{path}: {len(stored)} pages need {expected} bytes; the file has {size}")
    return entries, pages_start, page_bytes


def _check_digest(path: Path, file: BinaryIO, size: int) -> None:
    file.seek(0)
    digest, left = sha256(), size - _DIGEST_BYTES
    while left > 0 and (piece := file.read(min(left, 1 << 20))):
        digest.update(piece)
        left -= len(piece)
    if left or file.read() != digest.digest():
        raise FormatError(f"{path}: the checksum does not fit the content: truncated or damaged")


def _read_header(path: Path, content: bytes) -> dict[str, Any]:
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not JSON: {error}") from error
    kinds = {"fingerprint": str, "layout": dict, "page_bytes": list, "salts": list, "nodes": list}
    if not isinstance(header, dict) or any(not isinstance(header.get(name), kind) for name, kind in kinds.items()):
        raise FormatError(f"{path}: the header lacks one of {', '.join(kinds)}, or one has the wrong type")
    if any(salt is not None and not isinstance(salt, str) for salt in header["salts"]):
        raise FormatError(f"{path}: a salt is not a text")
    return header


def _read_entries(path: Path, header: dict[str, Any], tree: PrefixTree, vocabulary: int) -> list[_Entry]:
    entries: list[_Entry] = []
    groups = range(len(tree.pools))
    unlimited = [group for group in groups if not tree.windows[group]]
    for number, node in enumerate(header["nodes"]):
        match node:
            case [int(parent), int(salt), list(tokens), list(held)] if (
                -1 <= parent < number
                and 0 <= salt < len(header["salts"])
                and len(tokens) == tree.page_size
                and all(type(token) is int and 0 <= token < vocabulary for token in tokens)
                and (parent < 0 or entries[parent].salt == header["salts"][salt])
                and held == [group for group in groups if group in held]
                and all(group in held for group in unlimited)
            ):
                entries.append(_Entry(parent, header["salts"][salt], tuple(tokens), tuple(held)))
            case _:
                raise FormatError(
                    f"{path}: node {number} is {str(node)[:80]}; expected an earlier node's number or -1, a salt's "
                    f"number, {tree.page_size} token ids below {vocabulary} and layer groups out of {list(groups)}"
                )
    return entries


def _load(
    file: BinaryIO, entries: list[_Entry], start: int, page_bytes: list[int], tree: PrefixTree, cache: Cache
) -> int:
    """Loads nodes in order; parents come first, so a tree that is cut short is still a tree."""
    nodes: list[Node | None] = []
    added = 0
    for entry in entries:
        parent = nodes[entry.parent] if entry.parent >= 0 else tree.root(entry.salt)
        node = None if parent is None else parent.children.get(entry.tokens)
        if node is None and parent is not None and all(tree.pools[group].free for group in entry.groups):
            pages: list[int | None] = [None] * len(tree.pools)
            at = start
            for group in entry.groups:
                page = pages[group] = tree.pools[group].allocate()
                file.seek(at)
                cache.write(page, np.frombuffer(file.read(page_bytes[group]), dtype=np.uint8), group)
                at += page_bytes[group]
            node = tree.attach(parent, entry.tokens, pages)
            for group, page in _pages(node):
                tree.pools[group].release((page,))
            added += 1
        start += sum(page_bytes[group] for group in entry.groups)
        nodes.append(node)
    tree.touch([node for node in nodes if node is not None])
    return added
