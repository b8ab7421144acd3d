"""Grammars under which an answer can be nothing but valid tool calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mnemos.text.tools.families import HERMES, Family, Thinking
from mnemos.text.tools.schemas import closed

MOST_CALLS = 8  # in one answer: a small model may repeat itself for ever
# No white space but the usual one, so that arguments do not end in endless blanks.
_COMPACT = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
    "lenient": True,
}
Specials = Callable[[str], Sequence[int]]


def forcible(family: Family | None) -> Family:
    """The form in which calls are forced: the model's own if it is JSON, otherwise Hermes'."""
    return family if family is not None and family.as_json is not None else HERMES


def forced_calls(
    family: Family,
    tools: Sequence[Mapping[str, Any]],
    *,
    single: bool,
    specials: Specials,
    thinking: Thinking | None = None,
) -> str:
    """A Lark grammar, in llguidance's dialect, of one or several calls of these tools.

    tools: the functions, with name and parameters (a JSON schema). specials: the ids of a text that consists of special
    tokens, else none. thinking: the marks of the reasoning that the prompt has opened and that comes first.
    """
    assert family.as_json is not None
    name_key, arguments_key = family.as_json
    more = f"{{0,{MOST_CALLS - 1}}}"
    start, end = (_mark(mark, specials) for mark in (family.start, family.end))
    if family.listed:
        following = "" if single else f'(", " call){more}'
        answer = f'{start} "[" call {following} "]" {end}'
    elif family.end:
        following = "" if single else f'("\\n" marked){more}'
        answer = f"marked {following}"
    else:
        answer = "call"
    thought = "thought" if thinking is not None else ""
    rules = [f"start: {thought} {answer}", f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}"]
    if family.end and not family.listed:
        rules.append(f'marked: {start} "\\n" call "\\n" {end}')
    if thinking is not None:
        rules.append(f"thought[suffix={_quoted(thinking.end)}]: /(?s:.*)/")
    for index, tool in enumerate(tools):
        head = f'{{"{name_key}": {json.dumps(tool["name"])}, "{arguments_key}": '
        schema = {**closed(tool.get("parameters") or {"type": "object", "properties": {}}), "x-guidance": _COMPACT}
        rules.append(f'call_{index}: {_quoted(head)} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: %json {json.dumps(schema)}")
    return "\n".join(rules)


def _mark(text: str, specials: Specials) -> str:
    """A mark as special tokens, or as text where the vocabulary has none for it."""
    ids = specials(text)
    return " ".join(f"<[{token}]>" for token in ids) if ids else _quoted(text) if text else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
