"""JSON schemas as programs mean them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Where one schema says what another adds to: the properties of one part alone do not make the object.
_COMBINING = ("allOf", "anyOf", "oneOf", "not", "if", "$ref")
_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties")
_OF_NAMES = ("properties", "$defs", "definitions")  # schemas by names
_OF_LISTS = ("anyOf", "oneOf", "prefixItems")


def closed(schema: Any) -> Any:
    """The schema in which objects have no other properties than those that it lists, unless it speaks of others.

    JSON Schema allows any others, and a small model adds them endlessly; llama.cpp and Ollama forbid them too.
    """
    if not isinstance(schema, Mapping):
        return schema
    own = {name: _closed_part(name, value) for name, value in schema.items()}
    if isinstance(own.get("properties"), Mapping) and not any(name in own for name in (*_OPEN, *_COMBINING)):
        own["additionalProperties"] = False
    return own


def _closed_part(name: str, value: Any) -> Any:
    if name in _OF_NAMES and isinstance(value, Mapping):
        return {key: closed(part) for key, part in value.items()}
    if name in _OF_LISTS and isinstance(value, list):
        return [closed(part) for part in value]
    return closed(value) if name == "items" else value
