"""Conversations for templates that insist on turns: user and assistant in alternation, a system message at most first.

Agents send several messages of a user in a row, a system message and a developer's, or results of several tools. What
such a template refuses, it takes with neighbours joined, and, if it knows no system message, with that in the user's
first one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mnemos.text.conversation import Message

_SYSTEM = ("system", "developer")
_JOINED = ("system", "user", "assistant")  # a template that knows tools takes several results in a row


def with_turns(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The conversation in the forms in which such a template may take it, the most faithful first."""
    joined = _joined(messages)
    yield joined
    if joined and joined[0]["role"] == "system":
        first, rest = joined[0], joined[1:]
        yield _joined([{**first, "role": "user"}, *rest])


def _joined(messages: Sequence[Message]) -> list[Message]:
    """One message instead of several of the same author; a system message after the first turn is the user's."""
    turns: list[Message] = []
    for message in messages:
        role = message["role"]
        if role in _SYSTEM:
            role = "user" if any(turn["role"] != "system" for turn in turns) else "system"
        own = {**message, "role": role}
        if turns and turns[-1]["role"] == role and role in _JOINED:
            own = {**turns[-1], **own, "content": _content(turns[-1].get("content"), own.get("content"))}
            calls = [*(turns[-1].get("tool_calls") or ()), *(message.get("tool_calls") or ())]
            if calls:
                own["tool_calls"] = calls
            turns[-1] = own
        else:
            turns.append(own)
    return turns


def _content(first: Any, second: Any) -> Any:
    """Two messages' contents as one: texts a blank line apart, or a list of all their parts."""
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [*_parts(first), *_parts(second)]


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
