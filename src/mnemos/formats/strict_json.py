"""JSON from untrusted files: bounded in size and depth, without duplicate keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mnemos.errors import FormatError
from mnemos.formats.mapping import excerpt, require_file

MAX_BYTES = 16 << 20  # parsed JSON may take twenty times its text; real configs and headers stay far below 2 MB
MAX_DEPTH = 64


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `path` must be a regular file of at most MAX_BYTES."""
    require_file(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise FormatError(f"{path}: has {size} bytes; a JSON file may have {MAX_BYTES}")
        text = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error}") from error
    return parse_json_object(text, str(path))


def parse_json_object(text: bytes, label: str) -> dict[str, Any]:
    """The JSON object in `text`, UTF-8; `label` names its source in errors."""
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise FormatError(f"{label}: is nested too deeply; {MAX_DEPTH} levels are allowed") from error
    except (ValueError, FormatError) as error:
        raise FormatError(f"{label}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{label}: holds {excerpt(value)}; a JSON object is needed")
    _check_depth(value, label)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FormatError(f"key {excerpt(twice)} appears twice")
    return result


def _check_depth(value: Any, label: str) -> None:
    """Refuses what parses but would overflow the stack of later, recursive readers."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
    raise FormatError(f"{label}: is nested too deeply; {MAX_DEPTH} levels are allowed")
