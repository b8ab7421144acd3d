"""The part of a request that decides what its prompt begins with, whatever the protocol."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from mnemos.serve.anthropic.types import BILLING
from mnemos.serve.guard import parse_json
from mnemos.serve.refusal import Refusal

# Fields that a prompt is made of, in the order in which templates write them.
PROMPT_FIELDS = ("model", "tools", "system", "instructions", "messages", "input", "prompt", "text", "state")
KEY_HEADERS = (b"authorization", b"x-api-key", b"api-key")  # each key has a prefix cache of its own

_NAME = 4096  # characters that a session's name is padded to, so that it counts as a long prefix


def prompt_of(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> str:
    """A text that two requests have in common from the beginning as far as their prompts do; empty without a prompt."""
    if not body:
        return ""
    try:
        document = parse_json(body)
    except Refusal:  # the replica says what is wrong with it
        return ""
    if not isinstance(document, dict):
        return ""
    if isinstance(session := document.get("session"), str) and session:  # what it says is not all of the prompt
        return "\n".join([_key(headers), f"session {session}".ljust(_NAME)])
    parts = [_written(document[name]) for name in PROMPT_FIELDS if document.get(name)]
    if not parts:
        return ""
    return "\n".join([_key(headers), *parts])


def _key(headers: Iterable[tuple[bytes, bytes]]) -> str:
    return next((value.decode("latin-1") for name, value in headers if name in KEY_HEADERS), "")


def _written(value: Any) -> str:
    if isinstance(value, list):
        value = [item for item in value if not (isinstance(item, dict) and str(item.get("text")).startswith(BILLING))]
    return json.dumps(value, ensure_ascii=False)
