"""Anthropic's requests, and their conversations in the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from mnemos.engine.chat import Conversation, ToolChoice
from mnemos.errors import shown
from mnemos.serve.body import Body
from mnemos.serve.refusal import Refusal

# Accepted without effect: they concern Anthropic's accounts, hosting and caching.
ACCEPTED = ("metadata", "service_tier", "container", "context_management", "mcp_servers", "cache_control", "betas",
            "inference_geo", "speed", "diagnostics", "fallbacks")  # fmt: skip
# Blocks that are there to be read, though not all by a model of text. Others (calls of Anthropic's own tools and their
# results, encrypted reasoning, ...) are skipped.
READABLE = (None, "text", "image", "document", "audio", "video", "file", "search_result", "tool_reference")
# The first system block of some agents: different in each request, and nothing that a model should read. With it, no
# prompt would have a prefix in common with the one before.
BILLING = "x-anthropic-billing-header"


class MessagesRequest(Body):
    """`POST /v1/messages`, and, without what concerns the answer, `POST /v1/messages/count_tokens`."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    model: str | None = None
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=512)
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None  # the former name of output_config.format


def schema_of(body: MessagesRequest) -> tuple[dict[str, Any] | None, str]:
    """The schema that the answer must follow, if one is asked for, and the name of the field that holds it."""
    name, wanted = "output_config.format", (body.output_config or {}).get("format")
    if wanted is None:
        name, wanted = "output_format", body.output_format
    if wanted is None:
        return None, name
    schema = wanted.get("schema") if isinstance(wanted, dict) and wanted.get("type") == "json_schema" else None
    if not isinstance(schema, dict):
        raise Refusal(
            400, f"{name} is {shown(wanted)}; it must be {{'type': 'json_schema', 'schema': a JSON schema}}", param=name
        )
    return schema, f"{name}.schema"


def conversation_of(body: MessagesRequest) -> tuple[Conversation, list[str]]:
    """The neutral conversation, and the types of tools and blocks that have no place in it."""
    messages: list[dict[str, Any]] = []
    skipped = [f"tool:{tool.get('type')}" for tool in body.tools or () if "input_schema" not in tool]
    system = _system(body.system)
    if system:
        messages.append({"role": "system", "content": system})
    for index, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{index}]", skipped)
    tools = [_tool(tool) for tool in body.tools or () if "input_schema" in tool]
    choice, parallel = _choice(body.tool_choice, [tool["function"]["name"] for tool in tools])
    thinking = body.thinking or {}
    asked = {"enabled": True, "adaptive": True, "disabled": False}.get(str(thinking.get("type")))
    budget = thinking.get("budget_tokens")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise Refusal(
            400, f"thinking.budget_tokens is {shown(budget)}; it must be a whole number of at least 1", param="thinking"
        )
    continues = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    conversation = Conversation(
        messages, tools, choice, parallel=parallel, continues=continues, thinking=asked, budget=budget
    )
    return conversation, skipped


def _system(system: str | Sequence[Mapping[str, Any]] | None) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    texts = [_text(block, f"system[{index}]") for index, block in enumerate(system)]
    return "\n\n".join(text for text in texts if not text.startswith(BILLING))


def _messages(message: Mapping[str, Any], label: str, skipped: list[str]) -> list[dict[str, Any]]:
    """A message as one or several: results of tools are messages of their own, before what the user adds."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise Refusal(400, f"{label}.role is {shown(role)}; it must be user or assistant", param="messages")
    if content is None or isinstance(content, str):
        return [{"role": role, "content": content or ""}]
    if not isinstance(content, list):
        raise Refusal(
            400, f"{label}.content is {shown(content)}; it must be text or a list of blocks", param="messages"
        )
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        where = f"{label}.content[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result":
            results.append(_result(block, where, skipped))
        elif kind == "tool_use":
            function = {
                "name": block.get("name"),
                "arguments": json.dumps(block.get("input") or {}, ensure_ascii=False),
            }
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind in READABLE:
            texts.append(_text(block, where))
        else:
            skipped.append(f"block:{kind}")
    own: dict[str, Any] = {"role": role, "content": "\n\n".join(texts)}
    if thoughts:
        own["reasoning_content"] = "\n\n".join(thoughts)
    if calls:
        own["tool_calls"] = calls
    return [*results, own] if texts or calls or thoughts or not results else results


def _text(block: Any, where: str) -> str:
    """A block's text. Refusal for one that holds something else for the model to read."""
    if isinstance(block, str):
        return block
    kind = block.get("type", "text") if isinstance(block, Mapping) else type(block).__name__
    if kind == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind == "tool_reference":  # a tool that a search has found
        return str(block.get("tool_name", ""))
    if kind == "search_result" and isinstance(block.get("content"), list):
        parts = [_text(one, f"{where}.content[{index}]") for index, one in enumerate(block["content"])]
        return "\n".join([str(block.get("title", "")), str(block.get("source", "")), *parts])
    source = block.get("source") if kind == "document" else None
    if isinstance(source, Mapping) and source.get("type") == "text" and isinstance(source.get("data"), str):
        return str(source["data"])
    raise Refusal(400, f"{where} is of type {shown(kind)}; this server's models read text only", param="messages")


def _result(block: Mapping[str, Any], where: str, skipped: list[str]) -> dict[str, Any]:
    content = block.get("content")
    if isinstance(content, list):
        texts = []
        for index, one in enumerate(content):
            kind = one.get("type") if isinstance(one, dict) else None
            if kind in READABLE:
                texts.append(_text(one, f"{where}.content[{index}]"))
            else:
                skipped.append(f"block:{kind}")
        content = "\n".join(texts)
    text = "" if content is None else str(content)
    if block.get("is_error") is True:
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    described = {"description": tool["description"]} if tool.get("description") else {}
    return {
        "type": "function",
        "function": {"name": tool.get("name"), **described, "parameters": tool.get("input_schema")},
    }


def _choice(given: Mapping[str, Any] | None, names: list[str]) -> tuple[ToolChoice, bool | None]:
    """Whether and which tool must be called, and whether several calls may be made."""
    if given is None:
        return ToolChoice("auto" if names else "none"), None
    disabled = given.get("disable_parallel_tool_use")
    parallel = not disabled if isinstance(disabled, bool) else None
    kind, name = given.get("type"), given.get("name")
    if kind == "tool" and name in names:
        return ToolChoice("required", str(name)), parallel
    if kind == "any" and names:
        return ToolChoice("required"), parallel
    if kind in ("auto", "none"):
        return ToolChoice(kind if names else "none"), parallel
    raise Refusal(
        400,
        f"tool_choice is {shown(dict(given))}; its type must be auto, any, none or tool with the name of one of the "
        f"tools ({', '.join(names) or 'there are none'})",
        param="tool_choice",
    )
