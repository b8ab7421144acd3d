"""The items that a conversation consists of in `/v1/responses`, as messages that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from mnemos.serve.openai.shapes import new_id
from mnemos.serve.refusal import Refusal

# The beginnings of ids by the type of item.
IDS = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


def items_of(given: Any) -> list[dict[str, Any]]:
    """A request's `input` as a list of items, each with a type and an id. Refusal for anything else."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        shown = "missing" if given is None else f"{str(given)[:80]!r}"
        raise Refusal(400, f"input is {shown}; it must be a text or a list of items, and not empty", param="input")
    items = []
    for index, item in enumerate(given):
        if not isinstance(item, dict) or not isinstance(item.get("type", "message"), str):
            raise Refusal(400, f"input[{index}] is {str(item)[:80]!r}; it must be an item", param=f"input[{index}]")
        kind = item.get("type", "message")
        if kind == "item_reference":
            raise Refusal(
                400, f"input[{index}].type is 'item_reference'; send the item itself, or previous_response_id",
                param=f"input[{index}]",
            )  # fmt: skip
        items.append({"type": kind, "id": new_id(IDS.get(kind, "item_")), **item})
    return items


def messages_of(items: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages for a chat template, and the types of the items that have no place in them.

    Calls belong to the assistant's message before them, and reasoning to the one after it.
    """
    messages: list[dict[str, Any]] = []
    skipped: list[str] = []
    reasoning: list[str] = []
    for item in items:
        match item["type"]:
            case "message":
                message = {"role": item.get("role"), "content": _content(item.get("content"))}
                if message["role"] == "assistant":
                    _add_reasoning(message, reasoning)
                messages.append(message)
            case "reasoning":
                reasoning += _texts(item.get("content")) or _texts(item.get("summary"))
            case "function_call" | "custom_tool_call" | "local_shell_call":
                if not messages or messages[-1]["role"] != "assistant" or reasoning:
                    messages.append({"role": "assistant", "content": None})
                    _add_reasoning(messages[-1], reasoning)
                call = {"id": item.get("call_id"), "type": "function", "function": _function(item)}
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output" | "custom_tool_call_output" | "local_shell_call_output":
                output = _content(item.get("output"))
                messages.append({"role": "tool", "tool_call_id": item.get("call_id", item["id"]), "content": output})
            case other:
                skipped.append(other)
    return messages, skipped


def _function(item: dict[str, Any]) -> dict[str, Any]:
    """A call as that of a function, also of other kinds of tools: another model may have made it."""
    if item["type"] == "custom_tool_call":
        return {"name": item.get("name"), "arguments": json.dumps({"input": item.get("input")}, ensure_ascii=False)}
    if item["type"] == "local_shell_call":
        return {"name": "local_shell", "arguments": json.dumps(item.get("action") or {}, ensure_ascii=False)}
    return {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}


def _add_reasoning(message: dict[str, Any], reasoning: list[str]) -> None:
    if reasoning:
        message["reasoning_content"] = "\n".join(reasoning)
        reasoning.clear()


def _texts(parts: Any) -> list[str]:
    found = parts if isinstance(parts, list) else []
    return [part["text"] for part in found if isinstance(part, dict) and isinstance(part.get("text"), str)]


def _content(content: Any) -> Any:
    """Content whose refusals are text: an assistant said them."""
    if not isinstance(content, list):
        return content
    return [
        {"type": "text", "text": part.get("refusal")}
        if isinstance(part, dict) and part.get("type") == "refusal"
        else part
        for part in content
    ]
