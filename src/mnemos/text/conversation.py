"""Conversations as programs send them, in the form that chat templates are written for.

Clients leave `content` out or set it to null, send it in parts, use several names for reasoning, and pass a tool call's
arguments as JSON text, while template authors test with plain text and with arguments as objects. This module converts
the one into the other; whatever a template accepts as it is stays unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from typing import Any, Protocol

from mnemos.errors import RequestError

Message = Mapping[str, Any]


class TemplateRefusal(RequestError):
    """A chat template itself refuses a conversation: the order of its roles, for example."""


REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
ROLES = ("system", "user", "assistant", "tool")
_OLD_ROLES = {"function": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text")
# Unicode's noncharacters are never text, so what a template writes with them can be found again.
END_MARK = "\ufdd0\ufdd1"
PLAIN_MARK = "\ufdd2"


def check_messages(messages: Any) -> list[Message]:
    """Messages as a list of mappings with a role; objects of a client's library (pydantic's, dataclasses) become such.

    RequestError for anything else.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages is of type {type(messages).__name__}; it must be a list of {{'role', 'content'}}")
    plain = [_plain(message) for message in messages]
    for index, message in enumerate(plain):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] is {str(message)[:80]!r}; it must be a mapping with a 'role'")
    return plain


def _plain(value: Any) -> Any:
    """An object that holds a client's data as a mapping, without what is null; anything else as it is."""
    if hasattr(value, "model_dump"):
        return value.model_dump(exclude_none=True)
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


class Habits(Protocol):
    """What a chat template accepts, found by trying it when a conversation depends on it."""

    source: str  # Jinja text

    def takes_parts(self) -> bool:
        """Whether it writes the text of `{"type": "text", "text": ...}` parts."""

    def takes_objects(self) -> bool:
        """Whether a tool call's arguments may be an object; else they are JSON text."""


def prepare_messages(messages: Sequence[Message], template: Habits) -> list[dict[str, Any]]:
    """Messages in the form that a chat template expects; what is not a message stays as it is.

    Content that is null or absent becomes the empty text; parts are joined to one text, a line each, unless the
    template takes parts. Reasoning, also in parts of type "thinking", is given under each name that the template asks
    for. A tool call's arguments are an object or JSON text, whichever the template accepts; a function_call is one tool
    call. "developer" is "system" and "function" is "tool", unless the template knows them.
    RequestError for parts that are not text and for malformed calls.
    """
    return [_prepare(message, index, template) for index, message in enumerate(messages)]


def _prepare(message: Message, index: int, template: Habits) -> dict[str, Any]:
    own = dict(message)
    if isinstance(own.get("role"), str):
        own["role"] = _role(own["role"], template.source)
    content, thoughts = _without_thoughts(own.get("content"))
    if "role" in own or "content" in own:
        own["content"] = _content(content, f"messages[{index}].content", template)
    if thoughts and not any(own.get(name) for name in REASONING_NAMES):
        own["thinking"] = thoughts
    _spread_reasoning(own, template.source)
    old = own.pop("function_call", None)
    if "tool_calls" in own or old:
        calls = own.pop("tool_calls", None) or ([{"type": "function", "function": old}] if old else None)
        if calls:
            own["tool_calls"] = _tool_calls(calls, f"messages[{index}].tool_calls", template)
    return own


def mark_end(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with END_MARK after the last one's content, where the continuation starts."""
    if not messages:
        raise RequestError("messages is empty; continue_final_message needs a message to continue")
    content = messages[-1].get("content", "")
    marked = content + END_MARK if isinstance(content, str) else [*content, {"type": "text", "text": END_MARK}]
    return [*messages[:-1], {**messages[-1], "content": marked}]


def cut_at_end(text: str, label: str) -> str:
    """What a template wrote up to END_MARK. RequestError if it left the last message's content out."""
    before, mark, _ = text.rpartition(END_MARK)
    if not mark:
        raise RequestError(
            f"{label}: the chat template does not show the last message's content, so there is nothing to continue"
        )
    return before.replace(END_MARK, "")


def mark_control_texts(messages: list[dict[str, Any]], names: Iterable[str]) -> list[dict[str, Any]]:
    """The messages with a PLAIN_MARK inside each control token's name that a user or a tool wrote.

    The names are then text to the tokenizer. Assistants' and system messages are the program's own and stay.
    """
    known = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    if not known:
        return messages
    pattern = re.compile("|".join(map(re.escape, known)))
    return [
        {**message, "content": _marked(message["content"], pattern)}
        if message.get("role") in ("user", "tool") and message.get("content")
        else message
        for message in messages
    ]


def refuse_lost_messages(messages: list[dict[str, Any]], text: str, label: str) -> None:
    """RequestError for a message with an unusual role that the template silently left out."""
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role in ROLES or not isinstance(content, str) or not content.strip():
            continue
        if content.strip() not in text:
            raise RequestError(
                f"{label}: messages[{index}].role is {role[:80]!r}, which the chat template leaves out; "
                f"expected one of {', '.join(ROLES)}"
            )


def _role(role: str, source: str) -> str:
    if role == "developer" and role not in source:
        return "system"
    if role in _OLD_ROLES and not re.search(rf"""(==|[,(]|in\s*[\[(])\s*['"]{role}['"]""", source):
        return _OLD_ROLES[role]
    return role


def _content(content: Any, label: str, template: Habits) -> Any:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise RequestError(f"{label} is of type {type(content).__name__}; it must be text, null or a list of parts")
    texts = [_part(part, f"{label}[{index}]") for index, part in enumerate(content)]
    if template.takes_parts():
        return [{"type": "text", "text": text} for text in texts]
    return "\n".join(texts)


def _without_thoughts(content: Any) -> tuple[Any, str]:
    """(content without its parts of type "thinking", their text)."""
    if not isinstance(content, (list, tuple)):
        return content, ""
    thoughts = [part for part in content if isinstance(part, Mapping) and part.get("type") == "thinking"]
    texts = [text for part in thoughts if isinstance(text := part.get("thinking"), str)]
    return [part for part in content if part not in thoughts], "\n".join(texts)


def _part(part: Any, label: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise RequestError(f"{label} is of type {str(kind)[:80]!r}; this model reads parts of type 'text' only")
    return text


def _spread_reasoning(message: dict[str, Any], source: str) -> None:
    known = {name: value for name in REASONING_NAMES if (value := message.pop(name, None))}
    if known:
        message |= dict.fromkeys((name for name in REASONING_NAMES if name in source), next(iter(known.values())))
        message |= known


def _tool_calls(calls: Any, label: str, template: Habits) -> list[Any]:
    if isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence):
        raise RequestError(f"{label} is of type {type(calls).__name__}; it must be a list of calls")
    prepared = []
    for index, call in enumerate(map(_plain, calls)):
        if not isinstance(call, Mapping):
            raise RequestError(f"{label}[{index}] is {str(call)[:80]!r}; it must be a mapping with a 'function'")
        function = call.get("function")
        if isinstance(function, Mapping):
            call = {**call, "function": _with_arguments(function, template)}
        elif "arguments" in call:
            call = _with_arguments(call, template)
        prepared.append(call)
    return prepared


def _with_arguments(function: Mapping[str, Any], template: Habits) -> dict[str, Any]:
    """A function call with its arguments in the form the template accepts; text that is not a JSON object is kept."""
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(arguments)
            if isinstance(value, dict) and template.takes_objects():
                arguments = value
    elif isinstance(arguments, Mapping) and not template.takes_objects():
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**function, "arguments": arguments}


def _marked(content: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(content, str):
        return pattern.sub(lambda found: found[0][0] + PLAIN_MARK + found[0][1:], content)
    return [{**part, "text": _marked(part["text"], pattern)} for part in content]
