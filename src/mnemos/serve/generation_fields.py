"""`GenerationConfig` described as JSON, so that a page or another client can make a form of it."""

from __future__ import annotations

from typing import Any

from mnemos.decoding.fields import FIELDS, GROUPS, Field
from mnemos.serve.generation import RESERVED


def generation_fields() -> list[dict[str, Any]]:
    """Every field that a request can hold, in the order of the documents.

    Each has `name`, `group`, `title` (the group's heading), `help`, `kind` (of its rule, see `mnemos.rules.Rule`),
    `item` (the kind of a list's items), `minimum`, `maximum`, `choices` (of a name, else empty), `default` (None where
    leaving the field out has no single value) and `metavar`.
    """
    return [_description(field) for field in FIELDS if field.name not in RESERVED]


def _description(field: Field) -> dict[str, Any]:
    rule = field.rule
    return {
        "name": field.name,
        "group": field.group,
        "title": GROUPS[field.group],
        "help": field.help,
        "kind": rule.kind,
        "item": rule.item.kind if rule.item else None,
        "minimum": rule.low,
        "maximum": rule.high,
        "choices": list(rule.names),
        "default": list(field.default) if isinstance(field.default, tuple) else field.default,
        "metavar": field.metavar,
    }
