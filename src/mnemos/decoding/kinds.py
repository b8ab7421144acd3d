"""Rules for values that only generation parameters have, in addition to those of `mnemos.rules`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mnemos.rules import Rule, filled, real, several, whole


def _number(text: str) -> int | None:
    """The whole number that a text of at most 20 digits is."""
    return int(text) if len(text) <= 20 and text.isascii() and text.isdigit() else None


def _bias(value: Any) -> dict[int, float] | None:
    if not isinstance(value, Mapping) or len(value) > 65536:
        return None
    token, amount = TOKEN.check, real(-100, 100).check
    pairs = {}
    for key, bias in value.items():
        number = token(_number(key) if isinstance(key, str) else key)
        strength = amount(bias)
        if number is None or strength is None:
            return None
        pairs[number] = strength
    return pairs


def _sequence_bias(value: Any) -> dict[tuple[int, ...], float] | None:
    """Reads a mapping, or a list of pairs, as JSON needs."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return None
    pairs: dict[tuple[int, ...], float] = {}
    for item in value.items() if isinstance(value, Mapping) else value:
        if not isinstance(item, (list, tuple)) or len(item) != 2 or len(pairs) > 65536:
            return None
        sequence, amount = SEQUENCE.check(item[0]), real(-1000, 1000).check(item[1])
        if sequence is None or amount is None:
            return None
        pairs[sequence] = amount
    return pairs


def _memory(value: Any) -> Any:
    if value is False:
        return False
    from mnemos.decoding.memory import Memory  # rarely needed

    return Memory.read(value)


def _prompt(value: Any) -> str | tuple[int, ...] | None:
    if isinstance(value, str):
        return value or None
    if hasattr(value, "tolist"):  # an array or a tensor, perhaps a batch of one
        value = value.tolist()
        value = value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) else value
    ids: tuple[int, ...] | None = several(TOKEN, 1 << 20, single=False).check(value)
    return ids or None


def _dola_layers(value: Any) -> str | tuple[int, ...] | None:
    if value in ("low", "high"):
        return str(value)
    if isinstance(value, str):  # from a command line
        value = [_number(word) for word in value.split(",")]
    layers: tuple[int, ...] | None = several(TOKEN, 4096).check(value)
    return layers or None


def _decay(value: Any) -> tuple[int, float] | None:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    start, factor = whole(0).check(value[0]), real(1e-3, 1e3).check(value[1])
    return None if start is None or factor is None else (start, factor)


def _temperature(value: Any) -> float | None:
    number: float | None = real(0, 100).check(value)
    return None if number is not None and 0 < number < 1e-10 else number


def _early(value: Any) -> bool | str | None:
    return value if isinstance(value, bool) or (isinstance(value, str) and value == "never") else None


def _callable(value: Any) -> Any:
    return value if callable(value) else None


def _schema(value: Any) -> Any:
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        small = isinstance(schema, (dict, bool)) and len(json.dumps(schema, allow_nan=False)) <= 1 << 20
    except (ValueError, TypeError, RecursionError):
        return None
    return value if small else None


def function(arguments: str) -> Rule:
    """A function with these arguments."""
    return Rule(_callable, f"a callable {arguments}", "callable")


TOKEN = whole(0)
SEQUENCE = filled(several(TOKEN, 256, single=False))
SEQUENCE_BIAS = Rule(
    _sequence_bias, "a mapping from token sequences to numbers from -1000 to 1000, or a list of such pairs", "mapping"
)
MEMORY = Rule(_memory, "a Memory, its fields, a text like 'window=512,recall=480,sinks=32', or False for none", "text")
PROMPT = Rule(_prompt, "a non-empty string or a list of token ids", "text")
DOLA_LAYERS = Rule(_dola_layers, "low, high or a list of layer numbers", "text")
DECAY = Rule(_decay, "a pair of a whole number of tokens and a factor from 0.001 to 1000", "pair")
MIROSTAT = Rule(
    lambda value: whole(0, 2).check(value) if value != 1 else None,
    "0 (off) or 2 (mirostat 2)",
    "integer",
    low=0,
    high=2,
)
TEMPERATURE = Rule(
    _temperature, "0 (always the most probable token) or a number from 1e-10 to 100", "number", low=0, high=100
)
EARLY_STOPPING = Rule(_early, 'True, False or "never"', "flag or name")
BIAS = Rule(_bias, "a mapping from token ids to numbers from -100 to 100", "mapping")
JSON_SCHEMA = Rule(
    _schema,
    "a JSON schema: a dict, a pydantic model, True or False, or JSON text of at most 1048576 characters",
    "schema",
)
