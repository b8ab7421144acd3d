"""Kinds of values that only a text's parameters have, beside those of `mnemos.rules`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mnemos.rules import Rule, real, whole


def _bias(value: Any) -> dict[int, float] | None:
    if not isinstance(value, Mapping) or len(value) > 65536:
        return None
    token, amount = TOKEN.check, real(-100, 100).check
    pairs = {}
    for key, bias in value.items():
        number = token(int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key)
        strength = amount(bias)
        if number is None or strength is None:
            return None
        pairs[number] = strength
    return pairs


def _temperature(value: Any) -> float | None:
    number: float | None = real(0, 100).check(value)
    return None if number is not None and 0 < number < 1e-10 else number


def _early(value: Any) -> bool | str | None:
    return value if isinstance(value, bool) or (isinstance(value, str) and value == "never") else None


def _callable(value: Any) -> Any:
    return value if callable(value) else None


def _schema(value: Any) -> Any:
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        small = isinstance(schema, (dict, bool)) and len(json.dumps(schema, allow_nan=False)) <= 1 << 20
    except (ValueError, TypeError, RecursionError):
        return None
    return value if small else None


def function(arguments: str) -> Rule:
    """A function of these arguments."""
    return Rule(_callable, f"a callable {arguments}", "callable")


TOKEN = whole(0)
TEMPERATURE = Rule(_temperature, "0 (always the most probable token) or a number from 1e-10 to 100", "number")
EARLY_STOPPING = Rule(_early, 'True, False or "never"', "flag or name")
BIAS = Rule(_bias, "a mapping from token ids to numbers from -100 to 100", "mapping")
JSON_SCHEMA = Rule(
    _schema, "a JSON schema: a dict, True or False, or JSON text of at most 1048576 characters", "schema"
)
